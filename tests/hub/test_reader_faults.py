"""Whatever happens on the way, the output is that of an undisturbed run, or there is none and two lines say why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from int8convert.conversion.events import ShardRepeated
from int8convert.errors import CorruptFileError, HubConnectionError, HubError, Int8ConvertError, NonFiniteWeightError
from tests.hub.repositories import NAME, add, convert, fetched_bytes, opt_pickles
from tests.hub_server.faults import FaultKind
from tests.hub_server.fixtures import Connect
from tests.hub_server.http_messages import Origin
from tests.hub_server.hub import Hub
from tests.tiny_models import file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "small_pieces", "impatient")

N_TIMES = int(os.environ.get("INT8CONVERT_FAULTS", "4"))
"""Of each fault, by each reader. 20 take three minutes."""

READERS = ("stream", "download")
STALL_S, TIMEOUT_S = 0.4, 0.1
SECONDS = {FaultKind.STALL: STALL_S, FaultKind.RESTART: 0.05, FaultKind.TOO_MANY_REQUESTS: 0.0}


class Undisturbed:
    """A repository, and what comes out of it when nothing happens."""

    def __init__(self, hub: Hub, weights: dict[str, Path], expected: dict[str, bytes], folder: Path) -> None:
        self.hub, self.weights, self.expected, self.folder = hub, weights, expected, folder
        self.sizes = {name: path.stat().st_size for name, path in weights.items()}
        n_requests = len(hub.log.requests("GET", origin=Origin.STORAGE))
        self.first_weights = n_requests - len(weights) + 1
        """The number of the store's first request that is for a whole shard, counted from 1."""

    def attempt(self, out: str, reader: str) -> Int8ConvertError | None:
        """Convert, and check what is there after; the error, if there is one."""
        path = self.folder / out
        try:
            self.events = convert(NAME, path, reader=reader)
        except Int8ConvertError as error:
            assert "\n" not in error.message + error.hint
            assert not (path / "config.json").exists(), "half of an output looks like a whole one"
            assert not list(path.glob("int8convert/incoming")) and not list(path.rglob("*.incomplete"))
            for kept in path.glob("*.safetensors"):
                assert kept.read_bytes() == self.expected[kept.name], "a wrong byte was accepted"
            return error
        assert file_bytes(path) == self.expected
        return None


@pytest.fixture
def undisturbed(hub: Hub, connect: Connect, tmp_path: Path) -> Iterator[Undisturbed]:
    weights = add(hub, opt_pickles(tmp_path))
    connect(hub, timeout_s=TIMEOUT_S)
    convert(NAME, tmp_path / "expected", reader="stream")
    yield Undisturbed(hub, weights, file_bytes(tmp_path / "expected"), tmp_path)
    hub.faults.clear()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", list(FaultKind), ids=str)
def test_fault_in_the_weights_is_mended(kind: FaultKind, reader: str, undisturbed: Undisturbed) -> None:
    hub = undisturbed.hub
    n_fired = 0
    for seed in range(N_TIMES):
        hub.faults.clear()
        hub.log.clear()
        before = len(hub.faults.fired)
        hub.faults.add(
            kind, origin=Origin.STORAGE, nth=None, among=16, seed=seed, seconds=SECONDS.get(kind, 1.0), method="GET"
        )

        error = undisturbed.attempt(f"out-{seed}", reader)

        hub.await_restart()
        assert error is None or (kind is FaultKind.WRONG_BYTES and "the header of" in error.message), error
        if error is not None:  # it made sense, and was another one, which shows at the file's end
            hub.faults.clear()
            assert undisturbed.attempt(f"out-{seed}", reader) is None
        else:
            # One shard at most is fetched a second time, beside the headers.
            again = fetched_bytes(hub, undisturbed.weights)
            assert sum(again.values()) <= 2 * sum(undisturbed.sizes.values()) + 2 * max(undisturbed.sizes.values())
        n_fired += len(hub.faults.fired) - before
        shutil.rmtree(undisturbed.folder / f"out-{seed}")
    assert n_fired >= N_TIMES // 4, "most faults met no request: the test shows little"


