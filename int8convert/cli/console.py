"""Prints everything: results to stdout; progress, notes and errors to stderr.

No text is markup: a path may hold brackets, and a stranger's checkpoint chooses the names in it. Style is passed beside
the text.
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

from int8convert.cli.terminal import PlainConsole, escaping_messages, is_terminal, plain
from int8convert.errors import Int8ConvertError, OutputError, SourceError
from int8convert.hub import retry

_WIDTH_OF_A_PIPE = 160
"""Columns of a table in a file or a pipe. rich would assume 80."""

stdout = PlainConsole(
    highlight=False,
    markup=False,
    emoji=False,
    soft_wrap=True,
    width=None if is_terminal(sys.stdout) else _WIDTH_OF_A_PIPE,
)
stderr = PlainConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def wants_live_display(quiet: bool, as_json: bool) -> bool:
    """Return whether a person watches a terminal that can redraw. FORCE_COLOR would change rich's own guess."""
    return sys.stderr.isatty() and not stderr.is_dumb_terminal and not quiet and not as_json


@contextmanager
def quieting_libraries(is_live: bool, is_told: bool = False) -> Iterator[None]:
    """Silence the warnings of libraries, and their progress bars unless a person watches.

    Args:
        is_told: import torch and transformers first, and say so meanwhile, because it takes seconds.
    """
    if is_told and "torch" not in sys.modules:
        _import_libraries()
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


def _import_libraries() -> None:
    text = "importing torch and transformers"
    if stderr.is_terminal and not stderr.is_dumb_terminal:
        telling: Any = stderr.status(text)
    else:
        stderr.print(text)
        telling = nullcontext()
    with telling:
        import torch  # noqa: F401
        import transformers  # noqa: F401


@contextmanager
def quieting_hub(with_bars: bool = False) -> Iterator[None]:
    """Silence the Hub's client: our notes report its retries, and its warnings hold addresses.

    Args:
        with_bars: show its progress bars within a file; ours count whole files.
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
RESUMABLE_THERE = "finished shards are kept, on the Hub or here; the same command resumes, here or on another machine"
"""Hints of an interrupted command that resumes: without --upload, and with it."""


@contextmanager
def reporting_errors(as_json: bool, interrupted_hint: str = RESUMABLE) -> Iterator[None]:
    """Print our own errors as two lines and exit with their code. Any other exception is a bug and keeps its traceback.

    This is the only error boundary.

    Args:
        interrupted_hint: what is on the disk after Ctrl-C or SIGTERM.
    """
    try:
        with escaping_messages(), nullcontext() if as_json else telling_waits():
            _check_current_directory()
            yield
    except Int8ConvertError as error:
        _print_error(**describe_error(error), as_json=as_json)
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
            "the current directory was deleted", "change to another directory and rerun the same command"
        ) from None


def tell_interruption(stop: KeyboardInterrupt, as_json: bool, hint: str) -> int:
    """Print that Ctrl-C or SIGTERM stopped the command; return the exit code."""
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
    """Print on stderr an error that the result on stdout also holds; return the exit to raise."""
    _print_error(**describe_error(error), as_json=False)
    return typer.Exit(error.exit_code)


def describe_error(error: Int8ConvertError) -> dict[str, str]:
    """Return an error as the entry `error` of a JSON object. Its hint ends with what is on the disk."""
    hint = "; ".join(filter(None, (error.hint, error.state)))
    return {"code": error.code, "message": error.message, "hint": hint}


def print_json_error(code: str, message: str, hint: str) -> None:
    """Print the object that replaces the result. If stdout cannot be written, the error on stderr must suffice."""
    with suppress(OutputError):
        print_json({"schema": 1, "error": {"code": code, "message": message, "hint": hint}})


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C except for the exit code."""


def terminate(_signal_number: int, _frame: object) -> None:
    retry.interrupted.set()
    raise TerminatedError


def interrupt(_signal_number: int, _frame: object) -> None:
    retry.interrupted.set()
    raise KeyboardInterrupt


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def telling_waits() -> Iterator[None]:
    """Print a note for each long wait for the Hub."""
    handler = _Notes()
    retry.retry_log.addHandler(handler)
    try:
        yield
    finally:
        retry.retry_log.removeHandler(handler)


def note(message: str) -> None:
    """Print one line that the user should see, on stderr."""
    stderr.print(Text.assemble(("note:", "bold"), f" {message}"))


@contextmanager
def writing_result() -> Iterator[None]:
    """Report that stdout cannot be written, e.g. on a full disk. typer handles a closed pipe."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails at its end on what is left
        raise OutputError(
            f"the result cannot be written to stdout: {error.strerror}",
            "the command has done its work; make room and rerun it to see the result",
        ) from error


def print_json(value: dict[str, Any]) -> None:
    """Print the machine-readable result: one object, and nothing else on stdout."""
    with writing_result():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_line(text: str, head: str = "", style: str = "") -> None:
    """Print a line of the result: its head in bold, then the text in a style of rich."""
    with writing_result():
        stdout.print(Text.assemble((head, "bold"), (text, style)))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of the result: the first column left-aligned, the others right-aligned.

    Cells wrap between words. Longer words are not cut, so that names can be copied.
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
