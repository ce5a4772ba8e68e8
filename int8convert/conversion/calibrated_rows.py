"""Calibrated rounding: chooses codes by the error of a layer's outputs, where held-out inputs confirm them.

1. `CalibrationInputs` prepares each input once for all weights that read it: its columns by descending mean square, and
   the feedback of a weight's error to the columns after it, from the Cholesky factor of the damped second moment.
2. The rows of a weight are rounded with feedback, by `cuda_kernels.reference.feedback_round`. Scales are those of
   rounding to nearest, and a code may be less than one step away from its weight.
3. Each row is kept as it was rounded to nearest, unless its new codes give outputs on held-out inputs whose squared
   error is smaller. So a second moment of too few tokens costs time, not quality.

Costs 28 * in^2 bytes while an input of that width is prepared, and 4 * in * (in + tokens) for each of two that are
kept. Multiply-adds: in^3 / 6 in float64 for an input, in / 2 + 2 * tokens in float32 for a weight. The last bits of the
Cholesky factor depend on the processor and its BLAS, and so do codes whose target is nearly halfway between two. On one
machine the bits are the same for any number of workers.

Does not know whether a smaller error of a layer's outputs makes a better model. GPTQ: arXiv:2210.17323.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from cuda_kernels.reference import N_STEPS
from int8convert.checkpoint.manifest import CalibratedRows
from int8convert.checkpoint.names import CALIBRATED_STEPS_AWAY
from int8convert.planning.calibrated_rounding import InputMoments
from int8convert.planning.plan import ConversionPlan

_DAMPING = 0.01
"""What is added to the second moment's diagonal, as a share of its mean (GPTQ, Sec. 3.3)."""

_PREPARING_BYTES = 28
"""Bytes for each element of a second moment while it is prepared: one float32 and three float64 matrices."""

_LIBRARY_BYTES = 150_000_000
"""Resident set that torch adds, which reads the calibration: 145 MB measured."""

_DIGITS = 6
"""Significant digits of errors that are recorded. The last ones of a float32 sum depend on the processor."""

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PreparedInput:
    """An input of the model, prepared for rounding. Immutable, so several threads may share it.

    Attributes:
        order: int64 [in], the columns in the order in which they are rounded.
        feedback: [in, in], in that order and in panels; None if the second moment has no Cholesky factor.
        held_out: [in, tokens], in that order and in panels.
    """

    order: npt.NDArray[np.int64] = field(repr=False)
    feedback: Matrix | None = field(repr=False)
    held_out: Matrix = field(repr=False)


def prepare(second_moment: Matrix, held_out: Matrix) -> PreparedInput:
    """Prepare an input; see `InputMoments.load`."""
    diagonal = np.diag(second_moment)
    order = np.argsort(-diagonal, kind="stable")
    # The factor R of H = R R^T is upper triangular: the Cholesky factor of H with rows and columns reversed, reversed.
    backwards = order[::-1]
    damped = second_moment[backwards[:, None], backwards].astype(np.float64)
    damped[np.diag_indices_from(damped)] += _DAMPING * diagonal.mean(dtype=np.float64)
    try:
        factor = np.linalg.cholesky(damped)[::-1, ::-1]
    except np.linalg.LinAlgError:
        return PreparedInput(order, None, cpu.panels(held_out[:, order].T))
    del damped
    factor /= np.diag(factor).copy()
    return PreparedInput(order, cpu.panels(factor), cpu.panels(held_out[:, order].T))


def rounding_bytes(plan: ConversionPlan) -> int:
    """Return the most memory that rounding a plan's weights takes at a time; 0 if none is rounded by a calibration."""
    widths = [tensor.rounding.n_features for tensor in plan.tensors if tensor.rounding]
    if not widths:
        return 0
    from int8convert.calibration.moments import MAX_HELD_OUT

    widest = max(widths)
    return _LIBRARY_BYTES + (_PREPARING_BYTES + 4) * widest**2 + 3 * 4 * MAX_HELD_OUT * widest


class CalibrationInputs:
    """The prepared inputs of a conversion: the last two that were asked for. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prepared: dict[object, PreparedInput] = {}

    def get(self, moments: InputMoments) -> PreparedInput:
        """Return an input. Others wait while one is prepared, which takes all cores."""
        with self._lock:
            found = self._prepared.pop(moments.identity, None)
            if found is None:
                for older in list(self._prepared)[:-1]:
                    del self._prepared[older]
                found = prepare(*moments.load())
            self._prepared[moments.identity] = found
            return found


class RowRounding:
    """Rounds the rows of one weight, and keeps the outcome."""

    def __init__(self, moments: InputMoments, n_rows: int, inputs: CalibrationInputs) -> None:
        self._moments = moments
        self._inputs = inputs
        self._is_accepted = np.zeros(n_rows, bool)
        self._errors = np.zeros((2, n_rows))

    def round(
        self,
        weight: Matrix,
        begin: int,
        codes: npt.NDArray[np.int8],
        absmax: Matrix,
        noise: npt.NDArray[np.float64],
    ) -> None:
        """Choose the codes of some rows.

        Args:
            weight: float32 [n, in], the rows from `begin` on.
            codes: int8 [n, in], rounded to nearest; changed.
            absmax: float32 [n].
            noise: float64 [n], see `reference.QuantizedRows`; changed.
        """
        prepared = self._inputs.get(self._moments)
        with np.errstate(divide="ignore", over="ignore"):
            inv_scale = (np.float32(1) / absmax) * np.float32(N_STEPS)
        inv_scale[~np.isfinite(inv_scale)] = 0
        in_steps = weight[:, prepared.order] * inv_scale[:, None]
        nearest = np.subtract(in_steps, codes[:, prepared.order], dtype=np.float32)
        rounded = nearest
        if prepared.feedback is not None:
            rounded = np.empty_like(nearest)
            cpu.feedback_round(in_steps, prepared.feedback, CALIBRATED_STEPS_AWAY, rounded)
        rows = slice(begin, begin + len(weight))
        errors = self._errors[:, rows]
        for each, squares in zip((nearest, rounded), errors, strict=True):
            cpu.square_products(each, prepared.held_out, squares)
        errors *= np.square(absmax.astype(np.float64) / N_STEPS)
        is_accepted = self._is_accepted[rows] = errors[1] < errors[0]
        chosen = np.rint(in_steps[is_accepted] - rounded[is_accepted]).astype(np.int8)
        codes[np.ix_(is_accepted, prepared.order)] = chosen
        noise[is_accepted] = np.square(rounded[is_accepted], dtype=np.float64).sum(axis=1)

    def outcome(self) -> CalibratedRows:
        """Return the outcome, after the last rows."""
        nearest, rounded = self._errors
        written = np.where(self._is_accepted, rounded, nearest)
        errors = (float(f"{each.sum():.{_DIGITS}g}") for each in (nearest, written))
        return CalibratedRows(int(np.count_nonzero(self._is_accepted)), *errors)