@pytest.mark.parametrize("kind", list(FaultKind), ids=str)
def test_fault_in_a_small_request_is_mended_or_told(
    kind: FaultKind, undisturbed: Undisturbed, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the API, the index, the config, and of the headers that a dry run reads."""
    hub = undisturbed.hub
    for seed in range(N_TIMES):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(undisturbed.folder / f"cache-{seed}"))
        hub.faults.clear()
        hub.faults.add(kind, nth=None, among=14, seed=seed, seconds=SECONDS.get(kind, 1.0))

        error = undisturbed.attempt(f"out-{seed}", "stream")

        hub.await_restart()
        if kind is not FaultKind.WRONG_BYTES:
            assert error is None, error
        elif error is not None:
            hub.faults.clear()
            assert undisturbed.attempt(f"out-{seed}", "stream") is None
        shutil.rmtree(undisturbed.folder / f"out-{seed}")


def test_cut_stream_goes_on_at_the_byte_it_had_reached(undisturbed: Undisturbed) -> None:
    hub = undisturbed.hub
    n_headers = undisturbed.first_weights - 1
    for after_bytes in (1, 2047, 2048, 30_000, 55_480):
        hub.faults.clear()
        hub.log.clear()
        hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=n_headers + 2, after_bytes=after_bytes)

        assert undisturbed.attempt(f"out-{after_bytes}", "stream") is None

        cut, resumed = hub.log.requests("GET", origin=Origin.STORAGE)[n_headers + 1 : n_headers + 3]
        assert (cut.range, cut.sent_bytes) == (None, after_bytes)
        assert (resumed.range, resumed.status) == (f"bytes={after_bytes}-{55_481 - 1}", 206)


@pytest.mark.parametrize("reader", READERS)
def test_several_faults_at_once_are_mended(reader: str, undisturbed: Undisturbed) -> None:
    hub = undisturbed.hub
    for seed in range(N_TIMES // 2):
        hub.faults.clear()
        kinds = (FaultKind.CUT, FaultKind.RESET, FaultKind.UNAVAILABLE, FaultKind.URL_EXPIRED, FaultKind.TRUNCATED)
        for i, kind in enumerate(kinds):
            hub.faults.add(kind, origin=Origin.STORAGE, method="GET", nth=None, among=16, seed=100 * seed + i)

        assert undisturbed.attempt(f"out-{seed}", reader) is None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "kind",
    [FaultKind.CUT, FaultKind.STALL, FaultKind.UNAVAILABLE, FaultKind.URL_EXPIRED, FaultKind.TRUNCATED],
    ids=str,
)
def test_fault_that_does_not_pass_is_told_and_the_rerun_completes(
    kind: FaultKind, reader: str, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = undisturbed.hub
    monkeypatch.setenv("INT8CONVERT_HUB_PATIENCE", "0.5")
    seconds = SECONDS.get(kind, 1.0)
    nth = undisturbed.first_weights + 1
    hub.faults.add(kind, origin=Origin.STORAGE, nth=nth, times=10_000, after_bytes=0, seconds=seconds, method="GET")

    error = undisturbed.attempt("out", reader)

    assert isinstance(error, HubError)
    assert "reading 'pytorch_model-0000" in error.message and f"of '{NAME}' got no further in" in error.message
    assert "run the same command again" in error.hint
    hub.faults.clear()
    assert undisturbed.attempt("out", reader) is None


@pytest.mark.parametrize("reader", READERS)
def test_file_that_is_always_wrong_is_never_accepted(reader: str, undisturbed: Undisturbed) -> None:
    hub = undisturbed.hub
    nth = undisturbed.first_weights
    hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=nth, times=10_000, after_bytes=40_000)

    error = undisturbed.attempt("out", reader)

    assert isinstance(error, CorruptFileError)
    assert "came 3 times with other bytes than the Hub lists" in error.message
    hub.faults.clear()
    assert undisturbed.attempt("out", reader) is None


@pytest.mark.parametrize("reader", READERS)
def test_shard_with_wrong_bytes_is_made_again_and_told(reader: str, undisturbed: Undisturbed) -> None:
    hub = undisturbed.hub
    nth = undisturbed.first_weights + 1
    hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=nth, after_bytes=40_000)

    assert undisturbed.attempt("out", reader) is None

    repeated = [event for event in undisturbed.events if isinstance(event, ShardRepeated)]
    assert len(repeated) == 1
    assert "came with wrong bytes" in repeated[0].reason


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


def test_hub_that_does_not_answer_is_told_soon(
    connect: Connect, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hub)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, tmp_path / "out")

    assert caught.value.message.startswith(f"looking for '{NAME}' got no further in ")
    assert "no connection to 127.0.0.1" in caught.value.message
    assert caught.value.hint == "see that the network and the Hub are well, and run the same command again"
