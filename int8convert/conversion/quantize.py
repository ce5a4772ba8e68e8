"""`quantize` and `plan`: the main job as two plain functions."""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from int8convert.checkpoint.source import CheckpointSource, open_source
from int8convert.checkpoint.writer import ShardWriter
from int8convert.conversion.events import Event, EventSink, PlanMade, ShardFinished, TensorKept, TensorQuantized
from int8convert.conversion.head_start import HeadStart, guess_plan
from int8convert.conversion.model_map import ModelMapProcess, ModuleFilter, check_config
from int8convert.conversion.output import OutputDirectory
from int8convert.conversion.pipeline import Pipeline
from int8convert.conversion.plan import ConversionPlan, make_plan
from int8convert.conversion.report import ConversionReport, ReportBuilder
from int8convert.errors import CoverageError, DeviceError, DiskFullError, Int8ConvertError

DEFAULT_THRESHOLD = 6.0
"""Feature dimensions with a magnitude at or above it stay 16-bit: LLM.int8(), arXiv:2208.07339, Sec. 3.2."""

DEFAULT_MIN_COVERAGE = 0.5

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def plan(
    src: str | os.PathLike[str],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    max_shard_size: int | str | None = None,
) -> ConversionPlan:
    """What `quantize` would do with a checkpoint, from headers alone; writes nothing.

    Args: as `quantize` has them.

    Raises:
        Int8ConvertError: the source cannot be read, or a pattern matches nothing.
    """
    max_shard_bytes = parse_size(max_shard_size)
    source = open_source(src)
    check_config(source.config)
    with _PlanInTheMaking(source, ModuleFilter(tuple(skip), tuple(only)), max_shard_bytes) as coming:
        return coming.result()


def quantize(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    threshold: float = DEFAULT_THRESHOLD,
    min_coverage: float = DEFAULT_MIN_COVERAGE,
    max_shard_size: int | str | None = None,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_event: EventSink | None = None,
) -> ConversionReport:
    """Turn a checkpoint directory into an LLM.int8() checkpoint that transformers and bitsandbytes load.

    Streams: memory does not grow with the model. All arguments, headers and the disk's room are checked before the
    first byte is written; after any error nothing is left that looks like a checkpoint.

    Args:
        src: a directory with config.json and safetensors or `.bin` weights.
        out: the directory to write; must not exist, or be empty, unless `overwrite`.
        skip: modules that stay 16-bit; full names or dotted tails, with shell wildcards.
        only: if given, no other modules become int8.
        threshold: magnitude from which a feature dimension counts as outlier; written for the loader, it does not
            change the weights.
        min_coverage: share of the parameters, 0 to 1, that must become int8.
        max_shard_size: bytes, or a string such as "5GB"; None makes one output shard for each source shard.
        workers: threads; None takes the cores this process may use.
        device: "auto", "cpu" or "cuda[:n]".
        overwrite: replace a checkpoint in `out`.
        on_event: told what happens; None shows a tqdm bar.

    Raises:
        Int8ConvertError: what went wrong, and what to do.
        ValueError: an argument is out of its range.
    """
    began = time.perf_counter()
    max_shard_bytes = parse_size(max_shard_size)
    n_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if n_workers < 1 or not threshold >= 0 or not 0 <= min_coverage <= 1:
        raise ValueError("workers must be at least 1, threshold at least 0, min_coverage between 0 and 1")
    device_used = choose_device(device)
    source = open_source(src)
    check_config(source.config)
    output = OutputDirectory(out, source.directory, overwrite)
    modules = ModuleFilter(tuple(skip), tuple(only))
    report = ReportBuilder()
    sink = on_event or _TqdmProgress()

    def emit(event: Event) -> None:
        report(event)
        sink(event)

    try:
        with (
            _PlanInTheMaking(source, modules, max_shard_bytes) as coming,
            output.cleaned_on_failure(),
            Pipeline(output.path, n_workers, emit) as pipeline,
        ):
            conversion_plan, converted = _start(coming, output, pipeline, min_coverage)
            pipeline.run(conversion_plan, converted)
            output.complete(conversion_plan, threshold)
    except OSError as error:
        raise _as_output_error(error, output) from error
    return report.build(conversion_plan, str(out), device_used, time.perf_counter() - began)


