"""Chooses the factors of smoothed groups by the error of layers' outputs, in the arithmetic of the format's loader.

1. The factors of a group are s = max|x|^a / max|W|^(1 - a) for each feature of the tensor x that its layers read, with
   geometric mean 1. The strength a is one of 0, 0.1 ... 1; or nothing is smoothed.
2. For each choice, inputs x / s and weights W diag(s) of all int8 layers of the group are rounded as their loader
   rounds them, and the squared error of the outputs is summed. Half of the held-out inputs of a calibration choose.
3. The other half decides whether the choice is better than no smoothing. If not, the group is left alone.

Rows of weights that are divided by s keep their codes, since each row has a scale of its own.

Costs two readings of the weights that read a group's tensor, 12 products with 512 tokens each, and 24 KB of memory for
each of its features beside the calibration's moments. Does not know whether a smaller error of a layer's outputs makes
a better model, and ignores the rounding of what stays 16-bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cuda_kernels import cpu
from cuda_kernels.reference import N_STEPS
from int8convert.calibration.folder import CalibratedInput, Calibration, read_calibration, read_moments
from int8convert.checkpoint.floats import kernel_bits, widen
from int8convert.checkpoint.rows import Scratch
from int8convert.conversion.source_rows import SourceRows
from int8convert.errors import FormatError, SourceError
from int8convert.events import EventSink, GroupsSmoothed, SmoothingStarted
from int8convert.formats.int8_checkpoint import SourceReaders
from int8convert.formats.modules import module_of
from int8convert.planning.fold import Values
from int8convert.planning.plan import ConversionPlan, PlannedTensor
from int8convert.planning.smoothing import SmoothGroup, SmoothingFactors, spread
from int8convert.runtime.steps import Steps

STRENGTHS = tuple(i / 10 for i in range(11))

MAX_FACTOR = 256.0
"""Largest factor, and the inverse of the smallest one. A feature that is nearly zero would get any."""

MAX_TOKENS = 256
"""Tokens of each half of the held-out inputs that are used."""


@dataclass(frozen=True, slots=True)
class ReadTensor:
    """The tensor that a group's layers read, and the int8 weights among them.

    Attributes:
        held_out: float32 [tokens, in].
        largest: float32 [in], the largest magnitude of each feature.
        threshold: magnitude from which a column of inputs stays exact; 0 rounds all, with one scale a token.
    """

    group: SmoothGroup
    weights: tuple[PlannedTensor, ...]
    held_out: Values = field(repr=False)
    largest: Values = field(repr=False)
    threshold: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome for one group.

    Attributes:
        factors: [size]; None if nothing is smoothed.
        strength: the best one on the first half; None if that is no smoothing.
        error_before, error_after: on the second half, as a share of the outputs' squares.
    """

    factors: Values | None = field(repr=False)
    strength: float | None
    error_before: float
    error_after: float


def search_factors(
    plan: ConversionPlan, folder: Path, threshold: float, on_event: EventSink
) -> tuple[SmoothingFactors, GroupsSmoothed]:
    """Choose the factors of a plan's groups by a calibration.

    Args:
        plan: made without factors.
        threshold: of the outliers, where the format's loader has one.

    Raises:
        FormatError: no layer of a group becomes int8.
        SourceError: the calibration has no held-out inputs.
        CorruptFileError: it is damaged.
    """
    calibration = read_calibration(folder, plan.source)
    groups = plan.folding.smooth_groups if plan.folding else ()
    on_event(SmoothingStarted(len(groups)))
    used = threshold if module_of(plan.model_map.output_format).HAS_THRESHOLD else 0.0
    steps = Steps([1] * len(groups), on_event)
    factors: dict[str, Values] = {}
    choices = []
    with SourceReaders() as readers:
        for group in groups:
            tensor = _read_tensor(plan, group, calibration, folder, used)
            if tensor is not None:
                choice = choose(tensor, readers)
                choices.append(choice)
                if choice.factors is not None:
                    factors[group.name] = choice.factors
            steps.done(group.name)
    if not any(_int8_weights(plan, group) for group in groups):
        raise FormatError(
            f"--smooth has nothing to smooth: none of its layers becomes int8 in {plan.model_map.output_format}",
            "leave out --smooth, or choose another --format",
        )
    if not choices:
        raise SourceError(
            f"'{folder}' holds no held-out inputs of layers that can be smoothed",
            "calibrate again with int8convert calibrate --moments",
        )
    before, after = (float(np.mean([getattr(c, name) for c in choices])) for name in ("error_before", "error_after"))
    return SmoothingFactors(factors), GroupsSmoothed(len(factors), len(groups), before, after)


def _read_tensor(
    plan: ConversionPlan, group: SmoothGroup, calibration: Calibration, folder: Path, threshold: float
) -> ReadTensor | None:
    """Return what a group's choice is made by; None if no layer of it is int8, or its input was not held out."""
    weights = _int8_weights(plan, group)
    entry = _entry(calibration, group)
    moments = read_moments(folder, entry) if weights and entry is not None else None
    if moments is None or len(moments.held_out) < 2:
        return None
    largest = calibration.statistics[group.readers[0]].largest.numpy()
    return ReadTensor(group, weights, moments.held_out.numpy(), largest, threshold)


