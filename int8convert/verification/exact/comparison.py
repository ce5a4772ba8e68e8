"""Compares all tensors and files of an int8 checkpoint with the source, file by file, in threads.

Does not know where source and options come from; `level` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from int8convert.checkpoint.source import SourceShard
from int8convert.events import EventSink, TensorsCompared
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.planning.plan import ConversionPlan
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.config import check_config
from int8convert.verification.exact.files import (
    check_auxiliary,
    check_beside,
    check_files,
    check_needs,
    compare_sha256,
    hash_beside,
    hash_shard,
    read_records,
)
from int8convert.verification.exact.layout import Int8Pair, Layout, Pair, lay_out
from int8convert.verification.exact.outliers import pair_outliers
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.exact.rows import RowRules
from int8convert.verification.exact.tensors import TensorResult, compare_int8, compare_kept
from int8convert.verification.opened import ExaminedCheckpoint

_VALUE_CHECKS = ("rows", "weights", "codes", "scales", "kept", "outlier columns")


def rules_for(provenance: Provenance, found: Format) -> RowRules:
    """Return what may differ in a checkpoint of this origin."""
    stores_absmax = module_of(found).STORES_ABSMAX
    if not provenance.is_known:
        # Kernels on GPUs divide less exactly, and other tools round to other dtypes first.
        return RowRules(stores_absmax, 1e-3, False, None, may_be_fp16=True)
    if provenance.lora is not None:
        return RowRules(stores_absmax, 0.01, False, 1e-5)
    # From scale to absmax and back, some move by one unit in the last place, see `formats.scales`.
    return RowRules(stores_absmax, 1e-4, True, 2.0**-22) if provenance.exports else RowRules(stores_absmax)


class Comparison:
    """The comparison of two checkpoints. `hashes` is `ExactReport.files`; `n_bytes` are the bytes to read."""

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
            check_auxiliary(self._examined, source, self._provenance),
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
            is_calibrated = pair.module_name in self._provenance.calibrated
            rules = self._rules.calibrated() if is_calibrated else self._rules
            return compare_int8(pair, rules, self._outliers.pairs.get(pair.module_name))
        return compare_kept(pair)

    def _collect(self, tasks: Iterable[tuple[Future[Any], int]], on_event: EventSink) -> None:
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
