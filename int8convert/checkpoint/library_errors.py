"""The one boundary around what libraries raise while they read or run a stranger's files.

transformers, torch, tokenizers and jinja raise nearly every class there is on files that are damaged or were made to
trip them up. No list of classes is complete, so the boundary takes all of them, and names the class in the error. It
stands around calls of a library, never around our own work: a bug of ours keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.checkpoint.layout import quoted
from int8convert.errors import DeviceError, Int8ConvertError, RemoteCodeError, SourceError

RUNS_NO_CODE = "code of a checkpoint is not run here; read it, then load it by int8convert.load(trust_remote_code=True)"
TRUST_CODE = "read that code, then pass --trust-remote-code to have it run"
"""Hints for a checkpoint that needs code of its own."""

_MAX_LENGTH = 300
_WANTS_CODE = "trust_remote_code=True"
"""What transformers' errors name where a class is code in the checkpoint and that code may not run."""

_NO_MEMORY = "OutOfMemoryError"
"""torch's class for a GPU's memory. For the CPU's, and for files it maps, a RuntimeError says "allocate memory"."""

_RUST_PANIC = "PanicException"
"""The class of errors that tokenizers and safetensors do not expect themselves; a BaseException by its own choice."""


@contextmanager
def library_errors(what: str, hint: str, code_hint: str = RUNS_NO_CODE) -> Iterator[None]:
    """Turn what a library raises into an error of two lines.

    Errors of our own tree, MemoryError and what ends the process pass.

    Args:
        what: the beginning of the message, such as "'out' cannot be read as a checkpoint".
        hint: the error's hint.
        code_hint: the hint where the checkpoint needs code of its own to run.

    Raises:
        RemoteCodeError: the library says that it would have to run code of the checkpoint.
        DeviceError: there was not enough memory for what it was to do.
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
    """The class of an exception and the first line of its message, with the next where it ends in a colon; escaped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    first_line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return quoted(text, _MAX_LENGTH)[1:-1]
