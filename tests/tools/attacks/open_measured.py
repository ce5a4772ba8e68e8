"""Open a checkpoint as a conversion does, watch what that touches, and say how it ended.

As a program, `python -m tests.tools.attacks.open_measured` measures the memory and the time it takes. It opens each
checkpoint whose path comes in a line of stdin, in a process of its own, since a peak of memory cannot be reset. That
process is forked from one that has imported all. The answer is the outcome as JSON, or "" where the process died, and
the process's exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.source_weights import is_decodable
from int8convert.errors import Int8ConvertError
from int8convert.planning.model_map.model_map import check_config
from int8convert.sources import open_source
from tests.tools.attacks.registry import prepare

RUNS_CODE = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"})
MAX_LINE = 600
MAX_OPENING_S = 60
"""What takes longer in a process of its own is ended by a signal, which no code can catch."""

ROOT = Path(__file__).parents[3]

_watched: list[tuple[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How opening ended.

    error: the class of the error, "" if there was none.
    peak_bytes: growth of the resident set's high-water mark.
    """

    error: str
    message: str
    hint: str
    peak_bytes: int
    wall_s: float


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and (event == "open" or event in RUNS_CODE):
        _watched.append((event, str(arguments[0])))


sys.addaudithook(_watch)  # for the life of the process: a hook cannot be taken out again


@contextmanager
def watched_events() -> Iterator[list[tuple[str, str]]]:
    """What Python opens and runs meanwhile."""
    global _watched
    events: list[tuple[str, str]] = []
    _watched = events
    try:
        yield events
    finally:
        _watched = None


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End what hangs, such as the opening of a pipe nobody writes to."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def open_checkpoint(checkpoint: Path) -> CheckpointSource:
    """Everything a conversion learns of a source before it reads weights."""
    source = open_source(checkpoint)
    check_config(source.config, is_decodable(source))
    return source


def check_source(source: CheckpointSource) -> None:
    """A source that opened is right: every tensor lies in what its shard gives, and every file in the checkpoint."""
    inside = [Path(os.path.realpath(source.directory))]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
        inside.append(inside[0].parent.parent.parent / "blobs")
    for path in (*source.auxiliary_files, *(shard.path for shard in source.shards)):
        real = Path(os.path.realpath(path))
        assert real.is_file() and any(real.is_relative_to(root) for root in inside), path
    for shard in source.shards:
        assert shard.n_bytes == shard.path.stat().st_size
        reader = shard.open()
        try:
            for tensor in shard.tensors:
                assert tensor.name.isprintable() and tensor.offset >= 0 and min(tensor.shape, default=0) >= 0, tensor
                assert tensor.strides is None or min(tensor.strides, default=0) >= 0, tensor
                assert tensor.n_elements == 0 or tensor.offset + tensor.span_bytes <= shard.n_bytes, tensor
                # The last byte is the one that would be missing.
                last = memoryview(bytearray(min(1, tensor.span_bytes)))
                reader.read_into(last, tensor.offset + tensor.span_bytes - len(last))
        finally:
            reader.close()


def check_lines(message: str, hint: str) -> None:
    """An error is two clean lines."""
    for line in (message, hint):
        assert line and line.isprintable() and len(line) < MAX_LINE and not line.endswith("."), repr(line)


def _peak_bytes() -> int:
    # Not `ru_maxrss`: that of a new process starts at what its parent had.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _measure(checkpoint: Path) -> Outcome:
    error = message = hint = ""
    before_bytes, before_s = _peak_bytes(), time.perf_counter()
    try:
        open_checkpoint(checkpoint)
    except Int8ConvertError as caught:
        error, message, hint = type(caught).__name__, caught.message, caught.hint
    return Outcome(error, message, hint, _peak_bytes() - before_bytes, time.perf_counter() - before_s)


class MeasuringProcesses:
    """Processes that open checkpoints and measure it. A context manager."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.attacks.open_measured"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> MeasuringProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.communicate()

    def open(self, checkpoint: Path, folder: Path) -> Outcome:
        """Open a checkpoint in a process of its own, whose current folder is `folder`."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        print(json.dumps([str(checkpoint), str(folder)]), file=self._parent.stdin, flush=True)
        outcome, status = json.loads(self._parent.stdout.readline())
        assert status == 0, f"the process ended with {status}: its traceback is on stderr"
        return Outcome(**json.loads(outcome))


def _serve() -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_source(open_checkpoint(prepare(Path(folder))))  # imports what is imported late
    for line in sys.stdin:
        checkpoint, folder = json.loads(line)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(MAX_OPENING_S)
            os.chdir(folder)
            status = 1
            try:
                os.write(write_end, json.dumps(asdict(_measure(Path(checkpoint)))).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write_end)
        with open(read_end) as pipe:
            outcome = pipe.read()
        print(json.dumps([outcome, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]), flush=True)


if __name__ == "__main__":
    _serve()
