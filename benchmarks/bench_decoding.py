"""Prints how fast one core decodes low-bit weights, beside the library that writes the format, in the same process.

    python -m benchmarks.bench_decoding [ROWS COLUMNS]

CPU seconds, the best of five; GB/s of the bf16 weights that the codes stand for. Ours reads codes and scales from a
file in the page cache and gives float32; the libraries have them in memory and give bf16. GPTQ and AWQ have none here.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from int8convert.checkpoint.rows import Scratch
from int8convert.conversion.source_rows import SourceRows
from int8convert.decoding.source_weights import find_weights
from int8convert.formats.format import Format
from int8convert.planning.plan import PlannedTensor
from int8convert.sources import open_source
from tests.decoding import test_fp4, test_integers
from tests.tools.low_bit_checkpoints import Tensors, save_tensors

Case = tuple[str, Tensors, Any, Callable[[], Any] | None]
"""Name, tensors, quantization block, and the library's decoder."""


def cases(weight: torch.Tensor) -> Iterator[Case]:
    size = (weight.shape[0], weight.shape[1])
    codes, scale = (weight.float() * 600).to(torch.float8_e4m3fn), torch.rand(size[0] // 128, size[1] // 128)
    fp8 = Fp8Dequantize(None)
    yield (
        *("FP8 128 x 128", {"weight": codes, "weight_scale_inv": scale}, None),
        lambda: fp8._dequantize_one(codes, scale, torch.bfloat16),
    )
    for group, name in ((32, "MXFP4"), (16, "NVFP4")):
        stored, _ = test_fp4.compress(weight, group)
        scheme = preset_name_to_scheme(test_fp4.PRESETS[group], ["Linear"])
        yield name, stored, None, _decompress(test_fp4.FORMS[group], stored, scheme)
    for bits in (4, 8, 3):
        args: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": 32}
        stored, _, block = test_integers.compress("pack-quantized", weight, **args)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **args))
        yield f"pack-quantized, {bits} bits", stored, block, _decompress("pack-quantized", stored, scheme)
    for nested in (False, True):
        stored, _ = test_integers.four_bit(weight, "nf4", nested, 64)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        yield f"nf4{', nested' if nested else ''}", stored, None, _dequantize_4bit(packed, state)
    for reorders in (False, True):
        stored, _ = test_integers.gptq(4, size[1] // 128, reorders, 1, size)
        block = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        yield f"GPTQ{', reordered' if reorders else ''}", stored, block, None
    yield "AWQ", test_integers.awq(size, 128), {"quant_method": "awq", "bits": 4, "version": "gemm"}, None


def _decompress(form: str, stored: Tensors, scheme: Any) -> Callable[[], Any]:
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    return lambda: compressor.decompress(dict(stored), scheme)


def _dequantize_4bit(packed: torch.Tensor, state: Any) -> Callable[[], Any]:
    return lambda: bitsandbytes.functional.dequantize_4bit(packed, state)


def decode_file(folder: Path) -> None:
    """Decode the one weight of a checkpoint, block by block as a conversion does."""
    (weight,) = find_weights(open_source(folder)).by_codes.values()
    stored, shard = replace(weight.codes.stored, name=weight.name), weight.codes.shard
    rows = SourceRows(PlannedTensor(stored, shard, weight.name, "I8", "", Format.BITSANDBYTES, weight.whole()))
    scratch = Scratch()
    with closing(shard.open()) as reader:
        for begin, end in rows.ranges():
            rows.values(rows.read(reader, begin, end, scratch), begin, end)


def best_of_five(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    n_rows, n_columns = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (2048, 4096)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(n_rows, n_columns) * 0.05).bfloat16()
    gigabytes = 2 * weight.numel() / 1e9
    print(f"{'':26}ours, GB/s  library, GB/s")
    for name, tensors, block, library in cases(weight):
        with tempfile.TemporaryDirectory() as folder:
            source = save_tensors(Path(folder), {f"a.{leaf}": tensor for leaf, tensor in tensors.items()}, block)
            ours = gigabytes / best_of_five(lambda source=source: decode_file(source))  # type: ignore[misc]
        theirs = f"{gigabytes / best_of_five(library):14.2f}" if library is not None else f"{'-':>14}"
        print(f"{name:26}{ours:10.2f}{theirs}")


if __name__ == "__main__":
    main()
