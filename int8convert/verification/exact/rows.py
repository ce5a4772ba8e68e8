"""Judges rows of int8 weights against the source's weights, in NumPy.

The arithmetic is written again on purpose, so that the judge shares no defect with the converter. Two questions are
asked of each row, with w the weights, c the codes and s the stored step (absmax / 127):

1. Are codes and scale those of the reference rounding?
       inv = fl32(fl32(1 / absmax) * 127),   c = rint(fl32(w * inv)), ties to even
2. If not: is each weight within half a step of what its code stands for?
       |w - c * s| <= s / 2 + 2 ulp(absmax)

The three roundings of (1) and the one of s add up to at most two ulps: 4 * 127 * 2^-24 steps. So (1) implies (2), and
rows that pass (1), which are nearly all, cost no more than that.

Codes that a calibration chose are judged by (2) alone, with a wider limit; see `RowRules.calibrated`.

Does not know whether the source's weights are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.names import CALIBRATED_STEPS_AWAY
from int8convert.verification.checks import Finding

_N_STEPS = 127
_MAX_SHOWN_STEPS = 1e6

_CALIBRATED_SLACK = 1e-4
"""Steps by which the converter's float32 roundings may move a bound on the distance between a weight and its code."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """Differences that are no defect.

    Attributes:
        stores_absmax: whether the checkpoint stores the absmax of a row; else absmax / 127.
        slack_steps: steps by which a weight may be further away than half a step.
        needs_reference_codes: whether codes other than those of (1) are a defect, even halfway between two codes.
        scale_tolerance: allowed relative difference of the scale; None allows any.
        may_be_fp16: whether the weights may have been rounded to fp16 first, as bitsandbytes does.
    """

    stores_absmax: bool
    slack_steps: float = 0.0
    needs_reference_codes: bool = True
    scale_tolerance: float | None = 0.0
    may_be_fp16: bool = False

    def calibrated(self) -> RowRules:
        """Return the rules for codes that a calibration chose.

        Scales are those of the reference rounding. A code is less than one step away from its weight, so the largest
        weight of a row keeps the code 127. The judge does not know the calibration: it cannot tell which of the two
        codes beside a weight it chose.
        """
        further = CALIBRATED_STEPS_AWAY - 0.5 + _CALIBRATED_SLACK
        return replace(self, slack_steps=self.slack_steps + further, needs_reference_codes=False)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result for some rows.

    Attributes:
        n_codes, n_scales: number of codes and scales that differ from the reference rounding, defect or not.
        findings: check -> the first place, with the number of places in these rows.
    """

    n_codes: int
    n_scales: int
    findings: dict[str, Finding]


_NOTHING = Judgement(0, 0, {})


