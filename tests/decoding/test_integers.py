"""Integers of 2 to 8 bits are what the libraries that write them decode, bit by bit, and for any range of rows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig
from safetensors.torch import save_file

import int8convert
from cuda_kernels import reference
from int8convert.decoding.source_weights import find_weights
from int8convert.errors import AlreadyQuantizedError, CorruptFileError, OutputError
from int8convert.sources import open_source
from tests.planning.test_lora import save_adapter
from tests.tools.low_bit_checkpoints import Tensors, assert_same, decode, is_verified, save_coded, save_tensors
from tests.tools.tiny_models import edit_config, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def compress(form: str, weight: torch.Tensor, **args: Any) -> tuple[Tensors, torch.Tensor, dict[str, Any]]:
    """Return what compressed-tensors writes for a weight, what it decodes of that, and the block of its config."""
    size = args.get("group_size") or (weight.numel() if args.get("strategy") == "tensor" else weight.shape[1])
    arguments = QuantizationArgs(type="int", **args)
    blocks = weight.reshape(-1 if args.get("strategy") == "tensor" else len(weight), weight.numel() // len(weight))
    if args.get("strategy") == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        blocks = weight.reshape(len(weight), -1, size)
        low, high = blocks.amin(-1), blocks.amax(-1)
    scale, zeros = calculate_qparams(low, high, arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zeros}
    stored = compressor.compress(state, scheme)
    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}}
    block = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return stored, compressor.decompress(dict(stored), scheme)["weight"], block


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_equals_its_compressor(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """45 rows end inside a word of zero points, 90 columns inside a word of codes."""
    torch.manual_seed(0)
    weight = torch.randn(45, 96 if group else 90).to(dtype)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    stored, expected, block = compress("pack-quantized", weight, num_bits=bits, symmetric=symmetric, **strategy)
    assert ("weight_zero_point" in stored) is not symmetric
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in stored.items()}, block)
    for begin, end in ((0, 45), (7, 20), (44, 45)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


def test_modules_of_other_bits_are_told_by_their_shape(tmp_path: Path) -> None:
    """Groups of 64 at 4 bits have as many words and scales as groups of 32 at 8."""
    torch.manual_seed(0)
    saved: Tensors = {}
    groups: dict[str, Any] = {}
    wanted = {}
    for name, bits, size, columns in (("a", 4, 64, 256), ("b", 8, 32, 128), ("c", 4, 64, 64)):
        args: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": size}
        stored, wanted[name], block = compress("pack-quantized", torch.randn(8, columns), **args)
        saved |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
        groups[f"group_{name}"] = block["config_groups"]["group_0"]
    save_tensors(tmp_path, saved, {"quant_method": "compressed-tensors", "config_groups": groups})
    for name, expected in wanted.items():
        assert_same(decode(tmp_path, f"{name}.weight"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "args",
    [
        {"strategy": "tensor"},
        {"strategy": "channel", "symmetric": False},
        {"strategy": "group", "group_size": 32},
        {"strategy": "group", "group_size": 32, "symmetric": False},
    ],
    ids=str,
)
def test_one_byte_integers_equal_their_compressor(args: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(20, 96) * 0.05).to(dtype)
    weight[5] = 0
    stored, expected, block = compress("int-quantized", weight, num_bits=8, **args)
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in stored.items()}, block)
    for begin, end in ((0, 20), (4, 9)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


def pack(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Pack codes [n, m] to words [n * bits / 32, m], as GPTQModel does."""
    planes = np.unpackbits(codes.astype(np.uint8)[..., None], axis=2, bitorder="little")[..., :bits]
    stream = planes.transpose(1, 0, 2).reshape(codes.shape[1], -1)
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32).T.copy()


