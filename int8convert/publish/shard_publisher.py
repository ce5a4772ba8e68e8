"""Publishes shards on the Hub one by one during the conversion: a `ShardPublisher`.

Each shard is sent, then committed with its record; the first commit also holds the conversion's request. So any machine
can resume from the repository alone. The first commit also removes files that are to be replaced, lest old and new
shards look like one checkpoint. The last commit adds config.json and the index, which make it a checkpoint, and removes
request and records; it is made only if the Hub has all shards as they were here.

Every commit names its parent, so of two concurrent writers one is stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.manifest import Manifest, ShardRecord, parse_record
from int8convert.checkpoint.names import (
    CARD_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    OWN_FOLDER,
    VERIFY_FILE,
    is_loaded_as_weights,
)
from int8convert.errors import HubError, OutputError
from int8convert.events import EventSink, FileSent, ignore
from int8convert.hub.branch import Branch
from int8convert.hub.open_repository import open_repository
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import MAIN, Repository, find_repository
from int8convert.hub.small_files import fetch_small_files
from int8convert.inspection import inspect_source
from int8convert.planning.request_difference import first_difference
from int8convert.publish.card import make_card
from int8convert.publish.finished import read_published
from int8convert.text import quoted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_REQUEST_NAME = f"{OWN_FOLDER}/conversion.json"
_RECORDS_FOLDER = f"{OWN_FOLDER}/shards/"
_COMPLETE_FILES = frozenset({CONFIG_NAME, MANIFEST_NAME, VERIFY_FILE})


class HubPublisher:
    """A `ShardPublisher`.

    Args:
        private: whether a new repository is private, and an existing one must be; None accepts either.
        on_event: receives `FileSent`.

    Attributes:
        commit: the last commit, once the checkpoint is complete.
        keeps_card: the repository's model card is not ours, and was kept.
    """

    def __init__(
        self,
        repository: str,
        private: bool | None = None,
        revision: str = MAIN,
        on_event: EventSink = ignore,
    ) -> None:
        self._branch = Branch(repository, revision, private)
        self._on_event = on_event
        self._request: Mapping[str, Any] = {}
        self._has_begun = False
        self._overwrite = False
        self._stale: list[str] = []
        self._head: str | None = None
        self._n_sent_bytes = 0
        self.commit: str | None = None
        self.keeps_card = False

    @property
    def url(self) -> str:
        return self._branch.url

    def begin(self, request: Mapping[str, Any], overwrite: bool) -> dict[str, ShardRecord]:
        self._branch.check_access()
        self._request, self._overwrite = request, overwrite
        self._has_begun, self._stale = False, []
        found = self._branch.find()
        if found is None:
            return {}
        self._head = found.commit
        there, records = self._read_state(found)
        difference = first_difference(there, request) if there is not None else None
        if there is not None and difference is None:
            self._has_begun = _REQUEST_NAME in found.files
            return {name: record for name, record in records.items() if _is_whole(found.files.get(name), record)}
        if not overwrite and (there is not None or any(map(is_loaded_as_weights, found.files))):
            what = f"a conversion that differs: {difference}" if difference else "weights of something else"
            raise OutputError(
                f"{quoted(self._branch.repository)} holds {what}",
                "name another repository, or pass --overwrite to replace what is in it",
            )
        self._stale = [
            name for name in found.files if name in _COMPLETE_FILES or _is_record(name) or is_loaded_as_weights(name)
        ]
        return {}

    def make(self) -> None:
        self._branch.create()
        self._head = self._branch.head()

    def _read_state(self, found: Repository) -> tuple[dict[str, Any] | None, dict[str, ShardRecord]]:
        """Return the request of the conversion that is there, None if none is, and the records of its shards."""
        if _REQUEST_NAME in found.files:
            names = [_REQUEST_NAME, *filter(_is_record, found.files)]
            folder = fetch_small_files(found, names)
            values = [read_own_json(folder / name) for name in names[1:]]
            request = read_own_json(folder / _REQUEST_NAME)
        elif MANIFEST_NAME in found.files:
            manifest = read_own_json(fetch_small_files(found, [MANIFEST_NAME]) / MANIFEST_NAME)
            values, request = manifest.get("shards") or [], manifest.get("conversion") or {}
        else:
            return None, {}
        records = [record for record in map(parse_record, values) if record is not None]
        return request, {record.file_name: record for record in records}

    def publish(self, record: ShardRecord, path: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        additions = [
            self._branch.send(record.file_name, path, record.sha256),
            CommitOperationAdd(f"{_RECORDS_FOLDER}{record.file_name}.json", _encode(record.to_json())),
        ]
        if not self._has_begun:
            additions.append(CommitOperationAdd(_REQUEST_NAME, _encode(self._request)))
        self._commit(additions, self._stale, f"Add {record.file_name}")
        self._has_begun, self._stale = True, []
        self._report(record.file_name, record.n_bytes)

    def complete(self, out: Path) -> None:
        """See `ShardPublisher`. The model card says that the checkpoint is not verified."""
        from huggingface_hub import CommitOperationAdd

        output = read_published(out)
        state = find_repository(self._branch.repository, self._branch.name)
        shards = {record.file_name: record for record in output.records}
        self._check_shards(shards, state.files)
        files = {name: path for name, path in output.files().items() if name not in shards}
        additions = [self._branch.send(name, path) for name, path in files.items()]
        kept = {*shards, *files}
        stale = [
            name
            for name in state.files
            if name == _REQUEST_NAME or _is_record(name) or (is_loaded_as_weights(name) and name not in kept)
        ]
        self._head = state.commit  # the one whose files were compared
        self._commit(additions, stale, "Complete the checkpoint")
        for name, path in files.items():
            self._report(name, path.stat().st_size)
        self.keeps_card = not self._overwrite and self._branch.has_foreign_card(state)
        if not self.keeps_card:
            found = inspect_source(open_repository(self._branch.repository, self._head), Manifest(out))
            card = make_card(output, self._branch.repository, found).encode()
            self._commit([CommitOperationAdd(CARD_NAME, card)], [], "Write the model card")
            self._report(CARD_NAME, len(card))
        self.commit = self._head

    def _commit(self, additions: Sequence[CommitOperationAdd], deleted: Sequence[str], message: str) -> None:
        from huggingface_hub import CommitOperationDelete

        added = {addition.path_in_repo for addition in additions}
        deletions = [CommitOperationDelete(name) for name in deleted if name not in added]
        info = self._branch.commit(additions, deletions, message, self._head)
        self._head = info.oid if info is not None else self._branch.head()

    def _report(self, name: str, n_bytes: int) -> None:
        self._n_sent_bytes += n_bytes
        self._on_event(FileSent(name, n_bytes, True, self._n_sent_bytes))

    def _check_shards(self, shards: Mapping[str, ShardRecord], there: Mapping[str, HubFile]) -> None:
        for name, record in shards.items():
            if not _is_whole(there.get(name), record):
                raise HubError(
                    f"{quoted(name)} of {quoted(self._branch.repository)} has other bytes on the Hub than it had here",
                    "run the same command again to replace it; somebody else has changed it",
                )


def _is_record(name: str) -> bool:
    return name.startswith(_RECORDS_FOLDER) and name.endswith(".json")


def _is_whole(file: HubFile | None, record: ShardRecord) -> bool:
    """Return whether the Hub has a shard as recorded. For a tiny one outside of LFS, it knows the size alone."""
    return file is not None and file.n_bytes == record.n_bytes and file.sha256 in (record.sha256, None)


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
