"""bitsandbytes' 4-bit weights, nf4 and fp4: codes of a table of 16 values, and an absmax for each block of the matrix.

| tensor | |
|---|---|
| `P.weight` | codes of the flattened matrix, two in a byte, the high half first; of any dtype, as [n, 1] |
| `P.weight.absmax` | F32 [blocks]; or U8, codes of `nested_quant_map` times `nested_absmax`, plus an offset |
| `P.weight.quant_map` | F32 [16], the table |
| `P.weight.quant_state.bitsandbytes__nf4` | U8, JSON: shape, block size, offset |

Blocks run over the flattened matrix, across rows. The library takes its own table and ignores the stored one on CPUs,
so another table is refused. Reads the JSON of each weight while planning.

Source: bitsandbytes 0.50, `QuantState` and `dequantize_4bit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.source import fetch_tensors
from int8convert.decoding.coding import REFETCH, CodedWeight, Places
from int8convert.decoding.scale import read_scale
from int8convert.decoding.values import Values
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096
_MAX_BLOCK = 1 << 20

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
_TABLES = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([*_FP4, 0.0, *(-value for value in _FP4[1:])], np.float32),
}


@dataclass(frozen=True, slots=True)
class BlockwiseCoding:
    """Codes as bytes [bytes, 1].

    Attributes:
        shape: of the weight.
        block_size: elements that share an absmax.
        absmax: F32 [blocks], or U8 where it is nested.
        table: F32 [16].
        state: the JSON that all but the tensors was read from.
        nested: its table F32 [256] and its absmax F32; None if absmax is stored as floats.
        nested_block_size, nested_offset: how the nested absmax is decoded.
    """

    kind: str
    shape: tuple[int, int]
    block_size: int
    absmax: PlacedTensor
    table: PlacedTensor
    state: PlacedTensor
    nested: tuple[PlacedTensor, PlacedTensor] | None = None
    nested_block_size: int = 0
    nested_offset: float = 0.0

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        return (self.absmax, self.table, self.state, *(self.nested or ()))

    @property
    def rows_together(self) -> int:
        """Two where a row ends in the middle of a byte, which a stream gives only once."""
        return 1 + self.shape[1] % 2

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin * self.shape[1] // 2, -(-end * self.shape[1] // 2)

    def identity(self) -> list[Any]:
        names = [[tensor.shard.path.name, tensor.name] for tensor in self.beside]
        return [self.kind, self.shape, self.block_size, self.nested_block_size, self.nested_offset, names]

    def open(self) -> BlockwiseDecoder:
        """Read table and absmax.

        Raises:
            CorruptFileError: the table is not that of the library.
        """
        table = _TABLES[self.kind]
        if not np.array_equal(read_scale(self.table).reshape(-1) + np.float32(0), table):
            raise CorruptFileError(
                f"{quoted(self.table.name)} is not the table of {self.kind}: loaders take that, and other weights",
                REFETCH,
            )
        absmax = read_scale(self.absmax).reshape(-1)
        if self.nested is not None:
            values, outer = (read_scale(tensor).reshape(-1) for tensor in self.nested)
            blocks = np.arange(len(absmax)) // self.nested_block_size
            absmax = values[absmax] * outer[blocks] + np.float32(self.nested_offset)
        return BlockwiseDecoder(table, absmax.astype(np.float32), self.shape[1], self.block_size)


class BlockwiseDecoder:
    """Turns bytes into weights. Holds the absmax of all blocks."""

    def __init__(self, table: Values, absmax: Values, n_columns: int, block_size: int) -> None:
        self._table, self._absmax = table, absmax
        self._n_columns, self._block_size = n_columns, block_size

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> Values:
        packed: npt.NDArray[np.uint8] = codes.reshape(-1)
        # The kernel reads the low half first.
        swapped = np.asarray((packed << 4) | (packed >> 4), np.uint8)
        skipped = first_row * self._n_columns % 2  # the half of a byte that belongs to the row before
        first = first_row * self._n_columns - skipped
        n_elements = (2 * len(packed) - skipped) // self._n_columns * self._n_columns
        flat = np.empty(2 * len(packed), np.float32)
        at = 0
        while at < len(flat):
            # Whole blocks as rows; what is left of the first and of the last one alone.
            size = self._block_size
            begin = (first + at) % size
            n = (len(flat) - at) // size if begin == 0 else 0
            rows, columns = (n, size) if n else (1, min(size - begin, len(flat) - at))
            end = at + rows * columns
            block = (first + at) // size
            scale = np.ascontiguousarray(self._absmax[block : block + rows, None])
            weight = flat[at:end].reshape(rows, columns)
            part = swapped[at // 2 : -(-end // 2)].reshape(rows, -1)
            cpu.dequantize_packed(part, 4, self._table, np.zeros_like(scale), scale, 0, (1, columns), weight)
            at = end
        return flat[skipped : skipped + n_elements].reshape(-1, self._n_columns)


def find(places: Places, _block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the 4-bit weights of a checkpoint.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    states = {name: state for name, state in places.items() if _STATE in name}
    for name, state in states.items():
        if state.stored.dtype != "U8" or state.stored.n_elements > _MAX_STATE_BYTES:
            raise _wrong(name, f"has {state.stored.n_elements:,} elements of {state.stored.dtype}")
    fetch_tensors((state.shard, state.stored) for state in states.values())
    for name, state in states.items():
        stem, _, kind = name.partition(_STATE)
        codes = places.get(stem)
        if codes is None or kind not in _TABLES:
            raise _wrong(name, "belongs to no codes" if codes is None else "is of an unknown kind")
        yield _weight(name, _parse(name, state), kind, codes, places)


def _parse(name: str, state: PlacedTensor) -> dict[str, Any]:
    try:
        parsed = json.loads(bytes(read_scale(state).reshape(-1)))
    except (ValueError, RecursionError) as error:
        raise _wrong(name, "is no JSON") from error
    if not isinstance(parsed, dict):
        raise _wrong(name, "is no JSON object")
    return parsed


def _weight(name: str, state: dict[str, Any], kind: str, codes: PlacedTensor, places: Places) -> CodedWeight:
    shape: Any = state.get("shape")
    size: Any = state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape)) and _is_size(size)):
        raise _wrong(name, "states no shape [out, in] and block size")
    stem = codes.name
    n_bytes = -(-prod(shape) // 2)
    is_nested = "nested_blocksize" in state
    absmax, table = places.get(f"{stem}.absmax"), places.get(f"{stem}.quant_map")
    n_blocks = -(-prod(shape) // size)
    is_known = size <= _MAX_BLOCK and size % 2 == 0 and state.get("quant_type") == kind
    if not is_known or codes.stored.n_bytes != n_bytes:
        raise _wrong(name, f"does not describe {codes.stored.n_bytes:,} bytes of codes")
    if absmax is None or table is None or (table.stored.dtype, table.stored.n_elements) != ("F32", 16):
        raise _wrong(name, "lacks its absmax or its table")
    if (absmax.stored.dtype, absmax.stored.n_elements) != ("U8" if is_nested else "F32", n_blocks):
        raise _wrong(name, f"needs an absmax for each of {n_blocks:,} blocks")
    bytes_of = replace(codes.stored, dtype="U8", shape=(n_bytes, 1), strides=None)
    coding = BlockwiseCoding(kind, (shape[0], shape[1]), size, absmax, table, places[name])
    if is_nested:
        coding = _nested(name, state, coding, places, stem, n_blocks)
    return CodedWeight(stem, replace(codes, stored=bytes_of), coding)


def _nested(
    name: str, state: dict[str, Any], coding: BlockwiseCoding, places: Places, stem: str, n_blocks: int
) -> BlockwiseCoding:
    values, outer = places.get(f"{stem}.nested_quant_map"), places.get(f"{stem}.nested_absmax")
    size: Any = state["nested_blocksize"]
    offset: Any = state.get("nested_offset")
    is_float = isinstance(offset, float) and abs(offset) < 3e38
    if not (_is_size(size) and is_float and values is not None and outer is not None):
        raise _wrong(name, "lacks what its nested absmax is decoded by")
    found = [(tensor.stored.dtype, tensor.stored.n_elements) for tensor in (values, outer)]
    if found != [("F32", 256), ("F32", -(-n_blocks // size))]:
        raise _wrong(name, "has a nested absmax of another size")
    return replace(coding, nested=(values, outer), nested_block_size=size, nested_offset=offset)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def _wrong(name: str, why: str) -> CorruptFileError:
    return CorruptFileError(f"the 4-bit weight {quoted(name)} {why}", REFETCH)
