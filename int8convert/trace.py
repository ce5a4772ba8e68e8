"""A timeline of a conversion: what each thread did and when, in the Chrome trace event format.

`recording` collects the spans of the whole process and writes them to a file at its end. Viewers such as
https://ui.perfetto.dev and chrome://tracing show one row for each thread. A gap in a row is a wait.

Cost: less than a microsecond and 200 bytes of memory a span; a conversion has about five spans for each megabyte read.
Without a recording, `span` costs a comparison.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from int8convert.errors import OutputError
from int8convert.text import quoted

_OFF = nullcontext()
_spans: list[_Span] | None = None


class _Span:
    """One piece of work of one thread. A context manager, which takes the times."""

    __slots__ = ("began_ns", "ended_ns", "n_bytes", "name", "thread_id", "thread_name")

    def __init__(self, name: str, n_bytes: int | None) -> None:
        self.name = name
        self.n_bytes = n_bytes

    def __enter__(self) -> None:
        self.began_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self.ended_ns = time.perf_counter_ns()
        thread = threading.current_thread()
        self.thread_id, self.thread_name = threading.get_native_id(), thread.name
        if _spans is not None:
            _spans.append(self)


def span(name: str, n_bytes: int | None = None) -> AbstractContextManager[None]:
    """Return a context manager whose body is one span of the recording, if there is one.

    Args:
        name: a verb, such as "read".
        n_bytes: bytes that the body reads, writes or hashes; None where there are none to count.
    """
    return _OFF if _spans is None else _Span(name, n_bytes)


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Record the spans of all threads, and write them to a file at the end, also after an error.

    Args:
        path: the file, which is overwritten; None records nothing.

    Raises:
        OutputError: the file cannot be written. Before the body runs, if that shows when it is opened.
        ValueError: another recording has not ended.
    """
    global _spans
    if path is None:
        yield
        return
    if _spans is not None:
        raise ValueError("there is one recording at a time")
    _write(path, "")
    began_ns = time.perf_counter_ns()
    spans: list[_Span] = []
    _spans = spans
    try:
        yield
    finally:
        _spans = None
        _write(path, _as_json(spans, began_ns))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OutputError(
            f"the trace {quoted(str(path), 200)} cannot be written: {error.strerror}", "name another file"
        ) from error


def _as_json(spans: list[_Span], began_ns: int) -> str:
    """Return a JSON array with an event a line: "M" names a thread's row, "X" is a span with times in microseconds."""
    process = os.getpid()
    names = {each.thread_id: each.thread_name for each in spans}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}}
        for thread, name in names.items()
    ]
    for each in sorted(spans, key=lambda each: each.began_ns):
        events.append(
            {
                "ph": "X",
                "name": each.name,
                "pid": process,
                "tid": each.thread_id,
                "ts": (each.began_ns - began_ns) / 1000,
                "dur": (each.ended_ns - each.began_ns) / 1000,
                "args": {} if each.n_bytes is None else {"bytes": each.n_bytes},
            }
        )
    return "[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n"
