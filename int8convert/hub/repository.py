"""One repository at one commit: its files with sizes and hashes.

The commit is looked up first, and every later request names it, so a push in the meantime changes nothing. All bytes
from the Hub are compared with the size and the sha256 or git blob id that it lists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import HubError
from int8convert.hub.bounded_answer import get_json
from int8convert.hub.errors import endpoint
from int8convert.hub.retry import RetryBudget, call_hub
from int8convert.text import quoted

_N_CONNECTIONS = 4
MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OTHER_REPOSITORY = "name another repository; if HF_ENDPOINT names a mirror, unset it"

MAX_FILES = 200_000
"""Files of a repository. The Hub advises against more than 100,000."""

MAX_PAGES = 1_000
"""Pages of a list of files. The Hub puts 1,000 files on one."""


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file as the Hub lists it.

    Attributes:
        sha256: of the content, in hex; None for files outside of LFS.
        blob_id: git's id; for LFS files, that of the pointer.
    """

    name: str
    n_bytes: int
    sha256: str | None
    blob_id: str

    def is_content(self, content: bytes) -> bool:
        check = ContentCheck(self.n_bytes, self.sha256, self.blob_id)
        check.feed(content)
        return check.matches


class ContentCheck:
    """Compares a file's bytes, fed in order, with what the Hub lists. The arguments are those of `RepositoryFile`."""

    def __init__(self, n_bytes: int, sha256: str | None, blob_id: str) -> None:
        self._expected = sha256, blob_id
        self._sha256 = hashlib.sha256()
        self._blob = None if sha256 else hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)

    def feed(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        if self._blob is not None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        """The sha256 of all bytes so far, in hex."""
        return self._sha256.hexdigest()

    @property
    def matches(self) -> bool:
        """The bytes so far are the whole file."""
        if self._blob is not None:
            return self._blob.hexdigest() == self._expected[1]
        return self.sha256 == self._expected[0]


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        name: the Hub's name for it, which differs from the given name after a renaming.
        commit: 40 hex digits.
    """

    name: str
    commit: str
    revision: str
    is_private: bool
    files: Mapping[str, RepositoryFile] = field(repr=False)


def find_repository(name: str, revision: str | None = None) -> Repository:
    """Look a repository up.

    Raises:
        HubError: the repository does not exist, is not visible to this token, or the Hub cannot be reached.
    """
    from huggingface_hub.utils import validate_repo_id

    subject = f"looking for {quoted(name)}"
    route = f"{endpoint()}/api/models/{name}" + (f"/revision/{quote(revision, safe='')}" if revision else "")

    def look() -> tuple[str, str | None, bool]:
        validate_repo_id(name)
        found, _ = get_json(route, subject)
        if not isinstance(found, dict) or not isinstance(found.get("id"), str):
            raise ValueError("not a repository of the Hub")
        validate_repo_id(found["id"])
        return found["id"], found.get("sha"), bool(found.get("private"))

    found_name, commit, is_private = call_hub(look, RetryBudget(subject), name)
    if commit is None:
        raise HubError(f"{quoted(name)} is empty: it has no commit", "name a repository that holds a checkpoint")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise HubError(
            f"{quoted(name)} is at {quoted(str(commit), 60)}, expected a commit of 40 hex digits", _OTHER_REPOSITORY
        )
    return Repository(found_name, commit, revision or MAIN, is_private, _list_files(found_name, commit))


def _list_files(name: str, commit: str) -> dict[str, RepositoryFile]:
    """List a commit's files. The client's `list_repo_tree` has no time limit, and retries for minutes by itself."""
    route = f"{endpoint()}/api/models/{name}/tree/{commit}"
    subject = f"listing {quoted(name)}"
    query: str | None = "recursive=true"
    asked: set[str] = set()
    files: dict[str, RepositoryFile] = {}
    while query is not None:
        if query in asked or len(asked) == MAX_PAGES or len(files) > MAX_FILES:
            what = "repeats a page" if query in asked else f"has more than {MAX_FILES:,} files"
            raise HubError(f"the list of files of {quoted(name)} {what}", _OTHER_REPOSITORY)
        asked.add(query)
        found, query = call_hub(partial(_list_page, f"{route}?{query}", subject), RetryBudget(subject), name)
        files |= {file.name: file for file in found}
    return files


def _list_page(url: str, subject: str) -> tuple[list[RepositoryFile], str | None]:
    """Return the files of a page, without folders, and the query of the next page."""
    entries, query = get_json(url, subject)
    if not isinstance(entries, list):
        raise ValueError("not a list of files")
    return [file for entry in entries if (file := _parse_entry(entry)) is not None], query


def _parse_entry(entry: Any) -> RepositoryFile | None:
    """Return a file of the list; None for a folder. Raises ValueError for anything else."""
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
    raise ValueError("not an entry of a list of files")
