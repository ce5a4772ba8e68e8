"""`int8convert verify ORG/NAME`: what it finds in a repository is what it finds in the directory that was uploaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import int8convert
from int8convert.checkpoint.directory import read_shard
from int8convert.checkpoint.names import VERIFY_FILE
from tests.cli.conftest import Run
from tests.tools.hub_repositories import NAME, add, opt_pickles
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import outlier_model, save
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "hub"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SOURCE, REPO = "org/model", "me/model-int8"
FC1 = "model.decoder.layers.1.fc1"
EXACT = ("--level", "exact")
RUN = ("--device", "cpu", "--max-dnll", "9", "--max-kl", "9", "--sequences", "2", "--length", "16")
COMMIT_LENGTH = 12


@pytest.fixture
def out(hub: Hub, connect: Connect, tmp_path: Path, map_in_process: None) -> Path:
    """Converted from the Hub, with stored outlier columns, and published as REPO; nothing of it is in the cache."""
    tokenizer = build_tokenizer()
    saved = save(outlier_model(tokenizer), tmp_path / "saved", tokenizer)
    hub.add_repo(SOURCE, {path.name: path for path in saved.iterdir()} | {"LICENSE.md": b"mine"})
    connect(hub, hub.token)
    int8convert.quantize(
        SOURCE, tmp_path / "out", int8convert.PlanOptions(max_shard_size="100KB"), on_event=lambda event: None
    )
    int8convert.store_outliers(SOURCE, tmp_path / "out", {FC1: [1, 5]})
    publish(hub, tmp_path / "out")
    return tmp_path / "out"


def publish(hub: Hub, out: Path) -> None:
    """As `upload` does, without having been verified."""
    int8convert.upload(out, REPO, allow_unverified=True, on_event=lambda event: None)


def cached(tmp_path: Path, repository: str) -> dict[str, bytes]:
    """What the client's cache holds of a repository, as its snapshot shows it."""
    folder = tmp_path / "client" / f"models--{repository.replace('/', '--')}" / "snapshots"
    return {name.partition("/")[2]: content for name, content in file_bytes(folder).items()} if folder.exists() else {}


def without_place(report: dict[str, Any]) -> dict[str, Any]:
    """A report as far as it does not tell where it was made, and how long it took."""
    here = ("out", "elapsed_s", "written", "commit", "reference_commit", "reference", "seconds", "peak_memory_bytes")
    if isinstance(report, dict):
        return {key: without_place(value) for key, value in report.items() if key not in here}
    return [without_place(value) for value in report] if isinstance(report, list) else report


@pytest.mark.parametrize("level", [EXACT, RUN])
def test_repository_is_found_to_be_what_its_directory_is(
    level: tuple[str, ...], run: Run, out: Path, hub: Hub, tmp_path: Path
) -> None:
    code, printed, err = run("verify", REPO, *level, "--json")
    assert (code, err) == (0, "")
    report = json.loads(printed)
    code, printed, _ = run("verify", out, *level, "--json")
    local = json.loads(printed)

    assert without_place(report) == without_place(local)
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    not_vouched_for = {"README.md", *(f"int8convert/{name}" for name in ("verify.json", "local.json", "lock"))}
    assert report["files"].keys() == there - not_vouched_for
    checks = {check["name"]: check["n_checked"] for check in report["exact"]["checks"]}
    assert checks["outlier columns"] == 2 and checks["files"] == 2 and checks["carried"] > 2
    assert (report["written"], local["written"]) == (None, str(out / VERIFY_FILE))
    commits = [hub.repo(name).refs["main"] for name in (REPO, SOURCE)]
    assert [report["exact"][key] for key in ("commit", "reference_commit")] == commits
    assert {report["out"], report["exact"]["out"]} == {REPO}
    assert {report["reference"], report["exact"]["reference"]} == {SOURCE}


@pytest.mark.parametrize("level", [EXACT, RUN])
def test_cache_gets_what_the_client_fetches_and_nothing_else(
    level: tuple[str, ...], run: Run, out: Path, hub: Hub, tmp_path: Path
) -> None:
    assert run("verify", REPO, *level, "--quiet")[0] == 0

    for name in (REPO, SOURCE):
        found = cached(tmp_path, name)
        assert found and found.items() <= hub.repo(name).files.items()
        weights = {name for name in hub.repo(name).files if name.startswith("model-") or name == "model.safetensors"}
        assert (weights <= found.keys()) if level is RUN else not (weights & found.keys())
    assert VERIFY_FILE not in cached(tmp_path, REPO)


