"""The one boundary around what libraries raise while they read or run a stranger's files.

transformers, torch, tokenizers and jinja raise nearly every class there is on damaged or
hostile files. No list of classes is complete, so the boundary takes all of them, and names the class in the error. It
stands around calls of a library, never around our own work: a bug of ours keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.errors import DeviceError, Int8ConvertError, RemoteCodeError, SourceError
from int8convert.text import quoted

RUNS_NO_CODE = "code of a checkpoint is not run here; read it, then load it by int8convert.load(trust_remote_code=True)"
TRUST_CODE = "read that code, then pass --trust-remote-code to have it run"
"""Hints for a checkpoint that needs code of its own."""

_MAX_LENGTH = 300
_WANTS_CODE = "trust_remote_code=True"
"""Text in transformers' errors where a class is code in the checkpoint and may not run."""

_NO_MEMORY = "OutOfMemoryError"
"""Name of torch's error for exhausted GPU memory. For the CPU and for mapped files, a RuntimeError says "allocate
memory"."""

_RUST_PANIC = "PanicException"
"""Class name of Rust panics in tokenizers and safetensors. It derives from BaseException."""


@contextmanager
def library_errors(what: str, hint: str, code_hint: str = RUNS_NO_CODE) -> Iterator[None]:
    """Turn what a library raises into an error of two lines.

    Int8ConvertError, MemoryError and exceptions that end the process pass through.

    Args:
        what: the beginning of the message, such as "'out' cannot be read as a checkpoint".
        hint: the error's hint.
        code_hint: the hint where the checkpoint needs code of its own to run.

    Raises:
        RemoteCodeError: the library says that it would have to run code of the checkpoint.
        DeviceError: there was not enough memory.
        SourceError: it raised anything else.
    """
    try:
        yield
    except (Int8ConvertError, MemoryError):
        raise
    except Exception as error:
        if _WANTS_CODE in str(error):
            raise RemoteCodeError(f"{what}: it needs code that is part of the checkpoint", code_hint) from error
        if type(error).__name__ == _NO_MEMORY or "allocate memory" in str(error):
            raise DeviceError(f"{what}: {describe(error)}", "free memory, or use a device that has more") from error
        raise SourceError(f"{what}: {describe(error)}", hint) from error
    except BaseException as error:
        if type(error).__name__ != _RUST_PANIC:
            raise
        raise SourceError(f"{what}: {describe(error)}", hint) from error


def describe(error: BaseException) -> str:
    """Return an exception's class and first line, with the second if the first ends in a colon; escaped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    first_line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return quoted(text, _MAX_LENGTH)[1:-1]
