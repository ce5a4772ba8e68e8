"""One repository at one commit: its files with sizes and hashes, and its small files in the Hub's cache.

The commit is found first, and everything afterwards names it, so that a push in the meantime changes nothing. What the
Hub lists - size, and sha256 or git blob id - is what every byte that comes from it is measured against.

The small files are had through the client's own cache, like those of every other program that uses the Hub: what is
there already is not fetched again.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from int8convert.checkpoint.hub.failures import call_hub, endpoint
from int8convert.checkpoint.layout import CONFIG_NAME, INDEX_NAME, quoted
from int8convert.errors import CorruptFileError, DiskFullError, HubConnectionError, HubError, OutputError

_FETCHES_AT_ONCE = 4
_MAIN = "main"
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
    from huggingface_hub import HfApi

    found = call_hub(
        lambda: HfApi().model_info(name, revision=revision, timeout=_answer_s()), f"looking for {quoted(name)}", name
    )
    if found.sha is None:
        raise HubError(f"{quoted(name)} has no commit", "it is empty; name one that holds a checkpoint")
    commit = found.sha
    return Repository(found.id, commit, revision or _MAIN, bool(found.private), _list_files(found.id, commit))


def _answer_s() -> float:
    """How long to wait for an answer; of its own accord the client waits for ever."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _list_files(name: str, commit: str) -> dict[str, RepositoryFile]:
    """As the client's `list_repo_tree`, which takes no time limit, and tries for minutes on its own."""
    route = f"{endpoint()}/api/models/{name}/tree/{commit}"
    query: str | None = "recursive=true"
    files = {}
    while query is not None:
        entries, query = call_hub(partial(_list_page, f"{route}?{query}"), f"listing {quoted(name)}", name)
        for entry in entries:
            if entry["type"] == "file":
                sha256 = entry["lfs"]["oid"] if entry.get("lfs") else None
                files[entry["path"]] = RepositoryFile(entry["path"], entry["size"], sha256, entry["oid"])
    return files


def _list_page(url: str) -> tuple[list[dict[str, Any]], str | None]:
    """The entries of a page, and the query of the next one. Of its address no more: a mirror hands on the Hub's own,
    and the token must not follow it there."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    answer = get_session().get(url, headers=build_hf_headers(), timeout=_answer_s())
    hf_raise_for_status(answer)
    following = answer.links.get("next", {}).get("url")
    return answer.json(), urlsplit(following).query if following else None


def fetch_small_files(repository: Repository, names: Iterable[str], cache_dir: Path | None = None) -> Path:
    """The folder in the Hub's cache in which these files of the repository are, each checked against its hash.

    Args:
        cache_dir: another cache than the client's own.

    Raises:
        HubError: one cannot be had.
        CorruptFileError: one comes with wrong bytes again and again.
    """
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
        "HF_HOME names another, of a source --cache-dir, too; nothing was written",
    )


def _fetch(repository: Repository, name: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    subject = f"fetching {quoted(name)} of {quoted(repository.name)}"
    download = partial(hf_hub_download, repository.name, name, revision=repository.commit, cache_dir=cache_dir)
    for n_tries in range(_TRIES):
        try:
            path = Path(call_hub(partial(download, force_download=n_tries > 0), subject, repository.name))
        except OSError as error:
            raise _cache_error(error, cache_dir) from error
        if repository.files[name].is_content(path.read_bytes()):
            return path
    path.resolve().unlink()  # for the next program would take it from the cache
    path.unlink()
    raise CorruptFileError(
        f"{quoted(name)} of {quoted(repository.name)} came {_TRIES} times with other bytes than the Hub lists",
        "a proxy or a disk on the way is broken; nothing was written",
    )
