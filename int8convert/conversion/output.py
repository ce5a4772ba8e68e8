"""The directory that a conversion writes: checks its state, locks it, completes it or leaves it resumable.

OUT is in one of four states when a conversion begins: empty; an unfinished or finished conversion of the same source
with the same options, which is resumed; something else, which only `overwrite` replaces; or in use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import (
    INCOMPLETE_SUFFIX,
    as_output_error,
    check_folder,
    check_lengths,
    copy_file,
    make_folder,
    write_bytes,
    write_json,
)
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.names import (
    CONFIG_NAME,
    INDEX_NAME,
    OUTLIERS_FILE,
    OWN_FOLDER,
    SMOOTHING_FILE,
    VERIFY_FILE,
    is_weight_file,
    shard_name,
)
from int8convert.checkpoint.source import CheckpointSource
from int8convert.conversion.output_place import check_place
from int8convert.errors import OutputError
from int8convert.planning.request_difference import first_difference

_LOCK_NAME = "lock"
_INCOMING_NAME = "incoming"


class OutputDirectory:
    """OUT, from the first check to the last file.

    Args:
        out: need not exist.
        source: what is read. OUT must be another directory, and able to hold its file names.
        request: identifies the conversion, see `describe_source`.
        overwrite: replace a checkpoint in OUT. Files that belong to none stay.
        factors: content of the file of the factors that are folded into the weights; None if there are none.

    Raises:
        OutputError: it is the source, holds something else already, or cannot be written to.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        source: CheckpointSource,
        request: Mapping[str, Any],
        overwrite: bool,
        factors: bytes | None = None,
    ) -> None:
        self.path = Path(out)
        self.manifest = Manifest(self.path)
        self.request = request
        self.overwrites = overwrite
        self.has_begun = False
        self._factors = factors
        self._auxiliary: list[Path] = []
        _check_names(self, source)
        check_place(self.path, source.directory)
        self._find_state()

    def _find_state(self) -> None:
        """Set `replaces`: whether a checkpoint in OUT must be removed first. Raises if OUT holds something else."""
        self.replaces = False
        if not self.path.is_dir() or not any(not self._is_leftover(entry) for entry in self.path.iterdir()):
            return
        there = self.manifest.read_request()
        same = there is not None and first_difference(there, self.request) is None
        if same and not (self.overwrites and self.is_complete):
            return
        if self.overwrites:
            self.replaces = True
            return
        if there is None:
            raise OutputError(
                f"OUT '{self.path}' exists and is not empty",
                "name another directory, or pass --overwrite to replace the checkpoint in it",
            )
        kind = "a conversion" if self.is_complete else "an unfinished conversion"
        raise OutputError(
            f"OUT '{self.path}' holds {kind} that differs: {first_difference(there, self.request)}",
            "name another directory, or pass --overwrite to replace it",
        )

    def _is_leftover(self, entry: Path) -> bool:
        """Return whether a run that was killed before its first shard left an entry."""
        if entry.name == OWN_FOLDER and entry.is_dir():
            names = {path.name.removesuffix(INCOMPLETE_SUFFIX) for path in entry.iterdir()}
            expected = {_LOCK_NAME, _INCOMING_NAME, "shards", "conversion.json"}
            return names <= expected and not self.manifest.read_request()
        return entry.name.endswith(INCOMPLETE_SUFFIX)

    @property
    def is_complete(self) -> bool:
        """Whether OUT holds a finished conversion of ours."""
        return self.manifest.is_complete and (self.path / CONFIG_NAME).is_file()

    def free_bytes(self) -> int:
        """Return the free bytes of OUT's disk. Weight files in OUT count as free."""
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
        return shutil.disk_usage(existing).free + sum(path.stat().st_size for path in self._weight_files())

    @property
    def incoming(self) -> Path:
        """The folder for downloads that are removed after use."""
        return self.manifest.folder / _INCOMING_NAME

    def _weight_files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [entry for entry in self.path.iterdir() if entry.is_file() and is_weight_file(entry.name)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make and lock the directory. If the body fails before a shard is finished, remove what it wrote."""
        with ExitStack() as cleanup:
            try:
                self._make_and_lock(cleanup)
            except OSError as error:
                raise as_output_error(error, self.path) from error
            self._find_state()  # another process may have changed it between the first look and the lock
            if not self.replaces:
                self._remove_incomplete()
            try:
                yield
            except BaseException:
                self._remove_incomplete()
                if self.has_begun and not self.manifest.read_records():
                    for file in (*self._weight_files(), self.path / SMOOTHING_FILE):
                        file.unlink(missing_ok=True)
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
        """Remove what is replaced, and record the request. All is checked.

        Args:
            done: file name -> record of the shards that an earlier run finished.
            n_shards: number of shards of the output. If all are done, a complete checkpoint stays complete.
        """
        if self.replaces:
            # First what makes it look complete, so that no part of it ever does.
            for name in (CONFIG_NAME, INDEX_NAME, OUTLIERS_FILE, SMOOTHING_FILE, VERIFY_FILE):
                (self.path / name).unlink(missing_ok=True)
            self.manifest.remove()
            for file in self._weight_files():
                file.unlink()
            self.replaces = False
        if self.is_complete and len(done) < n_shards:
            # Files of a finished conversion are missing or damaged: it is unfinished again.
            for name in (CONFIG_NAME, INDEX_NAME):
                (self.path / name).unlink(missing_ok=True)
            self.manifest.reopen(self.request, done.values())
        elif not self.is_complete:
            self.manifest.begin(self.request)
        if self._factors is not None:
            write_bytes(self.path / SMOOTHING_FILE, self._factors)
        self.has_begun = not self.is_complete

    def complete(
        self,
        source: CheckpointSource,
        config: Mapping[str, Any],
        index: Mapping[str, Any] | None,
        summary: Mapping[str, Any],
        records: list[ShardRecord],
    ) -> None:
        """Write the small files: first those that are copied, last what makes the checkpoint look complete.

        Args:
            index: the content of the index of the shards; None for a single shard.
            summary: entries of the manifest that are about the whole checkpoint.
        """
        auxiliary: dict[str, str] = {}
        for file in source.auxiliary_files:
            name = file.relative_to(source.directory)
            target = self.path / name
            if target.parent != self.path:
                make_folder(target.parent)
            if not target.exists():
                self._auxiliary.append(target)
            copy_file(file, target)
            auxiliary[name.as_posix()] = file_sha256(target)
        self.manifest.complete(self.request, source, summary, records, auxiliary)
        if index is not None:
            write_json(self.path / INDEX_NAME, index)
        write_json(self.path / CONFIG_NAME, config)
        self.manifest.tidy()

    def remove_empty(self) -> None:
        """Remove the empty folders of an output that was published. OUT must not be in use."""
        _remove_if_empty(self.manifest.folder)
        _remove_if_empty(self.path)

    def discard(self) -> None:
        """Remove all that was written since `begin`: the output was published."""
        for name in (CONFIG_NAME, INDEX_NAME, SMOOTHING_FILE):
            (self.path / name).unlink(missing_ok=True)
        self.manifest.remove()
        for file in (*self._weight_files(), *self._auxiliary):
            file.unlink(missing_ok=True)
            if file.parent != self.path:
                _remove_if_empty(file.parent)


def _check_names(output: OutputDirectory, source: CheckpointSource) -> None:
    """Refuse folders that are links, and names that OUT cannot hold, before anything is written or removed."""
    names = [file.relative_to(source.directory).as_posix() for file in source.auxiliary_files]
    own = (output.manifest.folder, output.manifest.records_folder, output.incoming)
    for folder in (*own, *{(output.path / name).parent for name in names if "/" in name}):
        check_folder(folder)
    check_lengths(output.path, (*names, f"{OWN_FOLDER}/shards/{shard_name(0, 2)}.json"))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
