"""Shards that go to the Hub one by one while the conversion goes on: a `ShardPublisher` of the conversion.

Each shard is sent, then committed together with its record, and the first with what was asked of the conversion. So the
repository itself knows how far it has got, and whoever goes on with it - the same machine or another - needs nothing
else. That first commit also removes what is to be replaced, lest old and new shards look like one checkpoint. The last
one brings config.json and the index, which make it a checkpoint, and removes those notes; it is made only if all shards
are on the Hub as they were here.

Every commit names the one before it, so that of two who write to a repository at the same time one is stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.manifest import Manifest, ShardRecord, first_difference, parse_record
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
from int8convert.hub.branch import MAIN, Target
from int8convert.hub.open_repository import open_repository
from int8convert.hub.repository import Repository, RepositoryFile, fetch_small_files, find_repository
from int8convert.inspection import inspect_source
from int8convert.publish.card import make_card
from int8convert.publish.finished import read_published
from int8convert.text import quoted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_REQUEST_NAME = f"{OWN_FOLDER}/conversion.json"
_RECORDS_FOLDER = f"{OWN_FOLDER}/shards/"
_OF_A_WHOLE = frozenset({CONFIG_NAME, MANIFEST_NAME, VERIFY_FILE})


class HubPublisher:
    """See `ShardPublisher` of the conversion.

    Args:
        repository: ORGANIZATION/NAME; made if it is not there.
        private: whether it is then, and must be if it is there.
        revision: the branch.
        on_event: receives `FileSent`.

    Attributes:
        url: where to look at it.
        commit: the last one, once it is complete.
        keeps_card: the repository has a model card of somebody's own, which is left as it is.
    """

    def __init__(
        self,
        repository: str,
        private: bool | None = None,
        revision: str = MAIN,
        on_event: EventSink = ignore,
    ) -> None:
        self._target = Target(repository, revision, private)
        self._on_event = on_event
        self._request: Mapping[str, Any] = {}
        self._has_begun = False
        self._overwrites = False
        self._stale: list[str] = []
        self._head: str | None = None
        self._n_sent_bytes = 0
        self.commit: str | None = None
        self.keeps_card = False

    @property
    def url(self) -> str:
        return self._target.url

    def begin(self, request: Mapping[str, Any], overwrite: bool) -> dict[str, ShardRecord]:
        """See `ShardPublisher`."""
        self._target.check_access()
        self._request, self._overwrites = request, overwrite
        self._has_begun, self._stale = False, []
        found = self._target.find()
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
                f"{quoted(self._target.name)} holds {what}",
                "name another repository, or pass --overwrite to replace what is in it",
            )
        self._stale = [
            name for name in found.files if name in _OF_A_WHOLE or _is_record(name) or is_loaded_as_weights(name)
        ]
        return {}

    def make(self) -> None:
        """See `ShardPublisher`."""
        self._target.make()
        self._head = self._target.head()

    def _read_state(self, found: Repository) -> tuple[dict[str, Any] | None, dict[str, ShardRecord]]:
        """What was asked of the conversion that is there, and the records of its shards."""
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
        """See `ShardPublisher`."""
        from huggingface_hub import CommitOperationAdd

        additions = [
            self._target.send(record.file_name, path, record.sha256),
            CommitOperationAdd(f"{_RECORDS_FOLDER}{record.file_name}.json", _encode(asdict(record))),
        ]
        if not self._has_begun:
            additions.append(CommitOperationAdd(_REQUEST_NAME, _encode(self._request)))
        self._commit(additions, self._stale, f"Add {record.file_name}")
        self._has_begun, self._stale = True, []
        self._tell(record.file_name, record.n_bytes)

    def complete(self, out: Path) -> None:
        """See `ShardPublisher`. What is not verified here can be verified from there; the card tells that it is not."""
        from huggingface_hub import CommitOperationAdd

        output = read_published(out)
        state = find_repository(self._target.name, self._target.branch)
        shards = {record.file_name: record for record in output.records}
        self._check(shards, state.files)
        files = {name: path for name, path in output.files().items() if name not in shards}
        additions = [self._target.send(name, path) for name, path in files.items()]
        kept = {*shards, *files}
        stale = [
            name
            for name in state.files
            if name == _REQUEST_NAME or _is_record(name) or (is_loaded_as_weights(name) and name not in kept)
        ]
        self._head = state.commit  # that of the files which were compared
        self._commit(additions, stale, "Complete the checkpoint")
        for name, path in files.items():
            self._tell(name, path.stat().st_size)
        self.keeps_card = not self._overwrites and self._target.has_foreign_card(state)
        if not self.keeps_card:
            found = inspect_source(open_repository(self._target.name, self._head), Manifest(out))
            card = make_card(output, self._target.name, found).encode()
            self._commit([CommitOperationAdd(CARD_NAME, card)], [], "Write the model card")
            self._tell(CARD_NAME, len(card))
        self.commit = self._head

    def _commit(self, additions: Sequence[CommitOperationAdd], deleted: Sequence[str], message: str) -> None:
        from huggingface_hub import CommitOperationDelete

        added = {addition.path_in_repo for addition in additions}
        deletions = [CommitOperationDelete(name) for name in deleted if name not in added]
        info = self._target.commit(additions, deletions, message, self._head)
        self._head = info.oid if info is not None else self._target.head()

    def _tell(self, name: str, n_bytes: int) -> None:
        self._n_sent_bytes += n_bytes
        self._on_event(FileSent(name, n_bytes, True, self._n_sent_bytes))

    def _check(self, shards: Mapping[str, ShardRecord], there: Mapping[str, RepositoryFile]) -> None:
        for name, record in shards.items():
            if not _is_whole(there.get(name), record):
                raise HubError(
                    f"{quoted(name)} of {quoted(self._target.name)} has other bytes on the Hub than it had here",
                    "somebody else has changed it meanwhile; the same command makes it again",
                )


def _is_record(name: str) -> bool:
    return name.startswith(_RECORDS_FOLDER) and name.endswith(".json")


def _is_whole(file: RepositoryFile | None, record: ShardRecord) -> bool:
    """Whether the Hub has a shard as its record says. A tiny one may lie outside of LFS, where the Hub knows no sha256;
    its size is all there is to compare then."""
    return file is not None and file.n_bytes == record.n_bytes and file.sha256 in (record.sha256, None)


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
