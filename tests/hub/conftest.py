"""Repositories that are converted, and a client that is told to be quick."""

from __future__ import annotations

import pytest

from int8convert.checkpoint.hub import header_file, patience, shard_stream
from int8convert.conversion import blocks, reading_order
from tests.hub_server.fixtures import connect, hub, xet_hub

__all__ = ["connect", "hub", "impatient", "small_pieces", "xet_hub"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds, and few of them: what would be minutes of patience is over in two seconds."""
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "CALL_PATIENCE_S", 2.0)
    monkeypatch.setenv("INT8CONVERT_HUB_PATIENCE", "2")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, blocks and the window of the stream so small that a tiny shard is many of them."""
    monkeypatch.setattr(header_file, "_BLOCK_BYTES", 16384)
    monkeypatch.setattr(shard_stream, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(reading_order, "_AHEAD_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(blocks, "GATHERED_BYTES", 4096)
