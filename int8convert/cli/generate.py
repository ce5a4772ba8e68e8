"""`int8convert generate`: run an int8 checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from int8convert.cli.console import format_bytes, format_seconds, note, print_json, reporting_errors
from int8convert.errors import SourceError

HELP = """Let an int8 checkpoint continue a prompt.

OUT is an int8 checkpoint in the bitsandbytes or compressed-tensors layout, a directory or a repository's id. The text
goes to stdout as it comes; what it took, to stderr.

\b
Examples:
  int8convert generate ./opt-66b-int8 "The capital of France is"
  int8convert generate ./qwen3-int8 --file prompts.txt --temperature 0.7 --seed 1

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""

_INTERRUPTED = "nothing was written"


def _check_outliers(mode: str | None) -> str | None:
    modes = ("static", "static+guard", "dynamic", "none")
    if mode is not None and mode not in modes:
        raise typer.BadParameter(f"it is {', '.join(modes[:-1])} or {modes[-1]}, not {mode!r}")
    return mode


def generate(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The int8 checkpoint.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one on each line, continued as one batch.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="At most, for each prompt.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the drawing of tokens; 0 takes the likeliest one, always.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the tokens that make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many tokens; 0 from all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the drawing.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: where there is one.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The chat's system message.")] = None,
    outliers: Annotated[
        str | None,
        typer.Option(
            callback=_check_outliers,
            metavar="MODE",
            help="static, static+guard, dynamic or none; default: static+guard where OUT has stored outlier columns.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(envvar="INT8CONVERT_DEVICE", help="auto, cpu or cuda[:n].")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text alone.")] = False,
) -> None:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give one prompt, or --file with several", param_hint="PROMPT")
    with reporting_errors(as_json, _INTERRUPTED):
        prompts = [prompt] if prompt is not None else _read_prompts(file or Path())
        from int8convert.runtime.generate import generate as run

        streams = len(prompts) == 1 and not as_json
        report = run(
            out,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            chat=chat,
            system=system,
            outliers=outliers,
            device=device,
            on_text=_write if streams else None,
        )
        if as_json:
            print_json(report.to_json())
        elif streams:
            _write("\n")
        else:
            for text in report.texts:
                _write(f"{text}\n")
        if not quiet and not as_json:
            note(
                f"{report.n_new_tokens:,} tokens, the first after {format_seconds(report.first_token_s)}, then "
                f"{report.decode_tokens_per_s:.1f} tokens/s on the {report.device}; loaded in "
                f"{format_seconds(report.load_s)}, at most {format_bytes(report.peak_memory_bytes)} of memory"
            )


def _write(text: str) -> None:
    """Model text as it is: what looks like markup in it is text."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompts(file: Path) -> list[str]:
    hint = "give a text file with one prompt on each line"
    try:
        prompts = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"'{file}' cannot be read: {error}", "give a text file with one prompt on each line"
        ) from error
    if not prompts:
        raise SourceError(f"'{file}' holds no prompt", hint)
    return prompts
