"""4-bit floats are what the libraries that write them decode, bit by bit, in every layout and for any range of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import int8convert
from cuda_kernels import cpu, reference
from int8convert.errors import AlreadyQuantizedError, CorruptFileError
from int8convert.inspection import inspect
from tests.tools.low_bit_checkpoints import Tensors, assert_same, decode, is_verified, save_coded, save_tensors
from tests.tools.tiny_models import read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

FORMS = {16: "nvfp4-pack-quantized", 32: "mxfp4-pack-quantized"}
PRESETS = {16: "NVFP4A16", 32: "MXFP4A16"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def compress(weight: torch.Tensor, group: int) -> tuple[Tensors, torch.Tensor]:
    """Return what compressed-tensors writes for a weight, and what it decodes of that."""
    scheme = preset_name_to_scheme(PRESETS[group], ["Linear"])
    compressor: Any = BaseCompressor.get_value_from_registry(FORMS[group])
    blocks = weight.reshape(len(weight), -1, group)
    state: Tensors = {"weight": weight}
    if group == 16:
        state["weight_global_scale"] = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    factor = state.get("weight_global_scale")
    state["weight_scale"], _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, factor)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def codes_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def floats_of(packed: torch.Tensor) -> torch.Tensor:
    return E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


@given(
    bits=st.integers(2, 8),
    block=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 80)),
    first_row=st.integers(0, 7),
)
def test_kernel_equals_reference(bits: int, block: tuple[int, int], size: tuple[int, int], first_row: int) -> None:
    rng = np.random.default_rng(bits)
    (n_rows, n_columns), grid = size, (-(-(first_row + size[0]) // block[0]), -(-size[1] // block[1]))
    codes = rng.integers(0, 256, (n_rows, -(-n_columns * bits // 8)), np.uint8)
    values, scale = rng.standard_normal(1 << bits, np.float32), rng.random(grid, np.float32)
    zeros = rng.integers(0, 9, grid).astype(np.float32)
    weight = np.empty(size, np.float32)
    cpu.dequantize_packed(codes, bits, values, zeros, scale, first_row, block, weight)
    expected = reference.dequantize_packed(codes, bits, values, zeros, scale, first_row, block, n_columns)
    np.testing.assert_array_equal(weight, expected)
    groups = rng.integers(0, grid[1], n_columns).astype(np.int32)
    rows = rng.random((first_row + n_rows, grid[1]), np.float32)
    cpu.dequantize_reordered(codes, bits, values, rows, rows, first_row, groups, weight)
    expected = reference.dequantize_reordered(codes, bits, values, rows, rows, first_row, groups)
    np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("size", [1e-4, 0.02, 3.0])
def test_compressed_tensors_equals_its_compressor(group: int, size: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(24, 160) * size).bfloat16()
    weight[3], weight[5, :64] = 0, weight[5, :64] * 50
    stored, expected = compress(weight, group)
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in stored.items()})
    for begin, end in ((0, 24), (3, 6), (23, 24)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


def test_modelopt_multiplies_by_its_float(tmp_path: Path) -> None:
    """A product is rounded otherwise than the quotient by the reciprocal."""
    torch.manual_seed(0)
    packed, scale = codes_of((6, 40)), (torch.rand(6, 5) * 400).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.0123)
    save_tensors(tmp_path, {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": factor})
    expected = floats_of(packed) * (scale.float() * factor).repeat_interleave(16, 1)
    assert_same(decode(tmp_path, "a.weight"), expected)


def test_modelopt_experts_have_a_float_each(tmp_path: Path) -> None:
    packed, scale = codes_of((3, 6, 16)), (torch.rand(3, 6, 2) * 400).to(torch.float8_e4m3fn)
    factor = torch.tensor([0.5, 0.01, 3.0])
    save_tensors(tmp_path, {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": factor})
    expected = floats_of(packed) * (scale.float() * factor[:, None, None]).repeat_interleave(16, 2)
    assert_same(decode(tmp_path, "a.weight"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("leaf", ["weight_scale", "scale"])
def test_powers_of_two_beside_plain_names_equal_transformers(dtype: torch.dtype, leaf: str, tmp_path: Path) -> None:
    """ModelOpt, Quark and DeepSeek V4; the last one has an oracle."""
    packed, scale = codes_of((64, 48)).view(dtype), torch.randint(100, 130, (64, 3), dtype=torch.uint8)
    save_tensors(tmp_path, {"a.weight": packed, f"a.{leaf}": scale.view(torch.float8_e8m0fnu)})
    expected = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), scale, torch.bfloat16)
    for begin, end in ((0, 64), (5, 9)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


def test_one_scale_row_of_quark_covers_several_of_codes(tmp_path: Path) -> None:
    packed, scale = codes_of((12, 32)), torch.randint(100, 130, (3, 2), dtype=torch.uint8)
    save_tensors(tmp_path, {"a.weight": packed, "a.weight_scale": scale})
    factors = torch.exp2(scale.float() - 127).repeat_interleave(4, 0).repeat_interleave(32, 1)
    assert_same(decode(tmp_path, "a.weight", 3, 9), (floats_of(packed) * factors)[3:9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpt_oss_equals_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    blocks, scales = codes_of((3, 6, 2, 16)), torch.randint(0, 250, (3, 6, 2), dtype=torch.uint8)
    scales[0, 0] = torch.tensor([0, 1])  # bf16 has subnormals there
    save_tensors(tmp_path, {"a.down_proj_blocks": blocks, "a.down_proj_scales": scales})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert_same(decode(tmp_path, "a.down_proj"), expected)
    assert_same(decode(tmp_path, "a.down_proj", 1, 2), expected[1:2])


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss whose square matrices do not tell [in, out] from [out, in], in MXFP4."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        num_hidden_layers=1,
        num_local_experts=3,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tensors = read_tensors(directory)
    for name, n_out in (("gate_up_proj", 128), ("down_proj", 64)):
        stem = f"model.layers.0.mlp.experts.{name}"
        del tensors[stem]
        tensors[f"{stem}_blocks"] = codes_of((3, n_out, 2, 16))
        tensors[f"{stem}_scales"] = torch.randint(117, 123, (3, n_out, 2), dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stated = json.loads((directory / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stated["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (directory / "config.json").write_text(json.dumps(stated))
    return directory


def experts_of(directory: Path) -> Tensors:
    """Return the experts as transformers loads them: [experts, in, out]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}


