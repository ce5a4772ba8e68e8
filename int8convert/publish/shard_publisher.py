"""Shards that go to the Hub one by one while the conversion goes on: a `ShardPublisher` of the conversion.

Each shard is sent, then committed together with its record, and the first with what was asked of the conversion. So the
repository itself knows how far it has got, and whoever goes on with it - the same machine or another - needs nothing
else. The last commit brings config.json and the index, which make it a checkpoint, and removes those notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hub.repository import Repository, RepositoryFile, fetch_small_files, find_repository
from int8convert.checkpoint.hub.source import open_repository
from int8convert.checkpoint.inspection import inspect_source
from int8convert.checkpoint.layout import CONFIG_NAME, OWN_FOLDER, VERIFY_FILE, is_weight_file, quoted, read_json_object
from int8convert.checkpoint.manifest import Manifest, ShardRecord, first_difference, parse_record
from int8convert.checkpoint.source import CARD_NAME
from int8convert.errors import HubError, OutputError
from int8convert.publish.card import make_card
from int8convert.publish.finished import read_published
from int8convert.publish.target import MAIN, SentSink, Target

_REQUEST_NAME = f"{OWN_FOLDER}/conversion.json"
_RECORDS_FOLDER = f"{OWN_FOLDER}/shards/"
_MANIFEST_NAME = f"{OWN_FOLDER}/manifest.json"


class HubPublisher:
    """See `ShardPublisher` of the conversion.

    Args:
        repository: ORGANIZATION/NAME; made if it is not there.
        private: whether it is then.
        revision: the branch.
        on_file: told of each file that is on the Hub.

    Attributes:
        url: where to look at it.
        commit: the last one, once it is complete.
    """

    def __init__(
        self,
        repository: str,
        private: bool | None = None,
        revision: str = MAIN,
        on_file: SentSink = lambda name, n_bytes, is_sent: None,
    ) -> None:
        self._target = Target(repository, revision, private)
        self._on_file = on_file
        self._request: Mapping[str, Any] = {}
        self._has_begun = False
        self._stale: list[str] = []
        self.commit: str | None = None

    @property
    def url(self) -> str:
        return self._target.url

    def begin(self, request: Mapping[str, Any], overwrite: bool) -> dict[str, ShardRecord]:
        """See `ShardPublisher`."""
        self._request, self._stale = request, []
        self._target.make()
        found = find_repository(self._target.name, self._target.branch)
        names = [name for name in found.files if name in (_REQUEST_NAME, _MANIFEST_NAME) or _is_record(name)]
        there, records = self._read_state(found, names) if names else (None, {})
        difference = first_difference(there, request) if there is not None else None
        if there is not None and difference is None:
            self._has_begun = _REQUEST_NAME in found.files
            return {name: record for name, record in records.items() if _is_whole(found.files.get(name), record)}
        if not overwrite and (there is not None or any(map(is_weight_file, found.files))):
            what = f"a conversion that differs: {difference}" if difference else "weights of something else"
            raise OutputError(
                f"{quoted(self._target.name)} holds {what}",
                "name another repository, or pass --overwrite to replace what is in it; nothing was written",
            )
        self._stale = [
            name
            for name in found.files
            if name in (CONFIG_NAME, _MANIFEST_NAME, VERIFY_FILE) or _is_record(name) or is_weight_file(name)
        ]
        return {}

    def _read_state(self, found: Repository, names: list[str]) -> tuple[dict[str, Any] | None, dict[str, ShardRecord]]:
        """What was asked of the conversion that is there, and the records of its shards."""
        folder = fetch_small_files(found, names)
        if _REQUEST_NAME in names:
            values = [read_json_object(folder / name) for name in names if _is_record(name)]
            request = read_json_object(folder / _REQUEST_NAME)
        else:
            manifest = read_json_object(folder / _MANIFEST_NAME)
            values, request = manifest.get("shards") or [], manifest.get("conversion") or {}
        records = [record for record in map(parse_record, values) if record is not None]
        return request, {record.file_name: record for record in records}

    def publish(self, record: ShardRecord, path: Path) -> None:
        """See `ShardPublisher`."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [
            self._target.send(record.file_name, path),
            CommitOperationAdd(f"{_RECORDS_FOLDER}{record.file_name}.json", _encode(asdict(record))),
        ]
        if not self._has_begun:
            additions.append(CommitOperationAdd(_REQUEST_NAME, _encode(self._request)))
        added = {addition.path_in_repo for addition in additions}
        deletions = [CommitOperationDelete(name) for name in self._stale if name not in added]
        self._target.commit(additions, deletions, f"Add {record.file_name}")
        self._has_begun, self._stale = True, []
        self._on_file(record.file_name, record.n_bytes, True)

    def complete(self, out: Path) -> None:
        """See `ShardPublisher`. What is not verified here can be verified from there; the card tells that it is not."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        output = read_published(out)
        state = find_repository(self._target.name, self._target.branch)
        there = state.files
        shards = {record.file_name: record for record in output.records}
        files = {name: path for name, path in output.files().items() if name not in shards and name != CARD_NAME}
        additions = [self._target.send(name, path) for name, path in files.items()]
        stale = [
            name
            for name in there
            if name == _REQUEST_NAME or _is_record(name) or (is_weight_file(name) and name not in {*shards, *files})
        ]
        self._check(shards, there)
        deletions = [CommitOperationDelete(name) for name in stale]
        self._target.commit(additions, deletions, "Complete the checkpoint", state.commit)
        for name, path in files.items():
            self._on_file(name, path.stat().st_size, True)
        found = inspect_source(open_repository(self._target.name, self._target.head()), Manifest(out))
        card = make_card(output, self._target.name, found).encode()
        self._target.commit([CommitOperationAdd(CARD_NAME, card)], [], "Write the model card")
        self.commit = self._target.head()

    def _check(self, shards: Mapping[str, ShardRecord], there: Mapping[str, RepositoryFile]) -> None:
        for name, record in shards.items():
            if not _is_whole(there.get(name), record):
                raise HubError(
                    f"{quoted(name)} of {quoted(self._target.name)} has other bytes on the Hub than it had here",
                    "somebody else may have changed it meanwhile; the same command makes it again",
                )


def _is_record(name: str) -> bool:
    return name.startswith(_RECORDS_FOLDER) and name.endswith(".json")


def _is_whole(file: RepositoryFile | None, record: ShardRecord) -> bool:
    """Whether the Hub has a shard as its record says. A tiny one may lie outside of LFS, where the Hub knows no sha256;
    its size is all there is to compare then."""
    return file is not None and file.n_bytes == record.n_bytes and file.sha256 in (record.sha256, None)


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