def _int8_weights(plan: ConversionPlan, group: SmoothGroup) -> tuple[PlannedTensor, ...]:
    """Return the weights that read a group's tensor and become int8."""
    planned = {tensor.source.name: tensor for tensor in plan.tensors if tensor.is_quantized}
    keys = [plan.model_map.parameters[f"{name}.weight"][0] for name in group.readers]
    return tuple(planned[key] for key in keys if key in planned)


def _entry(calibration: Calibration, group: SmoothGroup) -> CalibratedInput | None:
    """Return the input that all layers of a group read; None if the calibration knows of none."""
    return next((entry for entry in calibration.inputs if set(group.readers) <= set(entry.modules)), None)


def choose(tensor: ReadTensor, readers: SourceReaders) -> Choice:
    """Choose the factors of one group."""
    largest_weights = np.zeros(tensor.held_out.shape[1], np.float32)
    for rows in _rows(tensor.weights, readers):
        np.maximum(largest_weights, np.abs(rows).max(0), out=largest_weights)
    group = tensor.group
    x_max, w_max = group.of_columns(tensor.largest), group.of_columns(largest_weights)
    candidates = [None, *(_factors(x_max, w_max, strength) for strength in STRENGTHS)]
    columns = [np.ones(1, np.float32) if s is None else spread(s, len(largest_weights), group.head) for s in candidates]
    halves = [_some(half) for half in np.array_split(tensor.held_out, 2)]
    rounded = [np.concatenate([round_inputs(half / s, tensor.threshold) for half in halves]) for s in columns]
    exact, n_first = np.concatenate(halves), len(halves[0])
    errors, squares = np.zeros((len(candidates), 2)), 0.0
    for rows in _rows(tensor.weights, readers):
        expected = exact @ rows.T
        squares += float(np.square(expected[n_first:], dtype=np.float64).sum())
        for i, (s, x) in enumerate(zip(columns, rounded, strict=True)):
            away = np.square(x @ round_weights(rows * s).T - expected, dtype=np.float64).sum(1)
            errors[i] += away[:n_first].sum(), away[n_first:].sum()
    best = int(errors[:, 0].argmin())
    before, after = (float(errors[i, 1]) / max(squares, 1e-300) for i in (0, best))
    if after < before:
        return Choice(candidates[best], STRENGTHS[best - 1], before, after)
    return Choice(None, STRENGTHS[best - 1] if best else None, before, before)


def _some(tokens: Values) -> Values:
    """Return at most `MAX_TOKENS` tokens, evenly spaced."""
    return tokens[:: -(-len(tokens) // MAX_TOKENS)]


def _factors(x_max: Values, w_max: Values, strength: float) -> Values:
    """Return the factors of a strength. A feature whose inputs or weights are all zero gets 1."""
    is_used = (x_max > 0) & (w_max > 0)
    logs = np.zeros(len(x_max))
    logs[is_used] = strength * np.log(x_max[is_used].astype(np.float64))
    logs[is_used] -= (1 - strength) * np.log(w_max[is_used].astype(np.float64))
    if is_used.any():
        logs[is_used] -= logs[is_used].mean()
    return np.exp(logs).clip(1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def round_inputs(x: Values, threshold: float) -> Values:
    """Return inputs [tokens, in] as a loader's int8 product takes them, each token with one scale.

    Args:
        threshold: columns that reach it at any token stay exact, and do not count for the scales; 0 for none.
    """
    is_exact = (np.abs(x) >= threshold).any(0) if threshold > 0 else np.zeros(x.shape[1], bool)
    ordinary = np.where(is_exact, np.float32(0), x)
    step = np.abs(ordinary).max(1, keepdims=True) / np.float32(N_STEPS)
    step[step == 0] = 1
    rounded: Values = np.where(is_exact, x, np.rint(ordinary / step) * step)
    return rounded


def round_weights(rows: Values) -> Values:
    """Return the weights that the codes of rows [n, in] stand for."""
    codes, absmax = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    signal, noise = np.empty(len(rows)), np.empty(len(rows))
    cpu.row_quantize(kernel_bits(rows, "F32"), codes, absmax, signal, noise)
    weights: Values = codes * (absmax / np.float32(N_STEPS))[:, None]
    return weights


def _rows(weights: tuple[PlannedTensor, ...], readers: SourceReaders) -> Iterator[Values]:
    """Yield the rows of weights, float32 [n, in], block by block."""
    scratch = Scratch()
    for tensor in weights:
        rows = SourceRows(tensor)
        for begin, end in rows.ranges():
            with readers.reading(tensor.shard) as reader:
                block = rows.read(reader, begin, end, scratch)
            yield widen(rows.values(block, begin, end), rows.dtype)
