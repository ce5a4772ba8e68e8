"""What reaches the terminal: standard streams that are open, and text whose control characters are escaped.

A daemon, cron or a container may start the command with some streams closed. The next file to be opened would then get
the number 0, 1 or 2, and output printed to that number would be written into a checkpoint.

A model type, a tensor's name or what a template raises can hold escape sequences, which clear the screen, rename the
window or answer in the user's name. Our own errors escape them (`int8convert.errors`). Here is the last line of
defence, around all that a command prints: our consoles, log records and warnings of libraries, and tracebacks.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""C0, DEL, C1, and the marks that make text run backwards."""

_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS if chr(code) not in "\n\t"}


def plain(text: str) -> str:
    """Return text with its control characters escaped, except newline and tab."""
    return text.translate(_ESCAPES)


class PlainConsole(Console):
    """Console that adds its own colours and removes those that come with the text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


@contextmanager
def escaping_messages() -> Iterator[None]:
    """Escape libraries' log records and warnings, and the traceback of an uncaught exception."""
    make_record, format_warning, hook = logging.getLogRecordFactory(), warnings.formatwarning, sys.excepthook

    def make_plain_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        with suppress(TypeError, ValueError):  # of a message that does not fit its arguments; the handler says so
            record.msg, record.args = plain(record.getMessage()), None
        if record.exc_info:
            record.exc_text = plain(logging.Formatter().formatException(record.exc_info))
        return record

    def format_plain_warning(*args: Any, **options: Any) -> str:
        return plain(format_warning(*args, **options))

    logging.setLogRecordFactory(make_plain_record)
    warnings.formatwarning = format_plain_warning
    sys.excepthook = _print_traceback  # until the process ends, if an exception comes
    try:
        yield
        sys.excepthook = hook
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.stderr.write(plain("".join(traceback.format_exception(kind, error, where))))


_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}


def open_missing_streams() -> None:
    """Point closed standard streams to /dev/null, and let stdout and stderr print every name.

    A character that the terminal's encoding lacks, such as an accent in a C locale or a byte of a path that is not
    UTF-8, is printed as its escape.
    """
    for fd in range(len(_MODES)):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
    for name, mode in _MODES.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a test's or a notebook's own stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal. A closed stream is None."""
    return stream is not None and stream.isatty()
