"""The directory a conversion writes into: checked before the first byte, cleaned up after a failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8convert.checkpoint.layout import (
    CONFIG_NAME,
    INDEX_NAME,
    bitsandbytes_config,
    build_index,
    is_weight_file,
    write_json,
)
from int8convert.conversion.plan import ConversionPlan, output_weight_map
from int8convert.errors import DiskFullError, OutputError


class OutputDirectory:
    """OUT, from the first check to the last file.

    Args:
        out: need not exist.
        source: the directory that is read; OUT must be another one.
        overwrite: replace a checkpoint that is there. Files that are no part of one are left alone.

    Raises:
        OutputError: it is the source, holds something already, or cannot be written to.
    """

    def __init__(self, out: str | os.PathLike[str], source: Path, overwrite: bool) -> None:
        self.path = Path(out)
        self._existed = self.path.exists()
        self._overwrite = overwrite
        self._is_cleared = False
        self._check(source)
        self.is_fresh = not self._replaced_files()
        """Whether nothing was in it that a conversion would replace."""

    def _check(self, source: Path) -> None:
        resolved, source = self.path.resolve(), source.resolve()
        if resolved == source or resolved in source.parents:
            raise OutputError(
                f"OUT '{self.path}' is the source itself, or holds it",
                "name another directory; nothing was written",
            )
        if self._existed and not self.path.is_dir():
            raise OutputError(f"OUT '{self.path}' is a file", "name a directory; nothing was written")
        if self._existed and any(self.path.iterdir()) and not self._overwrite:
            raise OutputError(
                f"OUT '{self.path}' exists and is not empty",
                "name another directory, or pass --overwrite to replace the checkpoint in it; nothing was written",
            )
        parent = next(p for p in (resolved, *resolved.parents) if p.is_dir())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"OUT '{self.path}' cannot be written to: no permission in '{parent}'",
                "name a directory you may write to; nothing was written",
            )

    def check_room(self, plan: ConversionPlan) -> None:
        """Compare the plan's size with the free disk space.

        Raises:
            DiskFullError: it does not fit.
        """
        needed, free = self._needed_and_free(plan)
        if needed > free:
            raise DiskFullError(
                f"OUT '{self.path}' needs {needed:,} bytes, its disk has {free:,} free",
                "make room, or name a directory on another disk; nothing was written",
            )

    def has_room(self, plan: ConversionPlan) -> bool:
        """Whether the plan's output fits on the disk."""
        needed, free = self._needed_and_free(plan)
        return needed <= free

    def _needed_and_free(self, plan: ConversionPlan) -> tuple[int, int]:
        """What is to be replaced, or was written already by a head start, counts as free."""
        needed = plan.n_written_bytes + sum(path.stat().st_size for path in plan.source.carried)
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
        replaced = sum(path.stat().st_size for path in self._replaced_files())
        return needed, shutil.disk_usage(existing).free + replaced

    def _replaced_files(self) -> list[Path]:
        """The files of the checkpoint in OUT that go before a new one comes: what makes it look complete first."""
        if not self.path.is_dir():
            return []
        files = [entry for entry in self.path.iterdir() if entry.is_file()]
        complete = [file for file in files if file.name in (CONFIG_NAME, INDEX_NAME)]
        return complete + [file for file in files if is_weight_file(file.name) and file not in complete]

    @contextmanager
    def cleaned_on_failure(self) -> Iterator[None]:
        """Makes the directory; if the body fails, what it wrote is removed again, and so is the directory if it is new.

        A checkpoint that was there is untouched until `clear` is called.
        """
        made = [p for p in (self.path, *self.path.absolute().parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if self._is_cleared:
                for file in self._replaced_files():
                    file.unlink()
            for directory in made:
                shutil.rmtree(directory) if directory == self.path else directory.rmdir()
            raise

    def clear(self) -> None:
        """Remove the checkpoint that is to be replaced; from here on, whatever is in its place is ours."""
        if not self.is_fresh:
            for file in self._replaced_files():
                file.unlink()
        self._is_cleared = True

    def complete(self, plan: ConversionPlan, threshold: float) -> None:
        """Write the small files: first what is carried over, then what makes the checkpoint look complete."""
        for file in plan.source.carried:
            target = self.path / file.relative_to(plan.source.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        if len(plan.shards) > 1:
            n_bytes = sum(tensor.output_bytes for tensor in plan.tensors)
            write_json(self.path / INDEX_NAME, build_index(output_weight_map(plan), n_bytes, plan.n_parameters))
        config = bitsandbytes_config(plan.source.config, plan.model_map.dtype, threshold, plan.model_map.skip_modules)
        write_json(self.path / CONFIG_NAME, config)
