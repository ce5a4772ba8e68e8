"""The three standard streams, made usable before anything else opens a file.

A daemon, cron or a container may start the command with some of them closed. The next file to be opened would then get
the number 0, 1 or 2, and output printed to that number would be written into a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

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
        with contextlib.suppress(AttributeError):  # a test's or a notebook's own stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal. A closed stream is None."""
    return stream is not None and stream.isatty()
