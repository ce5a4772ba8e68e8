"""Conversions in processes of their own, which a test may kill: forked, ready to go, from one that has all imported.

`python -m tests.tools.client_process SOURCE` converts a local checkpoint first, so that the kernel is loaded and the
map of that model remembered. Then, for every line of JSON on stdin - the arguments of `quantize`, and `upload`, a
repository to send the shards to - it forks a process that does it, writes its id, waits for it, and writes its exit
code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import int8convert
import int8convert.hub.open_repository
from int8convert.conversion.destination import PublishedDestination
from int8convert.publish.shard_publisher import HubPublisher
from tests.tools.hub_server.bandwidth import Bandwidth
from tests.tools.options import quantize

ROOT = Path(__file__).parents[2]


class ClientProcesses:
    """A context manager.

    Args:
        source: a local checkpoint like those that will be converted.
        environment: of the processes, laid over this one's.

    Attributes:
        pid: of the last conversion.
    """

    def __init__(self, source: Path, environment: Mapping[str, str]) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.client_process", str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        self.pid = 0
        self._read()  # it is ready

    def __enter__(self) -> ClientProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.communicate()

    def start(self, **arguments: Any) -> None:
        """Begin a conversion; `wait` for it before the next one."""
        assert self._parent.stdin is not None
        print(json.dumps(arguments), file=self._parent.stdin, flush=True)
        self.pid = self._read()
        assert self.pid > 1, "a conversion before this one was not waited for"

    def kill(self) -> None:
        """SIGKILL the conversion, unless it is through."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def run_until(self, n_bytes: int, bandwidth: Bandwidth, **arguments: Any) -> None:
        """A conversion that is killed when so many bytes have passed: it cannot be faster, however busy the machine."""
        bandwidth.pause_before(n_bytes)
        self.start(**arguments)
        bandwidth.await_pause()
        self.kill()
        assert self.wait() == -signal.SIGKILL
        bandwidth.go_on()

    def wait(self) -> int:
        """Its exit code; negative, the signal that ended it."""
        return self._read()

    def _read(self) -> int:
        assert self._parent.stdout is not None and self._parent.stderr is not None
        line = self._parent.stdout.readline()
        assert line, self._parent.stderr.read()
        return int(line)


def _convert(upload: str | None = None, **arguments: Any) -> None:
    destination = PublishedDestination(HubPublisher(upload)) if upload is not None else None
    quantize(**arguments, destination=destination)


def _serve(source: str) -> None:
    import huggingface_hub.hf_api  # noqa: F401, so that no child has to

    with tempfile.TemporaryDirectory() as folder:
        int8convert.quantize(source, Path(folder) / "out", on_event=lambda event: None)
    print(0, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _convert(**json.loads(line))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
