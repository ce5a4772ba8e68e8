"""A file of the Hub on this machine's disk: fetched by the Hub's own client, found in its cache, compared.

The client checks nothing but the size, so whoever reads the file must.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from int8convert.hub.byte_counter import byte_counter
from int8convert.hub.header_file import Evidence
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import ContentCheck

_PIECE_BYTES = 1 << 20


def cached_path(file: HubFile, cache_dir: Path | None = None) -> Path | None:
    """Where a file is in the Hub's cache, with the right size; None if it is not."""
    found = _find(file, cache_dir)
    return found if found is not None and found.stat().st_size == file.n_bytes else None


def is_in_cache(file: HubFile, cache_dir: Path | None = None) -> bool:
    """Whether a file is in the Hub's cache, of whatever size."""
    return _find(file, cache_dir) is not None


def _find(file: HubFile, cache_dir: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repository, file.name, cache_dir, file.commit)
    return Path(found) if isinstance(found, str) else None


def download_file(
    file: HubFile,
    cache_dir: Path | None,
    local_dir: Path | None,
    *,
    is_forced: bool,
    on_bytes: Callable[[int], None],
) -> Path:
    """Have the client fetch a file; it raises what it likes.

    Args:
        cache_dir: into this cache; None is the client's own.
        local_dir: into this directory instead.
        is_forced: whether what is there already does not count.
        on_bytes: told how many bytes have come; what it raises ends the download, if not at once.
    """
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            file.repository,
            file.name,
            revision=file.commit,
            cache_dir=cache_dir,
            local_dir=local_dir,
            force_download=is_forced,
            tqdm_class=byte_counter(on_bytes),
        )
    )


def is_content(path: Path, file: HubFile) -> bool:
    """Whether a local file has the bytes the Hub lists."""
    check = ContentCheck(file.n_bytes, file.sha256, file.blob_id)
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            check.feed(piece)
    return check.is_right


def holds_evidence(path: Path, evidence: Iterable[Evidence]) -> bool:
    """Whether the parts of a file that were read of it before are in it."""
    with path.open("rb") as file:
        for one in evidence:
            file.seek(one.begin)
            if hashlib.sha256(file.read(one.end - one.begin)).digest() != one.sha256:
                return False
    return True
