"""All that is printed: results to stdout; progress, notes and errors to stderr.

Nothing is markup. A path may hold brackets, and a stranger's checkpoint chooses the names in it, so style is given
beside the text and never inside it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import typer
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from int8convert.cli.streams import is_terminal
from int8convert.cli.terminal import PlainConsole, escaping_messages, plain
from int8convert.errors import Int8ConvertError, OutputError, SourceError
from int8convert.hub import retry

_WIDTH_OF_A_PIPE = 160
"""Tables in a file or a pipe need not fit the 80 columns rich would assume."""

stdout = PlainConsole(
    highlight=False,
    markup=False,
    emoji=False,
    soft_wrap=True,
    width=None if is_terminal(sys.stdout) else _WIDTH_OF_A_PIPE,
)
stderr = PlainConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def wants_live_display(quiet: bool, as_json: bool) -> bool:
    """Whether a person is watching, on a terminal that can redraw. Not rich's own guess, which FORCE_COLOR changes."""
    return sys.stderr.isatty() and not stderr.is_dumb_terminal and not quiet and not as_json


@contextmanager
def quieting_libraries(is_live: bool) -> Iterator[None]:
    """stderr is for our notes: no warnings of libraries, and their progress bars only where a person is watching."""
    if os.environ.get("INT8CONVERT_DEBUG"):
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not is_live:
                import transformers

                transformers.logging.disable_progress_bar()
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def quieting_hub(with_bars: bool = False) -> Iterator[None]:
    """No lines of the Hub's client between ours: what it retries, we tell of, and what it warns of holds addresses.

    Args:
        with_bars: its progress bars may be seen, within a file; ours only know of whole ones.
    """
    if os.environ.get("INT8CONVERT_DEBUG"):
        yield
        return
    if "huggingface_hub" not in sys.modules:  # it reads these when it is imported
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if with_bars else "1")
        yield
        return
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        client.setLevel(before)


RESUMABLE = "finished shards are kept, the one in work was removed; the same command resumes"
RESUMABLE_THERE = (
    "finished shards are on the Hub, where they are no checkpoint yet, or here; the one in work was removed; the same "
    "command goes on, here or elsewhere"
)
"""The hint of a command that was interrupted and resumes."""


@contextmanager
def reporting_errors(as_json: bool, interrupted_hint: str = RESUMABLE) -> Iterator[None]:
    """The one boundary: our own errors become two lines and an exit code; all else is a bug and keeps its traceback.

    Args:
        interrupted_hint: what is on the disk after Ctrl-C or SIGTERM.
    """
    try:
        with escaping_messages(), nullcontext() if as_json else telling_waits():
            _check_current_directory()
            yield
    except Int8ConvertError as error:
        hint = "; ".join(filter(None, (error.hint, error.state)))
        _print_error(error.code, error.message, hint, as_json)
        if os.environ.get("INT8CONVERT_DEBUG"):
            raise
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        raise typer.Exit(tell_interruption(stop, as_json, interrupted_hint)) from None


def _check_current_directory() -> None:
    """Refuse to run in a directory that was deleted: libraries ask for its path while they are imported."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SourceError(
            "the current directory was deleted", "change to another directory, and run the same command there"
        ) from None


def tell_interruption(stop: KeyboardInterrupt, as_json: bool, hint: str) -> int:
    """Print that it was Ctrl-C or SIGTERM; the exit code."""
    was_terminated = isinstance(stop, TerminatedError)
    word = "terminated" if was_terminated else "interrupted"
    _print_error(word, word, hint, as_json)
    return 143 if was_terminated else 130


def _print_error(code: str, message: str, hint: str, as_json: bool) -> None:
    if as_json:
        print_json_error(code, message, hint)
    stderr.print(Text.assemble(("error:", "bold red"), f" {message}"))
    stderr.print(Text.assemble(("hint:", "bold"), f" {hint}"))


def failure(error: Int8ConvertError) -> typer.Exit:
    """Print an error on stderr, beside a result that holds it; the exit to raise."""
    _print_error(error.code, error.message, error.hint, as_json=False)
    return typer.Exit(error.exit_code)


def describe_error(error: Int8ConvertError) -> dict[str, str]:
    """An error as the entry `error` of a JSON object."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def print_json_error(code: str, message: str, hint: str) -> None:
    """The object that stands in place of the result; where stdout takes none, the error on stderr has to do."""
    with suppress(OutputError):
        print_json({"schema": 1, "error": {"code": code, "message": message, "hint": hint}})


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: to be treated as Ctrl-C is, but for the exit code."""


def terminate(signal_number: int, frame: object) -> None:
    """The handler for SIGTERM."""
    retry.interrupted.set()
    raise TerminatedError


def interrupt(signal_number: int, frame: object) -> None:
    """The handler for SIGINT."""
    retry.interrupted.set()
    raise KeyboardInterrupt


class _Notes(logging.Handler):
    """Makes notes of what a module tells."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def telling_waits() -> Iterator[None]:
    """A note of each wait for the Hub that a person would notice."""
    handler = _Notes()
    retry.retry_log.addHandler(handler)
    try:
        yield
    finally:
        retry.retry_log.removeHandler(handler)


def note(message: str) -> None:
    """One line the user should see, on stderr."""
    stderr.print(Text.assemble(("note:", "bold"), f" {message}"))


@contextmanager
def writing_result() -> Iterator[None]:
    """Tells that stdout takes no more, as of a file on a full disk; a reader that has gone is typer's affair."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails at its end on what is left
        raise OutputError(
            f"the result cannot be written to stdout: {error.strerror}",
            "what else the command was to do is done; make room, or send its output elsewhere, and run it again",
        ) from error


def print_json(value: dict[str, Any]) -> None:
    """The machine-readable result: one object, and nothing else on stdout."""
    with writing_result():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_line(text: str, head: str = "", style: str = "") -> None:
    """A line of the result: its head in bold, then the text in the style of rich's name."""
    with writing_result():
        stdout.print(Text.assemble((head, "bold"), (text, style)))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of the result: the first column to the left, the others to the right.

    Cells are wrapped between words. What is still wider than the terminal is left to it: names stay whole to be copied.
    """
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        cells = [column, *(row[i] for row in rows)]
        is_text = any(len(cell.split()) > 2 for cell in cells)  # 6.29 M is none
        parts = [word for cell in cells for word in cell.split()] if is_text else cells
        justify: JustifyMethod = "right" if i else "left"
        min_width = max(map(len, parts))
        table.add_column(plain(column), justify=justify, header_style="dim", min_width=min_width, no_wrap=not is_text)
    for row in rows:
        table.add_row(*map(plain, row))
    print_line("", head=title)  # a title of the table's own would wrap at the table's width
    with writing_result():
        stdout.print(table, soft_wrap=False, crop=False)
