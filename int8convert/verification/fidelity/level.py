"""The fidelity level of `verify`: compares the predictions of an int8 checkpoint and its source on the same tokens.

1. Every window of the text goes through both models, one window at a time, so that no window's outlier columns depend
   on another's.
2. At each position the two distributions over the vocabulary are compared (`paired_statistics`). After each decoder
   layer the two hidden states are compared, so an error shows from the layer where it begins.
3. Both models are in memory if they fit. Otherwise they go through the layers in lockstep (`lockstep`). The results are
   the same to rounding.

The int8 model is what `int8convert.load` returns, in its own dtype. The reference runs in float32 on the CPU, where 16
bits are slower and less exact, and in its own dtype elsewhere. So the rounding of the int8 model's 16-bit parts is in
the result, too.

Does not know how other texts would come out, and says nothing of tasks.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from int8convert.errors import SourceError
from int8convert.events import EventSink, ignore
from int8convert.runtime.memory import USABLE, available_bytes, peak_bytes, start_peak
from int8convert.runtime.models import choose_device
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.fidelity.comparison import Comparison, FidelityTask
from int8convert.verification.fidelity.in_memory import compare_in_memory
from int8convert.verification.fidelity.lockstep import compare_in_lockstep
from int8convert.verification.fidelity.memory import bytes_in_memory
from int8convert.verification.fidelity.paired_statistics import PairedSummary
from int8convert.verification.options import Execution


@dataclass(frozen=True, slots=True)
class FidelityReport(PairedSummary):
    """Effect of one arithmetic of the int8 model on the predictions.

    Attributes:
        mode: the arithmetic, one of `fidelity.arithmetic.MODES`.
        threshold: magnitude from which a column is an outlier; None if the mode does not look for outliers.
        outlier_share: share of the int8 layers' input columns that stayed 16-bit, 0 to 1.
        dtype, reference_dtype: dtype of the int8 model's other tensors, and of the reference.
        layer_errors: decoder layer -> |difference of the hidden states| / |reference's| after it, in the order of the
            layers; all int8 layers before it included.
        streamed: whether the models ran layer by layer.
        peak_memory_bytes: the most memory that was resident in this process, mapped files included, GPUs excluded.
        seconds: time of the whole measurement, which all its arithmetics share.
        convention: how the text was cut, which tokens were scored, and what perplexity means then.

    All others are those of `paired_statistics.PairedSummary`.
    """

    mode: str
    threshold: float | None
    layer_errors: tuple[tuple[str, float], ...]
    outlier_share: float
    dtype: str
    reference_dtype: str
    device: str
    streamed: bool
    peak_memory_bytes: int
    seconds: float
    convention: str


@torch.no_grad()
def measure_fidelity(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    windows: TokenWindows,
    execution: Execution = Execution(),  # noqa: B008, frozen
    *,
    trust_remote_code: bool = False,
    on_event: EventSink = ignore,
) -> tuple[FidelityReport, ...]:
    """Compare an int8 checkpoint with its source on a text.

    Args:
        windows: the tokens, by the reference's tokenizer.
        on_event: receives `MeasurementStarted` and `MeasurementStep`.

    Returns:
        one report for each arithmetic.

    Raises:
        Int8ConvertError: a checkpoint cannot be read, does not predict the next token, or lacks what a mode needs.
        ValueError: a mode is unknown, or a threshold is negative.
    """
    began = time.perf_counter()
    start_peak()
    used = choose_device(execution.device)
    task = FidelityTask(reference, out, windows, replace(execution, device=used), trust_remote_code, on_event)
    stream = execution.stream
    if stream is None:
        stream = bytes_in_memory(task) > USABLE * available_bytes(used)
    measured = compare_in_lockstep(task) if stream else compare_in_memory(task)
    return tuple(
        FidelityReport(
            mode=comparison.arithmetic.mode,
            threshold=comparison.arithmetic.threshold,
            **_statistics(comparison, reference),
            layer_errors=comparison.layer_errors(),
            outlier_share=comparison.columns.share,
            dtype=str(measured.dtype).removeprefix("torch."),
            reference_dtype=str(measured.reference_dtype).removeprefix("torch."),
            device=used,
            streamed=stream,
            peak_memory_bytes=peak_bytes(),
            seconds=time.perf_counter() - began,
            convention=windows.convention,
        )
        for comparison in measured.comparisons
    )


def _statistics(comparison: Comparison, reference: str | os.PathLike[str]) -> dict[str, Any]:
    summary = asdict(comparison.statistics.summarize())
    if math.isnan(summary["reference_perplexity"]):
        raise SourceError(
            f"'{os.fspath(reference)}' predicts NaN on this text: there is nothing to compare with",
            "use --level exact, which needs no predictions",
        )
    return summary
