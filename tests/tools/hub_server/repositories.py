"""Repositories: commits, and refs that point at them."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from tests.tools.hub_server.blobs import Blobs, KnownFile
from tests.tools.hub_server.file_entries import FileEntry, added_entry
from tests.tools.hub_server.http_messages import Refusal


class Visibility(StrEnum):
    PUBLIC = "public"
    PRIVATE = "private"
    GATED = "gated"
    """Everybody may list it; the files are for those whom its owner let in."""


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    date: str
    tree: Mapping[str, FileEntry]


class Repository:
    """One model repository. Its methods may be called from many threads."""

    def __init__(self, repo_id: str, visibility: Visibility, blobs: Blobs) -> None:
        self.id, self.visibility = repo_id, visibility
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.pull_request_titles: list[str] = []
        self._blobs = blobs
        self._lock = threading.RLock()
        self.commit("main", "initial commit", {}, deleted=[])

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes of every file of main."""
        return self.files_at("main")

    def files_at(self, revision: str) -> dict[str, bytes]:
        """The bytes of every file of a branch, a pull request (`refs/pr/1`) or a commit."""
        tree = self.find(revision).tree
        return {path: self._blobs.path(entry.sha256).read_bytes() for path, entry in tree.items()}

    def add_files(self, files: Mapping[str, bytes | Path | KnownFile], title: str = "add files") -> str:
        """Put files on main without a client. Returns: the commit's id."""
        entries = {path: added_entry(self._blobs, path, content) for path, content in files.items()}
        return self.commit("main", title, entries, deleted=[])

    def commit(
        self,
        ref: str,
        title: str,
        files: Mapping[str, FileEntry],
        deleted: Iterable[str],
        expected_parent: str | None = None,
    ) -> str:
        """Add a commit to a branch: its tree, without what `deleted` names (a path, or a folder), with `files`.

        Raises:
            Refusal: 404, no such file to delete or no such branch; 412, the branch is not at `expected_parent`.
        """
        with self._lock:
            parent = self.refs.get(ref)
            if parent is None and self.refs:
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            if expected_parent and not (parent or "").startswith(expected_parent):
                raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
            tree = dict(self.commits[parent].tree) if parent else {}
            for path in deleted:
                gone = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
                for name in gone:
                    del tree[name]
            tree.update(files)
            return self._append(ref, Commit("", parent, title, _now(), tree))

    def branch(self, ref: str, at: str) -> None:
        """Make a ref point at a commit."""
        with self._lock:
            self.refs[ref] = at

    def open_pull_request(self, title: str, at: str) -> int:
        """Make the next `refs/pr/N`. Returns: N."""
        with self._lock:
            self.pull_request_titles.append(title)
            number = len(self.pull_request_titles)
            self.refs[f"refs/pr/{number}"] = at
            return number

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a pull request, or a commit id of which at least 7 characters are given.

        Raises:
            Refusal: 404 RevisionNotFound.
        """
        with self._lock:
            if oid := self.refs.get(revision):
                return self.commits[oid]
            named = [c for oid, c in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if len(named) != 1:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return named[0]

    def history(self, revision: str) -> list[Commit]:
        """A commit and what came before it, newest first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def _append(self, ref: str, commit: Commit) -> str:
        tree = {path: asdict(entry) for path, entry in commit.tree.items()}
        text = json.dumps([self.id, commit.parent, commit.title, len(self.commits), tree])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, commit.parent, commit.title, commit.date, commit.tree)
        self.refs[ref] = oid
        return oid


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders that lead to these files."""
    return set(itertools.chain.from_iterable(_parents(path) for path in paths))


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
