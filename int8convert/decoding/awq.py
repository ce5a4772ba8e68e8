"""AWQ weights of 4 bits in the `gemm` layout: a word holds a weight of eight outputs, in an order of its own.

`P.qweight` I32 [in, out / 8], `P.qzeros` I32 [in / group, out / 8], `P.scales` [in / group, out]. W = (code - zero) *
scale. The other layouts of AWQ have the same names, so the config must name this one.

Memory: rows are gathered from all of `qweight`. A stream from the Hub holds one `qweight` at a time.

Source: AutoAWQ 0.2.9, `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.floats import NUMPY_DTYPE, widen
from int8convert.decoding.coding import CodedWeight, Places, misfit, weights_by_column
from int8convert.decoding.scale import read_scale
from int8convert.decoding.values import Values
from int8convert.formats.int8_checkpoint import PlacedTensor

_IN_WORD = 8
_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
"""Bit at which the code of each of the eight outputs of a word begins."""


@dataclass(frozen=True, slots=True)
class AwqCoding:
    """Codes as words [out / 8, in].

    Attributes:
        scale: [groups, out].
        zeros: I32 [groups, out / 8].
    """

    scale: PlacedTensor
    zeros: PlacedTensor
    rows_together = _IN_WORD

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        return (self.scale, self.zeros)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return (codes[0] * _IN_WORD, codes[1])

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin // _IN_WORD, -(-end // _IN_WORD)

    def identity(self) -> list[Any]:
        return ["awq", *([tensor.shard.path.name, tensor.name] for tensor in self.beside)]

    def open(self) -> AwqDecoder:
        scale = widen(read_scale(self.scale), self.scale.stored.dtype)
        zeros = _unpack(read_scale(self.zeros).T)
        return AwqDecoder(np.ascontiguousarray(scale.T), zeros.astype(np.float32))


class AwqDecoder:
    """Turns words into weights. Holds scale and zero points of the matrix, float32 [out, groups]."""

    def __init__(self, scale: Values, zeros: Values) -> None:
        self._scale, self._zeros = scale, zeros
        self._values = np.arange(256, dtype=np.float32)

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> Values:
        unpacked = _unpack(codes)
        weight = np.empty(unpacked.shape, np.float32)
        block = (1, codes.shape[1] // self._scale.shape[1])
        cpu.dequantize_packed(unpacked, 8, self._values, self._zeros, self._scale, first_row, block, weight)
        return weight


def _unpack(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the codes [8 * n, columns] of words [n, columns]."""
    codes = np.empty((len(words), _IN_WORD, words.shape[1]), np.uint8)
    for i, shift in enumerate(_SHIFTS):
        codes[:, i] = (words.view(np.uint32) >> shift) & 15
    return codes.reshape(-1, words.shape[1])


def find(places: Places, block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the AWQ weights of a checkpoint whose config names the layout `gemm`.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    version = block.get("version", "gemm")
    is_gemm = isinstance(version, str) and version.lower() == "gemm" and block.get("bits", 4) == 4
    if block.get("quant_method") != "awq" or not is_gemm:
        return
    for module, codes, scale, zeros in weights_by_column(places):
        if not _fits(codes.stored.shape, scale.stored.shape, zeros.stored.shape):
            raise misfit(scale.stored, codes.stored, "scales [groups, out] and qzeros [groups, out / 8]")
        if scale.stored.dtype not in NUMPY_DTYPE or zeros.stored.dtype != "I32":
            raise misfit(scale.stored, codes.stored, "float scales, and qzeros as I32")
        n_in, n_words = codes.stored.shape
        by_rows = replace(codes.stored, shape=(n_words, n_in), strides=(1, n_words))
        yield CodedWeight(f"{module}.weight", replace(codes, stored=by_rows), AwqCoding(scale, zeros))


def _fits(codes: tuple[int, ...], scale: tuple[int, ...], zeros: tuple[int, ...]) -> bool:
    if len(codes) != 2 or len(scale) != 2 or min(*codes, *scale) == 0 or codes[0] % scale[0]:
        return False
    return scale[1] == codes[1] * _IN_WORD and zeros == (scale[0], codes[1])
