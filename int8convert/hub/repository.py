"""One repository at one commit: its files with sizes and hashes, and its small files in the Hub's cache.

The commit is found first, and everything afterwards names it, so that a push in the meantime changes nothing. What the
Hub lists - size, and sha256 or git blob id - is what every byte that comes from it is measured against.

The small files are had through the client's own cache, like those of every other program that uses the Hub: what is
there already is not fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from int8convert.checkpoint.names import CONFIG_NAME, INDEX_NAME, MAX_CARRIED_BYTES
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, DiskFullError, HubConnectionError, HubError, OutputError
from int8convert.hub.bounded_answer import get_json
from int8convert.hub.byte_counter import byte_counter, is_too_long
from int8convert.hub.errors import call_hub, endpoint
from int8convert.text import quoted

_FETCHES_AT_ONCE = 4
_MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_HUB = "name another repository; if HF_ENDPOINT names a mirror, unset it"

MAX_FILES = 200_000
"""Files of a repository. The Hub advises against more than 100,000."""

MAX_PAGES = 1_000
"""Pages of a list of files. The Hub puts 1,000 files on one."""

_TRIES = 3
"""For a small file that comes with wrong bytes."""


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file as the Hub lists it.

    Attributes:
        name: its path in the repository.
        sha256: of its content; None outside of LFS.
        blob_id: what git calls it; of LFS files, it is the pointer's.
    """

    name: str
    n_bytes: int
    sha256: str | None
    blob_id: str

    def is_content(self, content: bytes) -> bool:
        """Whether these are its bytes."""
        check = ContentCheck(self.n_bytes, self.sha256, self.blob_id)
        check.feed(content)
        return check.is_right


class ContentCheck:
    """Whether a file's bytes, fed in order, are what the Hub lists.

    Args:
        n_bytes, sha256, blob_id: as `RepositoryFile` has them.
    """

    def __init__(self, n_bytes: int, sha256: str | None, blob_id: str) -> None:
        self._expected = sha256, blob_id
        self._sha256 = hashlib.sha256()
        self._blob = None if sha256 else hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._sha256.update(data)
        if self._blob is not None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        """Of all that was fed, in hex."""
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether all that was fed is the file."""
        if self._blob is not None:
            return self._blob.hexdigest() == self._expected[1]
        return self.sha256 == self._expected[0]


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        name: as the Hub knows it, which of old names is not what was asked for.
        commit: 40 hex digits.
        revision: what was asked for: a branch, a tag, or a commit.
        is_private: whether only its owners see it.
        files: by name, folders left out.
    """

    name: str
    commit: str
    revision: str
    is_private: bool
    files: Mapping[str, RepositoryFile] = field(repr=False)


def find_repository(name: str, revision: str | None = None) -> Repository:
    """Look a repository up.

    Args:
        revision: a branch, a tag or a commit; None is the main branch.

    Raises:
        HubError: it is not there, or not for this token, or the Hub is not reached.
    """
    from huggingface_hub.utils import validate_repo_id

    subject = f"looking for {quoted(name)}"
    route = f"{endpoint()}/api/models/{name}" + (f"/revision/{quote(revision, safe='')}" if revision else "")

    def look() -> tuple[str, str | None, bool]:
        validate_repo_id(name)
        found, _ = get_json(route, subject)
        if not isinstance(found, dict) or not isinstance(found.get("id"), str):
            raise ValueError("no repository of the Hub")
        validate_repo_id(found["id"])
        return found["id"], found.get("sha"), bool(found.get("private"))

    found_name, commit, is_private = call_hub(look, subject, name)
    if commit is None:
        raise HubError(f"{quoted(name)} has no commit", "it is empty; name one that holds a checkpoint")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise HubError(f"{quoted(name)} is at {quoted(str(commit), 60)}, expected a commit of 40 hex digits", _NO_HUB)
    return Repository(found_name, commit, revision or _MAIN, is_private, _list_files(found_name, commit))


def _list_files(name: str, commit: str) -> dict[str, RepositoryFile]:
    """As the client's `list_repo_tree`, which takes no time limit, and tries for minutes on its own."""
    route = f"{endpoint()}/api/models/{name}/tree/{commit}"
    subject = f"listing {quoted(name)}"
    query: str | None = "recursive=true"
    asked: set[str] = set()
    files: dict[str, RepositoryFile] = {}
    while query is not None:
        if query in asked or len(asked) == MAX_PAGES or len(files) > MAX_FILES:
            what = "names a page again" if query in asked else f"has more than {MAX_FILES:,} files"
            raise HubError(f"the list of files of {quoted(name)} {what}", _NO_HUB)
        asked.add(query)
        found, query = call_hub(partial(_list_page, f"{route}?{query}", subject), subject, name)
        files |= {file.name: file for file in found}
    return files


def _list_page(url: str, subject: str) -> tuple[list[RepositoryFile], str | None]:
    """The files of a page, folders left out, and the query of the next one."""
    entries, query = get_json(url, subject)
    if not isinstance(entries, list):
        raise ValueError("no list of files")
    return [file for entry in entries if (file := _parse_entry(entry)) is not None], query


