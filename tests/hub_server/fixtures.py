"""Fixtures for tests that need a Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server.hub import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub without xet, empty."""
    with Hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with xet, empty; the test is skipped where hf_xet is not installed."""
    pytest.importorskip("hf_xet")
    with Hub(tmp_path / "hub", xet=True) as server:
        yield server
