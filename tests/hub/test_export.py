"""Exports of repositories on the Hub, by both readers, and exports that go there while they are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.conversion.destination import PublishedDestination
from int8convert.conversion.readers import Reader, Reading
from int8convert.errors import HubConnectionError
from int8convert.events import Event, PlanMade, ShardFinished, ShardRepeated, ignore
from int8convert.publish.shard_publisher import HubPublisher
from int8convert.verification.exact.level import verify_exact
from tests.tools.hub_conversions import READERS
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import as_downloaded, file_bytes, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "impatient")

NAME, NEW = "me/opt-int8", "me/opt-int8-vllm"
MANIFEST = "int8convert/manifest.json"
OPTIONS: list[dict[str, Any]] = [
    {"format": "compressed-tensors"},
    {"format": "torchao"},
    {"dequantize": "float16"},
    {"max_shard_size": "50KB"},
]


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    """An int8 checkpoint of three shards."""
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    int8convert.quantize(source, tmp_path / "int8", on_event=ignore)
    return tmp_path / "int8"


def add(hub: Hub, directory: Path, name: str = NAME) -> None:
    hub.add_repo(name, {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()})


def export(source: str | Path, out: Path, reader: str = "auto", **options: Any) -> list[Event]:
    """Export; the events."""
    events: list[Event] = []
    int8convert.export(source, out, reading=Reading(Reader(reader)), **{"on_event": events.append, **options})
    return events


def payload(out: Path) -> dict[str, bytes]:
    """All files but those that say where the source was."""
    return {name: content for name, content in file_bytes(out).items() if not name.startswith("int8convert/")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))
def test_repository_gives_the_bytes_of_a_directory(
    options: dict[str, Any], reader: str, hub: Hub, connect: Connect, int8: Path, tmp_path: Path
) -> None:
    add(hub, int8)
    connect(hub)
    export(as_downloaded(shutil.copytree(int8, tmp_path / "downloaded")), tmp_path / "expected", **options)
    events = export(NAME, tmp_path / "out", reader, **options)
    assert payload(tmp_path / "out") == payload(tmp_path / "expected")
    assert [event.reader for event in events if isinstance(event, PlanMade)] == [reader]
    manifest, expected = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("out", "expected"))
    assert manifest["source"] == NAME and len(manifest["source_revision"]) == 40
    assert manifest["shards"] == expected["shards"]  # with the sha256 of the source's shards


@pytest.mark.parametrize("reader", READERS)
def test_header_of_a_torchao_repository_goes_along(
    reader: str, hub: Hub, connect: Connect, int8: Path, tmp_path: Path
) -> None:
    export(int8, tmp_path / "torchao", format="torchao")
    add(hub, tmp_path / "torchao")
    connect(hub)
    export(tmp_path / "torchao", tmp_path / "expected", max_shard_size="50KB")
    export(NAME, tmp_path / "out", reader, max_shard_size="50KB")
    assert payload(tmp_path / "out") == payload(tmp_path / "expected")


def test_export_of_a_repository_is_verified_through_its_manifest(
    hub: Hub, connect: Connect, int8: Path, tmp_path: Path
) -> None:
    add(hub, int8)
    connect(hub)
    export(NAME, tmp_path / "out", "stream", format="compressed-tensors")
    report = verify_exact(tmp_path / "out", reference=tmp_path / "source")
    assert [check.name for check in report.checks if not check.is_passed] == []
    assert "through 1 export" in report.compared
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.decoder.layers.0.fc1")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    report = verify_exact(tmp_path / "out", reference=tmp_path / "source")
    assert [check.name for check in report.checks if not check.is_passed] == ["config"]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))
def test_shard_that_arrives_with_wrong_bytes_is_read_again(
    options: dict[str, Any], hub: Hub, connect: Connect, int8: Path, tmp_path: Path
) -> None:
    add(hub, int8)
    connect(hub)
    export(int8, tmp_path / "expected", **options)
    hub.faults.add(FaultKind.WRONG_BYTES, path=_sha256(int8 / "model-00002-of-00003.safetensors"), nth=3, times=1)
    events = export(NAME, tmp_path / "out", "stream", **options)
    assert any(isinstance(event, ShardRepeated) for event in events) and hub.faults.fired
    assert payload(tmp_path / "out") == payload(tmp_path / "expected")


def _sha256(path: Path) -> str:
    from int8convert.checkpoint.hashing import file_sha256

    return file_sha256(path)


@pytest.mark.parametrize("source", ["a directory", "the Hub"])
def test_export_goes_to_the_hub_while_it_is_written_and_resumes_there(
    source: str, hub: Hub, connect: Connect, int8: Path, tmp_path: Path
) -> None:
    add(hub, int8)
    connect(hub, hub.token)
    src = int8 if source == "a directory" else NAME
    export(int8, tmp_path / "expected", format="compressed-tensors")

    def stop(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == 0:
            raise KeyboardInterrupt

    options = {"format": "compressed-tensors", "reader": "stream"}
    with pytest.raises(KeyboardInterrupt):
        destination = PublishedDestination(HubPublisher(NEW))
        export(src, tmp_path / "work", **options, destination=destination, on_event=stop)
    assert "config.json" not in hub.repo(NEW).files

    destination = PublishedDestination(HubPublisher(NEW))
    reading = Reading(Reader.STREAM)
    report = int8convert.export(
        src, tmp_path / "elsewhere", format="compressed-tensors", reading=reading, destination=destination
    )
    assert report.out is None and report.n_done_shards >= 1 and not (tmp_path / "elsewhere").exists()
    there = {name: content for name, content in hub.repo(NEW).files.items() if name != "README.md"}
    assert {name: content for name, content in there.items() if name != MANIFEST} == payload(tmp_path / "expected")
    assert json.loads(there[MANIFEST])["conversion"]["format"] == "compressed-tensors"
    assert b"compressed-tensors" in hub.repo(NEW).files["README.md"]


@pytest.fixture
def scattered(int8: Path) -> Path:
    """The checkpoint with the scales of each shard's codes in the shard before, those of the first in the last."""
    paths = sorted(int8.glob("model-*.safetensors"))
    shards = [load_file(path) for path in paths]
    scales = [{name: shard.pop(name) for name in list(shard) if name.endswith(".SCB")} for shard in shards]
    assert all(scales)
    weight_map = {}
    for path, codes, others in zip(paths, shards, scales[1:] + scales[:1], strict=True):
        save_file(codes | others, path, {"format": "pt"})
        weight_map |= dict.fromkeys(codes | others, path.name)
    (int8 / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return int8


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))
def test_scales_in_other_shards_than_their_codes(
    options: dict[str, Any], reader: str, scattered: Path, tmp_path: Path, hub: Hub, connect: Connect
) -> None:
    """Shards are read once, in order; a shard that was read again for its scales would block the reader for ever."""
    add(hub, scattered)
    connect(hub)
    export(scattered, tmp_path / "expected", **options)
    export(NAME, tmp_path / "out", reader, **options)
    assert payload(tmp_path / "out") == payload(tmp_path / "expected")
    hub.faults.add(FaultKind.WRONG_BYTES, path=_sha256(scattered / "model-00001-of-00003.safetensors"), nth=3, times=1)
    events = export(NAME, tmp_path / "again", reader, **options)
    assert any(isinstance(event, ShardRepeated) for event in events) and hub.faults.fired
    assert payload(tmp_path / "again") == payload(tmp_path / "expected")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["recoded", "copied"])
