"""One repository at one commit: its files with sizes and hashes.

The commit is looked up first, and every later request names it, so a push in the meantime changes nothing. All bytes
from the Hub are compared with the size and the sha256 or git blob id that it lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import HubError
from int8convert.hub.bounded_answer import get_json
from int8convert.hub.errors import endpoint
from int8convert.hub.remote_file import HubFile
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
    files: Mapping[str, HubFile] = field(repr=False)


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


def _list_files(name: str, commit: str) -> dict[str, HubFile]:
    """List a commit's files. The client's `list_repo_tree` has no time limit, and retries for minutes by itself."""
    query: str | None = "recursive=true"
    asked: set[str] = set()
    files: dict[str, HubFile] = {}
    while query is not None:
        if query in asked or len(asked) == MAX_PAGES or len(files) > MAX_FILES:
            what = "repeats a page" if query in asked else f"has more than {MAX_FILES:,} files"
            raise HubError(f"the list of files of {quoted(name)} {what}", _OTHER_REPOSITORY)
        asked.add(query)
        found, query = call_hub(partial(_list_page, name, commit, query), RetryBudget(f"listing {quoted(name)}"), name)
        files |= {file.name: file for file in found}
    return files


def _list_page(name: str, commit: str, query: str) -> tuple[list[HubFile], str | None]:
    """Return the files of a page, without folders, and the query of the next page."""
    entries, following = get_json(f"{endpoint()}/api/models/{name}/tree/{commit}?{query}", f"listing {quoted(name)}")
    if not isinstance(entries, list):
        raise ValueError("not a list of files")
    return [file for entry in entries if (file := _parse_entry(name, commit, entry)) is not None], following


def _parse_entry(repository: str, commit: str, entry: Any) -> HubFile | None:
    """Return a file of the list; None for a folder. Raises ValueError for anything else."""
    match entry:
        case {"type": "file", "path": str(path), "size": int(size), "oid": str(blob_id), **others}:
            lfs = others.get("lfs")
            sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
            is_known = sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256))
            parts = path.split("/")
            if is_size(size) and is_known and path.isprintable() and not {"", ".", ".."} & {*parts}:
                return HubFile(repository, commit, path, size, sha256, blob_id)
        case {"type": str(kind)} if kind != "file":
            return None
    raise ValueError("not an entry of a list of files")


_NAME_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY_NAME = re.compile(f"{_NAME_PART}/{_NAME_PART}", re.ASCII)
"""ORGANIZATION/NAME. The few names without an organization count as directories."""

_REPOSITORY_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?:huggingface|hf)\.co/|hf://|(?=[^/]+/[^/]+@))(?!datasets/|spaces/)(?:models/)?"
    rf"(?P<name>{_NAME_PART}/{_NAME_PART})(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[^/?#]+))?(?:[/?#].*)?",
    re.ASCII,
)
"""Addresses of a repository's pages, and the notations of other tools."""


def looks_like_repository(name: str) -> bool:
    """Return whether a repository could have this name."""
    return _REPOSITORY_NAME.fullmatch(name) is not None


def name_of_address(address: str) -> str | None:
    """Return the name in a repository's address, with the option for its revision; None if it is no such address."""
    found = _REPOSITORY_ADDRESS.fullmatch(address)
    if found is None:
        return None
    revision = found["revision"]
    return f"{found['name']}, with --revision {unquote(revision)}" if revision else found["name"]
