"""Linear layers whose weight the model's own code reads stay 16-bit, so that what is converted runs, and runs right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import int8convert
from int8convert import Int8ConvertConfig
from int8convert.planning.plan_checkpoint import PlanOptions
from int8convert.runtime.linear_subclasses import computes_as_linear
from tests.scenarios.strangers.makers import change, convert
from tests.tools.family_models import build_family, families

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]

TOKENS = {"input_ids": torch.arange(3, 15)[None]}
PATCHES = {
    "pixel_values": torch.linspace(-1, 1, 16 * 48).reshape(1, 16, 48),
    "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    "spatial_shapes": torch.tensor([[4, 4]]),
}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}


def family(name: str) -> Callable[[], Any]:
    return lambda: build_family(next(family for family in families() if family.name == name))


def siglip2() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4))


def swinv2() -> Any:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "window_size": 4, "depths": [1], "num_heads": [2]}
    return transformers.Swinv2Model(transformers.Swinv2Config(**sizes))


CASES = {
    "hy_v4, its indexer": (family("causal/hy_v4"), TOKENS, "indexer.weights_proj"),
    "dots3_note, its indexer": (family("causal/dots3_note_text"), TOKENS, "indexer.weights_proj"),
    "siglip2, its patches": (siglip2, PATCHES, "embeddings.patch_embedding"),
    "swinv2, by its first parameter": (swinv2, IMAGE, "continuous_position_bias_mlp.0"),
    "siglip2, in torch's own attention": (siglip2, PATCHES, "head.attention.out_proj"),
    "mamba, its values": (family("causal/mamba"), TOKENS, "mixer.dt_proj"),
}


def save(make: Callable[[], Any], directory: Path) -> Path:
    torch.manual_seed(0)
    make().to(torch.bfloat16).save_pretrained(directory)
    return directory


def first_output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        output: torch.Tensor = model(**inputs)[0]
    return output.float().flatten()


def dtypes(out: Path) -> dict[str, str]:
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, no mapping
    return found


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("case", CASES)
def test_module_stays_16_bit_and_the_model_runs(case: str, output_format: str, tmp_path: Path) -> None:
    make, inputs, module = CASES[case]
    source = save(make, tmp_path / "source")
    out = convert(source, tmp_path / "out", format=output_format, min_coverage=0)
    stored = dtypes(out)
    # HY-V4 keeps its own in 32 bits, whatever the rest is in.
    assert {d for name, d in stored.items() if name.endswith(f"{module}.weight")} <= {"BF16", "F32"}
    assert any(name.endswith(f"{module}.weight") for name in stored)
    assert "I8" in stored.values()
    expected = first_output(type(make()).from_pretrained(source), inputs)
    got = first_output(int8convert.load(out), inputs)
    assert torch.nn.functional.cosine_similarity(got, expected, 0) > 0.99


def test_reason_is_said(tmp_path: Path) -> None:
    source = save(siglip2, tmp_path / "source")
    tensors = int8convert.plan(source).model_map.tensors
    reason = next(t.reason for name, t in tensors.items() if name.endswith("patch_embedding.weight"))
    assert reason == "the model's own code casts to its weight's dtype"


def test_what_is_quantized_in_memory_or_while_it_loads_runs_too(tmp_path: Path) -> None:
    source = save(siglip2, tmp_path / "source")
    model = transformers.Siglip2VisionModel.from_pretrained(source)
    expected = first_output(model, PATCHES)
    loaded = transformers.Siglip2VisionModel.from_pretrained(source, quantization_config=Int8ConvertConfig())
    for changed in (int8convert.quantize_(model), loaded):
        assert torch.nn.functional.cosine_similarity(first_output(changed, PATCHES), expected, 0) > 0.99


def test_subclass_that_computes_something_else_stays_16_bit(tmp_path: Path) -> None:
    source = save(family("causal/deepseek_v4"), tmp_path / "source")
    out = convert(source, tmp_path / "out", format="compressed-tensors")
    expected = first_output(transformers.DeepseekV4ForCausalLM.from_pretrained(source), TOKENS)
    assert torch.nn.functional.cosine_similarity(first_output(int8convert.load(out), TOKENS), expected, 0) > 0.99
    tensors = int8convert.plan(source, PlanOptions(format="compressed-tensors")).model_map.tensors
    reason = "DeepseekV4GroupedLinear: computes something else than a Linear"
    assert any(mapped.reason == reason for mapped in tensors.values())


def test_subclass_that_computes_the_same_in_other_words_is_a_linear() -> None:
    falcon = transformers.models.falcon.modeling_falcon.FalconLinear
    assert computes_as_linear(falcon(8, 4)) and computes_as_linear(falcon(8, 4, bias=False))


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_rwkv_divides_the_scale_in_place_of_the_codes(output_format: str, tmp_path: Path) -> None:
    source = save(family("causal/rwkv"), tmp_path / "source")
    change(source / "config.json", rescale_every=1)  # a layer further on is divided by a larger power of two
    out = convert(source, tmp_path / "out", format=output_format)
    expected = first_output(transformers.RwkvForCausalLM.from_pretrained(source), TOKENS)
    model = int8convert.load(out)
    layer = model.rwkv.blocks[1].attention.output
    layer.float()  # gives the layer another scale
    before = layer.weight_absmax.clone()
    assert torch.nn.functional.cosine_similarity(first_output(model, TOKENS), expected, 0) > 0.99
    assert torch.equal(layer.weight_absmax, before / 2)
    layer.set_outliers(torch.tensor([1]), torch.ones(layer.out_features, 1))
    assert not hasattr(layer.weight, "SCB")
