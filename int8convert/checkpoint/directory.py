"""Opens a checkpoint directory: reads its config, its index and the headers of its shards.

A checkpoint is a stranger's: whatever is in the directory, opening it ends in a source that can be read or in a
SourceError, within memory in proportion to its headers. A weight file that is replaced or changed after its header was
read is an error when it is opened again, see `file_reader`; a small file that is changed meanwhile is not noticed.
"""

from __future__ import annotations

import os
from pathlib import Path

from int8convert.checkpoint.file_reader import FileIdentity
from int8convert.checkpoint.json_file import MAX_INDEX_BYTES, read_json_object
from int8convert.checkpoint.loaders.files import LoaderFiles, find_loader_files
from int8convert.checkpoint.loaders.listing import DirectoryListing
from int8convert.checkpoint.loaders.notes import note_aside, note_large
from int8convert.checkpoint.loaders.shard_index import IndexDifferences, compare_index
from int8convert.checkpoint.model_card import find_card
from int8convert.checkpoint.names import (
    ADAPTER_CONFIG,
    CONFIG_NAME,
    MAX_AUXILIARY_BYTES,
    REQUEST_FILE,
    auxiliary_paths,
    find_file,
    open_regular,
)
from int8convert.checkpoint.pickle.reader import find_pickle_tensors
from int8convert.checkpoint.safetensors_file import find_safetensors_tensors
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.errors import CorruptFileError, SourceError
from int8convert.text import quoted


def open_directory(directory: Path, label: str, ignores_adapter: bool = False) -> CheckpointSource:
    """Read a directory's config, index and shard headers; no weights. `loaders.files` says which files these are.

    Args:
        ignores_adapter: read the weights alone, also if an adapter is beside them.

    Raises:
        SourceError: there is no such directory, no weights are in it, files are none or lie elsewhere, or loaders would
            take what is not converted here.
        CorruptFileError: a file contradicts what it, or the index, promises.
    """
    try:
        return _open_directory(directory, label, ignores_adapter)
    except OSError as error:
        where = f"{quoted(os.path.basename(error.filename))} in " if isinstance(error.filename, str) else ""
        raise SourceError(
            f"{where}{quoted(label, 300)} cannot be read: {error.strerror}",
            "check that you may read the directory and that its disk works",
        ) from error


def _open_directory(directory: Path, label: str, ignores_adapter: bool) -> CheckpointSource:
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise SourceError(f"{quoted(label, 300)} is not a checkpoint directory: {found}", "give a checkpoint directory")
    listing = DirectoryListing(directory, label)
    if CONFIG_NAME not in listing.root and find_file(directory, REQUEST_FILE) is not None:
        raise unfinished(label)
    files = find_loader_files(listing, ignores_adapter)
    find_card(directory)  # so that a card that cannot be read is refused now, not when all is converted
    auxiliary = auxiliary_paths(directory, files.auxiliary_files)
    left = {path for path in auxiliary if path.stat().st_size > MAX_AUXILIARY_BYTES}
    shards, differences = _read_shards(directory, files)
    taken = (files.weights, *(shard.path.name for shard in shards))
    return CheckpointSource(
        label=label,
        directory=directory,
        config=files.config,
        shards=shards,
        auxiliary_files=tuple(path for path in auxiliary if path not in left),
        notes=(*files.notes, *note_aside(listing.root, taken), *note_large(sorted(path.name for path in left))),
        has_adapter=ADAPTER_CONFIG in listing.root,
        index=differences,
        config_name=files.config_name or CONFIG_NAME,
        index_dtype=read_index_dtype(found_file(directory, files.weights)) if files.is_indexed else None,
    )


def unfinished(label: str) -> SourceError:
    """Return the error for an unfinished conversion of ours, which lacks config.json."""
    return SourceError(
        f"{quoted(label, 300)} is an unfinished conversion",
        "the quantize command that began it finishes it",
    )


def _read_shards(directory: Path, files: LoaderFiles) -> tuple[tuple[SourceShard, ...], IndexDifferences]:
    """Read the headers of the weight files."""
    path = found_file(directory, files.weights)
    weight_map = read_weight_map(path, files.suffix) if files.is_indexed else None
    names = [files.weights] if weight_map is None else _shard_names(directory, weight_map, files.weights)
    shards = tuple(read_shard(found_file(directory, name)) for name in names)
    return compare_index(weight_map or {}, shards)


def found_file(directory: Path, name: str) -> Path:
    """Return the path of a file that was listed; raises as `find_file`, and if it has gone since."""
    path = find_file(directory, name)
    if path is None:
        raise CorruptFileError(
            f"{quoted(name)} is not there any more",
            "leave the checkpoint alone while it is read, and rerun the same command",
        )
    return path


def read_shard(path: Path) -> SourceShard:
    """Return one weight file, from its header."""
    with open(open_regular(path), "rb") as file:
        identity = FileIdentity.of(file.fileno())
        find_tensors = find_safetensors_tensors if path.suffix == ".safetensors" else find_pickle_tensors
        tensors = find_tensors(file, identity.n_bytes, path.name)
        return SourceShard(path, identity.n_bytes, tensors, identity=identity)


def read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Return the index's map of tensor names to plain file names that end in `suffix`."""
    weight_map = read_json_object(index, MAX_INDEX_BYTES, allow_nan=False).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file_name, str) for file_name in weight_map.values())
    ):
        raise CorruptFileError(
            f"'{index.name}' has no weight_map from tensor names to file names",
            "fetch the index again",
        )
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(suffix) or not file_name.isprintable():
            raise CorruptFileError(
                f"'{index.name}' points to {quoted(file_name)}, which is not a plain file name ending in {suffix}",
                "fetch the index again; nothing outside the checkpoint was read",
            )
    return weight_map


def read_index_dtype(index: Path) -> str | None:
    """Return the dtype in an index's metadata, or None. transformers loads in it where config.json states none."""
    metadata = read_json_object(index, MAX_INDEX_BYTES, allow_nan=False).get("metadata")
    dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
    return dtype if isinstance(dtype, str) else None


def _shard_names(directory: Path, weight_map: dict[str, str], index_name: str) -> list[str]:
    """Return the names of the shards of an index, each a file of its own beside it."""
    names = sorted(set(weight_map.values()))
    seen: dict[tuple[int, int], str] = {}
    for file_name in names:
        path = find_file(directory, file_name)
        if path is None:
            raise CorruptFileError(
                f"'{index_name}' names shard {quoted(file_name)}, which is not there",
                "fetch the missing shard and rerun the same command",
            )
        # Links cost nothing: a thousand of them to one large header would cost the memory of a thousand.
        status = path.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), file_name)
        if other != file_name:
            raise CorruptFileError(
                f"'{index_name}' names shards {quoted(other)} and {quoted(file_name)}, which are one file",
                "fetch the checkpoint again",
            )
    return names
