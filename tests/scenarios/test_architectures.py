"""Models that take more than text: each matches bitsandbytes, or keeps what its loader does not replace and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("bitsandbytes")

from tests.tools.family_check import Inputs, Outcome, check_model, text_inputs

# transformers, bitsandbytes and torch have their remarks on tiny models, on tied weights and on int8.
pytestmark = pytest.mark.filterwarnings("ignore")

_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE = {**_LAYERS, "image_size": 16, "patch_size": 8}
_TEXT = {**_LAYERS, "vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 256}
_IMAGE_TOKEN = 120


def pixels(model: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)}


def pixels_and_text(model: Any) -> dict[str, torch.Tensor]:
    return {**pixels(model), "input_ids": torch.arange(3, 23).reshape(2, 10)}


def pixels_in_text(model: Any) -> dict[str, torch.Tensor]:
    """Four patches an image, whose places in the text hold the image token."""
    tokens = torch.arange(3, 23).reshape(2, 10)
    tokens[:, 2:6] = _IMAGE_TOKEN
    return {**pixels(model), "input_ids": tokens}


def sound(model: Any) -> dict[str, torch.Tensor]:
    frames = torch.linspace(-2, 2, 2 * 80 * 40).sin().reshape(2, 80, 40)
    return {"input_features": frames, "decoder_input_ids": torch.arange(3, 23).reshape(2, 10)}


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_IMAGE),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=_IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=128,
        max_source_positions=20,
        **{f"{token}_token_id": i for i, token in enumerate(("pad", "bos", "eos", "decoder_start"))},
    )
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], Inputs]] = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**_LAYERS, vocab_size=128)), text_inputs),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE)), pixels),
    "clip": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config={**_LAYERS, "vocab_size": 128}, vision_config=_IMAGE, projection_dim=64)
        ),
        pixels_and_text,
    ),
    "whisper": (whisper, sound),
    "llava": (llava, pixels_in_text),
    "qwen2_vl": (qwen2_vl, text_inputs),
}


@pytest.mark.parametrize("name", MODELS)
def test_encoders_speech_and_vision_match_bitsandbytes(name: str, tmp_path: Path, map_in_process: None) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    result = check_model(name, build().eval(), tmp_path, inputs)
    assert result.outcome is Outcome.MATCHES, result
    assert result.coverage is not None and result.coverage > 0.4


def test_multihead_attention_stays_and_is_named_as_what_it_is(tmp_path: Path, map_in_process: None) -> None:
    """torch's own attention holds query, key and value in one `in_proj_weight`, which no int8 module stands for."""
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_IMAGE)).eval()
    assert any(isinstance(module, torch.nn.MultiheadAttention) for module in model.modules())
    result = check_model("siglip", model, tmp_path, pixels)
    assert result.outcome is Outcome.MATCHES, result
    assert "MultiheadAttention: not replaced by the bitsandbytes loader" in result.kept
    assert "NonDynamicallyQuantizableLinear: not replaced by the bitsandbytes loader" in result.kept
