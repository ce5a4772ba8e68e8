"""What of an output is published, when, and with which proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi

import int8convert
from int8convert import errors
from int8convert.runtime.text.texts import Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from tests.publish.conftest import LOOSE
from tests.publish.test_upload import REPO, published
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("report", "why"),
    [
        ({"is_passed": True}, "'config.json' is not the one that was verified"),
        ({"is_passed": True, "files": {}}, "'config.json' is not the one that was verified"),
        ({"is_passed": True, "files": "config.json"}, "'config.json' is not the one that was verified"),
        ({"files": {}}, "it did not pass when it was verified"),
        ({"is_passed": "yes", "files": {}}, "it did not pass when it was verified"),
        (b"{", "its verify.json cannot be read"),
    ],
)
def test_report_that_names_nothing_proves_nothing(
    report: Any, why: str, verified: Path, hub: Hub, connect: Connect
) -> None:
    connect(hub, hub.token)
    path = verified / "int8convert" / "verify.json"
    path.write_bytes(report if isinstance(report, bytes) else json.dumps(report).encode())
    with pytest.raises(errors.UnverifiedError, match=f"cannot be published: {why}"):
        int8convert.upload(verified, REPO)
    assert not hub.log.requests()


def test_files_of_others_that_hide_or_are_unfinished_stay_here(verified: Path, hub: Hub, connect: Connect) -> None:
    expected = published(verified)
    for name in (".env", ".cache/token", "model.safetensors.incomplete", "int8convert/shards/a.json"):
        (verified / name).parent.mkdir(exist_ok=True)
        (verified / name).write_text("secret")
    (verified / "int8convert" / "incoming").mkdir()
    (verified / "int8convert" / "incoming" / "pytorch_model.bin").write_text("secret")
    connect(hub, hub.token)

    int8convert.upload(verified, REPO)

    assert hub.repo(REPO).files.keys() == expected.keys() | {"README.md"}


def test_card_is_written_anew_when_it_was_verified_since(out: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    int8convert.upload(out, REPO, allow_unverified=True)
    write_report(int8convert.verify(out, text=Text(n_sequences=4, length=16), execution=Execution("cpu"), gates=LOOSE))

    report = int8convert.upload(out, REPO)

    assert report.sent == ("README.md", "int8convert/verify.json")
    assert "**Not verified**" not in hub.repo(REPO).files["README.md"].decode()


def test_message_is_that_of_the_commit(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO, message="Int8  weights")
    assert hub.repo(REPO).history("main")[0].title == "Int8  weights"


def test_upload_to_a_branch_that_is_there_goes_on_with_it(verified: Path, hub: Hub, connect: Connect) -> None:
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    connect(hub, hub.token)
    int8convert.upload(verified, REPO, revision="int8")
    (verified / "README.md").write_text("# Mine")
    report = int8convert.upload(verified, REPO, revision="int8")
    assert report.sent == ("README.md",)


def test_output_that_cannot_be_written_to_is_told(
    verified: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hub, hub.token)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("int8convert.publish.upload.DirectoryLock", refuse)
    with pytest.raises(errors.OutputError, match="is not writable; an upload writes a model card and a lock into it"):
        int8convert.upload(verified, REPO)
    assert not hub.log.requests()


def test_commit_that_only_removes_is_made_though_it_failed_once(
    verified: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO)
    hub.repo(REPO).add_files({"pytorch_model.bin": b"old"})
    create_commit = HfApi.create_commit
    calls: list[str] = []

    def failing(self: HfApi, *arguments: object, **options: object) -> object:
        calls.append("commit")
        if len(calls) == 1:
            raise httpx2.ReadError("cut")
        return create_commit(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", failing)
    assert int8convert.upload(verified, REPO).deleted == ("pytorch_model.bin",)
    assert "pytorch_model.bin" not in hub.repo(REPO).files
