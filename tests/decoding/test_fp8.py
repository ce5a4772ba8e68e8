"""FP8 sources give the int8 of the weights they stand for, wherever their scales are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import int8convert
from cuda_kernels import cpu, reference
from int8convert.decoding.fp8 import fp8_values
from int8convert.errors import AlreadyQuantizedError, CorruptFileError
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.tiny_models import edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", CODES)
def test_all_256_codes_are_what_torch_reads(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(CODES[dtype]).float()
    np.testing.assert_array_equal(fp8_values(dtype), codes.numpy())


@pytest.mark.parametrize("block", [(1, 70), (5, 70), (3, 16), (128, 128)])
@pytest.mark.parametrize("first_row", [0, 7])
def test_kernel_equals_reference(block: tuple[int, int], first_row: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (9, 70), np.uint8)
    scale = rng.random((-(-16 // block[0]), -(-70 // block[1])), np.float32)
    values = fp8_values("F8_E4M3")
    weight = np.empty(codes.shape, np.float32)
    cpu.dequantize_fp8(codes, values, scale, first_row, *block, weight)
    np.testing.assert_array_equal(weight, reference.dequantize_fp8(codes, values, scale, first_row, *block))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_int8_is_that_of_the_decoded_weights(kind: str, output_format: str, plain: Path, tmp_path: Path) -> None:
    weights = save_fp8(plain, tmp_path / "fp8", kind)
    report = int8convert.quantize(
        tmp_path / "fp8", tmp_path / "out", int8convert.PlanOptions(format=output_format), on_event=lambda event: None
    )
    written = read_tensors(tmp_path / "out")
    assert sum(error.n_tensors for error in report.errors) == 14
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            assert torch.equal(written[name], weight)
            continue
        expected = reference.row_quantize(weight.numpy())
        np.testing.assert_array_equal(written[name].numpy(), expected.codes)
        if output_format == "bitsandbytes":
            scale = written[name.removesuffix("weight") + "SCB"].numpy()
            np.testing.assert_array_equal(scale, expected.absmax)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == output_format
    assert not [name for name in written if "scale_inv" in name]


def test_kept_fp8_weights_are_written_as_the_bf16_they_load_as(plain: Path, tmp_path: Path) -> None:
    weights = save_fp8(plain, tmp_path / "fp8", "block")
    int8convert.quantize(
        tmp_path / "fp8",
        tmp_path / "out",
        int8convert.PlanOptions(skip=["layers.0.*"], min_coverage=0),
        on_event=lambda event: None,
    )
    written = read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(written[name], weights[name].bfloat16())


def test_interrupted_or_not_the_bytes_are_the_same(plain: Path, tmp_path: Path) -> None:
    save_fp8(plain, tmp_path / "fp8", "block")
    for workers in (1, 4):
        int8convert.quantize(tmp_path / "fp8", tmp_path / f"{workers}", workers=workers, on_event=lambda event: None)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "4")


@pytest.mark.parametrize("shape", [(3, 3), (7,), (0,), (64, 2)])
def test_scale_that_does_not_fit_is_refused(shape: tuple[int, ...], plain: Path, tmp_path: Path) -> None:
    save_fp8(plain, tmp_path / "fp8", "block")
    path = tmp_path / "fp8" / "model-00002-of-00002.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(shape)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"is no scale for .model\.layers\.0\.mlp\.down_proj\.weight."):
        int8convert.quantize(tmp_path / "fp8", tmp_path / "out", on_event=lambda event: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "mxfp4", "fp8"])
def test_quantized_sources_that_are_no_fp8_are_refused(method: str, plain: Path, tmp_path: Path) -> None:
    """Also one that only says so: its weights are 16-bit."""
    edit_config(plain, quantization_config={"quant_method": method})
    with pytest.raises(AlreadyQuantizedError, match=method):
        int8convert.quantize(plain, tmp_path / "out", on_event=lambda event: None)


def test_result_loads_and_runs_in_bitsandbytes(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    weights = save_fp8(plain, tmp_path / "fp8", "block")
    int8convert.quantize(tmp_path / "fp8", tmp_path / "out", on_event=lambda event: None)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    source = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    source.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours: Any = model(tokens).logits.float()
        theirs = source(tokens).logits
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99
