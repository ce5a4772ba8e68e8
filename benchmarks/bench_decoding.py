"""Time the decoders of low-bit sources on one thread, beside the dequantizers of the libraries that define the formats.

How it goes: a weight of 4,096 x 4,096 is written once in each format, by the library where it is installed, else with
random codes. Then, in turns, ours reads and decodes it to float32 in the blocks of a conversion, and the library
decodes all of it to bfloat16, in memory. A round's time is that of one pass, the result the median over rounds.

The rate is that of the bfloat16 weight that comes out, 2 bytes a weight, so that formats compare.

Left out on purpose: quantizing what was decoded, which `bench_kernels` times, and a comparison of values, which the
tests make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_convert import describe_machine, format_range, parse_count
from int8convert.checkpoint.rows import Scratch, as_array, read_rows
from int8convert.conversion.source_rows import decoded_bytes
from int8convert.decoding.coding import Rows
from int8convert.decoding.source_weights import find_weights
from int8convert.sources import open_source

SIZE = 4096
Tensors = dict[str, torch.Tensor]
Case = tuple[Tensors, Mapping[str, Any], Callable[[], Any] | None]
"""What is stored of a weight `a.weight`, the quantization block of config.json, and the library's own way to decode."""


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def _compressed_tensors(form: str, **arguments: Any) -> Case:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(SIZE, SIZE, dtype=torch.bfloat16)
    args = QuantizationArgs(**arguments)
    blocks = weight.reshape(SIZE, -1, args.group_size or SIZE)
    scale, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zeros}
    stored = compressor.compress(state, scheme)
    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}}
    block = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    return tensors, block, lambda: compressor.decompress(dict(stored), scheme)


def _fp8_blocks() -> Case:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(SIZE, SIZE).to(torch.float8_e4m3fn)
    scale = torch.rand(SIZE // 128, SIZE // 128)
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    dequantize = Fp8Dequantize(None)._dequantize_one
    return {"a.weight": weight, "a.weight_scale_inv": scale}, block, lambda: dequantize(weight, scale, torch.bfloat16)


def _mxfp4_of_gpt_oss() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = _codes(1, SIZE, SIZE // 32, 16), torch.randint(110, 130, (1, SIZE, SIZE // 32), dtype=torch.uint8)
    tensors = {"a.weight_blocks": blocks, "a.weight_scales": scales}
    return tensors, {"quant_method": "mxfp4"}, lambda: convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)


def _nvfp4_of_modelopt() -> Case:
    scale = (torch.rand(SIZE, SIZE // 16) * 400).to(torch.float8_e4m3fn)
    tensors = {"a.weight": _codes(SIZE, SIZE // 2), "a.weight_scale": scale, "a.weight_scale_2": torch.tensor(0.01)}
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, None


def _gptq(bits: int) -> Case:
    group = 128
    tensors = {
        "a.qweight": _words(SIZE * bits // 32, SIZE),
        "a.qzeros": _words(SIZE // group, SIZE * bits // 32),
        "a.scales": torch.rand(SIZE // group, SIZE, dtype=torch.float16),
        "a.g_idx": torch.arange(SIZE, dtype=torch.int32) // group,
    }
    return tensors, {"quant_method": "gptq", "bits": bits, "group_size": group}, None


def _awq() -> Case:
    group = 128
    tensors = {
        "a.qweight": _words(SIZE, SIZE // 8),
        "a.qzeros": _words(SIZE // group, SIZE // 8),
        "a.scales": torch.rand(SIZE // group, SIZE, dtype=torch.float16),
    }
    return tensors, {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": group}, None


def _bitsandbytes(kind: str, is_nested: bool) -> Case:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.randn(SIZE, SIZE).bfloat16(), quant_type=kind, compress_statistics=is_nested)
    beside = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return {"a.weight": packed, **beside}, block, lambda: dequantize_4bit(packed, state)


CASES: dict[str, Callable[[], Case]] = {
    "FP8, 128 x 128": _fp8_blocks,
    "MXFP4, gpt-oss": _mxfp4_of_gpt_oss,
    "NVFP4, ModelOpt": _nvfp4_of_modelopt,
    "W4A16, groups of 32": lambda: _compressed_tensors(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32
    ),
    "W4A16, zero points": lambda: _compressed_tensors(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=False
    ),
    "W3A16": lambda: _compressed_tensors("pack-quantized", num_bits=3, type="int", strategy="group", group_size=128),
    "W8, groups of 128": lambda: _compressed_tensors(
        "int-quantized", num_bits=8, type="int", strategy="group", group_size=128
    ),
    "GPTQ, 4 bits": lambda: _gptq(4),
    "GPTQ, 3 bits": lambda: _gptq(3),
    "AWQ": _awq,
    "nf4": lambda: _bitsandbytes("nf4", False),
    "nf4, nested": lambda: _bitsandbytes("nf4", True),
}


def _write(folder: Path, tensors: Tensors, block: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))


def _decoder(folder: Path) -> Callable[[], None]:
    """Return what reads and decodes the only weight of a checkpoint, block by block; of experts, those of the first."""
    (weight,) = find_weights(open_source(folder)).by_codes.values()
    stored, coding = weight.codes.stored, weight.coding
    if len(stored.shape) == 3:
        stored, coding = weight.piece(Rows(0, 1, SIZE))

    n_rows = decoded_bytes(stored) // (4 * SIZE)  # as in a conversion

    def run() -> None:
        scratch = Scratch()
        with closing(weight.codes.shard.open()) as reader:
            decoder = coding.open()
            for begin in range(0, SIZE, n_rows):
                first, last = coding.code_rows(begin, begin + n_rows)
                block = read_rows(stored, reader, first, last, scratch)
                decoder.decode(as_array(stored, block, first, last), begin)

    return run


def _time(function: Callable[[], Any]) -> float:
    began = time.thread_time()
    function()
    return time.thread_time() - began


def _measure(make: Callable[[], Case], n_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round, of ours and of the library if it is there."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tensors, block, library = make()
        _write(Path(folder), tensors, block)
        contestants = {"int8convert": _decoder(Path(folder)), **({"library": library} if library else {})}
        seconds: dict[str, list[float]] = {each: [] for each in contestants}
        for function in contestants.values():
            function()  # compiles, and fills caches
        for _ in range(n_rounds):
            for name, function in contestants.items():
                seconds[name].append(_time(function))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=parse_count, default=5)
    parser.add_argument("--only", metavar="TEXT", default="", help="only formats whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_bytes, rows = 2 * SIZE * SIZE, []
    table = Table("format", "GB/s of bfloat16 a core", "the library", "ratio")
    for name, make in CASES.items():
        if options.only in name:
            seconds = _measure(make, options.rounds)
            rates = {each: [n_bytes / s / 1e9 for s in values] for each, values in seconds.items()}
            ours, theirs = rates["int8convert"], rates.get("library", [])
            ratio = f"{statistics.median(ours) / statistics.median(theirs):.1f}x" if theirs else "-"
            table.add_row(name, format_range(ours, 2), format_range(theirs, 2) if theirs else "not installed", ratio)
            rows.append({"format": name, "gb_per_s": rates})
    console = Console()
    machine = describe_machine(Path(tempfile.gettempdir()))
    console.print(machine)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "size": SIZE, "formats": rows}, indent=1))


if __name__ == "__main__":
    main()
