"""FP8 weights: a matrix of F8_E4M3 or F8_E5M2 codes, and one float for each of its blocks.

Whatever the scale is called - `weight_scale_inv` where DeepSeek wrote it, `weight_scale` elsewhere - a weight is code
times scale. The blocks are 128 x 128, single rows, or the whole matrix, which the scale's shape tells. `fp8_scales`
finds the scales.

Source: the float8 quantization of transformers, and OCP 8-bit Floating Point Specification (OFP8), for the codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.floats import NUMPY_DTYPE, widen
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.scale import read_scale

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})
"""Values of `quant_method` in config.json whose weights may be plain FP8 codes."""


@dataclass(frozen=True, slots=True)
class Fp8Scale:
    """The scale of one FP8 matrix.

    Attributes:
        stored: [], [1], [rows], [rows, 1] or [block rows, block columns].
        shard: the file it is in, which may be another than the codes'.
        block: rows and columns that share a value.
    """

    stored: StoredTensor
    shard: SourceShard = field(repr=False)
    block: tuple[int, int]

    def read(self) -> npt.NDArray[np.float32]:
        """Return the scale of each block, float32 [block rows, block columns]."""
        values = read_scale(self)
        wide = _e8m0_values(values) if self.stored.dtype == "F8_E8M0" else widen(values, self.stored.dtype)
        n_columns = self.stored.shape[1] if len(self.stored.shape) == 2 else 1
        return np.ascontiguousarray(wide).reshape(-1, n_columns)


def _e8m0_values(exponents: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return powers of two from their biased exponents."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)


def fp8_values(dtype: str) -> npt.NDArray[np.float32]:
    """Return the 256 values of an FP8 dtype, by code."""
    n_mantissa, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    codes = np.arange(256)
    exponent, mantissa = (codes & 0x7F) >> n_mantissa, codes & ((1 << n_mantissa) - 1)
    steps = np.where(exponent > 0, (1 << n_mantissa) + mantissa, mantissa)
    values = np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - bias - n_mantissa)
    if dtype == "F8_E4M3":  # no infinity; one magnitude is NaN
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[(exponent == 31) & (mantissa == 0)] = np.inf
        values[(exponent == 31) & (mantissa > 0)] = np.nan
    signed: npt.NDArray[np.float32] = np.where(codes & 0x80, -values, values).astype(np.float32)
    return signed


class Fp8Decoder:
    """Turns codes of one tensor into float32 weights. Holds the scale in memory. Thread-safe."""

    def __init__(self, dtype: str, scale: Fp8Scale | None) -> None:
        self._values = fp8_values(dtype)
        self._scale = scale.read() if scale is not None else None
        self._block = scale.block if scale is not None else (0, 0)

    def decode(self, codes: npt.NDArray[np.uint8], first_row: int) -> npt.NDArray[np.float32]:
        """Return the float32 weights of codes, in their shape.

        Args:
            codes: of any shape without a scale; with one, [rows, columns], of which the first is row `first_row`.
        """
        if self._scale is None:
            return self._values[codes]
        weight = np.empty(codes.shape, np.float32)
        cpu.dequantize_fp8(codes, self._values, self._scale, first_row, *self._block, weight)
        return weight


def is_fp8(source: CheckpointSource) -> bool:
    """Return whether the weights of a quantized source are FP8 codes, which are decoded here."""
    block = source.config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        return False
    weights = [t for t in source.tensors if t.name.endswith((".weight", ".weight_packed", ".qweight", "_blocks"))]
    return any(t.dtype in FP8_DTYPES for t in weights) and _none_is_packed(weights)


def _none_is_packed(weights: Iterable[StoredTensor]) -> bool:
    return all(t.dtype in FP8_DTYPES or t.dtype in NUMPY_DTYPE for t in weights)