def judge_rows(
    name: str,
    weight: npt.NDArray[np.float32],
    codes: npt.NDArray[np.int8],
    stored: npt.NDArray[np.float32],
    first_row: int,
    rules: RowRules,
) -> Judgement:
    """Compare some rows.

    Args:
        weight: float32 [rows, cols], the source's.
        codes: int8 [rows, cols].
        stored: float32 [rows], absmax or scale.
        first_row: index of the first of these rows in the matrix.
    """
    absmax = np.maximum(weight.max(axis=1), -weight.min(axis=1))  # keeps NaN
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inv_scale = (np.float32(1) / absmax) * np.float32(_N_STEPS)
    # A zero row, and one so small that its inv_scale overflows, has the codes 0. NaN and infinity are found below.
    inv_scale[~np.isfinite(inv_scale)] = 0
    with np.errstate(invalid="ignore"):
        in_steps = weight * inv_scale[:, None]
        reference = np.rint(in_steps, out=in_steps).astype(np.int8)
    expected = absmax if rules.stores_absmax else absmax / np.float32(_N_STEPS)
    is_finite = bool(np.isfinite(absmax).all())
    if is_finite and np.array_equal(reference, codes) and np.array_equal(expected, stored):
        return _NOTHING
    rows = _Rows(name, weight, codes, stored, first_row, rules, absmax, inv_scale, expected, reference)
    return rows.judge()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows in which something differs."""

    name: str
    weight: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int8]
    stored: npt.NDArray[np.float32]
    first_row: int
    rules: RowRules
    absmax: npt.NDArray[np.float32]
    inv_scale: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float32]
    reference: npt.NDArray[np.int8]

    def judge(self) -> Judgement:
        is_finite = np.isfinite(self.absmax)
        differs = (self.reference != self.codes) & is_finite[:, None]
        n_scales = np.count_nonzero((self.stored != self.expected) & is_finite)
        findings = dict(self._findings(is_finite, differs))
        return Judgement(int(np.count_nonzero(differs)), int(n_scales), findings)

    def _findings(
        self, is_finite: npt.NDArray[np.bool_], differs: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[str, Finding]]:
        yield from self._weights(is_finite)
        yield from self._rows(is_finite)
        if self.rules.needs_reference_codes and differs.any():
            row, column = _first(differs)
            expected, found = (f"code {codes[row, column]}" for codes in (self.reference, self.codes))
            yield "codes", self._finding(expected, found, differs, row, column)
        yield from self._scales(is_finite)

    def _scales(self, is_finite: npt.NDArray[np.bool_]) -> Iterator[tuple[str, Finding]]:
        if self.rules.scale_tolerance is None:
            return
        with np.errstate(invalid="ignore"):
            is_near = np.abs(self.stored - self.expected) <= self.rules.scale_tolerance * self.expected
        is_wrong = ~is_near & is_finite
        if is_wrong.any():
            row = int(np.argmax(is_wrong))
            what = "absmax" if self.rules.stores_absmax else "scale"
            expected, found = (f"{what} {float(values[row])!r}" for values in (self.expected, self.stored))
            yield "scales", self._finding(expected, found, is_wrong, row)

    def _weights(self, is_finite: npt.NDArray[np.bool_]) -> Iterator[tuple[str, Finding]]:
        """Find weights too far from what their codes stand for."""
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            value = float(self.absmax[row])
            yield "weights", self._finding("finite weights in the source", f"{value}", ~is_finite, row)
            return
        with np.errstate(invalid="ignore", over="ignore"):  # a stored scale may be anything
            step = self.stored.astype(np.float64) / (_N_STEPS if self.rules.stores_absmax else 1)
            rounded = self.codes * step[:, None]
            away = np.abs(self.weight - rounded)
            if self.rules.may_be_fp16:
                away = np.minimum(away, np.abs(self.weight.astype(np.float16) - rounded))
            limit = (0.5 + self.rules.slack_steps) * np.abs(step) + 2 * np.spacing(self.absmax).astype(np.float64)
            # Rows that are too small for int8 become zero.
            limit[self.inv_scale == 0] = np.inf
            too_far = ~(away <= limit[:, None])
        if too_far.any():
            row, column = _first(too_far)
            steps = min(away[row, column] / step[row], _MAX_SHOWN_STEPS) if step[row] > 0 else _MAX_SHOWN_STEPS
            within = 0.5 + self.rules.slack_steps
            allowed = "half a step" if within < 0.6 else f"{within:.2f} steps"
            expected = f"{float(self.weight[row, column]):.6g} within {allowed}"
            found = f"{rounded[row, column]:.6g}, {steps:.3g} steps away"
            yield "weights", self._finding(expected, found, too_far, row, column)

    def _rows(self, is_finite: npt.NDArray[np.bool_]) -> Iterator[tuple[str, Finding]]:
        """Find rows that became zero, or do not use the full range of codes."""
        peak = np.abs(self.codes.astype(np.int16)).max(axis=1)
        holds = is_finite & (self.inv_scale > 0)
        is_zero = holds & ((peak == 0) | ~(self.stored > 0))
        if is_zero.any():
            row = int(np.argmax(is_zero))
            expected = f"a row whose largest weight is {float(self.absmax[row]):.6g}"
            yield "rows", self._finding(expected, "a row of zeros", is_zero, row)
            return
        is_short = holds & ((peak != _N_STEPS) if self.rules.needs_reference_codes else (peak < _N_STEPS))
        if is_short.any():
            row = int(np.argmax(is_short))
            yield "rows", self._finding(f"largest |code| {_N_STEPS}", f"{peak[row]}", is_short, row)

    def _finding(
        self, expected: str, found: str, places: npt.NDArray[np.bool_], row: int, column: int | None = None
    ) -> Finding:
        return Finding(self.name, expected, found, self.first_row + row, column, int(np.count_nonzero(places)))


def _first(places: npt.NDArray[np.bool_]) -> tuple[int, int]:
    row, column = np.unravel_index(int(np.argmax(places)), places.shape)
    return int(row), int(column)
