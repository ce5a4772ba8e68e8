"""Small files of a repository, such as configs and indexes, in the Hub's cache, each checked against its hash.

The cache is the client's own, which other programs share; files that are in it are not fetched again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from int8convert.checkpoint.names import CONFIG_NAME, INDEX_NAME, MAX_AUXILIARY_BYTES
from int8convert.errors import CorruptFileError, DiskFullError, HubConnectionError, HubError, OutputError
from int8convert.hub.errors import TransientError
from int8convert.hub.local_copy import byte_counter, is_too_long
from int8convert.hub.repository import MAIN, Repository
from int8convert.hub.retry import RetryBudget, call_hub
from int8convert.text import quoted

_N_CONNECTIONS = 4
_MAX_DOWNLOADS = 3
"""Downloads of a small file that arrives with wrong bytes."""


def fetch_small_files(repository: Repository, names: Iterable[str], cache_dir: Path | None = None) -> Path:
    """Fetch small files, check each against its hash, and return their folder in the Hub's cache.

    Raises:
        HubError: a file cannot be fetched.
        CorruptFileError: a file is too large to be a small one, or arrives with wrong bytes three times.
    """
    names = list(names)
    for name in names:
        n_bytes = repository.files[name].n_bytes
        if n_bytes > MAX_AUXILIARY_BYTES:
            raise CorruptFileError(
                f"{quoted(name)} of {quoted(repository.name)} has {n_bytes:,} bytes, expected at most "
                f"{MAX_AUXILIARY_BYTES:,}",
                "name another repository, or another --revision of it",
            )
    with ThreadPoolExecutor(_N_CONNECTIONS) as pool:
        paths = dict(zip(names, pool.map(lambda name: _fetch(repository, name, cache_dir), names), strict=True))
    if not paths:
        raise HubError(f"{quoted(repository.name)} holds no checkpoint", "name a repository that holds one")
    name, path = next(iter(paths.items()))
    _remember_revision(repository, name, cache_dir)
    return path.parents[len(Path(name).parts) - 1]


def _remember_revision(repository: Repository, name: str, cache_dir: Path | None) -> None:
    """Let the client record the revision's commit in the cache, so that it is found without the network."""
    from huggingface_hub import hf_hub_download

    if repository.revision != repository.commit:
        call_hub(
            lambda: hf_hub_download(repository.name, name, revision=repository.revision, cache_dir=cache_dir),
            RetryBudget(f"fetching {quoted(name)} of {quoted(repository.name)}"),
            repository.name,
        )


def find_cached(name: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Return the Hub cache's folder of a revision, at the commit of its last look-up. It may be incomplete.

    Raises:
        HubConnectionError: the cache does not have it.
    """
    from huggingface_hub import try_to_load_from_cache

    for file_name in (CONFIG_NAME, INDEX_NAME, "model.safetensors"):
        found = try_to_load_from_cache(name, file_name, cache_dir, revision or MAIN)
        if isinstance(found, str):
            return Path(found).parent
    raise HubConnectionError(
        f"HF_HUB_OFFLINE is set, and {quoted(name)} is not in the cache",
        "unset it, or name the --cache-dir or the directory that holds the checkpoint",
    )


def _cache_error(error: OSError, cache_dir: Path | None) -> OutputError:
    from huggingface_hub import constants

    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else OutputError
    return kind(
        f"the cache '{cache_dir or constants.HF_HUB_CACHE}' cannot be written: {error.strerror}",
        "set HF_HOME to another, or pass --cache-dir for a source",
    )


def discard_cached(path: Path) -> None:
    """Remove a file with wrong bytes from the Hub's cache, lest another program use it.

    The blob that the file links to is removed, too, unless it is outside the cache.
    """
    blob = path.resolve()
    path.unlink()
    repository = next((folder.parent for folder in path.absolute().parents if folder.name == "snapshots"), None)
    roots = [folder.resolve() / "blobs" for folder in (repository, repository.parent)] if repository else []
    if any(blob.is_relative_to(root) for root in roots):
        blob.unlink(missing_ok=True)


def _fetch(repository: Repository, name: str, cache_dir: Path | None) -> Path:
    """Fetch one small file, again where it arrives with wrong bytes or is cached with such."""
    from huggingface_hub import hf_hub_download

    subject = f"fetching {quoted(name)} of {quoted(repository.name)}"
    file = repository.files[name]
    error = CorruptFileError(
        f"{quoted(name)} of {quoted(repository.name)} came {_MAX_DOWNLOADS} times with other bytes than the Hub lists",
        "check the proxy and the disk on the way; one of them is broken",
    )
    is_wrong = False
    path: Path | None = None

    def reject() -> NoReturn:
        nonlocal is_wrong
        is_wrong = True
        raise TransientError("wrong bytes", max_failures=_MAX_DOWNLOADS, final=error)

    def stop_at_its_end(n_bytes: int) -> None:
        if is_too_long(n_bytes, file.n_bytes):
            reject()

    def fetch() -> Path:
        nonlocal path
        path = Path(
            hf_hub_download(
                repository.name,
                name,
                revision=repository.commit,
                cache_dir=cache_dir,
                force_download=is_wrong,
                tqdm_class=byte_counter(stop_at_its_end),
            )
        )
        if path.stat().st_size != file.n_bytes or not file.is_content(path.read_bytes()):
            reject()
        return path

    try:
        return call_hub(fetch, RetryBudget(subject), repository.name)
    except CorruptFileError:
        if path is not None:
            discard_cached(path)
        raise
    except OSError as local_error:
        raise _cache_error(local_error, cache_dir) from local_error
