"""Fixtures for tests that need a Hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from huggingface_hub import HfApi, close_session, constants

from tests.tools.hub_server.hub import Hub


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


class Connect(Protocol):
    """How a test gets its client."""

    def __call__(self, hub: Hub, token: str | None = None, *, xet: bool = False, timeout_s: float = 10) -> HfApi: ...


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Connect]:
    """Make huggingface_hub in this process a client of a Hub, with a cache of its own and no token but the one given.

    Nothing of its code is changed; set is what it would have read from the environment, had it been imported now.
    """

    def run(hub: Hub, token: str | None = None, *, xet: bool = False, timeout_s: float = 10) -> HfApi:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        settings |= {"HF_HUB_CACHE": str(tmp_path / "client"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
        settings |= {"HF_HUB_DISABLE_XET": not xet, "HF_HUB_DOWNLOAD_TIMEOUT": timeout_s}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # Its uploads over HTTP use an argument that its HTTP library advises against.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        close_session()
        return HfApi(endpoint=hub.endpoint, token=token or False)

    yield run
    close_session()
