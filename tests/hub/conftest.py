"""What the tests of reading from the Hub share."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from int8convert.checkpoint.hub import patience
from tests.hub_server.fixtures import connect, hub, xet_hub

__all__ = ["connect", "hub", "xet_hub"]

_LONGEST_WAIT_S = 0.02


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short, ours and those of the client, which are seconds; patience is, too."""
    quick = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, _LONGEST_WAIT_S)))
    monkeypatch.setattr(file_download, "time", quick)
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(patience, "FIRST_WAIT_S", _LONGEST_WAIT_S)
    monkeypatch.setattr(patience, "CALL_PATIENCE_S", 8.0)
    monkeypatch.setenv("INT8CONVERT_HUB_PATIENCE", "8")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)


@pytest.fixture
def client_cache(tmp_path: Path) -> Path:
    """Where the client that `connect` makes has its cache."""
    return tmp_path / "client"
