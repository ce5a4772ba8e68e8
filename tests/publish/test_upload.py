"""A finished, verified output arrives on the Hub whole, once, and as it was; anything else does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi

import int8convert
from int8convert import errors
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.events import Event, FileSent
from int8convert.publish.finished import check_verified, read_finished
from int8convert.verification.earlier_runs import write_report
from tests.tools.hub_server import write_routes
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin, Response
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility
from tests.tools.hub_server.routing import ROUTES
from tests.tools.tiny_models import file_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REPO = "me/model-int8"


def second_shard(out: Path) -> Path:
    return sorted(out.glob("model-*.safetensors"))[1]


def published(out: Path) -> dict[str, bytes]:
    """What should be on the Hub."""
    return {name: content for name, content in file_bytes(out).items() if not name.endswith("lock")}


def test_everything_arrives_as_it_was(verified: Path, hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)

    report = int8convert.upload(verified, REPO)

    assert hub.repo(REPO).files == published(verified)
    assert report.commit == hub.repo(REPO).refs["main"]
    assert report.url == f"{hub.endpoint}/{REPO}"
    assert report.is_verified
    assert report.n_sent_bytes == report.n_bytes == sum(map(len, published(verified).values()))
    checked = api.verify_repo_checksums(REPO, local_dir=verified)
    assert not checked.mismatches and not checked.missing_paths


def test_no_place_of_this_machine_is_published(verified: Path, hub: Hub, connect: Connect, tmp_path: Path) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO)

    assert (verified / "int8convert" / "local.json").is_file()
    files = hub.repo(REPO).files
    assert "int8convert/local.json" not in files and "int8convert/verify.json" in files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    verify = json.loads(files["int8convert/verify.json"])
    assert (verify["out"], verify["reference"], verify["exact"]["reference"]) == ("out", "source", "source")


def test_what_is_there_is_not_sent_again(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    first = int8convert.upload(verified, REPO)
    hub.log.clear()

    again = int8convert.upload(verified, REPO)

    assert again.commit is None
    assert again.n_sent_bytes == 0
    assert first.n_bytes == again.n_bytes
    assert not hub.log.requests("PUT") and not hub.log.requests("POST", "/commit/")


def test_changed_shard_is_the_only_one_sent(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO)
    name = second_shard(verified).name
    hub.repo(REPO).add_files({name: b"something else" * 1000})

    report = int8convert.upload(verified, REPO)

    assert report.sent == (name,)
    assert hub.repo(REPO).files == published(verified)


def test_weights_of_something_else_are_removed_and_other_files_are_not(
    verified: Path, hub: Hub, connect: Connect
) -> None:
    others = {"notes.txt": b"mine", "model-q4.gguf": b"mine", "onnx/model.safetensors": b"mine"}
    old = ("adapter_config.json", "model-00001-of-00009.safetensors", "pytorch_model.bin")
    hub.add_repo(REPO, {**dict.fromkeys(old, b"old"), **others})
    connect(hub, hub.token)
    before = hub.repo(REPO).files
    with pytest.raises(errors.OutputError) as caught:
        int8convert.upload(verified, REPO)
    assert (caught.value.message, caught.value.hint) == (
        f"'{REPO}' holds weights of something else: 'adapter_config.json' and 2 more",
        "name another repository, or pass --overwrite to replace them",
    )
    assert hub.repo(REPO).files == before

    report = int8convert.upload(verified, REPO, overwrite=True)

    assert report.deleted == old
    assert hub.repo(REPO).files == published(verified) | others


def test_weights_of_something_else_under_the_same_name_are_not_replaced_unasked(
    source: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    int8convert.quantize(source, tmp_path / "single", on_event=lambda event: None)
    hub.add_repo(REPO, {"model.safetensors": b"in 16 bits"})
    connect(hub, hub.token)
    with pytest.raises(errors.OutputError, match=r"holds weights of something else: 'model.safetensors'"):
        int8convert.upload(tmp_path / "single", REPO, allow_unverified=True)
    assert hub.repo(REPO).files == {"model.safetensors": b"in 16 bits"}

    int8convert.upload(tmp_path / "single", REPO, allow_unverified=True, overwrite=True)
    assert hub.repo(REPO).files["model.safetensors"] == (tmp_path / "single" / "model.safetensors").read_bytes()


def test_shards_of_an_earlier_conversion_go_without_being_asked_for(
    verified: Path, source: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO)
    int8convert.quantize(source, tmp_path / "other", on_event=lambda event: None)

    report = int8convert.upload(tmp_path / "other", REPO, allow_unverified=True)

    assert set(report.deleted) == {path.name for path in verified.glob("model*")} - {"model.safetensors"}
    assert {name for name in hub.repo(REPO).files if name.startswith("model")} == {"model.safetensors"}


CARD = b"---\nlicense: mit\nextra_gated_prompt: Do no harm\n---\n# My words\n"


def test_card_that_somebody_wrote_on_the_hub_stays_unless_told(verified: Path, hub: Hub, connect: Connect) -> None:
    hub.add_repo(REPO, {"README.md": CARD})
    connect(hub, hub.token)

    report = int8convert.upload(verified, REPO)

    assert report.keeps_card == "repository" and "README.md" not in report.sent
    assert hub.repo(REPO).files["README.md"] == CARD
    assert not (verified / "README.md").exists()
    report = int8convert.upload(verified, REPO, overwrite=True)
    assert report.keeps_card == "" and report.sent == ("README.md",)
    assert b"library_name: transformers" in hub.repo(REPO).files["README.md"]


@pytest.mark.parametrize("private", [False, True])
def test_repository_that_is_not_as_private_as_asked_is_refused(
    private: bool, verified: Path, hub: Hub, connect: Connect
) -> None:
    hub.add_repo(REPO, {}, Visibility.PUBLIC if private else Visibility.PRIVATE)
    connect(hub, hub.token)
    asked, there = ("private", "public") if private else ("public", "private")

    for is_dry in (True, False):
        with pytest.raises(errors.HubAccessError) as caught:
            int8convert.upload(verified, REPO, private=private, dry_run=is_dry)
        assert caught.value.message == f"'{REPO}' exists and is {there}, but --{asked} was given"
    assert not hub.repo(REPO).files


def test_report_tells_who_will_see_it(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    dry = int8convert.upload(verified, REPO, private=True, dry_run=True)
    assert (dry.is_new, dry.is_private, dry.has_token) == (True, True, True)
    first = int8convert.upload(verified, REPO)
    assert (first.is_new, first.is_private) == (True, False)
    again = int8convert.upload(verified, REPO)
    assert (again.is_new, again.is_private) == (False, False)


def test_without_a_token_nothing_is_tried(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub)

    with pytest.raises(errors.HubAccessError, match=f"no token is set; writing to '{REPO}' needs one"):
        int8convert.upload(verified, REPO)

    assert not hub.log.requests()
    assert not int8convert.upload(verified, REPO, dry_run=True).has_token


@pytest.mark.parametrize("name", ["model-int8", "https://huggingface.co/me/model", "me/a/b", ""])
def test_what_is_no_name_of_a_repository_is_refused(name: str, verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    with pytest.raises(errors.HubError, match="is not a valid name of a repository"):
        int8convert.upload(verified, name)
    assert not hub.log.requests()


def test_card_in_another_encoding_is_refused(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    (verified / "README.md").write_bytes("Modèle".encode("latin-1"))
    with pytest.raises(errors.OutputError, match=r"README.md' is not in UTF-8"):
        int8convert.upload(verified, REPO)
    assert not hub.log.requests("POST")


def test_branch_is_made_and_main_left_alone(verified: Path, hub: Hub, connect: Connect) -> None:
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    connect(hub, hub.token)

    report = int8convert.upload(verified, REPO, revision="int8")

    assert report.url.endswith("/tree/int8")
    assert hub.repo(REPO).files == {"notes.txt": b"mine"}
    assert hub.repo(REPO).files_at("int8") == published(verified) | {"notes.txt": b"mine"}


def test_refusal_of_a_file_is_told_in_the_hubs_words(
    verified: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: object, request: object, file: dict[str, Any], *_: object) -> dict[str, Any]:
        error = {"code": 403, "message": "Private repository storage limit reached"}
        return {"oid": file["oid"], "size": file["size"], "error": error}

    monkeypatch.setattr("tests.tools.hub_server.write_routes._lfs_object", full)
    connect(hub, hub.token)

    with pytest.raises(errors.HubError, match=r"the Hub rejects the files: .*Private repository storage limit reached"):
        int8convert.upload(verified, REPO)
    assert len(hub.log.requests("POST", "batch")) == 1


def test_pull_request_whose_answer_got_lost_is_not_made_twice(
    verified: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hub, hub.token)
    int8convert.upload(verified, REPO)
    (verified / "README.md").write_text("# Mine")

    def lose(*arguments: Any) -> Response:
        write_routes.commit(*arguments)
        return Response(502, b"")

    lost = [replace(route, answer=lose) if route.answer is write_routes.commit else route for route in ROUTES]
    monkeypatch.setattr("tests.tools.hub_server.routing.ROUTES", tuple(lost))

    with pytest.raises(errors.HubConnectionError, match="may exist; the answer was lost: status 502"):
        int8convert.upload(verified, REPO, create_pr=True)
    assert len(hub.repo(REPO).pull_request_titles) == 1


def test_pull_request_changes_nothing_and_is_told(verified: Path, hub: Hub, connect: Connect) -> None:
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    connect(hub, hub.token)

    report = int8convert.upload(verified, REPO, create_pr=True, message="Int8  weights")

    assert hub.repo(REPO).files == {"notes.txt": b"mine"}
    assert "/discussions/1" in report.url
    assert hub.repo(REPO).files_at("refs/pr/1") == published(verified) | {"notes.txt": b"mine"}


def test_private_is_asked_for_when_the_repository_is_made(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)

    int8convert.upload(verified, REPO, private=True)

    connect(hub)
    with pytest.raises(errors.HubMissingError, match="has no repository 'me/model-int8' that is public"):
        int8convert.plan(REPO)


def test_dry_run_changes_nothing_anywhere(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    before = file_bytes(verified)

    report = int8convert.upload(verified, REPO, dry_run=True)

    assert file_bytes(verified) == before
    assert not hub.log.requests("POST") and not hub.log.requests("PUT")
    assert set(report.sent) == {*published(verified), "README.md"}
    int8convert.upload(verified, REPO)
    assert int8convert.upload(verified, REPO, dry_run=True).sent == ()


def test_card_of_somebody_s_own_is_kept(verified: Path, hub: Hub, connect: Connect) -> None:
    (verified / "README.md").write_text("# Mine")
    connect(hub, hub.token)

    report = int8convert.upload(verified, REPO)

    assert report.keeps_card
    assert hub.repo(REPO).files["README.md"] == b"# Mine"


def test_xet_brings_the_same(verified: Path, xet_hub: Hub, connect: Connect) -> None:
    connect(xet_hub, xet_hub.token, xet=True)

    int8convert.upload(verified, REPO)

    assert {name: xet_hub.repo(REPO).files[name] for name in published(verified)} == published(verified)
    assert xet_hub.log.requests("GET", "xet-write-token")


def test_server_without_xet_is_told_with_the_way_out(verified: Path, hub: Hub, connect: Connect) -> None:
    pytest.importorskip("hf_xet")
    connect(hub, hub.token, xet=True)

    with pytest.raises(errors.HubError) as caught:
        int8convert.upload(verified, REPO)

    assert caught.value.hint == "pass --no-xet to send them by HTTP"


def unfinished(out: Path) -> str:
    (out / "config.json").unlink()
    return "is an unfinished conversion"


def foreign(out: Path) -> str:
    shutil.rmtree(out / "int8convert")
    return "is no output of int8convert quantize"


def lacking_a_shard(out: Path) -> str:
    second_shard(out).unlink()
    return "'model-00002-of-0000.\\.safetensors' in .*: expected [0-9,]+ bytes, found no such file"


def flipped_bit(out: Path) -> str:
    path = second_shard(out)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}, as the manifest says"


def not_verified(out: Path) -> str:
    (out / "int8convert" / "verify.json").unlink()
    return "cannot be published: not verified yet"


def failed(out: Path) -> str:
    path = out / "int8convert" / "verify.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_passed": False}))
    return "cannot be published: it did not pass when it was verified"


def changed_since(out: Path) -> str:
    config = out / "config.json"
    config.write_text(config.read_text().replace("6.0", "5.0"))
    return "cannot be published: 'config.json' is not the one that was verified"


def verified_before_columns_were_stored(out: Path) -> str:
    (out / "int8convert" / "outliers.safetensors").write_bytes(b"new")
    return "'int8convert/outliers.safetensors' is not one of the verified files"


@pytest.mark.parametrize(
    "spoil",
    [
        *(unfinished, foreign, lacking_a_shard, flipped_bit, not_verified, failed, changed_since),
        verified_before_columns_were_stored,
    ],
)
def test_refused_before_anything_is_sent(
    spoil: Callable[[Path], str], verified: Path, hub: Hub, connect: Connect
) -> None:
    connect(hub, hub.token)
    expected = spoil(verified)

    with pytest.raises(errors.Int8ConvertError, match=expected) as caught:
        int8convert.upload(verified, REPO)

    assert caught.value.state == "nothing was sent"
    assert not hub.log.requests()


def test_failed_gate_is_answered_by_the_same_measurement(verified: Path) -> None:
    path = verified / "int8convert" / "verify.json"
    failed = {
        "failures": ["fidelity (dynamic): mean KL is 0.1, expected at most 0"],
        "text": {"name": "t.txt", "is_default": False, "n_sequences": 2, "length": 32},
        "gates": {"max_dnll": 0.01, "max_kl": 0.0, "min_task_p": 0.001},
    }
    report = json.loads(path.read_text()) | {"is_passed": False}
    command = f"run `int8convert verify {verified} --text t.txt --sequences 2 --length 32 --max-kl 0`"
    earlier = {**failed, "level": "fidelity", "measured": {"dynamic": 60}, "files": report["files"], "status": "stands"}
    for told in (failed, {"failures": [], "earlier_failures": [earlier]}):
        path.write_text(json.dumps(report | told))
        with pytest.raises(errors.UnverifiedError) as caught:
            check_verified(read_finished(verified))
        assert caught.value.hint == (f"{command}, or pass --allow-unverified; the model card then says so")
    path.write_text(json.dumps(report | failed | {"text": {"n_sequences": "; rm"}}))
    with pytest.raises(errors.UnverifiedError) as caught:
        check_verified(read_finished(verified))
    assert caught.value.hint.startswith(f"run `int8convert verify {verified}`, or pass")


def test_dry_run_offline_is_told_that_it_asks_the_hub(verified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubConnectionError, match="a dry run asks the Hub what REPO holds") as caught:
        int8convert.upload(verified, REPO, dry_run=True)
    assert caught.value.hint == "unset HF_HUB_OFFLINE"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_failed_is_named_and_no_way_out_that_is_none(
    is_damaged: bool, verified: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    connect(hub, hub.token)
    if is_damaged:
        flipped_bit(verified)
    else:
        (tmp_path / "source" / "LICENSE").write_text("another")
    report = int8convert.verify(verified, level="exact")
    write_report(report)

    with pytest.raises(errors.UnverifiedError) as caught:
        int8convert.upload(verified, REPO)

    assert caught.value.message.endswith(": it did not pass when it was verified: " + "; ".join(report.failures[:3]))
    assert ("files: model-00002-of-" in caught.value.message) is is_damaged
    assert ("--allow-unverified" in caught.value.hint) is not is_damaged
    assert ("remove what is named" in caught.value.hint) is is_damaged


def test_unverified_passes_on_demand_and_the_card_says_so(out: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)

    report = int8convert.upload(out, REPO, allow_unverified=True)

    assert not report.is_verified
    assert "**Not verified**" in hub.repo(REPO).files["README.md"].decode()


@pytest.mark.parametrize("token", [None, "stranger", "hf_bad"])
def test_without_the_right_nothing_is_sent_and_the_next_step_is_named(
    token: str | None, verified: Path, hub: Hub, connect: Connect
) -> None:
    hub.add_repo(REPO, {})
    connect(hub, hub.stranger_token if token == "stranger" else token)

    with pytest.raises(errors.HubError) as caught:
        int8convert.upload(verified, REPO)

    assert "HF_TOKEN" in caught.value.hint
    assert hub.repo(REPO).files == {}


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.RESET, FaultKind.TOO_MANY_REQUESTS, FaultKind.UNAVAILABLE])
@pytest.mark.parametrize("where", ["PUT", "POST"])
def test_trouble_on_the_way_up_is_mended(
    kind: FaultKind, where: str, verified: Path, hub: Hub, connect: Connect
) -> None:
    """At every request in turn: objects, batches, the commit, whether the server had taken it or not."""
    connect(hub, hub.token)
    for nth in range(1, 6):
        hub.faults.clear()
        hub.faults.add(kind, method=where, nth=nth, seed=nth, seconds=0.0)

        int8convert.upload(verified, f"me/{kind.name.lower()}-{where.lower()}-{nth}")

        repository = hub.repo(f"me/{kind.name.lower()}-{where.lower()}-{nth}")
        assert repository.files == published(verified)


def test_commit_whose_answer_got_lost_is_not_made_twice(verified: Path, hub: Hub, connect: Connect) -> None:
    api: HfApi = connect(hub, hub.token)
    create_commit = HfApi.create_commit
    calls: list[str] = []

    def losing(self: HfApi, *arguments: object, **options: object) -> object:
        calls.append("commit")
        create_commit(self, *arguments, **options)  # type: ignore[arg-type]
        raise httpx2.ReadError("cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_commit", losing)
        report = int8convert.upload(verified, REPO)

    assert calls == ["commit"]
    assert report.commit == hub.repo(REPO).refs["main"]
    assert len(api.list_repo_commits(REPO)) <= 2
    assert hub.repo(REPO).files == published(verified)


def test_interrupted_upload_goes_on_behind_what_was_sent(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, FileSent) and event.name == second_shard(verified).name:
            raise Stopped

    with pytest.raises(Stopped):
        int8convert.upload(verified, REPO, on_event=stop)
    assert hub.repo(REPO).files == {} or "config.json" not in hub.repo(REPO).files, "half of it shows"
    sent = {request.path for request in hub.log.requests("PUT", origin=Origin.STORAGE)}
    hub.log.clear()

    int8convert.upload(verified, REPO)

    assert sent
    assert not sent & {request.path for request in hub.log.requests("PUT", origin=Origin.STORAGE)}
    assert hub.repo(REPO).files == published(verified)


@pytest.mark.parametrize("allow_unverified", [False, True])
def test_dequantized_export_is_not_uploaded(
    allow_unverified: bool, out: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    connect(hub, hub.token)
    int8convert.export(out, tmp_path / "plain", dequantize="float16", on_event=lambda event: None)

    with pytest.raises(errors.OutputError, match="plain' is no int8 checkpoint") as caught:
        int8convert.upload(tmp_path / "plain", REPO, allow_unverified=allow_unverified)

    assert caught.value.hint == "send it by `hf upload`" and caught.value.state == "nothing was sent"
    assert hub.state.repository(REPO) is None


def test_conversion_in_progress_is_not_uploaded(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    with DirectoryLock(verified / "int8convert" / "lock"), pytest.raises(errors.OutputError, match="is being written"):
        int8convert.upload(verified, REPO)


def test_other_bytes_on_the_hub_are_noticed(
    verified: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushes between our commit and the comparison."""
    connect(hub, hub.token)
    create_commit = HfApi.create_commit

    def racing(self: HfApi, *arguments: object, **options: object) -> object:
        create_commit(self, *arguments, **options)  # type: ignore[arg-type]
        hub.repo(REPO).add_files({"config.json": b"{}"})
        options = {**options, "commit_message": "again"}
        return create_commit(self, REPO, [], **{**options})  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", racing)
    with pytest.raises(errors.HubError, match=r"has other bytes than were sent for 'config\.json'") as caught:
        int8convert.upload(verified, REPO)
    assert caught.value.state == "the commit was made"


def test_state_after_a_commit_that_failed_is_that_of_the_files(verified: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    hub.faults.add(FaultKind.UNAVAILABLE, method="POST", path="/commit/", times=10_000)

    with pytest.raises(errors.HubConnectionError, match="the commit to 'me/model-int8' made no progress") as caught:
        int8convert.upload(verified, REPO)

    assert caught.value.state == "files that were sent are on the server, and the same command resumes after them"
    hub.faults.clear()
    n_puts = len(hub.log.requests("PUT"))
    assert int8convert.upload(verified, REPO).commit is not None
    assert len(hub.log.requests("PUT")) == n_puts, "a file was sent again"
