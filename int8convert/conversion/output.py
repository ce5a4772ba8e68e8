"""The directory a conversion writes into: its state found out, locked, brought to completion or left resumable.

OUT is in one of four states when a conversion begins: empty; holding an unfinished or finished conversion of the same
source with the same options, which is resumed; something else, which only `overwrite` replaces; or in use.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.atomic import (
    INCOMPLETE_SUFFIX,
    check_folder,
    check_lengths,
    copy_file,
    make_folder,
    write_json,
)
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.loaders.files import is_carried_folder
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.manifest import Manifest, ShardRecord, first_difference
from int8convert.checkpoint.names import (
    CONFIG_NAME,
    INDEX_NAME,
    OUTLIERS_FILE,
    OWN_FOLDER,
    VERIFY_FILE,
    is_weight_file,
    shard_name,
)
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import DiskFullError, OutputError
from int8convert.formats.quantization_config import build_index
from int8convert.planning.output_config import converted_config
from int8convert.planning.plan import ConversionPlan, output_weight_map

_LOCK_NAME = "lock"
_INCOMING_NAME = "incoming"


class SizedPlan(Protocol):
    """What will be written, as far as room is concerned."""

    @property
    def source(self) -> CheckpointSource: ...

    @property
    def n_written_bytes(self) -> int: ...


class OutputDirectory:
    """OUT, from the first check to the last file.

    Args:
        out: need not exist.
        source: what is read. OUT must be another directory, and able to hold its file names.
        request: what identifies the conversion, see `manifest.describe_source`.
        overwrite: replace a checkpoint that is there. Files that are no part of one are left alone.

    Raises:
        OutputError: it is the source, holds something else already, or cannot be written to.
    """

    def __init__(
        self, out: str | os.PathLike[str], source: CheckpointSource, request: Mapping[str, Any], overwrite: bool
    ) -> None:
        self.path = Path(out)
        self.manifest = Manifest(self.path)
        self._request = request
        self._overwrite = overwrite
        self.has_begun = False
        self._carried: list[Path] = []
        self._check_files(source)
        self._check_place(source.directory)
        self._find_state()

    def _check_place(self, source: Path) -> None:
        resolved, source = self.path.resolve(), source.resolve()
        # Compared by inode too: one directory may be mounted in two places.
        if any(_is_same(resolved, folder) for folder in (source, *source.parents)):
            raise OutputError(
                f"OUT '{self.path}' is the source itself, or holds it",
                "name another directory",
            )
        inner = next((folder for folder in (resolved, *resolved.parents) if _is_same(folder.parent, source)), None)
        if inner is not None and (inner.name == OWN_FOLDER or is_carried_folder(inner.name)):
            raise OutputError(
                f"OUT '{self.path}' lies in '{inner.name}', a folder of the source's own files",
                "name a directory outside of the source",
            )
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"OUT '{self.path}' is a file", "name a directory")
        parent = next(p for p in (resolved, *resolved.parents) if p.is_dir())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"OUT '{self.path}' cannot be written to: no permission in '{parent}'",
                "name a directory you may write to",
            )

    def _check_files(self, source: CheckpointSource) -> None:
        """Refuse folders that are links, and names that OUT cannot hold, before anything is written or removed."""
        names = [file.relative_to(source.directory).as_posix() for file in source.carried]
        folders = {self.path / name for name in names if "/" in name}
        for folder in (self.manifest.folder, self.manifest.records_folder, self.incoming, *{f.parent for f in folders}):
            check_folder(folder)
        check_lengths(self.path, (*names, f"{OWN_FOLDER}/shards/{shard_name(0, 2)}.json"))

    def _find_state(self) -> None:
        """Sets `replaces`, whether a checkpoint in OUT has to go first; raises where there is something else."""
        self.replaces = False
        if not self.path.is_dir() or not any(not self._is_leftover(entry) for entry in self.path.iterdir()):
            return
        there = self.manifest.read_request()
        same = there is not None and first_difference(there, self._request) is None
        if same and not (self._overwrite and self.is_complete):
            return
        if self._overwrite:
            self.replaces = True
            return
        if there is None:
            raise OutputError(
                f"OUT '{self.path}' exists and is not empty",
                "name another directory, or pass --overwrite to replace the checkpoint in it",
            )
        kind = "a conversion" if self.is_complete else "an unfinished conversion"
        raise OutputError(
            f"OUT '{self.path}' holds {kind} that differs: {first_difference(there, self._request)}",
            "name another directory, or pass --overwrite to replace it",
        )

    def _is_leftover(self, entry: Path) -> bool:
        """What a run that was killed before its first shard leaves."""
        if entry.name == OWN_FOLDER and entry.is_dir():
            return {path.name.removesuffix(INCOMPLETE_SUFFIX) for path in entry.iterdir()} <= {
                _LOCK_NAME,
                _INCOMING_NAME,
                "shards",
                "conversion.json",
            } and not self.manifest.read_request()
        return entry.name.endswith(INCOMPLETE_SUFFIX)

    @property
    def request(self) -> Mapping[str, Any]:
        """What identifies the conversion."""
        return self._request

    @property
    def overwrites(self) -> bool:
        """Whether what is there may be replaced."""
        return self._overwrite

    @property
    def is_complete(self) -> bool:
        """Whether a finished conversion of ours is in it."""
        return self.manifest.is_complete and (self.path / CONFIG_NAME).is_file()

    def check_room(self, plan: SizedPlan) -> None:
        """Compare what is still to be written with the free disk space.

        Raises:
            DiskFullError: it does not fit.
        """
        needed, free = self._needed_and_free(plan)
        if needed > free:
            raise DiskFullError(
                f"OUT '{self.path}' needs {needed:,} bytes, its disk has {free:,} free",
                "make room, or name a directory on another disk, and rerun the same command",
            )

    def free_bytes(self) -> int:
        """What the disk has free, weight files that are there counted as free."""
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
        return shutil.disk_usage(existing).free + sum(path.stat().st_size for path in self._weight_files())

    def spare_bytes(self, plan: SizedPlan) -> int:
        """What the disk has free beside the plan's output; negative if that does not fit."""
        needed, free = self._needed_and_free(plan)
        return free - needed

    @property
    def incoming(self) -> Path:
        """The folder for shards of the source that are downloaded, and removed after use."""
        return self.manifest.folder / _INCOMING_NAME

    def _needed_and_free(self, plan: SizedPlan) -> tuple[int, int]:
        """Weight files that are there, to be replaced or written already, count as free."""
        needed = plan.n_written_bytes + sum(path.stat().st_size for path in plan.source.carried)
        return needed, self.free_bytes()

    def _weight_files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [entry for entry in self.path.iterdir() if entry.is_file() and is_weight_file(entry.name)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes and locks the directory. If the body fails before a shard is finished, all of it is removed again."""
        with ExitStack() as cleanup:
            try:
                self._make_and_lock(cleanup)
            except OSError as error:
                raise as_output_error(error, self.path) from error
            self._find_state()  # another process may have been at work between the first look and the lock
            if not self.replaces:
                self._remove_incomplete()
            try:
                yield
            except BaseException:
                self._remove_incomplete()
                if self.has_begun and not self.manifest.read_records():
                    for file in self._weight_files():
                        file.unlink()
                    self.manifest.tidy()
                raise

    def _make_and_lock(self, cleanup: ExitStack) -> None:
        own = self.path / OWN_FOLDER
        missing = [folder for folder in (own, *own.absolute().parents) if not folder.exists()]
        for folder in reversed(missing):
            cleanup.callback(_remove_if_empty, folder)
        make_folder(own)
        cleanup.enter_context(DirectoryLock(own / _LOCK_NAME))

    def _remove_incomplete(self) -> None:
        for folder in (self.path, self.manifest.folder, self.manifest.records_folder):
            for leftover in folder.glob(f"*{INCOMPLETE_SUFFIX}"):
                leftover.unlink()
        shutil.rmtree(self.incoming, ignore_errors=True)

    def begin(self, done: Mapping[str, ShardRecord], n_shards: int) -> None:
        """All is checked: remove what is to be replaced, and write down what is being done.

        Args:
            done: records of the shards that are finished from an earlier run.
            n_shards: of the whole; if all are done, a complete checkpoint stays complete.
        """
        if self.replaces:
            # First what makes it look complete, so that no half of it ever does; and what is of the weights that go.
            for name in (CONFIG_NAME, INDEX_NAME, OUTLIERS_FILE, VERIFY_FILE):
                (self.path / name).unlink(missing_ok=True)
            self.manifest.remove()
            for file in self._weight_files():
                file.unlink()
            self.replaces = False
        if self.is_complete and len(done) < n_shards:
            # A finished conversion of which files are missing or damaged: unfinished again.
            for name in (CONFIG_NAME, INDEX_NAME):
                (self.path / name).unlink(missing_ok=True)
            self.manifest.reopen(self._request, done.values())
        elif not self.is_complete:
            self.manifest.begin(self._request)
        self.has_begun = not self.is_complete

    def complete(
        self, plan: ConversionPlan, threshold: float, summary: Mapping[str, Any], records: list[ShardRecord]
    ) -> None:
        """Write the small files that make the directory a checkpoint of the plan's format."""
        index = None
        if len(plan.shards) > 1:
            n_bytes = sum(tensor.output_bytes for tensor in plan.tensors)
            index = build_index(output_weight_map(plan), n_bytes, plan.n_parameters)
        self.write_small_files(plan.source, summary, records, index, converted_config(plan, threshold))

    def write_small_files(
        self,
        source: CheckpointSource,
        summary: Mapping[str, Any],
        records: list[ShardRecord],
        index: Mapping[str, Any] | None,
        config: Mapping[str, Any],
    ) -> None:
        """First what is carried over, last what makes the checkpoint look complete."""
        carried: dict[str, str] = {}
        for file in source.carried:
            name = file.relative_to(source.directory)
            target = self.path / name
            if target.parent != self.path:
                make_folder(target.parent)
            if not target.exists():
                self._carried.append(target)
            copy_file(file, target)
            carried[name.as_posix()] = file_sha256(target)
        self.manifest.complete(self._request, source, summary, records, carried)
        if index is not None:
            write_json(self.path / INDEX_NAME, index)
        write_json(self.path / CONFIG_NAME, config)
        self.manifest.tidy()

    def remove_empty(self) -> None:
        """Remove what is left of an output that is elsewhere: empty folders; not in use."""
        for folder in (self.manifest.folder, self.path):
            _remove_if_empty(folder)

    def discard(self) -> None:
        """Remove all that was written since `begin`, of an output that nobody would resume, or that is elsewhere."""
        for name in (CONFIG_NAME, INDEX_NAME):
            (self.path / name).unlink(missing_ok=True)
        self.manifest.remove()
        for file in (*self._weight_files(), *self._carried):
            file.unlink(missing_ok=True)
            if file.parent != self.path:
                _remove_if_empty(file.parent)


def as_output_error(error: OSError, path: Path) -> OutputError:
    """What the user is told of an OSError in writing to the directory `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"no room left while writing to '{path}'", "make room and rerun the same command")
    return OutputError(
        f"'{error.filename or path}' cannot be written: {error.strerror}", "mend that and rerun the same command"
    )


def _is_same(folder: Path, other: Path) -> bool:
    try:
        return folder == other or folder.samefile(other)
    except OSError:  # one of them does not exist
        return False


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
