"""Child processes in which transformers works on a stranger's config, apart from the process that reads and writes.

A worker is a module with a function `answer`, which takes a request and returns a value, both of JSON's types. The
request is one JSON object on the child's stdin. On its stdout it replies with one of

    {"value": what `answer` returned}
    {"failure": {"kind": "refused", "class": "ModelMapError", "message": ..., "module": ..., "hint": ...}}
    {"failure": {"kind": "raised", "class": "KeyError", "message": ..., "module": ...}}

"refused" carries an error of ours, which the parent raises again. "raised" carries any other exception: the name of its
class, the first line of its text, and the module whose code raised it. A failure also sets the exit status to 1. A
child without a reply was killed, or crashed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from int8convert.errors import (
    CorruptFileError,
    DeviceError,
    Int8ConvertError,
    ModelMapError,
    PromptError,
    RemoteCodeError,
    SourceError,
)

_ERRORS: dict[str, type[Int8ConvertError]] = {
    kind.__name__: kind
    for kind in (SourceError, CorruptFileError, DeviceError, ModelMapError, RemoteCodeError, PromptError)
}


class WorkerError(Exception):
    """A worker has no value to return.

    Attributes:
        exception: name of the class that `answer` raised; "" if the child died or was stopped.
        message: first line of the exception's text; else the last line on stderr, or "".
        module: module of the code that raised it; "" if unknown.
        status: exit status of the child, negative for a signal; None if it was stopped for taking too long.
    """

    def __init__(self, exception: str, message: str, module: str, status: int | None) -> None:
        super().__init__(message)
        self.exception = exception
        self.message = message
        self.module = module
        self.status = status


class Worker:
    """A child process of one worker. Uses no network, sees no GPU, and imports nothing from the current directory."""

    def __init__(self, module: str) -> None:
        package_root = str(Path(__file__).parents[2])
        # -P: a torch.py in the current directory, which may be the checkpoint itself, must not be imported.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __name__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH")))),
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )

    def send(self, request: Any) -> None:
        """Send a request of at most 64 kB, which fits in the pipe, so that the child works before `result` waits."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin:
            self._process.stdin.write(json.dumps(request))
        self._process.stdin = None

    def result(self, request: Any = None, limit_s: float | None = None) -> Any:
        """Wait for the value.

        Args:
            request: None if it was sent already.
            limit_s: seconds after which the child is stopped.

        Raises:
            Int8ConvertError: the worker raised it.
            WorkerError: it raised anything else, died, or took too long.
        """
        try:
            output, complaints = self._process.communicate(None if request is None else json.dumps(request), limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise WorkerError("", f"it did not finish within {limit_s:.0f} s", "", None) from None
        status = self._process.returncode
        try:
            reply = json.loads(output)
        except ValueError:
            last_line = (complaints.strip().splitlines() or [""])[-1]
            raise WorkerError("", last_line, "", status) from None
        if "failure" in reply:
            raise decode_failure(reply["failure"], status)
        return reply["value"]

    def stop(self) -> None:
        """End the child if it still runs. Another thread may wait in `result` meanwhile."""
        self._process.kill()
        self._process.wait()


def encode_failure(error: BaseException) -> dict[str, str]:
    """Return the JSON form of an exception; see the module's docstring."""
    traceback, module = error.__traceback__, ""
    while traceback is not None:
        module, traceback = traceback.tb_frame.f_globals.get("__name__", ""), traceback.tb_next
    if isinstance(error, Int8ConvertError):
        return {
            "kind": "refused",
            "class": type(error).__name__,
            "message": error.message,
            "module": module,
            "hint": error.hint,
        }
    first_line = str(error).partition("\n")[0]
    return {"kind": "raised", "class": type(error).__name__, "message": first_line, "module": module}


def decode_failure(failure: Mapping[str, str], status: int | None = None, hint: str = "") -> Exception:
    """Return the exception of a JSON form; `hint` is for an error of ours that has none."""
    if failure["kind"] == "refused":
        return _ERRORS.get(failure["class"], SourceError)(failure["message"], failure["hint"] or hint)
    return WorkerError(failure["class"], failure["message"], failure["module"], status)


def main() -> None:
    """Run the worker that the first argument names."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not end up in the reply
    try:
        reply = json.dumps({"value": import_module(sys.argv[1]).answer(json.load(sys.stdin))})
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a stranger's code may raise anything; panics of Rust are no Exception
        stdout.write(json.dumps({"failure": encode_failure(error)}))
        sys.exit(1)
    stdout.write(reply)


if __name__ == "__main__":
    main()
