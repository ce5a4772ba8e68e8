"""Through a proxy the environment names: all that is read and sent goes through it, and its password nowhere else."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session

import int8convert
from int8convert.errors import HubConnectionError, HubError
from tests.hub.forward_proxy import ForwardProxy
from tests.tools.hub_conversions import READERS, convert
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes

pytestmark = pytest.mark.usefixtures("quick_waits", "map_in_process")


@pytest.fixture
def proxy() -> Iterator[ForwardProxy]:
    with ForwardProxy() as running:
        yield running


@pytest.fixture
def model(hub: Hub, connect: Connect, tmp_path: Path) -> Hub:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub, hub.token)
    return hub


def go_through(proxy_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client see this environment."""
    monkeypatch.setenv("HTTP_PROXY", proxy_url)
    monkeypatch.setenv("HTTPS_PROXY", proxy_url)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    close_session()


@pytest.mark.parametrize("reader", READERS)
def test_everything_goes_through_the_proxy(
    reader: str, model: Hub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = convert(NAME, tmp_path / "direct", "stream")
    model.log.clear()
    go_through(proxy.url(), monkeypatch)

    assert convert(NAME, tmp_path / "out", reader) == expected
    int8convert.upload(tmp_path / "out", "me/int8", allow_unverified=True)

    assert len(proxy.forwarded) == len(model.log.requests()) > 20
    assert not [request for request in model.log.requests() if request.fault is not None]
    everything = b"".join([*file_bytes(tmp_path / "out").values(), *model.repo("me/int8").files.values()])
    assert proxy.password.encode() not in everything


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_refuses_is_told_and_its_password_is_not(
    scheme: str, model: Hub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of https it is asked for a tunnel, and refuses that."""
    go_through(proxy.url("a-wrong-password"), monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", model.endpoint.replace("http:", f"{scheme}:"))

    with pytest.raises(HubError) as caught:
        convert(NAME, tmp_path / "out")

    assert proxy.n_refused == 1, "it was asked again, though a password does not mend itself"
    assert (caught.value.message, caught.value.hint) == (
        "the proxy in front of the Hub demands a login: status 407",
        "set HTTPS_PROXY with name and password: http://NAME:PASSWORD@HOST:PORT",
    )
    assert "a-wrong-password" not in "".join(traceback.format_exception(caught.value))


def test_proxy_that_is_not_there_is_told_and_its_password_is_not(
    model: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("int8convert.hub.retry.CALL_RETRY_S", 0.1)
    with ForwardProxy() as gone:
        address = gone.url()
    go_through(address, monkeypatch)

    with pytest.raises(HubConnectionError, match="Connection refused") as caught:
        convert(NAME, tmp_path / "out")

    assert ForwardProxy.password not in "".join(traceback.format_exception(caught.value))
