"""Control characters of a stranger's text are escaped before they reach the terminal, whoever prints them.

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
    """Text with its control characters, newline and tab excepted, as escapes that print."""
    return text.translate(_ESCAPES)


class PlainConsole(Console):
    """A console that adds colours of its own and lets none through that come with the text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


@contextmanager
def escaping_messages() -> Iterator[None]:
    """Escape what libraries log and warn of, and the traceback of an exception that comes through."""
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
