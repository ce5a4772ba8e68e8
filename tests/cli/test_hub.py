"""The commands that meet the Hub, as their users meet them: streams, exit codes, JSON, and no secret anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from int8convert.hub import retry
from tests.cli.conftest import Run
from tests.tools.hub_repositories import NAME, add, opt_pickles
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "hub"]

REPO = "me/opt-66b-int8"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "CALL_RETRY_S", 1.0)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "1")


@pytest.fixture
def source(hub: Hub, connect: Connect, tmp_path: Path) -> Path:
    """Like facebook/opt-66b, on a Hub on which this process may do everything."""
    directory = opt_pickles(tmp_path)
    add(hub, directory)
    connect(hub, hub.token)
    return directory


def test_quantize_says_which_reader_and_why(source: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    commit = hub.repo(NAME).refs["main"][:12]

    code, out, err = run("quantize", NAME, tmp_path / "a")
    assert code == 0
    assert f"note: reading {NAME} at {commit} by download: the disk has room for two of its shards beside" in err
    assert out.startswith(f"{tmp_path / 'a'}: ")

    code, out, err = run("quantize", NAME, tmp_path / "b", "--reader", "stream")
    assert f"note: reading {NAME} at {commit} by stream\n" in err


def test_dry_run_tells_disk_memory_and_time_of_each_reader_and_fetches_next_to_nothing(
    source: Path, hub: Hub, run: Run
) -> None:
    hub.log.clear()
    code, out, err = run("quantize", NAME, "--dry-run", "--bandwidth", "1kB")

    total = sum(path.stat().st_size for path in source.glob("*.bin"))
    assert (code, err) == (0, "")
    assert f"Plan for {NAME} at {hub.repo(NAME).refs['main'][:12]} (OPTForCausalLM)" in out
    assert "--reader stream: " in out and "--reader download: " in out
    assert f"network: {total / 1000:.0f} kB: {total // 60_000} min" in out

    code, out, err = run("quantize", NAME, "--dry-run", "--json")
    fetch = json.loads(out)["fetch"]
    sizes = sorted(path.stat().st_size for path in source.glob("*.bin"))
    assert fetch["n_bytes"] == total
    assert (fetch["stream"]["disk_bytes"], fetch["download"]["disk_bytes"]) == (0, sum(sizes[-2:]))
    assert fetch["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["quantize", NAME, "out", "--reader", "fast"], "auto, stream or download"),
        (["quantize", NAME, "out", "--keep"], "--keep needs --upload"),
        (["quantize", NAME, "out", "--max-disk", "3GB"], "--max-disk needs --upload"),
        (["quantize", NAME, "--upload", REPO, "--columns", "text.txt"], "then int8convert upload"),
        (["quantize", NAME], "OUT is missing"),
        (["upload", "out"], "REPO"),
        (["quantize", NAME, "--dry-run", "--bandwidth", "fast"], "50MB"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], complaint: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert complaint in " ".join(err.replace("│", " ").split())


def test_upload_tells_files_and_ends_with_url_and_commit(source: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    run("quantize", NAME, tmp_path / "out", "--quiet")

    code, out, err = run("upload", tmp_path / "out", REPO)
    assert (code, out) == (1, "")
    assert err == (
        f"error: '{tmp_path / 'out'}' cannot be published: not verified yet\n"
        f"hint: run `int8convert verify {tmp_path / 'out'}`, or pass --allow-unverified; the model card then says so; "
        "nothing was sent\n"
    )
    assert run("verify", tmp_path / "out", "--level", "exact", "--quiet")[0] == 0

    code, out, err = run("upload", tmp_path / "out", REPO, "--private", "--message", "Int8")
    assert code == 0
    assert out.splitlines()[0].startswith(f"{hub.endpoint}/{REPO}, new, private: ")
    assert out.splitlines()[1] == f"commit: {hub.repo(REPO).refs['main']}"
    assert {line.split(":")[0] for line in err.splitlines()} == set(hub.repo(REPO).files)

    code, out, err = run("upload", tmp_path / "out", REPO, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["schema"], report["commit"], report["n_sent_bytes"]) == (1, None, 0)


def test_stream_through_ends_with_the_url(
    source: Path, hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    code, out, err = run("quantize", NAME, "--upload", REPO, "--max-disk", "30MB")

    assert code == 0
    assert out.startswith(f"{hub.endpoint}/{REPO}: ")
    assert f"commit: {hub.repo(REPO).refs['main']}; all shards compared by hash" in out
    sent = {line.partition(": ")[0] for line in err.splitlines() if line.endswith(" sent")}
    assert sent == {name for name in hub.repo(REPO).files if name != ".gitattributes"}
    assert not (tmp_path / "int8convert-opt-66b-int8").exists()
    code, out, err = run("inspect", REPO, "--json")
    assert json.loads(out)["quant_method"] == "bitsandbytes"


def test_errors_of_the_hub_are_two_lines_and_one_object(source: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add_repo("org/gated", {"config.json": b"{}"}, Visibility.GATED)

    code, out, err = run("quantize", "org/nothing", tmp_path / "out", "--json")

    assert code == 1
    assert json.loads(out)["error"]["code"] == "hub_missing"
    assert err == (
        f"error: {hub.endpoint} has no repository 'org/nothing' visible to this token\n"
        "hint: check the name (ORGANIZATION/NAME); for a private one log in by `hf auth login` or set HF_TOKEN; "
        "no directory 'org/nothing' is here either; nothing was written\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("token", "visibility", "error", "hint"),
    [
        (None, Visibility.PRIVATE, "has no repository 'a/b' that is public, and no token is set", "or set HF_TOKEN"),
        ("stranger", Visibility.PRIVATE, "has no repository 'a/b' visible to this token", "or set HF_TOKEN"),
        ("hf_bad", Visibility.PRIVATE, "the Hub rejects the token", "set HF_TOKEN to a valid one"),
        (None, Visibility.GATED, "'a/b' is gated: its owner admits those who accept its terms", "accept them at "),
        ("stranger", Visibility.GATED, "'a/b' is gated", "then log in by `hf auth login` or set HF_TOKEN"),
    ],
)
def test_closed_repositories_name_the_next_step(
    token: str | None,
    visibility: Visibility,
    error: str,
    hint: str,
    hub: Hub,
    connect: Connect,
    run: Run,
    tmp_path: Path,
) -> None:
    hub.add_repo("a/b", {"config.json": b"{}", "model.safetensors": b"x" * 100}, visibility)
    connect(hub, hub.stranger_token if token == "stranger" else token)

    code, _, err = run("quantize", "a/b", tmp_path / "out")

    first, second = err.splitlines()
    assert code == 1
    assert error in first and hint in second


def test_inspect_tells_the_commit_of_a_repository_and_none_of_a_directory(source: Path, hub: Hub, run: Run) -> None:
    commit = hub.repo(NAME).refs["main"]

    assert run("inspect", NAME)[1].startswith(f"{NAME} at {commit[:12]}: OPTForCausalLM, ")
    assert json.loads(run("inspect", NAME, "--json")[1])["commit"] == commit
    assert run("inspect", source)[1].startswith(f"{source}: OPTForCausalLM, ")
    assert json.loads(run("inspect", source, "--json")[1])["commit"] is None


def test_revision_that_is_not_there_is_told(source: Path, run: Run, tmp_path: Path, hub: Hub) -> None:
    code, _, err = run("quantize", NAME, tmp_path / "out", "--revision", "v9")
    assert (code, err) == (
        1,
        f"error: '{NAME}' has no branch, tag or commit of the given name\n"
        f"hint: see its branches and tags at {hub.endpoint}/{NAME}/tree/main; nothing was written\n",
    )


def run_alone(hub: Hub, folder: Path, *arguments: str, xet: bool = False) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, that tells all it can."""
    environment = os.environ | hub.client_environment(hub.token, xet=xet)
    environment |= {"INT8CONVERT_DEBUG": "1", "INT8CONVERT_HUB_RETRY_SECONDS": "1", "HF_HUB_VERBOSITY": "info"}
    command = [sys.executable, "-m", "int8convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.parametrize("xet", [False, True])
def test_token_is_in_nothing_that_is_written_said_or_sent_elsewhere(xet: bool, tmp_path: Path) -> None:
    """Through a private repository, all commands, and errors with their tracebacks."""
    if xet:
        pytest.importorskip("hf_xet")
    with Hub(tmp_path / "server", xet=xet) as hub:
        directory = opt_pickles(tmp_path)
        add(hub, directory)
        hub.repo(NAME).visibility = Visibility.PRIVATE
        work = tmp_path / "work"
        work.mkdir()
        said = []
        commands = [
            ("quantize", NAME, "out", "--reader", "download", "--json"),
            ("upload", "out", REPO, "--private", "--allow-unverified"),
            ("quantize", NAME, "--upload", "me/through", "--keep", "--reader", "stream"),
            ("quantize", "org/nothing", "nowhere"),
        ]
        for arguments in commands[:2] if xet else commands:
            done = run_alone(hub, work, *arguments, xet=xet)
            assert done.returncode == (arguments[1] == "org/nothing"), done.stderr
            said.append(done.stdout + done.stderr)
        hub.faults.add(FaultKind.UNAVAILABLE, method="POST", path="/commit/", times=10_000)
        for arguments in () if xet else [("upload", "out", "me/broken", "--allow-unverified")]:
            done = run_alone(hub, work, *arguments, xet=False)
            assert done.returncode == 1, done.stderr
            said.append(done.stdout + done.stderr)
        token = hub.token

        assert token not in "".join(said)
        assert not [request.path for request in hub.log.requests(origin=Origin.STORAGE) if request.carries_token]
        for name in (REPO,) if xet else (REPO, "me/through"):
            assert not [path for path, content in hub.repo(name).files.items() if token.encode() in content]
    written = {str(path): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert written and not [path for path, content in written.items() if token.encode() in content]
    signed = [line for text in said for line in text.splitlines() if "Signature=" in line or "signature=" in line]
    assert not signed, signed[:2]
    assert file_bytes(work / "out").keys() > {"config.json"}
