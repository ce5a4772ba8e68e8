"""Compares one tensor of an int8 checkpoint with the source, in blocks of a megabyte or two.

Stored outlier columns are compared in the same pass, with the rows they were taken from.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.verification.checks import Finding
from int8convert.verification.exact.layout import Int8Pair, KeptPair
from int8convert.verification.exact.rows import RowRules, judge_rows
from int8convert.verification.exact.values import (
    FLOATS,
    FP16_MAX,
    PlannedRows,
    TensorRows,
    cast,
    flat,
    float_values,
    read_all,
    same_bits,
    shown,
)

_MERGED_TOLERANCE = 1e-5
"""Allowed difference after a merge, relative to the largest value of a row: the last bits of B @ A by BLAS depend on
processor and blocks."""


@dataclass(frozen=True, slots=True)
class OutlierPair:
    """Stored outlier columns of one module.

    Attributes:
        columns: int32 [n], their indices in the weight.
        weight: [out, n], their values.
    """

    columns: npt.NDArray[np.int32] = field(repr=False)
    weight: PlacedTensor


@dataclass
class TensorResult:
    """The comparison of one tensor.

    Attributes:
        n_checked: check -> number of things checked.
        findings: check -> the first place, with the number of places.
    """

    n_checked: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    n_different_codes: int = 0
    n_different_scales: int = 0

    def add(self, check: str, finding: Finding) -> None:
        """Add a block's finding: the first place is kept, the numbers of places are added."""
        before = self.findings.get(check)
        if before is not None:
            finding = replace(before, n_places=before.n_places + finding.n_places)
        self.findings[check] = finding


def compare_int8(pair: Int8Pair, rules: RowRules, outliers: OutlierPair | None) -> TensorResult:
    """Compare codes, scale and stored columns of an int8 weight."""
    result = TensorResult()
    planned = pair.planned
    n_rows, n_columns = planned.shape
    scale = float_values(read_all(pair.scale), pair.scale.stored.dtype)
    _check_zeros(pair, result)
    _check_matrix(pair, result)
    with ExitStack() as stack:
        source = stack.enter_context(PlannedRows(planned, planned.source))
        out = stack.enter_context(TensorRows(pair.codes.stored, pair.codes.shard))
        stored = outliers and stack.enter_context(TensorRows(outliers.weight.stored, outliers.weight.shard))
        for begin, end in source.ranges():
            values = source.read(begin, end)
            codes = out.read(begin, end).view(np.int8)
            weight = float_values(values, source.dtype)
            found = judge_rows(pair.codes.name, weight, codes, scale[begin:end], begin, rules)
            result.n_different_codes += found.n_codes
            result.n_different_scales += found.n_scales
            for check, finding in found.findings.items():
                result.add(check, finding)
            if outliers and stored:
                expected = np.ascontiguousarray(values[:, outliers.columns])
                _compare_columns(pair, outliers, expected, source.dtype, stored.read(begin, end), begin, result)
    result.n_checked |= {"weights": n_rows * n_columns, "codes": n_rows * n_columns, "scales": n_rows, "rows": n_rows}
    if outliers is not None:
        result.n_checked["outlier columns"] = len(outliers.columns)
    return result


def _check_zeros(pair: Int8Pair, result: TensorResult) -> None:
    """Find zero points, which shift every weight of a row, and format numbers other than 0, which reorder codes."""
    if pair.zeros is None:
        return
    values = read_all(pair.zeros)
    if values.any():
        row = int(np.argmax(values != 0))
        n_places = int(np.count_nonzero(values))
        result.add("scales", Finding(pair.zeros.name, "0", f"{values[row]}", row, n_places=n_places))


def _check_matrix(pair: Int8Pair, result: TensorResult) -> None:
    """Compare the matrix by which loaders rotate the input with Sylvester's, whose signs are parities of i & j."""
    if pair.matrix is None:
        return
    found = float_values(read_all(pair.matrix), pair.matrix.stored.dtype).reshape(pair.matrix.stored.shape)
    at = np.arange(len(found))
    n_common_bits = np.vectorize(lambda bits: int(bits).bit_count())(at[:, None] & at)
    differs = found != np.where(n_common_bits % 2, -1, 1)
    if differs.any():
        row, column = map(int, np.argwhere(differs)[0])
        finding = Finding(pair.matrix.name, f"{-found[row, column]:g}", f"{found[row, column]:g}", row, column)
        result.add("weights", replace(finding, n_places=int(differs.sum())))


