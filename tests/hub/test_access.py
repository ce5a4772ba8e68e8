"""Who may read what: with the right token it works, and without it two lines say what to do.

The token goes to the Hub alone, and neither it nor a signed address is written anywhere.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from int8convert.errors import (
    HubAccessError,
    HubConnectionError,
    HubError,
    HubMissingError,
    Int8ConvertError,
    OutputError,
)
from tests.tools.client_process import ROOT
from tests.tools.hub_conversions import READERS, convert
from tests.tools.hub_models import opt_66b
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility

pytestmark = pytest.mark.usefixtures("quick_waits", "map_in_process")

NAME = "org/name"


def lines_of(error: Int8ConvertError) -> tuple[str, str]:
    return error.message, error.hint


def refusal(kind: type[HubError], name: str, out: Path, **options: str) -> tuple[str, str]:
    """The two lines of the error; nothing may have been written."""
    with pytest.raises(kind) as caught:
        convert(name, out, **options)
    assert type(caught.value) is kind
    assert not out.exists()
    return lines_of(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("visibility", [Visibility.PRIVATE, Visibility.GATED])
def test_right_token_reads_it_and_goes_to_no_other_origin(
    hub: Hub, connect: Connect, tmp_path: Path, visibility: Visibility, reader: str
) -> None:
    files = opt_66b(tmp_path / "model")
    hub.add_repo("org/public", files)
    hub.add_repo(NAME, files, visibility)
    connect(hub)
    public = convert("org/public", tmp_path / "public", reader)
    connect(hub, hub.token)
    hub.log.clear()

    found = convert(NAME, tmp_path / "out", reader)

    assert {name: data for name, data in found.items() if name.endswith("tensors")} == {
        name: data for name, data in public.items() if name.endswith("tensors")
    }
    assert all(request.has_authorization for request in hub.log.requests(origin=Origin.HUB))
    assert hub.log.requests(origin=Origin.STORAGE)
    assert not [request for request in hub.log.requests(origin=Origin.STORAGE) if request.carries_token]


def test_private_one_without_a_token(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"), Visibility.PRIVATE)
    connect(hub)
    assert refusal(HubMissingError, NAME, tmp_path / "out") == (
        f"{hub.endpoint} has no repository 'org/name' that is public, and no token is set",
        "check the name (ORGANIZATION/NAME); for a private one log in by `hf auth login` or set HF_TOKEN; "
        "no directory 'org/name' is here either",
    )


def test_private_one_with_another_s_token(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"), Visibility.PRIVATE)
    connect(hub, hub.stranger_token)
    assert refusal(HubMissingError, NAME, tmp_path / "out") == (
        f"{hub.endpoint} has no repository 'org/name' visible to this token",
        "check the name (ORGANIZATION/NAME); for a private one log in by `hf auth login` or set HF_TOKEN; "
        "no directory 'org/name' is here either",
    )


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_gated_one_without_consent(hub: Hub, connect: Connect, tmp_path: Path, who: str) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"), Visibility.GATED)
    connect(hub, hub.stranger_token if who == "a stranger" else None)
    assert refusal(HubAccessError, NAME, tmp_path / "out") == (
        "'org/name' is gated: its owner admits those who accept its terms",
        f"accept them at {hub.endpoint}/org/name, then log in by `hf auth login` or set HF_TOKEN",
    )


def test_token_that_is_none(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub, "hf_" + "x" * 34)
    assert refusal(HubAccessError, NAME, tmp_path / "out") == (
        "the Hub rejects the token: it is invalid or has expired",
        "log in by `hf auth login`, or set HF_TOKEN to a valid one",
    )


def test_revision_that_is_none(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    assert refusal(HubMissingError, NAME, tmp_path / "out", revision="v2") == (
        "'org/name' has no branch, tag or commit of the given name",
        f"see its branches and tags at {hub.endpoint}/org/name/tree/main",
    )


def test_endpoint_that_is_no_address(
    hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(hub)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "huggingface.co")
    assert refusal(HubConnectionError, NAME, tmp_path / "out") == (
        "HF_ENDPOINT is 'huggingface.co', expected an address that begins with https:// or http://",
        "correct it, or unset it for huggingface.co",
    )


def test_retry_seconds_that_are_no_number(
    hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "long")
    assert refusal(HubError, NAME, tmp_path / "out")[0] == (
        "INT8CONVERT_HUB_RETRY_SECONDS is 'long', expected a number of seconds"
    )


def test_cache_that_cannot_be_written(
    hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/cache/models--org--name")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OutputError) as caught:
        convert(NAME, tmp_path / "out", cache_dir="/cache")
    assert lines_of(caught.value) == (
        "the cache '/cache' cannot be written: Read-only file system",
        "set HF_HOME to another, or pass --cache-dir for a source",
    )


def test_name_that_is_no_name(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    connect(hub)
    assert refusal(HubError, "org/a--b", tmp_path / "out") == (
        "'org/a--b' cannot be the name of a repository: \"Cannot have -- or .. in repo_id: 'org/a--b'.\"",
        "give the name as ORGANIZATION/NAME",
    )


def test_no_network(hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("int8convert.hub.retry.CALL_RETRY_S", 0.1)
    connect(hub)
    hub.stop()
    assert refusal(HubConnectionError, NAME, tmp_path / "out") == (
        "looking for 'org/name' made no progress for 0 s: no connection to 127.0.0.1: '[Errno 111] Connection refused'",
        "check the network connection, then rerun the same command",
    )


def test_address_that_always_has_run_out_is_in_no_error(
    hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No error holds what the client's own errors hold: the address, which may be signed."""
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "1")
    hub.state.urls.lifetime_s = -1  # every signed address has run out before it is used
    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, tmp_path / "out")
    assert "status 403 of localhost, as for an expired address" in caught.value.message
    everything = "".join(traceback.format_exception(caught.value))
    assert "Signature=" not in everything and "Expires=" not in everything


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of model maps, which take seconds to make."""
    return tmp_path_factory.mktemp("maps")


def run_command(hub: Hub, folder: Path, maps: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | hub.client_environment(hub.token)
    environment |= {"INT8CONVERT_DEBUG": "1", "INT8CONVERT_HUB_RETRY_SECONDS": "2", "XDG_CACHE_HOME": str(maps)}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "int8convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize("reader", [pytest.param("stream", marks=pytest.mark.slow), "download"])
def test_neither_token_nor_signature_is_written_anywhere(hub: Hub, tmp_path: Path, maps: Path, reader: str) -> None:
    """Not by the command in debug mode either, with a fault that is retried and one that ends it in a traceback."""
    hub.add_repo(NAME, opt_66b(tmp_path / "model"), Visibility.PRIVATE)
    folder = tmp_path / "work"
    folder.mkdir()
    hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=7, seed=1)
    hub.faults.add(FaultKind.RESET, origin=Origin.STORAGE, nth=8, times=1000, after_bytes=0)
    failed = run_command(hub, folder, maps, "quantize", NAME, "out", "--reader", reader)
    assert failed.returncode == 1 and "Traceback" in failed.stderr, failed.stderr
    hub.faults.clear()
    hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=7, seed=1)

    done = run_command(hub, folder, maps, "quantize", NAME, "out", "--reader", reader)

    assert done.returncode == 0, done.stderr
    written = [path.read_bytes() for place in (folder, maps) for path in place.rglob("*") if path.is_file()]
    written += [run.stdout.encode() + run.stderr.encode() for run in (failed, done)]
    signatures = {request.query.partition("Signature=")[2] for request in hub.log.requests(origin=Origin.STORAGE)}
    assert signatures and all(len(signature) == 64 for signature in signatures)
    for secret in (hub.token, *signatures):
        assert not [data for data in written if secret.encode() in data]
    assert not [request for request in hub.log.requests(origin=Origin.STORAGE) if request.carries_token]
