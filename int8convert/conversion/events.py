"""What the conversion says while it runs. The CLI turns events into bars, library users get tqdm, tests read them.

Events arrive one at a time, from whichever thread caused them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from int8convert.checkpoint.source import SourceShard
from int8convert.conversion.device import CPU, Device
from int8convert.conversion.readers import ReaderChoice
from int8convert.planning.plan import ConversionPlan, PlannedShard, PlannedTensor


@dataclass(frozen=True, slots=True)
class PlanMade:
    """Everything is decided and checked; the first byte is about to be written.

    device: where rows are quantized, and why, if no one asked for it.
    reader: how the source comes from the Hub; None of a local one, and where nothing is left to read.
    """

    plan: ConversionPlan
    device: Device = CPU
    reader: ReaderChoice | None = None


@dataclass(frozen=True, slots=True)
class SourceFetched:
    """So many bytes of a shard of the source have come from the Hub."""

    shard: SourceShard
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ShardStarted:
    """Shard i of n, counted from 0, is about to be read."""

    i: int
    n: int
    shard: PlannedShard


@dataclass(frozen=True, slots=True)
class TensorQuantized:
    """A tensor is in its output shard as int8.

    sqnr_db: signal to quantization noise of the whole tensor, in decibels; infinite where nothing was lost.
    absmax_min, absmax_max: the range of its rows' absmax.
    n_zero_rows: rows that hold nothing but zeros.
    """

    tensor: PlannedTensor
    sqnr_db: float
    absmax_min: float
    absmax_max: float
    n_zero_rows: int = 0


@dataclass(frozen=True, slots=True)
class TensorKept:
    """A tensor is in its output shard unchanged.

    n_non_finite: how many of its values, as written, are NaN or infinite.
    n_zero_rows: of a matrix, rows in stretches of a megabyte or more that hold nothing but zeros.
    """

    tensor: PlannedTensor
    n_non_finite: int = 0
    n_zero_rows: int = 0


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """Shard i of n is on the disk under its final name."""

    i: int
    n: int
    shard: PlannedShard


@dataclass(frozen=True, slots=True)
class ShardSkipped:
    """Shard i of n is finished from an earlier run; its tensors' events come again, from what was written down."""

    i: int
    n: int
    shard: PlannedShard


@dataclass(frozen=True, slots=True)
class ShardRepeated:
    """Shard i of n, and those behind it that are begun, are converted again: their tensors' events come once more.

    reason: why, in a phrase.
    """

    i: int
    n: int
    shard: PlannedShard
    reason: str


Event = (
    PlanMade
    | SourceFetched
    | ShardRepeated
    | ShardSkipped
    | ShardStarted
    | TensorQuantized
    | TensorKept
    | ShardFinished
)
EventSink = Callable[[Event], None]
