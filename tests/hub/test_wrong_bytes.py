"""Bytes that are not those the Hub lists: found at the shard's end, fetched again, at last refused; never kept."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download

from int8convert.errors import CorruptFileError
from int8convert.events import Event, PlanMade, ShardFinished, ShardRepeated
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.hub_conversions import READERS, begin_anew, convert, looks_complete
from tests.tools.hub_models import NAME, files_of, opt_66b, save_opt
from tests.tools.hub_server.blobs import KnownFile
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_waits", "map_in_process")


@pytest.mark.parametrize("reader", READERS)
def test_shard_that_came_wrong_is_fetched_again_and_nothing_made_of_it_had_a_name(
    hub: Hub, connect: Connect, tmp_path: Path, client_cache: Path, reader: str
) -> None:
    files = opt_66b(tmp_path / "model")
    hub.add_repo(NAME, files)
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", reader)
    begin_anew(hub, client_cache)
    second = hashlib.sha256(Path(str(files["pytorch_model-00002-of-00003.bin"])).read_bytes()).hexdigest()
    hub.faults.add(FaultKind.WRONG_BYTES, path=second, nth=3, times=2)  # behind the two requests for its header
    events: list[Event] = []

    assert convert(NAME, tmp_path / "out", reader, events.append) == expected

    told = [(type(event), event.i) for event in events if isinstance(event, ShardFinished | ShardRepeated)]
    assert told == [(ShardFinished, 0), (ShardRepeated, 1), (ShardRepeated, 1), (ShardFinished, 1), (ShardFinished, 2)]
    assert len(hub.log.requests("GET", second, Origin.STORAGE)) == 2 + 3


@pytest.mark.parametrize("reader", READERS)
def test_small_output_shards_of_a_shard_that_came_wrong_are_all_dropped(
    hub: Hub, connect: Connect, tmp_path: Path, client_cache: Path, reader: str
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model", n_shards=1))
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", reader, max_shard_size="100KB")
    begin_anew(hub, client_cache)
    hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=3, seed=1)
    events: list[Event] = []

    assert convert(NAME, tmp_path / "out", reader, events.append, max_shard_size="100KB") == expected

    told = [type(event) for event in events if isinstance(event, ShardFinished | ShardRepeated)]
    assert told == [ShardRepeated] + [ShardFinished] * (len(told) - 1) and len(told) > 5


@pytest.mark.parametrize("reader", READERS)
def test_shard_that_always_comes_wrong_is_refused_after_three_times(
    hub: Hub, connect: Connect, tmp_path: Path, client_cache: Path, reader: str
) -> None:
    files = opt_66b(tmp_path / "model")
    hub.add_repo(NAME, files)
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", reader)
    begin_anew(hub, client_cache)
    second = hashlib.sha256(Path(str(files["pytorch_model-00002-of-00003.bin"])).read_bytes()).hexdigest()
    hub.faults.add(FaultKind.WRONG_BYTES, path=second, nth=3, times=math.inf)

    with pytest.raises(CorruptFileError) as caught:
        convert(NAME, tmp_path / "out", reader)

    assert caught.value.message.startswith(
        "'pytorch_model-00002-of-00003.bin' came 3 times with other bytes than the Hub lists: sha256 "
    )
    assert caught.value.message.endswith(f", expected {second}")
    assert caught.value.hint == "check the proxy, the network and the disk on the way: one of them alters it"
    assert caught.value.state == "1 finished shard is kept: the same command resumes after it"
    assert not looks_complete(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]
    hub.faults.clear()
    assert convert(NAME, tmp_path / "out", reader) == expected


@pytest.mark.parametrize("reader", READERS)
def test_file_of_another_content_than_listed_is_refused(
    hub: Hub, connect: Connect, tmp_path: Path, reader: str
) -> None:
    directory = save_opt(tmp_path / "model")
    weights = directory / "model.safetensors"
    listed = hashlib.sha256(b"another").hexdigest()
    hub.add_repo(NAME, files_of(directory) | {weights.name: KnownFile(weights, listed)})
    connect(hub)

    with pytest.raises(CorruptFileError, match=r"'model\.safetensors' came 3 times with other bytes"):
        convert(NAME, tmp_path / "out", reader)
    assert not list((tmp_path / "out").rglob("*.safetensors*"))


@pytest.mark.parametrize("reader", READERS)
def test_header_that_was_another_when_the_plan_was_made_is_refused(
    hub: Hub, connect: Connect, tmp_path: Path, reader: str
) -> None:
    """The whole file is right, and would be converted by a wrong plan: two tensors have one another's names."""
    directory = save_opt(tmp_path / "model")
    weights = directory / "model.safetensors"
    right = weights.read_bytes()
    wrong = bytearray(right)
    a, b = right.index(b"layers.0.fc1.bias"), right.index(b"layers.1.fc1.bias")
    wrong[a + 7], wrong[b + 7] = right[b + 7], right[a + 7]
    weights.write_bytes(wrong)
    hub.add_repo(NAME, files_of(directory) | {weights.name: KnownFile(weights, hashlib.sha256(right).hexdigest())})
    connect(hub)

    def mend(event: Event) -> None:
        if isinstance(event, PlanMade):
            weights.write_bytes(right)

    with pytest.raises(CorruptFileError) as caught:
        convert(NAME, tmp_path / "out", reader, mend)

    assert caught.value.message == (
        "the header of 'model.safetensors' differs from the one the conversion was planned from"
    )
    assert caught.value.hint == "run the same command again; it plans from the new header"
    assert caught.value.state == "what this run had written was removed"
    assert not looks_complete(tmp_path / "out")
    assert convert(NAME, tmp_path / "out", reader) == convert(directory, tmp_path / "local") | {
        "int8convert/manifest.json": (tmp_path / "out/int8convert/manifest.json").read_bytes()
    }


