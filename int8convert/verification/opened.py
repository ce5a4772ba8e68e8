"""Opens the int8 checkpoint that is examined: a directory, or a repository on the Hub.

For a repository, config.json, auxiliary files, manifest, stored columns and factors come through the cache of the
Hub's client. Weight files in that cache are read there, others by range. A range has no hash, so the manifest is then
compared with the sha256 that the Hub lists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from int8convert.checkpoint.loaders.present_files import find_present, is_listed
from int8convert.checkpoint.names import MANIFEST_NAME, OUTLIERS_FILE, SMOOTHING_FILE
from int8convert.checkpoint.source import CheckpointSource
from int8convert.events import HubReadStarted
from int8convert.sources import open_source

_OWN_FILES = (MANIFEST_NAME, OUTLIERS_FILE, SMOOTHING_FILE)


@dataclass(frozen=True, slots=True)
class ExaminedCheckpoint:
    """An int8 checkpoint, opened.

    Attributes:
        source: config, headers and auxiliary files.
        names: all present files, by their path with `/`, whether a loader takes them or not.
        refused: entries that are no file of the checkpoint -> reason; see `PresentFiles`.
    """

    source: CheckpointSource
    names: frozenset[str] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def weight_files(self) -> frozenset[str]:
        """Names of all present safetensors files, whether the index names them or not."""
        return frozenset(name for name in self.names if "/" not in name and name.endswith(".safetensors"))

    def path_of(self, name: str) -> Path | None:
        """Return the local path of a file; None if it is no file of the checkpoint, or not on this machine."""
        if name not in self.names or name in self.refused:
            return None
        path = self.source.directory / name
        return path if path.is_file() else None


def open_examined(out: str | os.PathLike[str], revision: str | None = None) -> ExaminedCheckpoint:
    """Read config, index, headers and manifest; no weights.

    Raises:
        Int8ConvertError: see `open_source`.
    """
    source = open_source(out, revision, ignores_adapter=True)  # `exact.files` reports an adapter
    if source.commit is None:
        present = find_present(source.directory)
        return ExaminedCheckpoint(source, frozenset(present.files), present.refused)
    from int8convert.hub.cached_copy import fetch_beside, reading_cached

    names = fetch_beside(source, _OWN_FILES)
    return ExaminedCheckpoint(reading_cached(source), frozenset(filter(is_listed, names)))


def hub_reading(source: CheckpointSource, is_kept: bool = False) -> HubReadStarted | None:
    """Return the event for reading all of a checkpoint from the Hub; None for a directory."""
    if source.commit is None:
        return None
    n_bytes = sum(shard.n_bytes for shard in source.shards if shard.remote is not None)
    return HubReadStarted(source.label, source.commit, n_bytes, is_kept)