def test_what_is_read_is_said_with_size_and_commit(run: Run, out: Path, hub: Hub) -> None:
    here, there = (hub.repo(name).refs["main"][:COMMIT_LENGTH] for name in (REPO, SOURCE))

    code, printed, err = run("verify", REPO, *EXACT)
    assert code == 0 and printed.splitlines()[0] == f"{REPO} at {here}: passed"
    assert printed.splitlines()[1].startswith(f"Exact: 12 int8 weights of {SOURCE} at {there}, ")
    notes = err.splitlines()
    assert notes[0].startswith(f"note: reading {REPO} at {here} from the Hub: ") and " kB, of which" in notes[0]
    assert notes[1].startswith(f"note: reading {SOURCE} at {there} from the Hub: ")
    assert notes[2] == f"note: no verify.json was written: {REPO} is on the Hub, and stays as it is"

    code, _, err = run("verify", REPO, *RUN)
    assert f"note: fetching {SOURCE} at {there} into the cache of the Hub's client: " in err
    code, _, err = run("verify", REPO, *RUN)
    assert f"note: reading {SOURCE} at {there} from the cache of the Hub's client\n" in err


def test_revision_is_that_of_the_int8_checkpoint(run: Run, out: Path, hub: Hub) -> None:
    good = hub.repo(REPO).refs["main"]
    hub.repo(REPO).add_files({"config.json": b"{}"})

    assert run("verify", REPO, *EXACT)[0] == 1
    code, printed, _ = run("verify", REPO, *EXACT, "--revision", good)
    assert code == 0 and f"{REPO} at {good[:COMMIT_LENGTH]}: passed" in printed


@pytest.mark.parametrize("level", [EXACT, RUN])
def test_flipped_bit_on_the_hub_fails_and_names_the_tensor(
    level: tuple[str, ...], run: Run, out: Path, hub: Hub
) -> None:
    for path in out.glob("model-*.safetensors"):
        for stored in read_shard(path).tensors:
            if stored.name == f"{FC1}.weight":
                data = bytearray(path.read_bytes())
                data[stored.offset + 3 * stored.shape[1] + 5] ^= 64
                hub.repo(REPO).add_files({path.name: bytes(data)})

    code, printed, _ = run("verify", REPO, *level)

    assert code == 3
    assert f"  codes: {FC1}.weight row 3 column 5: expected code " in printed
    assert "  files: model-0000" in printed and ": expected sha256 " in printed


def test_weights_that_no_index_names_are_found_without_fetching_them(run: Run, out: Path, hub: Hub) -> None:
    hub.repo(REPO).add_files({"adapter_model.safetensors": b"x" * 1000})

    code, printed, _ = run("verify", REPO, *EXACT)

    assert code == 3 and "  files: adapter_model.safetensors: expected no weight file beside those of" in printed


def test_weight_file_whose_sha256_the_hub_does_not_list_is_read_for_it(
    run: Run, out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from int8convert.hub.open_repository import RemoteShard

    monkeypatch.setattr(RemoteShard, "sha256", property(lambda shard: None))

    code, printed, _ = run("verify", REPO, *EXACT, "--json")

    assert code == 0
    assert json.loads(printed)["exact"]["checks"][0]["n_checked"] == 2


def test_page_is_drawn_of_a_repository(run: Run, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = run("verify", REPO, *RUN, "--report", tmp_path / "report.html", "--quiet")
    text = (tmp_path / "report.html").read_text()
    assert code == 0 and "Passed. " in text and REPO in text and str(tmp_path) not in text


def test_source_that_was_a_directory_is_to_be_named(
    run: Run, hub: Hub, connect: Connect, tmp_path: Path, map_in_process: None
) -> None:
    tokenizer = build_tokenizer()
    saved = save(outlier_model(tokenizer), tmp_path / "saved", tokenizer)
    int8convert.quantize(saved, tmp_path / "out", on_event=lambda event: None)
    connect(hub, hub.token)
    publish(hub, tmp_path / "out")

    code, _, err = run("verify", REPO, *EXACT)
    assert code == 1 and "its manifest names 'saved', which is not there" in err and "--reference SRC" in err
    assert run("verify", REPO, *EXACT, "--reference", saved)[0] == 0


def test_conversion_that_went_straight_to_the_hub_passes_with_its_pickled_source_there(
    run: Run, hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub, hub.token)
    monkeypatch.chdir(tmp_path)
    assert run("quantize", NAME, "--upload", REPO, "--quiet")[0] == 0
    assert f"`int8convert verify {REPO}` compares it with its source" in hub.repo(REPO).files["README.md"].decode()

    code, printed, _ = run("verify", REPO, *EXACT)

    assert code == 0 and f"{REPO} at {hub.repo(REPO).refs['main'][:COMMIT_LENGTH]}: passed" in printed