def test_small_file_that_always_comes_wrong_is_refused(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    hub.faults.add(FaultKind.WRONG_BYTES, method="GET", path="/config.json", times=math.inf, after_bytes=20)

    with pytest.raises(CorruptFileError) as caught:
        convert(NAME, tmp_path / "out")
    assert caught.value.message == (
        "'config.json' of 'facebook/opt-66b' came 3 times with other bytes than the Hub lists"
    )
    assert caught.value.hint == "check the proxy and the disk on the way; one of them is broken"
    hub.faults.clear()
    convert(NAME, tmp_path / "out")


def test_small_file_that_always_comes_wrong_stays_in_nobodys_cache(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    hub.faults.add(FaultKind.WRONG_BYTES, method="GET", path="/config.json$", times=math.inf, after_bytes=20)
    with pytest.raises(CorruptFileError):
        convert(NAME, tmp_path / "out")
    hub.faults.clear()

    assert Path(hf_hub_download(NAME, "config.json")).read_bytes() == hub.repo(NAME).files["config.json"]


def test_wrong_bytes_in_the_cache_of_the_client_are_not_believed(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    """It is fetched into a folder of ours then; the cache, which is not, stays as it was."""
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    api = connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", "download")
    cached = Path(api.hf_hub_download(NAME, "pytorch_model-00002-of-00003.bin"))
    damaged = bytearray(cached.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cached.write_bytes(damaged)

    assert convert(NAME, tmp_path / "out", "download") == expected
    assert cached.read_bytes() == damaged


@pytest.mark.parametrize("reader", READERS)
def test_scale_of_fp8_codes_that_came_wrong_is_not_believed(
    hub: Hub, connect: Connect, tmp_path: Path, client_cache: Path, reader: str
) -> None:
    """Scales are read by range, from another shard than the codes they belong to."""
    save_fp8(save_checkpoint("llama", tmp_path / "plain", torch.bfloat16), tmp_path / "fp8", "block")
    hub.add_repo(NAME, files_of(tmp_path / "fp8"))
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", reader)
    requests = hub.log.requests("GET", "/objects/", Origin.STORAGE)
    outcomes = set()
    for nth in range(1, len(requests) + 1):
        begin_anew(hub, client_cache)
        hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=nth, after_bytes=0)
        out = tmp_path / str(nth)
        try:
            assert convert(NAME, out, reader) == expected, f"request {nth} of {len(requests)}"
            outcomes.add("mended")
        except CorruptFileError as error:
            assert not looks_complete(out)
            outcomes.add(error.message)
            hub.faults.clear()
            assert convert(NAME, out, reader) == expected
    assert outcomes == {"mended"}, "each of them shows before a header does"
