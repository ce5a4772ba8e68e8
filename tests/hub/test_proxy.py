"""A caching proxy that we did not write, between us and the Hub: what comes through it is still right.

olah (on PyPI) does not install beside huggingface_hub 2: it needs an environment of its own, whose `olah-cli` is found
on PATH or named by INT8CONVERT_OLAH. Without it, this is skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.tools.hub_repositories import NAME, add, convert, fetched_bytes, opt_pickles
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes

pytestmark = pytest.mark.usefixtures("map_in_process")

OLAH = os.environ.get("INT8CONVERT_OLAH") or shutil.which("olah-cli")


@pytest.fixture
def proxy(hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the proxy, through which this process now sees the Hub."""
    if OLAH is None:
        pytest.skip("no olah-cli: install olah in an environment of its own, and set INT8CONVERT_OLAH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, behind = f"127.0.0.1:{port}", hub.endpoint.removeprefix("http://")
    options = {"host": "127.0.0.1", "port": port, "repos-path": tmp_path / "olah", "log-path": tmp_path / "olah-log"}
    options |= {"hf-scheme": "http", "hf-netloc": behind, "hf-lfs-netloc": behind.replace("127.0.0.1", "localhost")}
    options |= {"mirror-scheme": "http", "mirror-netloc": address, "mirror-lfs-netloc": address}
    command = [OLAH, *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "olah.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        _await(f"http://{address}/", process)
        connect(hub)
        template = f"http://{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{address}")
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "olah ended"
        try:
            urlopen(url).close()
        except URLError as error:
            if hasattr(error, "code"):
                return
            time.sleep(0.1)
        else:
            return
    raise AssertionError("olah does not answer")


def test_conversions_through_a_caching_proxy_are_right(proxy: str, hub: Hub, tmp_path: Path) -> None:
    source = opt_pickles(tmp_path)
    weights = add(hub, source)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, tmp_path / "local")

    for reader in ("stream", "download", "stream"):
        out = tmp_path / f"out-{reader}"
        shutil.rmtree(out, ignore_errors=True)
        convert(NAME, out, reader=reader)
        assert {n: c for n, c in file_bytes(out).items() if n != "int8convert/manifest.json"} == {
            n: c for n, c in file_bytes(tmp_path / "local").items() if n != "int8convert/manifest.json"
        }

    assert fetched_bytes(hub, weights), "nothing went through the proxy"
