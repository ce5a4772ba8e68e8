"""The hidden states of all windows between two layers, in memory or in memory-mapped files."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import torch

from int8convert.errors import DiskFullError


class HiddenStates:
    """One tensor for each window, on the CPU.

    Args:
        folder: a folder for files; None keeps the tensors in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._states: dict[int, torch.Tensor] = {}

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._states[i]

    def __setitem__(self, i: int, state: torch.Tensor) -> None:
        """Store a copy."""
        kept = self._states.get(i)
        if kept is None or kept.shape != state.shape or kept.dtype != state.dtype:
            kept = self._states[i] = self._allocate(state)
        kept.copy_(state)

    def _allocate(self, state: torch.Tensor) -> torch.Tensor:
        if self._folder is None:
            return torch.empty(state.shape, dtype=state.dtype)
        handle, name = tempfile.mkstemp(dir=self._folder)
        try:
            # Otherwise a full disk would kill the process when a page is written.
            os.posix_fallocate(handle, 0, max(1, state.nbytes))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFullError(
                f"the disk of '{self._folder}' has no room for hidden states of {state.nbytes:,} bytes a window",
                "set TMPDIR to a folder with more room, or measure fewer windows",
            ) from error
        finally:
            os.close(handle)
        return torch.from_file(name, shared=True, size=state.numel(), dtype=state.dtype).view(state.shape)