def _parse_entry(entry: Any) -> RepositoryFile | None:
    """A file of the list; None of a folder.

    Raises:
        ValueError: it is neither.
    """
    match entry:
        case {"type": "file", "path": str(path), "size": int(size), "oid": str(blob_id), **others}:
            lfs = others.get("lfs")
            sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
            is_known = sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256))
            parts = path.split("/")
            if is_size(size) and is_known and path.isprintable() and not {"", ".", ".."} & {*parts}:
                return RepositoryFile(path, size, sha256, blob_id)
        case {"type": str(kind)} if kind != "file":
            return None
    raise ValueError("no entry of a list of files")


def fetch_small_files(repository: Repository, names: Iterable[str], cache_dir: Path | None = None) -> Path:
    """The folder in the Hub's cache in which these files of the repository are, each checked against its hash.

    Args:
        cache_dir: another cache than the client's own.

    Raises:
        HubError: one cannot be had.
        CorruptFileError: one is too large to be a small file, or comes with wrong bytes again and again.
    """
    names = list(names)
    for name in names:
        n_bytes = repository.files[name].n_bytes
        if n_bytes > MAX_CARRIED_BYTES:
            raise CorruptFileError(
                f"{quoted(name)} of {quoted(repository.name)} has {n_bytes:,} bytes, expected at most "
                f"{MAX_CARRIED_BYTES:,}",
                "name another repository, or another --revision of it",
            )
    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        paths = dict(zip(names, pool.map(lambda name: _fetch(repository, name, cache_dir), names), strict=True))
    if not paths:
        raise HubError(f"{quoted(repository.name)} holds nothing to convert", "name a repository with a checkpoint")
    name, path = next(iter(paths.items()))
    _remember_revision(repository, name, cache_dir)
    return path.parents[len(Path(name).parts) - 1]


def _remember_revision(repository: Repository, name: str, cache_dir: Path | None) -> None:
    """Have the cache know which commit the revision is, by which it is found without the network."""
    from huggingface_hub import hf_hub_download

    if repository.revision != repository.commit:
        call_hub(
            lambda: hf_hub_download(repository.name, name, revision=repository.revision, cache_dir=cache_dir),
            f"fetching {quoted(name)} of {quoted(repository.name)}",
            repository.name,
        )


def find_cached(name: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder in the Hub's cache for a revision as it was when it was last looked up; its files may lack.

    Raises:
        HubConnectionError: the cache knows nothing of it.
    """
    from huggingface_hub import try_to_load_from_cache

    for file_name in (CONFIG_NAME, INDEX_NAME, "model.safetensors"):
        found = try_to_load_from_cache(name, file_name, cache_dir, revision or _MAIN)
        if isinstance(found, str):
            return Path(found).parent
    raise HubConnectionError(
        f"HF_HUB_OFFLINE is set, and {quoted(name)} is not in the cache",
        "unset it, or name the --cache-dir, or the directory, that holds the checkpoint",
    )


def _cache_error(error: OSError, cache_dir: Path | None) -> OutputError:
    from huggingface_hub import constants

    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else OutputError
    return kind(
        f"the cache '{cache_dir or constants.HF_HUB_CACHE}' cannot be written: {error.strerror}",
        "HF_HOME names another, of a source --cache-dir, too",
    )


def discard_cached(path: Path) -> None:
    """Remove a file with wrong bytes from the Hub's cache, where the next program would take it.

    In the cache a file is a link to a blob, which goes too. A link that leads out of the cache is removed alone.
    """
    blob = path.resolve()
    path.unlink()
    repository = next((folder.parent for folder in path.absolute().parents if folder.name == "snapshots"), None)
    roots = [folder.resolve() / "blobs" for folder in (repository, repository.parent)] if repository else []
    if any(blob.is_relative_to(root) for root in roots):
        blob.unlink(missing_ok=True)


class _TooLongError(Exception):
    """The server sends more bytes than it lists. Stays in this module."""


def _fetch(repository: Repository, name: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    subject = f"fetching {quoted(name)} of {quoted(repository.name)}"
    file = repository.files[name]

    def stop_at_its_end(n_bytes: int) -> None:
        if is_too_long(n_bytes, file.n_bytes):
            raise _TooLongError

    download = partial(
        hf_hub_download,
        repository.name,
        name,
        revision=repository.commit,
        cache_dir=cache_dir,
        tqdm_class=byte_counter(stop_at_its_end),
    )
    path = None
    for n_tries in range(_TRIES):
        try:
            path = Path(call_hub(partial(download, force_download=n_tries > 0), subject, repository.name))
        except _TooLongError:
            continue
        except OSError as error:
            raise _cache_error(error, cache_dir) from error
        if path.stat().st_size == file.n_bytes and file.is_content(path.read_bytes()):
            return path
    if path is not None:
        discard_cached(path)
    raise CorruptFileError(
        f"{quoted(name)} of {quoted(repository.name)} came {_TRIES} times with other bytes than the Hub lists",
        "a proxy or a disk on the way is broken",
    )
