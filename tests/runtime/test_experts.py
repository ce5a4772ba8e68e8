"""Int8 experts: those of every layout the converter writes give what transformers' own give for their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import int8convert
from int8convert.runtime.experts import Int8Experts
from int8convert.runtime.linear import Int8Linear
from tests.conversion.test_experts import FAMILIES, N_EXPERTS
from tests.tools.options import quantize
from tests.tools.tiny_models import read_tensors

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS = torch.arange(3, 30).reshape(1, 27) % 32
NEMOTRON = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layers_block_type": ["moe", "attention"],
    "n_routed_experts": N_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "n_group": 1,
    "topk_group": 1,
}


def build(family: str) -> Any:
    config_class, arguments = {**FAMILIES, "nemotron_h": ("NemotronHConfig", NEMOTRON)}[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.float().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS, use_cache=False).logits
    return result


def convert(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder / "source")
    quantize(folder / "source", folder / "out", format="compressed-tensors", **options)
    return folder / "out"


def round_trip(rows: torch.Tensor) -> torch.Tensor:
    """What the codes of rows stand for."""
    absmax = rows.abs().amax(-1, keepdim=True)
    return torch.round(rows * ((1 / absmax) * 127)) * (absmax / 127)


@torch.no_grad()
def round_weights_(model: Any, int8_layers: set[str]) -> None:
    """Put into a float model what its int8 form stands for."""
    for name, module in model.named_modules():
        if name in int8_layers and isinstance(module, torch.nn.Linear):
            module.weight.copy_(round_trip(module.weight))
        for leaf in ("gate_up_proj", "up_proj", "down_proj", "w1", "v1", "w2"):
            weight = getattr(module, leaf, None)
            if not isinstance(weight, torch.nn.Parameter):
                continue
            if leaf == "w2":  # [experts * intermediate, hidden], for one expert [in, out]
                by_expert = weight.view(N_EXPERTS, -1, weight.shape[1])
                weight.copy_(round_trip(by_expert.transpose(1, 2)).transpose(1, 2).reshape(weight.shape))
            elif getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"):
                weight.copy_(round_trip(weight.transpose(1, 2)).transpose(1, 2))
            else:
                weight.copy_(round_trip(weight))


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
def test_experts_are_those_of_transformers_with_the_weights_the_codes_stand_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(family)
    out = convert(source, tmp_path)
    model = int8convert.load(out)
    assert any(isinstance(module, Int8Experts) for module in model.modules())
    round_weights_(source, {name for name, module in model.named_modules() if isinstance(module, Int8Linear)})
    with monkeypatch.context() as patch:
        # Activations as they are: what is left to differ is where the weights went.
        patch.setattr(Int8Linear, "forward", lambda self, x: functional.linear(x, self.dequantize(), self.bias))
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    before, after = read_tensors(out), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "dbrx"])
def test_logits_are_within_the_error_of_quantization(family: str, tmp_path: Path) -> None:
    source = build(family)
    model = int8convert.load(convert(source, tmp_path))
    error = (logits(model) - logits(source)).norm() / logits(source).norm()
    assert 0 < float(error) < 0.03


def test_expert_nobody_chose_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = int8convert.load(convert(build("mixtral"), tmp_path))
    experts = next(module for module in model.modules() if isinstance(module, Int8Experts))
    ran = []
    run = Int8Experts._run
    monkeypatch.setattr(Int8Experts, "_run", lambda self, e, x: ran.append((e, len(x))) or run(self, e, x))
    index = torch.tensor([[2, 0], [2, 4], [0, 2]])  # 4 is no expert: "none"
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    x = torch.randn(3, 64)
    y = experts(x, index, weights)
    assert ran == [(0, 2), (2, 3)]
    alone = torch.zeros(3, 64)
    for t, (chosen, weight) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, w in zip(chosen, weight, strict=True):
            if expert < N_EXPERTS:
                alone[t] += w * run(experts, expert, x[t][None])[0]
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)


def test_experts_that_stay_16_bit_are_loaded_as_they_are(tmp_path: Path) -> None:
    source = build("qwen3_moe")
    model = int8convert.load(convert(source, tmp_path, skip=["layers.0.mlp.experts.*"]))
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["Qwen3MoeExperts", "Int8Experts"]
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, source.model.layers[0].mlp.experts.down_proj)


def test_experts_on_the_disk_stay_int8_and_give_the_same(tmp_path: Path) -> None:
    out = convert(build("mixtral"), tmp_path)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = int8convert.load(out, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert next(model.model.layers[1].mlp.experts.parameters()).is_meta
    assert torch.equal(logits(model), logits(int8convert.load(out)))
    assert not list((tmp_path / "offload").rglob("*.dat"))