def gptq(bits: int, n_groups: int, reorders: bool, version: int, size: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
    """Return a GPTQ weight of random codes, and what GPTQModel's formula gives: fp16 [out, in]."""
    rng, top, (n_out, n_in) = np.random.default_rng(0), (1 << bits) - 1, size
    codes, zeros = rng.integers(0, top + 1, (n_in, n_out)), rng.integers(0, top + 1, (n_groups, n_out))
    groups = np.arange(n_in) // (n_in // n_groups)
    groups = rng.permutation(groups) if reorders else groups
    scales = torch.from_numpy((rng.random((n_groups, n_out)) * 0.1 + 1e-3).astype(np.float16))
    stored = (zeros - 1) & top if version == 1 else zeros
    tensors = {
        "qweight": torch.from_numpy(pack(codes, bits)),
        "qzeros": torch.from_numpy(pack(stored.T, bits).T.copy()),
        "scales": scales,
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    at = torch.from_numpy(groups)
    return tensors, (scales[at] * (torch.from_numpy(codes) - torch.from_numpy(zeros)[at])).T.contiguous()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("reorders", [False, True])
@pytest.mark.parametrize("n_groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_equals_its_formula(bits: int, n_groups: int, reorders: bool, version: int, tmp_path: Path) -> None:
    tensors, expected = gptq(bits, n_groups, reorders, version, (64, 128))
    form = "gptq" if version == 1 else "gptq_v2"
    block = {"quant_method": "gptq", "bits": bits, "group_size": 128 // n_groups, "checkpoint_format": form}
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()}, block)
    for begin, end in ((0, 64), (5, 43), (63, 64)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


@pytest.mark.parametrize("group_of", ["none", "zeros", "negative"])
def test_groups_of_gptq_are_contiguous_where_the_file_does_not_say(group_of: str, tmp_path: Path) -> None:
    tensors, expected = gptq(4, 4, False, 1, (32, 128))
    groups = tensors.pop("g_idx")
    if group_of != "none":
        tensors["g_idx"] = groups * 0 if group_of == "zeros" else groups - 4
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()}, block)
    assert_same(decode(tmp_path, "a.weight"), expected)


ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(size: tuple[int, int], group: int) -> Tensors:
    rng, (n_out, n_in) = np.random.default_rng(0), size

    def words(codes: np.ndarray[Any, Any]) -> torch.Tensor:
        ordered = codes.reshape(len(codes), -1, 8)[..., ORDER].astype(np.uint32)
        packed = (ordered << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
        return torch.from_numpy(packed.view(np.int32))

    scales = torch.from_numpy((rng.random((n_in // group, n_out)) * 0.1).astype(np.float16))
    zeros = rng.integers(0, 16, (n_in // group, n_out))
    return {"qweight": words(rng.integers(0, 16, (n_in, n_out))), "qzeros": words(zeros), "scales": scales}


@pytest.mark.parametrize("group", [32, 128])
def test_awq_equals_the_converter_of_compressed_tensors(group: int, tmp_path: Path) -> None:
    tensors = awq((64, 128), group)
    converter = AutoAWQConverter(group_size=group)
    codes, scale, zeros = converter._convert_gemm_module(tensors["qweight"], tensors["scales"], tensors["qzeros"])
    steps = (codes.int() - zeros.int().repeat_interleave(group, 1)).half()
    expected = steps * scale.repeat_interleave(group, 1)
    block = {"quant_method": "awq", "bits": 4, "version": "GEMM", "group_size": group}
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()}, block)
    for begin, end in ((0, 64), (8, 43), (56, 64)):
        assert_same(decode(tmp_path, "a.weight", begin, end), expected[begin:end])


def four_bit(weight: torch.Tensor, kind: str, nested: bool, size: int) -> tuple[Tensors, torch.Tensor]:
    """Return what bitsandbytes stores for a weight, and what its portable code decodes of that.

    Its CPU kernel, version 0.50.2, takes the absmax of other blocks where a row is no multiple of a block.
    """
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=size, compress_statistics=nested, quant_type=kind
    )
    absmax = state.absmax
    if nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    decoded = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, size, weight.shape, weight.dtype)
    if weight.shape[1] % size == 0 and size < 2048:
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(packed, state), decoded)
    beside = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed, **beside}, decoded


@pytest.mark.parametrize("shape", [(48, 80), (33, 50), (7, 129), (9, 128)])
@pytest.mark.parametrize("size", [32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_equal_bitsandbytes(
    kind: str, nested: bool, size: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Rows of 129 begin in the middle of a byte, and blocks run over the ends of rows."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        weight = (torch.randn(shape) * 0.1).to(dtype)
        weight[2] = 0
        tensors, expected = four_bit(weight, kind, nested, size)
        save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()})
        for begin, end in ((0, shape[0]), (2, 6), (3, 5), (5, 6)):
            # A zero has no sign in the table, and one in the kernel.
            decoded = decode(tmp_path, "a.weight", begin, end)
            assert_same(decoded + np.float32(0), expected[begin:end] + 0.0)


@pytest.mark.parametrize(("n_columns", "together"), [(128, 1), (129, 2)])
def test_blocks_of_a_stream_share_no_byte(n_columns: int, together: int, tmp_path: Path) -> None:
    tensors, _ = four_bit(torch.randn(8, n_columns), "nf4", False, 64)
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()})
    (weight,) = find_weights(open_source(tmp_path)).by_codes.values()
    starts = [weight.whole().code_rows(row, row + together) for row in range(0, 8, weight.whole().rows_together)]
    assert weight.whole().rows_together == together
    assert all(one[1] == other[0] for one, other in itertools.pairwise(starts))


def test_bytes_of_another_dtype_are_read_as_bytes(tmp_path: Path) -> None:
    tensors, expected = four_bit(torch.randn(8, 64), "nf4", True, 64)
    tensors["weight"] = tensors["weight"].reshape(-1).view(torch.bfloat16)[:, None]
    save_tensors(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()})
    assert_same(decode(tmp_path, "a.weight"), expected)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)


