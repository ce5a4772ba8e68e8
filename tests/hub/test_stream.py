"""A stream goes on at the byte it had reached, and its bytes are judged before what they seem to say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from int8convert.errors import NonFiniteWeightError
from tests.tools.hub_repositories import NAME, add, convert, opt_pickles
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "small_pieces", "quick_waits")


def test_cut_stream_goes_on_at_the_byte_it_had_reached(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    weights = add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "expected", reader="stream")
    n_headers = len(hub.log.requests("GET", origin=Origin.STORAGE)) - len(weights)
    n_bytes = sorted(weights.items())[1][1].stat().st_size
    for after_bytes in (1, 2047, 2048, 30_000, n_bytes - 1):
        hub.log.clear()
        hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=n_headers + 2, after_bytes=after_bytes)

        convert(NAME, tmp_path / f"out-{after_bytes}", reader="stream")

        assert file_bytes(tmp_path / f"out-{after_bytes}") == file_bytes(tmp_path / "expected")
        cut, resumed = hub.log.requests("GET", origin=Origin.STORAGE)[n_headers + 1 : n_headers + 3]
        assert (cut.range, cut.sent_bytes) == (None, after_bytes)
        assert (resumed.range, resumed.status) == (f"bytes={after_bytes}-{n_bytes - 1}", 206)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_very_large_shard_comes_by_several_requests(
    ignores_ranges: bool, hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is larger than 50 GB the store behind the Hub gives in parts only."""
    weights = add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "expected", reader="stream")
    n_headers = len(hub.log.requests("GET", origin=Origin.STORAGE)) - len(weights)
    monkeypatch.setattr("int8convert.hub.stream._MAX_REQUEST_BYTES", 40_000)
    if ignores_ranges:
        hub.faults.add(FaultKind.RANGE_IGNORED, origin=Origin.STORAGE, nth=n_headers + 1, times=math.inf)
    hub.log.clear()

    convert(NAME, tmp_path / "out", reader="stream")

    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")
    if not ignores_ranges:
        requests = hub.log.requests("GET", origin=Origin.STORAGE)[n_headers:]
        sizes = [path.stat().st_size for _, path in sorted(weights.items())]
        begins = [begin for size in sizes for begin in range(0, size, 40_000)]
        assert [int(str(request.range).removeprefix("bytes=").partition("-")[0]) for request in requests] == begins
        assert sum(request.sent_bytes for request in requests) == sum(sizes)
        assert max(request.sent_bytes for request in requests) == 40_000


def test_wrong_bytes_that_are_no_numbers_are_not_blamed_on_the_checkpoint(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned over, the bytes of a weight of zeros are NaN: the shard is fetched again before anybody says so."""
    source = save_checkpoint("opt", tmp_path / "source")
    save_file({name: torch.zeros_like(t) for name, t in read_tensors(source).items()}, source / "model.safetensors")
    add(hub, source)
    connect(hub)
    convert(NAME, tmp_path / "expected", reader="stream")
    n_headers = len(hub.log.requests("GET", origin=Origin.STORAGE)) - 1
    raised: list[NonFiniteWeightError] = []
    init = NonFiniteWeightError.__init__

    def noting(self: NonFiniteWeightError, *arguments: str) -> None:
        raised.append(self)
        init(self, *arguments)

    monkeypatch.setattr(NonFiniteWeightError, "__init__", noting)
    n_bytes = (source / "model.safetensors").stat().st_size
    hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=n_headers + 1, after_bytes=n_bytes - 20_000)

    convert(NAME, tmp_path / "out", reader="stream")

    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")
    assert raised, "nothing was NaN: the test shows nothing"