def _compare_columns(
    pair: Int8Pair,
    outliers: OutlierPair,
    values: npt.NDArray[Any],
    dtype: str,
    found: npt.NDArray[Any],
    begin: int,
    result: TensorResult,
) -> None:
    stored = outliers.weight.stored
    expected = cast(values, dtype, stored.dtype)
    is_same = _agree(expected, found, stored.dtype, is_merged=pair.planned.lora is not None)
    if not is_same.all():
        at = int(np.argmin(is_same))
        row, i = divmod(at, len(outliers.columns))
        result.add(
            "outlier columns",
            Finding(
                stored.name,
                shown(expected, stored.dtype, at),
                shown(found, stored.dtype, at),
                begin + row,
                int(outliers.columns[i]),
                int(np.count_nonzero(~is_same)),
            ),
        )


def _agree(expected: npt.NDArray[Any], found: npt.NDArray[Any], dtype: str, is_merged: bool) -> npt.NDArray[np.bool_]:
    """Return where two arrays agree: bit by bit, or within a tolerance if an adapter was merged."""
    is_same = same_bits(expected, found)
    if is_merged and dtype in FLOATS and not is_same.all():
        one, other = float_values(expected, dtype), float_values(found, dtype)
        unit = 0.0 if dtype == "F32" else 2.0**-7 if dtype == "BF16" else 2.0**-10
        largest = np.abs(one).max(axis=-1, keepdims=True, initial=0)
        is_same |= np.abs(one - other) <= _MERGED_TOLERANCE * largest + unit * np.abs(one)
    return is_same


def compare_kept(pair: KeptPair) -> TensorResult:
    """Compare a tensor that is kept, possibly in another float dtype."""
    result = TensorResult(n_checked={"kept": 1})
    planned, there = pair.planned, pair.tensor.stored
    source = planned.source
    # Row by row only if a value's place in its row matters.
    is_strided = source.strides is not None or there.strides is not None
    is_plain = not (is_strided or planned.coding or planned.lora or planned.fold)
    source, there = (flat(source), flat(there)) if is_plain or not source.shape else (source, there)
    has_int8_form = True
    with PlannedRows(planned, source) as expected_rows, TensorRows(there, pair.tensor.shard) as found_rows:
        for begin, end in expected_rows.ranges():
            values = expected_rows.read(begin, end)
            if pair.must_be_non_finite:
                has_int8_form &= bool((np.abs(float_values(values, expected_rows.dtype)) <= FP16_MAX).all())
            expected = cast(values, expected_rows.dtype, there.dtype)
            found = found_rows.read(begin, end)
            is_same = _agree(expected, found, there.dtype, planned.lora is not None)
            if not is_same.all():
                result.add("kept", _difference(pair, expected, found, is_same, begin))
    if pair.must_be_non_finite and has_int8_form:
        name = pair.tensor.name
        finding = Finding(name, "int8: all its weights have an int8 form", f"{there.dtype}, kept as not finite")
        result.add("tensors", finding)
    return result


def _difference(
    pair: KeptPair, expected: npt.NDArray[Any], found: npt.NDArray[Any], is_same: npt.NDArray[np.bool_], begin: int
) -> Finding:
    at = int(np.argmin(is_same))
    dtype = pair.tensor.stored.dtype
    row_size = max(1, pair.tensor.stored.n_elements // max(1, (pair.tensor.stored.shape or (1,))[0]))
    index = at + begin * (expected.size // max(1, len(expected)))
    row, column = divmod(index, row_size)
    return Finding(
        pair.tensor.name,
        shown(expected, dtype, at),
        shown(found, dtype, at),
        row,
        column if row_size > 1 else None,
        int(np.count_nonzero(~is_same)),
    )
