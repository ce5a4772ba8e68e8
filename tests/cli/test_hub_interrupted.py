"""Ctrl-C and SIGTERM end a command at once, whatever is on its way, and leave what can be gone on with."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.client_process import ROOT
from tests.tools.hub_repositories import NAME, add
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import hub
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import save_checkpoint

__all__ = ["hub"]

REPO = "me/int8"
LONG_S = 90
"""Seconds of a stall, and of retries; the command must end long before."""

SOON_S = 30


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Iterator[Hub]:
    """On the Hub, in five shards; the stalls of the test end with it."""
    add(hub, save_checkpoint("llama", tmp_path / "source", max_shard_size="40KB"))
    yield hub
    hub.stop()


def start(hub: Hub, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | hub.client_environment(hub.token)
    environment |= {"INT8CONVERT_HUB_RETRY_SECONDS": f"{LONG_S}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "int8convert", "quantize", NAME, "out", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    )


def interrupt(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """The exit code and what was said, if it is through soon."""
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=SOON_S)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_upload_in_flight_is_not_waited_for(number: int, code: int, word: str, model: Hub, tmp_path: Path) -> None:
    model.faults.add(FaultKind.STALL, method="PUT", nth=2, times=math.inf, seconds=LONG_S, after_bytes=0)
    process = start(model, tmp_path, "--reader", "stream", "--upload", REPO)
    while len(model.faults.fired) == 0:
        assert process.poll() is None
        time.sleep(0.05)

    assert interrupt(process, number)[0] == code

    assert not list((tmp_path / "out").rglob("*.incomplete"))
    model.faults.clear()
    process = start(model, tmp_path, "--reader", "stream", "--upload", REPO)
    assert process.communicate() and process.returncode == 0
    assert "config.json" in model.repo(REPO).files and not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["stream", "download"])
def test_store_that_is_down_is_not_waited_for(reader: str, model: Hub, tmp_path: Path) -> None:
    model.faults.add(FaultKind.UNAVAILABLE, origin=Origin.STORAGE, nth=7, times=math.inf)
    process = start(model, tmp_path, "--reader", reader)
    while len(model.faults.fired) < 3:
        assert process.poll() is None
        time.sleep(0.05)

    code, said = interrupt(process, signal.SIGINT)

    assert code == 130 and "error: interrupted" in said
    assert not list((tmp_path / "out").rglob("*.incomplete"))


def test_header_that_does_not_come_is_not_waited_for(model: Hub, tmp_path: Path) -> None:
    model.faults.add(FaultKind.UNAVAILABLE, origin=Origin.STORAGE, times=math.inf)
    process = start(model, tmp_path)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("note: reading 'model-0000") and "status 503 of localhost; retrying in" in said

    assert interrupt(process, signal.SIGINT)[0] == 130

    assert not (tmp_path / "out").exists()
