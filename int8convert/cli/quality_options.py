"""The options of `quantize` that bring predictions nearer to the source's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli import console, options
from int8convert.errors import Int8ConvertError

if TYPE_CHECKING:
    from int8convert.events import EventSink
    from int8convert.planning.kept_modules import KeepBudget
    from int8convert.planning.plan_checkpoint import PlanOptions

CALIBRATED = "calibrated"
"""Value of --smooth, --round and --columns: choose by the folder that --calibration names."""

_PARTS = re.compile(
    r"--keep-budget \d+(\.\d+)?|--(calibration|damage|keep-budget|moments|rotate|round calibrated)(?![\w-])"
)
"""Options that --quality best stands for, as errors name them."""


def _check_quality(quality: str | None) -> str | None:
    if quality is not None:
        options.check_choice(quality, ("best",))
    return quality


def _check_rounding(name: str) -> str:
    options.check_choice(name, ("nearest", CALIBRATED))
    return name


def _check_file_or_calibrated(value: str | None) -> str | None:
    if value is not None and Path(value).is_dir():
        raise typer.BadParameter(f"it is {CALIBRATED} or a file, and '{value}' is a folder, as --calibration takes")
    return value


Quality = Annotated[
    str | None,
    typer.Option(
        metavar="QUALITY",
        callback=_check_quality,
        help="best: calibrate SRC on --text, round by the calibration, and rotate if that is expected to help. Keep "
        "the costliest modules 16-bit, up to --keep-budget (default: 2 %). SRC must fit into memory.",
    ),
]

Rotate = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Fold a rotation into the weights, which spreads outliers. Every loader runs OUT. Fails if the model's "
        "class allows no rotation.",
    ),
]

RotateInputs = Annotated[
    bool,
    typer.Option(
        "--rotate-inputs",
        help="Like --rotate; the loader also rotates further inputs while the model runs. Only vLLM on one GPU and "
        "int8convert.load do. Needs --format compressed-tensors.",
    ),
]

Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="CAL",
        help="The folder that int8convert calibrate wrote for SRC, for --smooth, --round and --columns calibrated.",
    ),
]

Smooth = Annotated[
    str | None,
    typer.Option(
        metavar="calibrated|FILE",
        callback=_check_file_or_calibrated,
        help="Fold factors into the weights, which move outliers between inputs and weights where layers' outputs get "
        "more exact. calibrated: choose factors by CAL, which needs --moments. FILE: an earlier smoothing.safetensors.",
    ),
]

Columns = Annotated[
    str | None,
    typer.Option(
        metavar="calibrated|FILE",
        callback=_check_file_or_calibrated,
        help="After the conversion, store outlier columns in 16 bits, for int8convert.load. calibrated: choose columns "
        "by CAL. FILE: choose them by running this text through OUT.",
    ),
]

KeepPercent = Annotated[
    float | None,
    typer.Option(
        parser=options.parse_percent,
        metavar="PERCENT",
        help="Leave the modules 16-bit whose rounding costs the predictions most, up to this share of the weights. "
        "SRC must fit into memory.",
    ),
]

Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With --keep-budget or --quality: text in UTF-8 to run through SRC.  [default: a small one]",
    ),
]

Round = Annotated[
    str,
    typer.Option(
        metavar="ROUNDING",
        callback=_check_rounding,
        help="nearest; or calibrated: choose codes by the error of the layers' outputs on CAL (GPTQ), which needs "
        "--moments.",
    ),
]


def kept_by(percent: float | None, text: Path | None, device: str, trust_remote_code: bool) -> KeepBudget | None:
    """Return the rule of --keep-budget; None without it."""
    if percent is None:
        return None
    from int8convert.outliers.keep import keep_budget
    from int8convert.runtime.text.texts import Text

    return keep_budget(percent, Text(text), device=device, trust_remote_code=trust_remote_code)


def best(
    src: str,
    out: str,
    plan_options: PlanOptions,
    percent: float | None,
    text: Path | None,
    device: str,
    on_event: EventSink,
) -> PlanOptions:
    """Return the options of --quality best, and say on stderr what was chosen."""
    from int8convert.outliers.quality import KEPT_PERCENT, best_options
    from int8convert.runtime.text.texts import Text

    found = best_options(
        src, out, plan_options, Text(text), percent=percent or KEPT_PERCENT, device=device, on_event=on_event
    )
    chosen = "with --rotate" if found.options.rotate else "without --rotate"
    if found.kl_plain is not None and found.kl_rotated is not None:
        chosen += f": expected KL divergence {found.kl_rotated:.2g} nats a token with it, {found.kl_plain:.2g} without"
    elif found.refusal:
        chosen += f": {found.refusal}"
    console.note(f"--quality best converts {chosen}; the calibration is in '{found.calibration}'")
    return found.options


@contextmanager
def naming_best(quality: str | None) -> Iterator[None]:
    """Make errors of what --quality best does name it, in place of options that it stands for."""
    try:
        yield
    except Int8ConvertError as error:
        if quality is not None:
            error.message = _PARTS.sub(_as_typed, error.message)
            error.hint = "leave out --quality best" if _PARTS.search(error.hint) else error.hint
        raise


def _as_typed(part: re.Match[str]) -> str:
    return f"--quality best {part[0]}" if part[0][-1].isdigit() else "--quality best"


def check(context: typer.Context) -> None:
    """Refuse contradictory options, and options that lack what they need."""
    given = set(options.given_options(context))
    if "text" in given and not given & {"keep_budget", "quality"}:
        raise options.UsageError("--text needs --keep-budget PERCENT or --quality best")
    beside = sorted(given & {"rotate", "rotate_inputs", "smooth", "round", "calibration", "columns", "lora"})
    if "quality" in given and beside:
        raise options.UsageError(f"--quality best chooses by itself: leave out {options.option_name(beside[0])}")
    if "rotate_inputs" in given and not _rotates_inputs(context.params["format"]):
        raise options.UsageError("--rotate-inputs needs --format compressed-tensors: no other loader rotates inputs")
    if context.params["keep_budget"] == 0:
        raise typer.BadParameter("it must be above 0", param_hint="--keep-budget")
    if {"keep_budget", "lora"} <= given:
        raise options.UsageError("--keep-budget measures SRC without the adapter: give one of --keep-budget and --lora")
    if {"smooth", "lora"} <= given:
        raise options.UsageError("--smooth measures SRC without the adapter: give one of --smooth and --lora")
    changed = next((name for name in ("rotate", "rotate_inputs", "smooth", "lora") if name in given), None)
    if changed and context.params["columns"] == CALIBRATED:
        raise options.UsageError(
            f"--columns calibrated describes SRC without {options.option_name(changed)}: pass a text to --columns, or "
            "leave one of the two out"
        )
    uses = [name for name in ("smooth", "round", "columns") if context.params[name] == CALIBRATED]
    if uses and "calibration" not in given:
        raise options.UsageError(f"{options.option_name(uses[0])} calibrated needs --calibration CAL")
    if "calibration" in given and not uses:
        raise options.UsageError("--calibration needs --smooth calibrated, --round calibrated or --columns calibrated")


def _rotates_inputs(name: str) -> bool:
    from int8convert.formats.format import Format
    from int8convert.formats.modules import module_of

    return module_of(Format(name)).ROTATES_INPUTS
