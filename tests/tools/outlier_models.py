"""Tiny models with outliers that were put there, at known places, without changing what they compute.

Two injections: in what norms return (`outlier_model`), and in the product of gated MLPs (`gated_model`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.outlier_injection import inject_product_outliers
from tests.tools.language_models import language_model
from tests.tools.options import quantize

SHIFTED = {7: 40.0, 50: -40.0}
"""Dimension -> what is added to it: outliers of one sign at every token."""

SCALED = {21: 30.0}
"""Dimension -> what it is multiplied by: outliers of both signs, at those tokens where it is not small."""


@torch.no_grad()
def inject(model: Any, shifted: dict[int, float], scaled: dict[int, float]) -> None:
    """Change what the Linears behind an OPT's norms read, and undo it in these.

    x = norm(h) becomes m x + s, W[:, j] becomes W[:, j] / m, and the bias is lowered by s W[:, j] / m.
    """
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        pairs = ((layer.self_attn_layer_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),)
        for norm, readers in (*pairs, (layer.final_layer_norm, (layer.fc1,))):
            for j, factor in scaled.items():
                norm.weight[j] *= factor
                norm.bias[j] *= factor
                for linear in readers:
                    linear.weight[:, j] /= factor
            for j, shift in shifted.items():
                norm.bias[j] += shift
                for linear in readers:
                    linear.bias -= shift * linear.weight[:, j]


@torch.no_grad()
def outlier_model(
    tokenizer: Any, shifted: dict[int, float] | None = None, scaled: dict[int, float] | None = None
) -> Any:
    """An OPT of two layers and 64 features in float32, whose next token depends on the ones before."""
    model = language_model("opt", tokenizer)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.12)
    model.model.decoder.final_layer_norm.weight.mul_(20)  # sharp predictions, which can be spoilt
    inject(model, SHIFTED if shifted is None else shifted, SCALED if scaled is None else scaled)
    return model.eval()


@torch.no_grad()
def gated_model(tokenizer: Any, magnitude: float = 60.0, channels: int = 3) -> Any:
    """A Llama of two layers in float32, whose `down_proj` reads outlier channels at some tokens.

    Its MLP is three blocks of 128 channels wide, so that scales by blocks differ from one scale a token.
    """
    torch.manual_seed(2)
    sizes = {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.lm_head.weight.mul_(2)  # sharp predictions, which can be spoilt
    inject_product_outliers(model, magnitude, channels)
    return model


def save(model: Any, directory: Path, tokenizer: Any, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model as a checkpoint that has its tokenizer."""
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def convert(source: Path, out: Path, **options: Any) -> Path:
    quantize(source, out, **options)
    return out