def test_export_resumes_where_finished_shards_held_scales_of_the_others(
    options: dict[str, Any], reader: str, scattered: Path, tmp_path: Path, hub: Hub, connect: Connect
) -> None:
    add(hub, scattered)
    connect(hub)
    export(scattered, tmp_path / "expected", **options)
    last = len(list((tmp_path / "expected").glob("model-*.safetensors"))) - 1

    def stop(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == last - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(NAME, tmp_path / "out", reader, **options, on_event=stop)
    events = export(NAME, tmp_path / "out", reader, **options)
    assert [event.i for event in events if isinstance(event, ShardFinished)] == [last]
    assert payload(tmp_path / "out") == payload(tmp_path / "expected")


def test_state_of_an_error_counts_the_shards_that_were_sent(
    int8: Path, tmp_path: Path, hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is complete here, so nothing is written into it; two of its shards are on the Hub all the same."""
    connect(hub, hub.token)
    export(int8, tmp_path / "out", format="compressed-tensors")
    sent: list[str] = []

    class Breaking(HubPublisher):
        def publish(self, record: Any, path: Path) -> None:
            if len(sent) == 2:
                raise HubConnectionError("the network is down", "run the same command again")
            super().publish(record, path)
            sent.append(path.name)

    with pytest.raises(HubConnectionError) as caught:
        export(
            int8,
            tmp_path / "out",
            format="compressed-tensors",
            destination=PublishedDestination(Breaking(NEW), keeps=True),
        )
    assert caught.value.state.startswith("2 finished shards are on the Hub and 1 finished shard is in ")
