"""Exports read by the tools they are for, and checkpoints of those tools read by export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import int8convert
from tests.conversion.test_export import assert_same, make_int8, read_config
from tests.tools.tiny_models import build_model, read_tensors, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CASES = [("opt", torch.float16), ("llama", torch.bfloat16), ("qwen3", torch.bfloat16), ("gpt_neox", torch.float16)]
TOKENS = torch.arange(3, 43).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits.float()
    return found


def load(name: str, directory: Path) -> Any:
    """By transformers; every tensor of the checkpoint is used and none is missing."""
    model, info = type(build_model(name)).from_pretrained(directory, device_map="cpu", output_loading_info=True)
    assert not any(info.values()), info
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_within_the_error_of_bitsandbytes(found: torch.Tensor, name: str, directory: Path) -> None:
    """Against the dequantized weights in float32: a loader adds about as much as bitsandbytes' own arithmetic does."""
    int8convert.export(directory / "int8", directory / "plain", dequantize="float32")
    exact = logits(load(name, directory / "plain"))
    theirs = relative_error(logits(load(name, directory / "int8")), exact)
    assert 0 < relative_error(found, exact) < 2 * theirs < 0.03


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[name for name, _ in CASES])
def test_compressed_tensors_loads_and_computes_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("bitsandbytes")
    out = make_int8(tmp_path, name, dtype)
    int8convert.export(out, tmp_path / "new", format="compressed-tensors")
    model = load(name, tmp_path / "new")
    quantized = {n for n, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None}
    n_int8 = sum(tensor.dtype == torch.int8 for tensor in read_tensors(out).values())
    assert len(quantized) == n_int8
    assert_within_the_error_of_bitsandbytes(logits(model), name, tmp_path)


