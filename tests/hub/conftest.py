"""Repositories that are converted, and a client that is told to be quick."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from int8convert.checkpoint import rows
from int8convert.hub import header_file, retry, stream
from int8convert.planning import reading_order
from tests.tools.hub_server.fixtures import connect, hub, xet_hub

__all__ = ["connect", "hub", "impatient", "small_pieces", "xet_hub"]

_LONGEST_WAIT_S = 0.02


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds, and few of them: minutes of retries are over in two seconds."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "CALL_RETRY_S", 2.0)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "2")


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries for seconds, and waits of milliseconds, ours and those of the client, which are seconds."""
    quick = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, _LONGEST_WAIT_S)))
    monkeypatch.setattr(file_download, "time", quick)
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", _LONGEST_WAIT_S)
    monkeypatch.setattr(retry, "CALL_RETRY_S", 8.0)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "8")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, blocks and the window of the stream so small that a tiny shard is many of them."""
    monkeypatch.setattr(header_file, "_BLOCK_BYTES", 16384)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(reading_order, "_AHEAD_BYTES", 0)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(rows, "GATHERED_BYTES", 4096)


@pytest.fixture
def client_cache(tmp_path: Path) -> Path:
    """Where the client that `connect` makes has its cache."""
    return tmp_path / "client"


@pytest.fixture(autouse=True)
def remembered_maps(shared_maps: None) -> None:
    """Commands find the maps of models that an earlier test converted: a child to make one costs five seconds."""