def _start(
    coming: _PlanInTheMaking, output: OutputDirectory, pipeline: Pipeline, min_coverage: float
) -> tuple[ConversionPlan, dict[int, ShardWriter]]:
    """Wait for the plan, converting by a guess meanwhile, and check it; the shards that are converted already."""
    guess = guess_plan(coming.source, coming.modules, coming.max_shard_bytes)
    # Where an old checkpoint is to be replaced, it stays until all is checked, and both need room: no head start.
    if guess is None or not output.is_fresh or not output.has_room(guess):
        conversion_plan = coming.result()
        _check(conversion_plan, output, min_coverage, pipeline)
        return conversion_plan, {}
    head_start = HeadStart(pipeline, guess, coming.peek)
    try:
        head_start.run()
        conversion_plan = coming.result()
        _check(conversion_plan, output, min_coverage, pipeline)
        return conversion_plan, head_start.confirm(conversion_plan)
    finally:
        head_start.discard()


def _check(conversion_plan: ConversionPlan, output: OutputDirectory, min_coverage: float, pipeline: Pipeline) -> None:
    check_coverage(conversion_plan, min_coverage)
    output.check_room(conversion_plan)
    output.clear()
    pipeline.emit(PlanMade(conversion_plan))


class _PlanInTheMaking:
    """The true plan, once the child that maps the model has answered; a thread waits for it. A context manager."""

    def __init__(self, source: CheckpointSource, modules: ModuleFilter, max_shard_bytes: int | None) -> None:
        self.source = source
        self.modules = modules
        self.max_shard_bytes = max_shard_bytes
        self._process = ModelMapProcess(source, modules)
        self._waiter = ThreadPoolExecutor(1)
        self._plan = self._waiter.submit(lambda: make_plan(source, self._process.result(), max_shard_bytes))

    def __enter__(self) -> _PlanInTheMaking:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()
        self._waiter.shutdown()

    def peek(self) -> ConversionPlan | None:
        """The plan if it is there already, or the error that came instead."""
        return self._plan.result() if self._plan.done() else None

    def result(self) -> ConversionPlan:
        return self._plan.result()


def check_coverage(conversion_plan: ConversionPlan, min_coverage: float) -> None:
    """Refuse a conversion that would leave nearly everything as it is.

    Raises:
        CoverageError: with what stays and why.
    """
    if conversion_plan.n_int8_parameters and conversion_plan.coverage >= min_coverage:
        return
    reasons = "; ".join(
        f"{reason}: {100 * n / max(1, conversion_plan.n_parameters):.0f} %"
        for reason, (_, n) in list(conversion_plan.kept_by_reason().items())[:3]
    )
    raise CoverageError(
        f"only {100 * conversion_plan.coverage:.1f} % of the parameters would become int8, "
        f"at least {100 * min_coverage:g} % are asked for",
        f"what stays 16-bit: {reasons}; --dry-run lists it, --min-coverage lowers the bar; nothing was written",
    )


def choose_device(device: str) -> str:
    """The device that converts.

    Raises:
        DeviceError: it is not to be had.
    """
    if device in ("auto", "cpu"):
        return "cpu"
    if re.fullmatch(r"cuda(:\d+)?", device):
        raise DeviceError(
            f"--device {device}: this version of int8convert converts on the CPU only",
            "pass --device cpu or leave the option out; the result is the same",
        )
    raise ValueError(f"device must be auto, cpu or cuda[:n], not {device!r}")


def parse_size(size: int | str | None) -> int | None:
    """Bytes of a size such as 2000000, "5GB" (10^9) or "5GiB" (2^30).

    Raises:
        ValueError: it is none.
    """
    if size is None:
        return None
    match = _SIZE.fullmatch(str(size).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"a size must look like 5GB or 500MiB, not {size!r}")
    number, prefix, binary = match.groups()
    unit: int = (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    return math.ceil(float(number) * unit)


def _as_output_error(error: OSError, output: OutputDirectory) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"no room left while writing to '{output.path}'",
            "make room and rerun the same command; what this run had written was removed",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
        return Int8ConvertError(
            f"'{error.filename or output.path}': {error.strerror}",
            "mend that and rerun the same command; what this run had written was removed",
        )
    return error


class _TqdmProgress:
    """What a library user sees by default: one bar over the bytes read."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(unit="B", unit_scale=True, desc="quantize")

    def __call__(self, event: Event) -> None:
        match event:
            case PlanMade(conversion_plan):
                self._bar.reset(total=conversion_plan.n_read_bytes)
            case TensorQuantized(tensor=tensor) | TensorKept(tensor=tensor):
                self._bar.update(tensor.source.n_bytes)
            case ShardFinished(i=i, n=n) if i == n - 1:
                self._bar.close()