def test_compressed_tensors_decompresses_to_our_weights(tmp_path: Path) -> None:
    """Its decompressor, given the very tensors and scheme of the export; transformers would round the scale first."""
    compressors = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    from compressed_tensors.quantization import QuantizationConfig

    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "new", format="compressed-tensors")
    int8convert.export(tmp_path / "new", tmp_path / "plain", dequantize="float32")
    int8convert.export(out, tmp_path / "from_absmax", dequantize="float16")
    block = QuantizationConfig.model_validate(read_config(tmp_path / "new")["quantization_config"])
    scheme = block.config_groups["group_0"]
    tensors, plain, from_absmax = (read_tensors(tmp_path / d) for d in ("new", "plain", "from_absmax"))
    n_compared = 0
    for key, scale in tensors.items():
        if key.endswith(".weight_scale"):
            name = key.removesuffix(".weight_scale")
            state = {"weight": tensors[f"{name}.weight"], "weight_scale": scale}
            weight = compressors.IntQuantizationCompressor.decompress(state, scheme)["weight"]
            assert weight.dtype == torch.float32 and torch.equal(weight, plain[f"{name}.weight"])
            # By way of absmax the last bit of float32 may differ, and of float16 where that is a tie.
            assert torch.allclose(weight, from_absmax[f"{name}.weight"].float(), rtol=2**-11, atol=2**-25)
            n_compared += 1
    assert n_compared == 12


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_of_compressed_tensors_itself(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes made by its compressor, by a scale that is no absmax / 127, and the config it writes."""
    compressors = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    pytest.importorskip("bitsandbytes")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    source = read_tensors(save_checkpoint("llama", tmp_path / "source", torch.bfloat16))
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    tensors = {}
    for name, tensor in source.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = (tensor.float().abs().amax(1, keepdim=True) / 127.5).to(scale_dtype)
        state = compressors.IntQuantizationCompressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        tensors.update({name.replace(".weight", f".{part}"): value for part, value in state.items()})
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors")
    block = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="int-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["re:.*lm_head"],
    )
    config = read_config(tmp_path / "source")
    config["quantization_config"] = block.model_dump(mode="json")
    (theirs / "config.json").write_text(json.dumps(config))

    report = int8convert.export(theirs, tmp_path / "new", format="bitsandbytes")
    after = read_tensors(tmp_path / "new")
    assert read_config(tmp_path / "new")["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    n_changed = 0
    for name, codes in tensors.items():
        if codes.dtype == torch.int8:
            absmax, scale = after[name.replace("weight", "SCB")], tensors[f"{name}_scale"].float().flatten()
            assert torch.equal(after[name], codes)
            assert torch.allclose(absmax / 127, scale, rtol=2**-23, atol=0)
            n_changed += int((absmax / 127 != scale).sum())
    assert report.n_changed_scales == n_changed
    assert (n_changed > 0) == (scale_dtype == torch.float32)  # 127 times a 16-bit scale is exact
    exact = logits(load("llama", save_dequantized(theirs, tmp_path)))
    assert relative_error(logits(load("llama", tmp_path / "new")), exact) < 0.03


def save_dequantized(directory: Path, beside: Path) -> Path:
    int8convert.export(directory, beside / "dequantized", dequantize="float32")
    return beside / "dequantized"


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[name for name, _ in CASES])
def test_torchao_loads_and_computes_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In several shards, each of which names all tensors."""
    pytest.importorskip("torchao")
    out = make_int8(tmp_path, name, dtype)
    int8convert.export(out, tmp_path / "new", format="torchao")
    model = load(name, tmp_path / "new")
    int8convert.export(tmp_path / "new", tmp_path / "values", dequantize="float32")
    before, values = read_tensors(out), read_tensors(tmp_path / "values")
    n_compared = 0
    for module_name, module in model.named_modules():
        if type(getattr(module, "weight", None)).__name__ == "Int8Tensor":
            assert torch.equal(module.weight.qdata, before[f"{module_name}.weight"])
            assert torch.equal(module.weight.scale.flatten(), before[f"{module_name}.SCB"] / 127)
            assert module.weight.dtype == dtype
            assert torch.equal(module.weight.dequantize(torch.float32), values[f"{module_name}.weight"])
            n_compared += 1
    assert n_compared == sum(tensor.dtype == torch.int8 for tensor in before.values())
    assert_within_the_error_of_bitsandbytes(logits(model), name, tmp_path)


def test_torchao_reads_each_file_by_itself(tmp_path: Path) -> None:
    """As vLLM does: header and tensors of one file to torchao's own reader, what is left over to the next."""
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "new", format="torchao")
    found = {}
    for path in sorted((tmp_path / "new").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            complete, left_over = support.unflatten_tensor_state_dict(tensors, file.metadata())
        assert not left_over
        found.update(complete)
    before = read_tensors(out)
    assert found.keys() == {name for name in before if not name.endswith(("SCB", "weight_format"))}
    for name, tensor in found.items():
        codes = tensor.qdata if hasattr(tensor, "qdata") else tensor
        assert torch.equal(codes, before[name])


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_checkpoint_of_torchao_itself(kind: str, tmp_path: Path) -> None:
    """To bitsandbytes; and cut into shards, where its own way to treat activations stays as it was."""
    pytest.importorskip("bitsandbytes")
    quantization = pytest.importorskip("torchao.quantization")
    source = save_checkpoint("llama", tmp_path / "source", torch.bfloat16)
    config = transformers.TorchAoConfig(getattr(quantization, kind)())
    model_class = transformers.LlamaForCausalLM
    model = model_class.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    expected = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    int8convert.export(tmp_path / "theirs", tmp_path / "cut", max_shard_size="30KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert_same(read_tensors(tmp_path / "cut"), read_tensors(tmp_path / "theirs"))
    again = load("llama", tmp_path / "cut")
    assert torch.equal(logits(again), expected)
    int8convert.export(tmp_path / "theirs", tmp_path / "new", format="bitsandbytes")
    for name, module in load("llama", tmp_path / "new").named_modules():
        if type(module).__name__ == "Linear8bitLt":
            assert torch.equal(module.weight.data, model.get_submodule(name).weight.qdata)
    exact = logits(load("llama", save_dequantized(tmp_path / "theirs", tmp_path)))
    assert relative_error(logits(load("llama", tmp_path / "new")), exact) < 0.03
