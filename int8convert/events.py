"""The events of all commands: one union, and one type of function that receives them.

`on_event` of `quantize`, `export`, `verify` and `upload` is called with one event at a time, from the thread that
caused it. The command line draws bars from events, `int8convert.progress_bar` does so for library users, and tests read
them. Events hold plain values: names, counts, bytes, reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanMade:
    """A plan is made and checked; the first byte is about to be written.

    A second one follows if modules turn out to have no int8 form and the conversion begins again.

    Attributes:
        source, commit: the source's path or repository, and the commit of the latter.
        model_class: the transformers class that decided; None where name rules did.
        coverage: share of the parameters that become int8, 0 to 1; None for an export.
        device, device_reason: where rows are quantized; the reason is "" if the user chose the device.
        reader, reader_reason: how shards are read from the Hub; the reason is "" if the user chose the reader. None for
            a local source, and where no shard is left to read.
    """

    source: str
    commit: str | None
    model_class: str | None
    n_source_shards: int
    n_read_bytes: int
    n_shards: int
    n_written_bytes: int
    coverage: float | None
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    device_reason: str = ""
    reader: str | None = None
    reader_reason: str = ""


@dataclass(frozen=True, slots=True)
class SourceFetched:
    """`n_bytes` bytes of a source shard have arrived from the Hub."""

    file_name: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ShardStarted:
    """Output shard i of n, counted from 0, is about to be made."""

    i: int
    n: int
    file_name: str


@dataclass(frozen=True, slots=True)
class TensorQuantized:
    """A tensor is in its output shard as int8.

    Attributes:
        n_read_bytes, n_written_bytes: its bytes in the source, and with its scales in the output.
        sqnr_db: signal to quantization noise of the whole tensor, in decibels; infinite where nothing was lost.
        absmax_min, absmax_max: the range of its rows' absmax.
        n_zero_rows: rows that hold only zeros.
        n_accepted_rows: rows with the codes that a calibration chose; None if none is involved.
        nearest_error, error: squared error of the outputs on held-out inputs, summed over rows and tokens: if all rows
            were rounded to nearest, and of the codes that were written; 0 without a calibration.
    """

    name: str
    source_name: str
    n_rows: int
    n_read_bytes: int
    n_written_bytes: int
    sqnr_db: float
    absmax_min: float
    absmax_max: float
    n_zero_rows: int = 0
    is_replayed: bool = False
    n_accepted_rows: int | None = None
    nearest_error: float = 0.0
    error: float = 0.0

    @property
    def layer_kind(self) -> str:
        """The last part of the module's name: q_proj, fc1."""
        return self.name.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class TensorKept:
    """A tensor is in its output shard, not as int8.

    Attributes:
        n_rows: length of its first dimension; 0 for a scalar.
        n_read_bytes, n_written_bytes: its bytes in the source and in the output.
        reason: why it is not int8.
        n_non_finite: number of its values, as written, that are NaN or infinite.
        n_zero_rows: rows of a matrix in stretches of a megabyte or more that hold only zeros.
    """

    name: str
    source_name: str
    n_rows: int
    n_read_bytes: int
    n_written_bytes: int
    dtype: str
    reason: str
    n_non_finite: int = 0
    n_zero_rows: int = 0
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """Output shard i of n is on the disk under its final name."""

    i: int
    n: int
    file_name: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ShardSkipped:
    """Output shard i of n is finished from an earlier run. The events of its tensors follow, from its record."""

    i: int
    n: int
    file_name: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ShardRepeated:
    """Output shard i of n, and later ones that are begun, are converted again; their tensors' events are repeated."""

    i: int
    n: int
    file_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FileSent:
    """A file is on the Hub.

    Attributes:
        is_sent: it was sent now; False if it was there already.
        n_done_bytes, n_total_bytes: bytes of all files so far, and of all files; the latter is None while unknown.
    """

    name: str
    n_bytes: int
    is_sent: bool
    n_done_bytes: int
    n_total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class HubReadStarted:
    """A checkpoint is about to be read from the Hub.

    Attributes:
        n_bytes: bytes of its weight files that come over the network; the cache of the Hub's client has the rest.
        is_kept: the files are stored in that cache; otherwise they are read by range and not stored.
    """

    repository: str
    commit: str
    n_bytes: int
    is_kept: bool


@dataclass(frozen=True, slots=True)
class DownloadStarted:
    """A weight file is about to be downloaded into the cache of the Hub's client."""

    file_name: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TensorsCompared:
    """`verify` has compared `n_done_bytes` of `n_total_bytes`, both checkpoints together."""

    n_done_bytes: int
    n_total_bytes: int


@dataclass(frozen=True, slots=True)
class MeasurementStarted:
    """One model, or two that are compared, are about to be run on a text.

    Attributes:
        streamed: layer by layer; False if whole models are in memory.
        peak_memory_bytes: the most memory this process will need, by plan.
        n_steps: windows, or layers if streamed.
    """

    streamed: bool
    peak_memory_bytes: int
    n_steps: int


@dataclass(frozen=True, slots=True)
class MeasurementStep:
    """Step n_done of n_steps is done, of what `MeasurementStarted`, `DamageStarted` or `SmoothingStarted` began.

    Attributes:
        step: "window", or the name of the layer that was streamed, or of the group that was smoothed.
        remaining_s: estimated seconds for the other steps, from the time of those that are done.
    """

    step: str
    n_done: int
    n_steps: int
    remaining_s: float


@dataclass(frozen=True, slots=True)
class DamageStarted:
    """The source's model is about to be loaded, to measure what the rounding of each layer costs.

    Attributes:
        peak_memory_bytes: about the most memory this process will need.
        n_steps: number of windows.
    """

    peak_memory_bytes: int
    n_steps: int


@dataclass(frozen=True, slots=True)
class ModulesKept:
    """These modules stay 16-bit, within the user's budget.

    Attributes:
        names: full names of the modules, of most damage for their weights first.
        n_weights: number of their weights.
        n_bytes: bytes that they take more than in int8.
        kl_before, kl_after: expected KL divergence of the predictions in nats a token, if all modules were int8, and
            with these in 16 bits.
        n_unmeasured: number of weights that become int8 and were not measured, such as those of fused experts.

    All numbers are None if an earlier run of this conversion made the choice.
    """

    names: tuple[str, ...]
    n_weights: int | None = None
    n_bytes: int | None = None
    kl_before: float | None = None
    kl_after: float | None = None
    n_unmeasured: int | None = None


@dataclass(frozen=True, slots=True)
class SmoothingStarted:
    """The factors of n_steps groups of layers are about to be chosen."""

    n_steps: int


@dataclass(frozen=True, slots=True)
class GroupsSmoothed:
    """The factors of all groups are chosen.

    Attributes:
        n_smoothed: number of groups that are smoothed, of n_groups that may be.
        error_before, error_after: squared error of the outputs of int8 layers on held-out inputs, as a share of the
            outputs' squares; the mean of the groups that were measured.

    All but the first are None if the factors come from a file.
    """

    n_smoothed: int
    n_groups: int | None = None
    error_before: float | None = None
    error_after: float | None = None


Event = (
    PlanMade
    | SourceFetched
    | ShardStarted
    | TensorQuantized
    | TensorKept
    | ShardFinished
    | ShardSkipped
    | ShardRepeated
    | FileSent
    | HubReadStarted
    | DownloadStarted
    | TensorsCompared
    | MeasurementStarted
    | MeasurementStep
    | DamageStarted
    | ModulesKept
    | SmoothingStarted
    | GroupsSmoothed
)
EventSink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Receive an event and do nothing."""
