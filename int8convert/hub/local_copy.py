"""Files of the Hub on this machine's disk: fetched by the Hub's client, found in its cache, compared with the Hub.

The client checks the size alone; callers check the content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from int8convert.hub.header_file import RangeDigest
from int8convert.hub.remote_file import ContentCheck, HubFile

_PIECE_BYTES = 1 << 20


def cached_path(file: HubFile, cache_dir: Path | None = None) -> Path | None:
    """Return a file's path in the Hub's cache; None if it is not there with the right size."""
    found = _find(file, cache_dir)
    return found if found is not None and found.stat().st_size == file.n_bytes else None


def is_in_cache(file: HubFile, cache_dir: Path | None = None) -> bool:
    """Return whether a file is in the Hub's cache, of whatever size."""
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
    """Fetch a file by the client, whose errors are not translated.

    Args:
        cache_dir: the cache to fetch into; None is the client's own.
        local_dir: a directory to fetch into instead.
        on_bytes: called with the number of bytes received; what it raises ends the download, though not at once.
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


def has_content(path: Path, file: HubFile) -> bool:
    """Return whether a local file has the bytes that the Hub lists."""
    check = ContentCheck(file)
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            check.feed(piece)
    return check.matches


def matches_digests(path: Path, digests: Iterable[RangeDigest]) -> bool:
    """Return whether a local file holds the ranges that were read before."""
    with path.open("rb") as file:
        for digest in digests:
            file.seek(digest.begin)
            if hashlib.sha256(file.read(digest.end - digest.begin)).digest() != digest.sha256:
                return False
    return True


_SLACK_BYTES = 1 << 20
"""Bytes of slack for tiny files."""


def is_too_long(n_bytes: int, n_listed: int) -> bool:
    """Return whether a server has sent more of a file than it lists.

    Some versions of the client count twice what they fetch again after a broken connection, so only more than twice
    the size is too much.
    """
    return n_bytes > 2 * n_listed + _SLACK_BYTES


def byte_counter(on_bytes: Callable[[int], None]) -> Any:
    """Return a progress bar class for the client that shows nothing and reports the bytes received.

    What `on_bytes` raises ends the download, though not at once.
    """
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._n_received = options.get("initial", 0) or 0

        def update(self, n: float | None = 1) -> None:
            self._n_received += n or 0
            on_bytes(int(self._n_received))

    return Counter
