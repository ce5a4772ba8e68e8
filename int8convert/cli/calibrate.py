"""`int8convert calibrate`: writes statistics of what a model's layers read on a text, for options of `quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli import console, options
from int8convert.runtime.text.texts import reusable_file
from int8convert.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from int8convert.calibration.folder import Calibration

HELP = f"""Run a text through a model, and write statistics of what its layers read to the folder CAL.

SRC is a directory or a repository on the Hub. One layer is in memory at a time, so models larger than memory run, too.
`quantize --calibration CAL` reads them: --columns calibrated chooses outlier columns, --smooth calibrated factors, and
--round calibrated codes. The last two need --moments, which take 4 * N^2 bytes for each input of N features.
Layers that read the same tensor share them, and inputs of more than 16,384 features get none.

\b
Examples:
  int8convert calibrate ./opt-66b --text sample.txt -o opt-66b-cal
  int8convert calibrate ./opt-66b --text sample.txt -o opt-66b-cal --moments
  int8convert quantize ./opt-66b ./opt-66b-int8 --calibration opt-66b-cal --columns calibrated
  int8convert quantize ./opt-66b ./opt-66b-int8 --calibration opt-66b-cal --round calibrated

{options.EXIT_CODES}
"""

_INTERRUPTED = "CAL holds no new calibration; run the same command again"


def calibrate(
    src: options.Source,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text in UTF-8 to run through the model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CAL", help="The folder to write.")],
    moments: Annotated[bool, typer.Option("--moments", help="Also write second moments and held-out inputs.")] = False,
    threshold: options.OutlierThreshold = 6.0,
    sequences: options.Sequences = 128,
    length: options.WindowLength = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    if threshold == 0:
        raise typer.BadParameter("it must be above 0", param_hint="--threshold")
    with (
        console.reporting_errors(as_json, _INTERRUPTED),
        console.quieting_hub(),
        console.quieting_libraries(False, not quiet and not as_json),
        reusable_file(text) as reusable,
    ):
        from int8convert.calibration.calibrate import calibrate as run
        from int8convert.cli.progress import showing_progress
        from int8convert.runtime.text.texts import Text

        began = time.perf_counter()
        with showing_progress(quiet, as_json, "reading the model") as on_event:
            calibration = run(
                src,
                output,
                Text(reusable, n_sequences=sequences, length=length),
                with_moments=moments,
                threshold=threshold,
                device=device,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        elapsed_s = time.perf_counter() - began
        if as_json:
            console.print_json({**calibration.record(), "folder": str(output), "elapsed_s": elapsed_s})
            return
        _print_outcome(calibration, output, elapsed_s, moments)


def _print_outcome(calibration: Calibration, folder: Path, elapsed_s: float, with_moments: bool) -> None:
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print_line(
        f": {len(calibration.statistics):,} layers with {len(calibration.inputs):,} inputs, "
        f"{calibration.n_sequences} x {calibration.length} tokens of {calibration.text}, {format_bytes(n_bytes)}, "
        f"{format_seconds(elapsed_s)}",
        head=str(folder),
    )
    wide = [entry.modules[0] for entry in calibration.inputs if entry.moments is None] if with_moments else []
    if wide:
        console.note(f"no second moments for {len(wide):,} inputs that are too wide, such as that of {wide[0]}")