def test_gpt_oss_experts_become_int8(gpt_oss: Path, tmp_path: Path) -> None:
    options = int8convert.PlanOptions(format="compressed-tensors")
    int8convert.quantize(gpt_oss, tmp_path / "out", options, on_event=lambda event: None)
    written, stem = read_tensors(tmp_path / "out"), "model.layers.0.mlp.experts"
    loaded = experts_of(gpt_oss)
    for expert in range(3):
        matrices = loaded[f"{stem}.gate_up_proj"][expert].T
        for name, matrix in (
            ("gate_proj", matrices[0::2]),
            ("up_proj", matrices[1::2]),
            ("down_proj", loaded[f"{stem}.down_proj"][expert].T),
        ):
            expected = reference.row_quantize(matrix.float().contiguous().numpy())
            np.testing.assert_array_equal(written[f"{stem}.{expert}.{name}.weight"].numpy(), expected.codes)
    assert is_verified(tmp_path / "out", gpt_oss)


def test_gpt_oss_experts_stay_16_bit_where_the_format_has_none(gpt_oss: Path, tmp_path: Path) -> None:
    int8convert.quantize(
        gpt_oss, tmp_path / "out", int8convert.PlanOptions(min_coverage=0), on_event=lambda event: None
    )
    written = read_tensors(tmp_path / "out")
    for name, expected in experts_of(gpt_oss).items():
        assert torch.equal(written[name], expected)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_int8_is_that_of_the_decoded_weights(group: int, output_format: str, tmp_path: Path) -> None:
    plain = save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)
    block = {"quant_method": "compressed-tensors", "format": FORMS[group]}
    save_coded(plain, tmp_path / "source", lambda weight: compress(weight, group)[0], block)
    int8convert.quantize(
        tmp_path / "source",
        tmp_path / "out",
        int8convert.PlanOptions(format=output_format, skip=["layers.1.mlp.up_proj"]),
        on_event=lambda event: None,
    )
    written = read_tensors(tmp_path / "out")
    for name, weight in read_tensors(plain).items():
        if "_proj.weight" not in name:
            assert torch.equal(written[name], weight)
        elif name == "model.layers.1.mlp.up_proj.weight":
            assert torch.equal(written[name], compress(weight, group)[1])
        else:
            expected = reference.row_quantize(decode(tmp_path / "source", name))
            np.testing.assert_array_equal(written[name].numpy(), expected.codes)
    assert not [name for name in written if "packed" in name or "global" in name]
    assert is_verified(tmp_path / "out", tmp_path / "source")


