"""`int8convert generate`: runs an int8 checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli import console, options
from int8convert.cli.terminal import plain
from int8convert.errors import SourceError
from int8convert.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from int8convert.runtime.generate import GenerationReport

HELP = f"""Continue a prompt with an int8 checkpoint.

OUT is in the bitsandbytes or compressed-tensors format. The text goes to stdout while it is generated. Speed and memory
go to stderr.

\b
Examples:
  int8convert generate ./opt-66b-int8 "The capital of France is"
  int8convert generate ./qwen3-int8 --file prompts.txt --temperature 0.7 --seed 1

{options.EXIT_CODES}
"""

_INTERRUPTED = "nothing was written"


def _check_outliers(mode: str | None) -> str | None:
    from int8convert.runtime.modes import OutlierMode

    options.check_choice(mode, tuple(OutlierMode))
    return mode


def generate(
    out: options.Int8Checkpoint,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts to run as one batch, one on each line. --json keeps their texts apart."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Generate at most so many tokens for each prompt.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="Sampling temperature. 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, metavar="X", help="Sample from the likeliest tokens with this total probability."
        ),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, metavar="N", help="Sample from so many of the likeliest tokens, or from all if 0.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Random seed for sampling.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template.  [default: if there is one]")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The chat's system message.")] = None,
    outliers: Annotated[
        str | None,
        typer.Option(
            callback=_check_outliers,
            metavar="MODE",
            help="How inputs are quantized: static, static+guard, dynamic or none; with a scale for each 128 features: "
            "static+blocks, dynamic+blocks or blocks.  [default: static+guard if OUT stores columns, else dynamic]",
        ),
    ] = None,
    int8_head: Annotated[
        bool, typer.Option("--int8-head", help="Run the output head in int8, too. Faster, and a little less exact.")
    ] = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the text.")] = False,
) -> None:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give one prompt, or --file with several", param_hint="PROMPT")
    if system is not None and chat is False:
        raise typer.BadParameter("a system message needs a chat, and --no-chat is given", param_hint="--system")
    streams = prompt is not None and not as_json
    output = _Output()
    with console.reporting_errors(as_json, _INTERRUPTED), output.ending_its_line():
        prompts = [prompt] if prompt is not None else _read_prompts(file or Path())
        with console.quieting_libraries(console.wants_live_display(quiet, as_json), not quiet and not as_json):
            from int8convert.runtime.generate import Sampling
            from int8convert.runtime.generate import generate as run

            report = run(
                out,
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature, top_p, top_k, seed),
                chat=chat,
                system=system,
                outliers=outliers,
                device=device,
                int8_head=int8_head,
                on_text=output.write if streams else None,
            )
        if as_json:
            console.print_json(report.to_json())
        elif not streams:
            for text in report.texts:
                output.write(f"{text}\n")
    if not quiet and not as_json:
        if temperature == 0 and (seed is not None or top_p < 1 or top_k > 0):
            console.note("--seed, --top-p and --top-k have no effect at --temperature 0")
        _print_notes(report, max_new_tokens)


def _print_notes(report: GenerationReport, max_new_tokens: int) -> None:
    n_cut = report.is_complete.count(False)
    if n_cut:
        which = "the text was" if len(report.texts) == 1 else f"{n_cut:,} of {len(report.texts):,} texts were"
        is_full = report.max_new_tokens < max_new_tokens
        why = "the model has no more positions" if is_full else "--max-new-tokens asks for no more"
        console.note(f"{which} cut off after {report.max_new_tokens:,} tokens: {why}")
    console.note(
        f"{report.n_new_tokens:,} tokens, the first after {format_seconds(report.first_token_s)}, then "
        f"{report.decode_tokens_per_s:.1f} tokens/s on the {report.device}; loaded in "
        f"{format_seconds(report.load_s)}, at most {format_bytes(report.peak_memory_bytes)} of memory"
    )


class _Output:
    """Writes the model's text to stdout. Nothing in it is markup.

    On a terminal, control characters are escaped: the model and its vocabulary are a stranger's.
    """

    def __init__(self) -> None:
        self._last = "\n"

    def write(self, text: str) -> None:
        self._last = text[-1:] or self._last  # first: a signal may come as soon as the text is out
        with console.writing_result():
            sys.stdout.write(plain(text) if sys.stdout.isatty() else text)

    @contextmanager
    def ending_its_line(self) -> Iterator[None]:
        """End the last line, so that an error or the shell's prompt begins a new one."""
        try:
            yield
        finally:
            if self._last != "\n":
                self.write("\n")


def _read_prompts(file: Path) -> list[str]:
    hint = "give a text file in UTF-8 with one prompt on each line"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise SourceError(f"'{file}' cannot be read: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"'{file}' is not UTF-8 text: byte {error.start:,} {error.reason}", hint) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise SourceError(f"'{file}' holds no prompt", hint)
    return prompts
