"""The exact level of `verify`: compares an int8 checkpoint with its source, tensor by tensor, without running a model.

1. The manifest names the source and the options of the conversion. From them the plan is rebuilt, as `quantize` makes
   it. It says what each tensor must have become (`layout`), and what the model lacks (`needs`).
2. Every weight file is hashed and compared with the manifest, while other threads compare its tensors: codes and scales
   with the rounding of the source, everything else byte by byte (`tensors`, `rows`).
3. config.json is compared entry by entry with what the conversion writes (`config`), and auxiliary files with the
   source's. Any other file is a finding, unless no loader reads it (`beside`).
4. Meanwhile a child process runs a few tokens through the model, without its weights (`trial_run`).

Either checkpoint may be on the Hub. Its tensors are then read by range, and its weights are not stored.

Costs one reading of both checkpoints, and a few megabytes for each thread. The arithmetic is written again on purpose,
in NumPy, so that the judge shares no defect with the converter. Shared are the reading of a source, and the plan of
which tensors become int8.

Does not know whether rounding to int8 harms this model; the fidelity level measures that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from int8convert.checkpoint.request_difference import describe_source
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.errors import CorruptFileError, SourceError
from int8convert.events import EventSink, TensorsCompared, ignore
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.planning.plan import ConversionPlan
from int8convert.planning.plan_checkpoint import PlanOptions, plan_unchecked
from int8convert.text import counted, quoted
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.beside import check_beside, check_carried, hash_beside
from int8convert.verification.exact.config import check_config
from int8convert.verification.exact.files import check_files, compare_sha256, hash_shard, read_records
from int8convert.verification.exact.layout import Int8Pair, Layout, Pair, lay_out
from int8convert.verification.exact.needs import allowed_note, check_needs
from int8convert.verification.exact.outliers import pair_outliers
from int8convert.verification.exact.provenance import Provenance, find_provenance
from int8convert.verification.exact.rows import RowRules
from int8convert.verification.exact.tensors import TensorResult, compare_int8, compare_kept
from int8convert.verification.exact.trial_run import TrialRun
from int8convert.verification.opened import ExaminedCheckpoint, hub_reading, open_examined

"""Told of bytes done and bytes in all."""

_VALUE_CHECKS = ("rows", "weights", "codes", "scales", "kept", "outlier columns")


@dataclass(frozen=True, slots=True)
class ExactReport:
    """The outcome of the exact level.

    Attributes:
        out, reference: the two checkpoints; the reference is None if `out` cannot be opened.
        format: the format of `out`.
        checks: all checks; docs/verify-json.md describes each.
        n_int8_weights: number of int8 weights.
        n_different_codes, n_different_scales: number of codes and scales that differ from the reference rounding. They
            are no defect if another tool computed the checkpoint.
        n_read_bytes: bytes of both checkpoints.
        notes: what the user should know about the measurement.
        commit, reference_commit: commits of checkpoints on the Hub; else None.
        files: sha256 of every file of `out` that was examined.
        compared: what `out` was compared with, for people.
    """

    out: str
    reference: str | None
    format: str
    checks: tuple[Check, ...]
    n_int8_weights: int = 0
    n_different_codes: int = 0
    n_different_scales: int = 0
    n_read_bytes: int = 0
    elapsed_s: float = 0.0
    notes: tuple[str, ...] = ()
    commit: str | None = None
    reference_commit: str | None = None
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    compared: str = ""

    @property
    def is_passed(self) -> bool:
        return all(check.is_passed for check in self.checks)


def verify_exact(
    out: str | os.PathLike[str] | ExaminedCheckpoint,
    *,
    revision: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    on_event: EventSink = ignore,
) -> ExactReport:
    """Compare an int8 checkpoint with its source.

    Args:
        out: the int8 checkpoint: a directory, a repository on the Hub, or one that is open.
        revision: branch, tag or commit of that repository.
        reference: the source; None for the one that the manifest names.
        lora: the adapter that was merged in the conversion.
        trust_remote_code: run code in the source, as `quantize` does.
        workers: number of threads; None for the cores that this process may use.
        on_event: receives `HubReadStarted` and `TensorsCompared`.

    Raises:
        SourceError: `out` is no int8 checkpoint, or its source is missing.
        Int8ConvertError: the source cannot be read or planned, or the adapter is another one.
    """
    began = time.perf_counter()
    try:
        examined = out if isinstance(out, ExaminedCheckpoint) else open_examined(out, revision)
    except CorruptFileError as error:
        named = os.fspath(out)  # type: ignore[arg-type]
        finding = Finding(named, "a checkpoint whose files agree", error.message)
        return ExactReport(named, None, "", (make_check("files", 1, [finding]),))
    checkpoint = examined.source
    found = _format(checkpoint)
    provenance = find_provenance(checkpoint, reference, lora)
    n_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    with TrialRun(checkpoint, trust_remote_code) as trial:
        # Modules that were kept for their values are not planned as int8, and must then hold such values.
        planned = plan_unchecked(
            provenance.reference,
            PlanOptions(
                skip=(*provenance.skip, *provenance.kept_for_values),
                only=provenance.only,
                format=provenance.format,
                lora=provenance.lora,
                trust_remote_code=trust_remote_code,
                revision=provenance.revision,
            ),
        )
        for reading in filter(None, map(hub_reading, (checkpoint, planned.source))):
            on_event(reading)
        comparison = _Comparison(examined, planned, provenance)
        checks = comparison.run(n_workers, on_event)
        runs, not_tried = trial.result()
    return ExactReport(
        out=checkpoint.label,
        reference=provenance.reference,
        format=str(found),
        checks=(*checks, runs),
        n_int8_weights=len(comparison.layout.int8_modules),
        n_different_codes=comparison.totals.n_different_codes,
        n_different_scales=comparison.totals.n_different_scales,
        n_read_bytes=comparison.n_bytes,
        elapsed_s=time.perf_counter() - began,
        notes=(*_notes(provenance, planned), *not_tried),
        commit=checkpoint.commit,
        reference_commit=planned.source.commit,
        files=comparison.hashes,
        compared=_compared(planned.source, provenance),
    )


def _compared(source: CheckpointSource, provenance: Provenance) -> str:
    """Return what the checkpoint was compared with: how much of the source, and by which rule."""
    files = f"{counted(len(source.shards), 'weight file')}, config.json"
    carried = f" and {counted(len(source.auxiliary_files), 'other file')}" if source.auxiliary_files else ""
    if not provenance.is_known:
        return f"{files}{carried}; no manifest tells what the conversion wrote"
    exports = f", through {counted(len(provenance.exports), 'export')}" if provenance.exports else ""
    return f"{files}{carried}, as its manifest says they were converted{exports}"


def _format(out: CheckpointSource) -> Format:
    if "quantization_config" not in out.config:
        what = "its config.json has no quantization_config" if out.config else "it has no config.json"
        raise SourceError(
            f"{quoted(out.label, 200)} is no int8 checkpoint: {what}",
            "give an output of int8convert quantize, or finish the conversion first",
        )
    return read_format(out.config)


def _notes(provenance: Provenance, planned: ConversionPlan) -> Iterator[str]:
    if not provenance.is_known:
        yield (
            "no manifest tells how the checkpoint was made: codes are judged by their distance to the weights, "
            "and no file by its sha256"
        )
    elif provenance.source_files and _identity(describe_source(planned.source)) != _identity(provenance.source_files):
        yield "the source is not the one of the conversion: its config.json, its files or their headers have changed"
    if provenance.lora is not None:
        yield "an adapter was merged, whose last bits depend on the machine: codes may differ halfway between two codes"
    if (allowed := allowed_note(planned.model_map, provenance)) is not None:
        yield allowed


def _identity(described: Any) -> Any:
    """Return what tells two sources apart, without the times of their files, which a copy changes."""
    files = described.get("files")
    files = files if isinstance(files, dict) else {}
    sizes = {name: (f.get("n_bytes"), f.get("header_sha256")) for name, f in files.items() if isinstance(f, dict)}
    return described.get("config_sha256"), sizes


def rules_for(provenance: Provenance, found: Format) -> RowRules:
    """Return what may differ in a checkpoint of this origin."""
    stores_absmax = module_of(found).STORES_ABSMAX
    if not provenance.is_known:
        # Kernels on GPUs divide less exactly, and other tools round to other dtypes first.
        return RowRules(stores_absmax, 1e-3, False, None, may_be_fp16=True)
    if provenance.lora is not None:
        return RowRules(stores_absmax, 0.01, False, 1e-5)
    # From scale to absmax and back, some move by one unit in the last place, see `formats.scales`.
    return RowRules(stores_absmax, 1e-4, True, 2.0**-22) if provenance.is_exported else RowRules(stores_absmax)


class _Comparison:
    """The comparison of two checkpoints.

    Attributes:
        totals: sums over all tensors.
        n_bytes: bytes to read.
        hashes: see `ExactReport.files`.
    """

    def __init__(self, examined: ExaminedCheckpoint, planned: ConversionPlan, provenance: Provenance) -> None:
        out = self._out = examined.source
        self._examined = examined
        self.hashes: dict[str, str] = {}
        self._plan = planned
        self._provenance = provenance
        self.layout: Layout = lay_out(out, planned, provenance)
        self._records = read_records(out)
        self._outliers = pair_outliers(out, self.layout, provenance.is_known)
        self._rules = rules_for(provenance, self.layout.format)
        self.totals = TensorResult()
        self._findings: dict[str, list[Finding]] = {name: [] for name in ("files", "tensors", *_VALUE_CHECKS)}
        self.n_bytes = out.n_bytes + planned.n_read_bytes

    def run(self, n_workers: int, on_event: EventSink) -> tuple[Check, ...]:
        """Return all checks, the most telling first."""
        self._findings["files"] += check_files(self._examined, self._records, self._provenance)
        self._findings["tensors"] += self.layout.findings
        self._findings["outlier columns"] += self._outliers.findings
        with ThreadPoolExecutor(n_workers) as pool:
            try:
                self._collect(self._submit(pool), on_event)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        source = self._plan.source
        self.hashes |= hash_beside(self._examined, source)
        return (
            self._check("files", len(self._out.shards) if self._records else 0),
            self._check("tensors", self.layout.n_expected),
            check_needs(self._out, self._plan.model_map, self._provenance),
            *(self._check(name, self.totals.n_checked.get(name, 0)) for name in _VALUE_CHECKS),
            check_config(self._out, self._plan, self._provenance, self.layout.int8_modules),
            check_carried(self._examined, source, self._provenance),
            check_beside(self._examined, source, self._provenance),
        )

    def _check(self, name: str, n_checked: int) -> Check:
        return make_check(name, n_checked, self._findings[name])

    def _submit(self, pool: ThreadPoolExecutor) -> list[tuple[Future[Any], int]]:
        """Submit tasks file by file, so that hashing and comparing read each file from the disk once."""
        tasks: list[tuple[Future[Any], int]] = []
        by_file: dict[str, list[Pair]] = {}
        for pair in self.layout.pairs:
            by_file.setdefault(pair.main.shard.path.name, []).append(pair)
        for shard in self._out.shards:
            tasks.append((pool.submit(self._hash, shard), shard.n_bytes))
            for pair in by_file.get(shard.path.name, []):
                tasks.append((pool.submit(self._compare, pair), pair.planned.source.n_bytes))
        return tasks

    def _hash(self, shard: SourceShard) -> Finding | None:
        sha256 = hash_shard(shard)
        self.hashes[shard.path.name] = sha256
        return compare_sha256(shard, sha256, self._records.get(shard.path.name))

    def _compare(self, pair: Pair) -> TensorResult:
        if isinstance(pair, Int8Pair):
            return compare_int8(pair, self._rules, self._outliers.pairs.get(pair.module_name))
        return compare_kept(pair)

    def _collect(self, tasks: Iterable[tuple[Future[Any], int]], on_event: EventSink) -> None:
        """Collect results in the order of the files."""
        n_done = 0
        for task, n_bytes in tasks:
            result = task.result()
            if isinstance(result, TensorResult):
                self._add(result)
            elif result is not None:
                self._findings["files"].append(result)
            n_done += n_bytes
            on_event(TensorsCompared(n_done, self.n_bytes))

    def _add(self, result: TensorResult) -> None:
        for name, n in result.n_checked.items():
            self.totals.n_checked[name] = self.totals.n_checked.get(name, 0) + n
        for name, finding in result.findings.items():
            self._findings[name].append(finding)
        self.totals.n_different_codes += result.n_different_codes
        self.totals.n_different_scales += result.n_different_scales