def encode_awq(weight: torch.Tensor) -> Tensors:
    return awq((weight.shape[0], weight.shape[1]), 32)


KINDS: dict[str, tuple[Any, Any]] = {
    "pack-quantized": (
        lambda weight: compress("pack-quantized", weight, num_bits=4, strategy="group", group_size=32)[0],
        compress("pack-quantized", torch.ones(8, 32), num_bits=4, strategy="group", group_size=32)[2],
    ),
    "int-quantized": (
        lambda weight: compress("int-quantized", weight, num_bits=8, strategy="group", group_size=32)[0],
        {"quant_method": "compressed-tensors"},
    ),
    "GPTQ": (
        lambda weight: gptq(4, 2, True, 1, (weight.shape[0], weight.shape[1]))[0],
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
    ),
    "AWQ": (encode_awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "bitsandbytes 4-bit": (
        lambda weight: four_bit(weight, "nf4", True, 64)[0],
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
}


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_that_of_the_decoded_weights(kind: str, output_format: str, plain: Path, tmp_path: Path) -> None:
    encode, block = KINDS[kind]
    source = tmp_path / "source"
    save_coded(plain, source, encode, block)
    skipped = "model.layers.1.mlp.up_proj.weight"
    options = int8convert.PlanOptions(format=output_format, skip=["layers.1.mlp.up_proj"])
    int8convert.quantize(source, tmp_path / "out", options, on_event=lambda event: None)
    written, weights = read_tensors(tmp_path / "out"), read_tensors(plain)
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            assert torch.equal(written[name], weight)
        elif name == skipped:
            assert_same(decode(source, name), written[name])
        else:
            expected = reference.row_quantize(decode(source, name))
            np.testing.assert_array_equal(written[name].numpy(), expected.codes)
    beside = (".SCB", ".weight_format", ".weight_scale", ".weight_zero_point")
    assert {name for name in written if not name.endswith(beside)} == weights.keys()
    assert is_verified(tmp_path / "out", source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_source_quantizes_what_a_16_bit_load_holds(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    """Transformers dequantizes to 16 bits, and bitsandbytes quantizes that."""
    source, out, name = tmp_path / "source", tmp_path / "out", "model.layers.0.mlp.down_proj.weight"
    save_coded(plain, source, *KINDS["bitsandbytes 4-bit"])
    rounded = str(dtype).removeprefix("torch.")
    options = int8convert.PlanOptions(round_source=rounded)
    int8convert.quantize(source, out, options, on_event=lambda event: None)
    exact = torch.from_numpy(decode(source, name))
    expected = reference.row_quantize(exact.to(dtype).float().numpy())
    np.testing.assert_array_equal(read_tensors(out)[name].numpy(), expected.codes)
    assert (reference.row_quantize(exact.numpy()).codes != expected.codes).any()
    recorded = json.loads((out / "int8convert" / "manifest.json").read_text())["conversion"]["options"]
    assert recorded["round_source"] == rounded
    assert is_verified(out, source)
    with pytest.raises(OutputError, match="--round-source"):
        int8convert.quantize(source, out, on_event=lambda event: None)


def test_codes_and_logits_are_those_of_bitsandbytes_on_the_dequantized_model(plain: Path, tmp_path: Path) -> None:
    """Transformers loads the 4-bit model and dequantizes it; bitsandbytes quantizes what that saves."""
    auto = transformers.AutoModelForCausalLM
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = auto.from_pretrained(plain, dtype=torch.float16, quantization_config=four, device_map="cpu")
    model.save_pretrained(tmp_path / "source")
    model.dequantize(torch.float16).save_pretrained(tmp_path / "dequantized")
    edit_config(tmp_path / "source", dtype="float16")
    options = int8convert.PlanOptions(round_source="float16")
    int8convert.quantize(tmp_path / "source", tmp_path / "out", options, on_event=lambda event: None)
    theirs = auto.from_pretrained(
        tmp_path / "dequantized", dtype=torch.float16, quantization_config=eight, device_map="cpu"
    )
    ours = auto.from_pretrained(tmp_path / "out", device_map="cpu")
    expected, found = theirs.state_dict(), ours.state_dict()
    assert sum(tensor.dtype == torch.int8 for tensor in found.values()) == 14
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_round_source_takes_16_bit_dtypes_alone(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="round_source must be float16 or bfloat16"):
        int8convert.quantize(plain, tmp_path / "out", int8convert.PlanOptions(round_source="float32"))


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("kind", "option"), [("pack-quantized", "lora"), ("AWQ", "lora"), ("GPTQ", "rotate")])
def test_options_work_on_decoded_rows_as_on_floats(kind: str, option: str, plain: Path, tmp_path: Path) -> None:
    save_coded(plain, tmp_path / "source", *KINDS[kind])
    decoded = {
        name: torch.from_numpy(decode(tmp_path / "source", name)) if "_proj.weight" in name else tensor
        for name, tensor in read_tensors(plain).items()
    }
    (tmp_path / "floats").mkdir()
    save_file(decoded, tmp_path / "floats" / "model.safetensors", {"format": "pt"})
    (tmp_path / "floats" / "config.json").write_bytes((plain / "config.json").read_bytes())
    options = int8convert.PlanOptions(rotate=True)
    if option == "lora":
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        options = int8convert.PlanOptions(lora=save_adapter("llama", tmp_path / "adapter", config))
    for name in ("source", "floats"):
        int8convert.quantize(tmp_path / name, tmp_path / f"{name}-out", options, on_event=lambda event: None)
    assert (tmp_path / "source-out/model.safetensors").read_bytes() == (
        tmp_path / "floats-out/model.safetensors"
    ).read_bytes()


def test_four_bits_that_transformers_saved_are_the_weights_it_runs(plain: Path, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "source")
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = model.get_parameter(name)
    expected = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert_same(decode(tmp_path / "source", name), expected)


def test_codes_with_a_row_scale_alone_keep_their_bytes(plain: Path, tmp_path: Path) -> None:
    """The library's scale is absmax / 127.5, and its codes reach -128: quantized again, they would be others."""
    encode = lambda weight: compress("int-quantized", weight, num_bits=8, strategy="channel")  # noqa: E731
    block = encode(torch.ones(8, 32))[2]
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    block["config_groups"]["group_0"]["input_activations"] = inputs
    block |= {"quantization_status": "compressed", "ignore": ["lm_head"]}
    source = tmp_path / "source"
    save_coded(plain, source, lambda weight: encode(weight)[0], block)
    with pytest.raises(AlreadyQuantizedError, match="the int8 of compressed-tensors"):
        int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    int8convert.export(source, tmp_path / "out", format="bitsandbytes", on_event=lambda event: None)
    stored, written = read_tensors(source), read_tensors(tmp_path / "out")
    codes = {name: tensor for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert min(int(tensor.min()) for tensor in codes.values()) == -128
    for name, tensor in codes.items():
        assert torch.equal(written[name], tensor)


def damaged(kind: str, **changes: torch.Tensor | None) -> tuple[Tensors, Any]:
    """Return the tensors of a weight with some replaced or left out, and the block of its config."""
    encode, block = KINDS[kind]
    tensors = {**encode(torch.ones(32, 64)), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {f"a.{name}": tensor for name, tensor in tensors.items() if tensor is not None}, block


STATE = "weight__quant_state__bitsandbytes____nf4"
I64, I32 = torch.int64, torch.int32
DAMAGES: dict[str, tuple[Tensors, Any, str]] = {
    "another shape": (*damaged("pack-quantized", weight_shape=torch.tensor([32, 65])), "says \\[32, 65\\]"),
    "words too short": (
        *damaged("pack-quantized", weight_packed=torch.zeros(32, 7, dtype=I32)),
        "4 bits in groups of 32",
    ),
    "no scale": (*damaged("pack-quantized", weight_scale=None), "has no 'a.weight_scale'"),
    "zero points of another shape": (
        *damaged("pack-quantized", weight_zero_point=torch.zeros(32, 2, dtype=I32)),
        "expected \\[4, 2\\]",
    ),
    "reordered inputs": (*damaged("pack-quantized", weight_g_idx=torch.zeros(64, dtype=I32)), "another group's scale"),
    "zero points of the wrong dtype": (
        *damaged("int-quantized", weight_zero_point=torch.zeros(32, 2)),
        "expected I8 \\[32, 2\\]",
    ),
    "GPTQ words too short": (*damaged("GPTQ", qweight=torch.zeros(7, 32, dtype=I32)), "is no scale"),
    "GPTQ groups beyond the scale": (*damaged("GPTQ", g_idx=torch.full((64,), 2, dtype=I32)), "beyond the 2"),
    "GPTQ without zero points": (*damaged("GPTQ", qzeros=None), "beside it"),
    "AWQ zero points of another shape": (*damaged("AWQ", qzeros=torch.zeros(2, 5, dtype=I32)), "is no scale"),
    "another table": (*damaged("bitsandbytes 4-bit", weight__quant_map=torch.ones(16)), "is not the table of nf4"),
    "too few blocks": (
        *damaged("bitsandbytes 4-bit", weight__absmax=torch.zeros(31, dtype=torch.uint8)),
        "for each of 32 blocks",
    ),
    "too few codes": (
        *damaged("bitsandbytes 4-bit", weight=torch.zeros(1023, 1, dtype=torch.uint8)),
        "does not describe 1,023 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    tensors, block, message = DAMAGES[damage]
    save_tensors(tmp_path, tensors, block)
    with pytest.raises(CorruptFileError, match=message):
        decode(tmp_path, "a.weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2000, "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"shape": [1, 1e9], "blocksize": 64}', "states no shape"),
        ('{"shape": [32, 64], "blocksize": 0}', "states no shape"),
        ('{"shape": [32, 64], "blocksize": 63, "quant_type": "nf4"}', "does not describe"),
        (" " * 5000, "has 5,000 elements"),
    ],
)
def test_states_of_strangers_are_refused(text: str, message: str, tmp_path: Path) -> None:
    tensors, block = damaged("bitsandbytes 4-bit")
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_tensors(tmp_path, tensors, block)
    with pytest.raises(CorruptFileError, match=message):
        decode(tmp_path, "a.weight")
