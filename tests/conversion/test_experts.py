"""Experts of every layout become int8 under the right name, with the right bytes; what routes to them does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import CoverageError, PatternError
from int8convert.planning.expert_layouts import ExpertLayout, fits, split
from tests.tools.options import quantize
from tests.tools.tiny_models import read_tensors

pytestmark = pytest.mark.usefixtures("map_in_process")

N_EXPERTS = 4
_SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_DEEPSEEK = {
    "n_routed_experts": N_EXPERTS,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_LLAMA4 = {"num_local_experts": N_EXPERTS, "intermediate_size_mlp": 96, "head_dim": 16, "interleave_moe_layer_step": 1}
_ARIA = {"moe_num_experts": N_EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}
_JAMBA = {"num_experts": N_EXPERTS, "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_state": 8}
_DBRX = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 32,
    "vocab_size": 32,
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": N_EXPERTS, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": N_EXPERTS}),
    "phimoe": ("PhimoeConfig", {**_SIZES, "num_local_experts": N_EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SIZES, "num_experts": N_EXPERTS, "moe_intermediate_size": 96, "head_dim": 16, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_SIZES, **_DEEPSEEK}),
    "jamba": ("JambaConfig", {**_SIZES, **_JAMBA}),
    "granitemoe": ("GraniteMoeConfig", {**_SIZES, "num_local_experts": N_EXPERTS}),
    "gpt_oss": ("GptOssConfig", {**_SIZES, "num_local_experts": N_EXPERTS, "head_dim": 16}),
    "llama4_text": ("Llama4TextConfig", {**_SIZES, **_LLAMA4}),
    "aria_text": ("AriaTextConfig", {**_SIZES, **_ARIA}),
    "dbrx": ("DbrxConfig", _DBRX),
}

Experts = Iterator[tuple[str, torch.Tensor]]


def stacked(path: str, module: Any) -> Experts:
    """[E, 2 * width, in]: gate above up."""
    for e in range(N_EXPERTS):
        gate, up = module.gate_up_proj[e].chunk(2)
        yield from ((f"{path}.{e}.gate_proj", gate), (f"{path}.{e}.up_proj", up))
        yield f"{path}.{e}.down_proj", module.down_proj[e]


def transposed(path: str, module: Any) -> Experts:
    """[E, in, 2 * width]: gate left of up."""
    for e in range(N_EXPERTS):
        gate, up = module.gate_up_proj[e].t().chunk(2)
        yield from ((f"{path}.{e}.gate_proj", gate), (f"{path}.{e}.up_proj", up))
        yield f"{path}.{e}.down_proj", module.down_proj[e].t()


def interleaved(path: str, module: Any) -> Experts:
    """[E, in, 2 * width]: columns of gate and up in turns, as gpt-oss's forward takes them apart."""
    for e in range(N_EXPERTS):
        columns = module.gate_up_proj[e]
        yield from ((f"{path}.{e}.gate_proj", columns[:, ::2].t()), (f"{path}.{e}.up_proj", columns[:, 1::2].t()))
        yield f"{path}.{e}.down_proj", module.down_proj[e].t()


def mixtral_names(path: str, module: Any) -> Experts:
    for name, weight in stacked(path.replace(".mlp.", ".block_sparse_moe."), module):
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = name.replace(ours, theirs)
        yield name, weight


def dbrx(path: str, module: Any) -> Experts:
    """[E * width, in] for gate and up, [E * width, out] for down, whose rows are its inputs."""
    width = module.ffn_hidden_size
    for e in range(N_EXPERTS):
        rows = slice(e * width, (e + 1) * width)
        prefix = f"{path.removesuffix('.mlp')}.{e}"
        yield from ((f"{prefix}.gate_proj", module.w1[rows]), (f"{prefix}.up_proj", module.v1[rows]))
        yield f"{prefix}.down_proj", module.w2[rows].t()


EXPECTED: dict[str, Callable[[str, Any], Experts]] = {
    "mixtral": mixtral_names,
    "phimoe": mixtral_names,
    "gpt_oss": interleaved,
    "llama4_text": transposed,
    "aria_text": transposed,
    "dbrx": dbrx,
}


def build(family: str) -> Any:
    config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.to(torch.bfloat16).eval()


