"""Escapes control characters of untrusted text before they reach the terminal.

A model type, a tensor's name or what a template raises can hold escape sequences, which clear the screen, rename the
window or answer in the user's name. Our own errors escape them (`int8convert.errors`). Here is the last line of
defence, around all that a command prints: our consoles, log records and warnings of libraries, and tracebacks.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

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
