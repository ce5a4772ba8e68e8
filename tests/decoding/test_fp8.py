"""FP8 sources give the int8 of the weights they stand for, wherever their scales are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import int8convert
from cuda_kernels import reference
from int8convert.decoding.values import fp8_values
from int8convert.errors import AlreadyQuantizedError, CorruptFileError
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.low_bit_checkpoints import assert_same, decode, is_verified, save_tensors
from tests.tools.tiny_models import edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", CODES)
def test_all_256_codes_are_what_torch_reads(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(CODES[dtype]).float()
    np.testing.assert_array_equal(fp8_values(dtype), codes.numpy())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes_dtype", CODES.values())
@pytest.mark.parametrize("kind", ["float", "bfloat16", "exponents", "rows", "one", "groups of 32"])
def test_every_scale_equals_transformers(
    kind: str, codes_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    codes = (torch.randn(256, 384) * 30).to(codes_dtype)
    scale = {
        "float": torch.rand(2, 3) * 1e-3,
        "bfloat16": (torch.rand(2, 3) * 1e-3).bfloat16(),
        "exponents": torch.randint(100, 130, (2, 3), dtype=torch.uint8),
        "rows": torch.rand(256, 1),
        "one": torch.rand(1, 1),
        "groups of 32": torch.randint(100, 130, (256, 12), dtype=torch.uint8),
    }[kind]
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, dtype)
    save_tensors(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale})
    for begin, end in ((0, 256), (100, 140)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])
    if scale.dtype is torch.uint8:
        save_tensors(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale.view(torch.float8_e8m0fnu)})
        assert_same(decode(tmp_path, "a.weight"), expected)


def test_ragged_blocks_equal_compressed_tensors(tmp_path: Path) -> None:
    codes, scale = (torch.randn(576, 200) * 30).to(torch.float8_e4m3fn), torch.rand(5, 2)
    expected = FP8BlockDequantizer()._create_dequantized_weight(codes, scale)
    save_tensors(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale})
    for begin, end in ((0, 576), (500, 576)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


@pytest.mark.parametrize("structure", [[64, 32], [128, 128]])
def test_blocks_of_compressed_tensors_have_the_size_its_config_names(structure: list[int], tmp_path: Path) -> None:
    grid = [-(-200 // structure[0]), -(-320 // structure[1])]
    codes, scale = (torch.randn(200, 320) * 30).to(torch.float8_e4m3fn), torch.rand(grid)
    block = {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": structure}}}}
    save_tensors(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, block)
    full = scale.repeat_interleave(structure[0], 0)[:200].repeat_interleave(structure[1], 1)[:, :320]
    assert_same(decode(tmp_path, "a.weight", 100, 200), (codes.float() * full)[100:])


@pytest.mark.parametrize("grid", [(4, 2, 3), (4, 256, 1), (4,), (4, 1, 1)])
def test_fused_experts_have_a_scale_each(grid: tuple[int, ...], tmp_path: Path) -> None:
    codes, scale = (torch.randn(4, 256, 384) * 30).to(torch.float8_e4m3fn), torch.rand(grid)
    save_tensors(tmp_path, {"a.gate_up_proj": codes, "a.gate_up_proj_scale_inv": scale})
    full = scale if len(grid) == 3 else scale[:, None, None]
    expected = Fp8Dequantize(None)._dequantize_one(codes, full, torch.float32)
    assert_same(decode(tmp_path, "a.gate_up_proj", 1, 3), expected[1:3])


@pytest.mark.parametrize("block", [(32, 32), (48, 32), (1, 32)])
@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_fused_experts_become_int8(block: tuple[int, int], output_format: str, tmp_path: Path) -> None:
    """Halves of a block may belong to gate and to up."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    stem = "model.layers.0.mlp.experts"
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(stem):
            tensors[name] = tensor
            continue
        rows, columns = (-(-n // size) for n, size in zip(tensor.shape[1:], block, strict=True))
        scale = torch.rand(4, rows, columns) * 1e-3
        full = scale.repeat_interleave(block[0], 1)[:, : tensor.shape[1]].repeat_interleave(block[1], 2)
        codes = (tensor.float() / full[..., : tensor.shape[2]] * 0.01).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
        expected[name] = codes.float() * full[..., : tensor.shape[2]]
    source = tmp_path / "source"
    model.config.save_pretrained(source)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors")
    edit_config(
        source,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        quantization_config={"quant_method": "fp8", "weight_block_size": list(block)},
    )
    options = int8convert.PlanOptions(format=output_format, min_coverage=0)
    int8convert.quantize(source, tmp_path / "out", options, on_event=lambda event: None)
    written = read_tensors(tmp_path / "out")
    for expert in range(4) if output_format == "compressed-tensors" else ():
        gate, up = expected[f"{stem}.gate_up_proj"][expert].chunk(2)
        matrices = {"gate_proj": gate, "up_proj": up, "down_proj": expected[f"{stem}.down_proj"][expert]}
        for name, matrix in matrices.items():
            codes = reference.row_quantize(matrix.contiguous().numpy()).codes
            np.testing.assert_array_equal(written[f"{stem}.{expert}.{name}.weight"].numpy(), codes)
    for name, weight in expected.items() if output_format == "bitsandbytes" else ():
        assert torch.equal(written[name], weight.bfloat16())
    assert is_verified(tmp_path / "out", source)