DAMAGES: dict[str, tuple[Tensors, str]] = {
    "scale of another shape": (
        {"weight_packed": codes_of((8, 32)), "weight_scale": torch.zeros(8, 3, dtype=torch.uint8)},
        r"is no scale for 'a\.weight_packed'",
    ),
    "columns that do not fill a group": (
        {"weight_packed": codes_of((8, 33)), "weight_scale": torch.zeros(8, 2, dtype=torch.uint8)},
        r"is no scale for 'a\.weight_packed'",
    ),
    "NVFP4 without its float": (
        {"weight_packed": codes_of((8, 32)), "weight_scale": torch.zeros(8, 4).to(torch.float8_e4m3fn)},
        r"has no 'a\.weight_global_scale'",
    ),
    "a float for each row": (
        {
            "weight": codes_of((8, 32)),
            "weight_scale": torch.zeros(8, 4).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.zeros(8),
        },
        r"is no scale for 'a\.weight'",
    ),
    "a swizzled scale": (
        {
            "weight": codes_of((8, 32)),
            "weight_scale": torch.zeros(32).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.zeros(1),
        },
        r"is no scale for 'a\.weight'",
    ),
    "the weight in two forms": (
        {
            "weight": torch.zeros(8, 64),
            "weight_packed": codes_of((8, 32)),
            "weight_scale": torch.zeros(8, 2, dtype=torch.uint8),
        },
        "is there twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    tensors, message = DAMAGES[damage]
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(CorruptFileError, match=message):
        decode(tmp_path, "a.weight")


def test_blocks_of_another_width_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a_blocks": codes_of((2, 4, 2, 8)), "a_scales": codes_of((2, 4, 2))})
    with pytest.raises(CorruptFileError, match="16 bytes of codes a value"):
        decode(tmp_path, "a")


def test_exponent_255_is_refused(tmp_path: Path) -> None:
    scale = torch.full((8, 2), 255, dtype=torch.uint8)
    save_tensors(tmp_path, {"a.weight_packed": codes_of((8, 32)), "a.weight_scale": scale})
    with pytest.raises(CorruptFileError, match="exponent 255"):
        decode(tmp_path, "a.weight")


def test_codes_without_a_scale_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "source", {"a.weight_packed": codes_of((8, 32))}, {"quant_method": "compressed-tensors"})
    with pytest.raises(AlreadyQuantizedError, match="compressed-tensors"):
        int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)


def test_inspect_counts_weights_and_not_their_codes(gpt_oss: Path) -> None:
    found = inspect(gpt_oss)
    experts = sum(tensor.numel() for tensor in experts_of(gpt_oss).values() if tensor.dim() == 3)
    assert found.n_parameters_by_format == {"MXFP4": experts}
    assert found.n_parameters == sum(
        parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_pretrained(gpt_oss).parameters()
    )
    assert found.n_int8_parameters == 0