def experts_of(family: str, model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if (
            type(module).__name__.endswith(("Experts", "ExpertGLU"))
            and next(module.parameters(recurse=False), None) is not None
        ):
            found.update(EXPECTED.get(family, stacked)(path, module))
    assert len(found) == 2 * N_EXPERTS * 3
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_within_half_a_step_of_its_source(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    report = int8convert.quantize(
        tmp_path / "source",
        tmp_path / "out",
        int8convert.PlanOptions(format="compressed-tensors"),
        on_event=lambda event: None,
    )
    assert report.coverage >= 0.9
    written = read_tensors(tmp_path / "out")
    experts = experts_of(family, model)
    for name, weight in experts.items():
        codes, scale = written[f"{name}.weight"], written[f"{name}.weight_scale"]
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (weight.shape[0], 1)
        torch.testing.assert_close(scale[:, 0], weight.float().abs().amax(1) / 127, rtol=1e-6, atol=0)
        assert ((codes * scale - weight.float()).abs() <= 0.5001 * scale).all(), name
    assert not [name for name in written if "router" in name and name.endswith("weight_scale")]
    assert not [name for name in written if name.endswith(("gate.weight_scale", "gate_up_proj", "down_proj"))]


def test_biases_of_fused_experts_go_along(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.save_pretrained(tmp_path / "source")
    int8convert.quantize(
        tmp_path / "source",
        tmp_path / "out",
        int8convert.PlanOptions(format="compressed-tensors"),
        on_event=lambda event: None,
    )
    written = read_tensors(tmp_path / "out")
    for i, layer in enumerate(model.model.layers):
        for e in range(N_EXPERTS):
            prefix = f"model.layers.{i}.mlp.experts.{e}"
            bias = layer.mlp.experts.gate_up_proj_bias[e]
            assert torch.equal(written[f"{prefix}.gate_proj.bias"], bias[::2])
            assert torch.equal(written[f"{prefix}.up_proj.bias"], bias[1::2])
            assert torch.equal(written[f"{prefix}.down_proj.bias"], layer.mlp.experts.down_proj_bias[e])


def test_default_format_stops_and_names_the_one_that_holds_experts(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "source")
    with pytest.raises(CoverageError) as caught:
        int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)
    assert "experts: not replaced by the bitsandbytes loader" in caught.value.message
    assert "--format compressed-tensors" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_patterns_choose_among_experts(tmp_path: Path) -> None:
    build("gpt_oss").save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"format": "compressed-tensors", "min_coverage": 0, "on_event": lambda event: None}
    quantize(tmp_path / "source", tmp_path / "out", skip=["layers.0.mlp.experts.*"], **options)
    written = read_tensors(tmp_path / "out")
    source = read_tensors(tmp_path / "source")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(written[name], source[name])
    assert written["model.layers.1.mlp.experts.0.gate_proj.weight"].dtype == torch.int8
    with pytest.raises(PatternError):
        quantize(tmp_path / "source", tmp_path / "out 2", skip=["no_such_expert"], **options)


@pytest.mark.parametrize(
    ("is_transposed", "is_interleaved", "n_projections", "leaf"),
    [*itertools.product([False, True], [False, True], [1, 2], ["weight"]), (False, True, 2, "bias")],
)
def test_split_views_are_what_indexing_gives(
    is_transposed: bool, is_interleaved: bool, n_projections: int, leaf: str
) -> None:
    n_out, n_in = 6, 5
    shape = (3, n_out) if leaf == "bias" else (3, n_in, n_out) if is_transposed else (3, n_out, n_in)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    layout = ExpertLayout("m", ("a", "b")[:n_projections], leaf, 3, is_transposed, is_interleaved)
    assert fits(layout, shape)
    stored = StoredTensor("x", "F32", shape, 100)
    for name, view in split(layout, stored):
        _, expert, projection, _ = name.split(".")
        matrix = values[int(expert)].t() if is_transposed and leaf == "weight" else values[int(expert)]
        i = layout.projections.index(projection)
        width = n_out // n_projections
        expected = matrix[i::n_projections] if is_interleaved else matrix[i * width : (i + 1) * width]
        strides = view.strides or torch.empty(view.shape).stride()
        assert torch.equal(values.as_strided(view.shape, strides, (view.offset - 100) // 4), expected)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 6, 4), (3, 6), (3, 6, 0), (7, 4), (3, 6, 4, 1)])
def test_shapes_that_do_not_fit_are_not_split(shape: tuple[int, ...]) -> None:
    assert not fits(ExpertLayout("m", ("a", "b"), "weight", 3, False, False), shape)
