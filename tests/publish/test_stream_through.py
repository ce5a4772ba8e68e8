"""A conversion whose shards go to the Hub ends in the same repository, however often killed, in the disk allowed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session
from safetensors.torch import save_file

import int8convert
from int8convert import errors
from int8convert.checkpoint.manifest import ShardRecord
from int8convert.conversion.destination import PublishedDestination
from int8convert.events import ShardSkipped
from int8convert.publish.shard_publisher import HubPublisher
from tests.publish.stream_through import REPO, Stopped, on_the_hub, stop_at, through
from tests.tools.hub_repositories import NAME, add, convert
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


def test_repository_is_what_the_directory_would_be(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    through(tmp_path / "work")

    assert on_the_hub(hub) == expected
    card = hub.repo(REPO).files["README.md"].decode()
    assert "**Not verified**" in card and f"base_model: {NAME}" in card and "| not a matrix product |" in card
    assert not (tmp_path / "work").exists()


def test_kept_output_is_the_same_and_can_be_uploaded_again(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    through(tmp_path / "work", keeps=True)

    assert file_bytes(tmp_path / "work") == expected
    assert on_the_hub(hub) == expected
    assert int8convert.upload(tmp_path / "work", REPO, allow_unverified=True).n_sent_bytes == 0


@pytest.mark.parametrize("is_on_a_fresh_machine", [False, True])
def test_rerun_goes_on_from_what_the_repository_has(
    is_on_a_fresh_machine: bool, hub: Hub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        through(tmp_path / "work", on_event=stop_at(3))
    there = {name for name in on_the_hub(hub) if name.endswith(".safetensors")}
    assert there and "config.json" not in on_the_hub(hub), "half of it looks like a checkpoint"
    hub.log.clear()

    events = through(tmp_path / ("elsewhere" if is_on_a_fresh_machine else "work"))

    assert sum(isinstance(event, ShardSkipped) for event in events) >= len(there)
    assert on_the_hub(hub) == expected
    sent = {request.path for request in hub.log.requests("PUT", origin=Origin.STORAGE)}
    assert len(sent) <= 5 - len(there) + 3  # the shards that lacked, and large small files


def test_shard_that_changed_on_the_hub_is_made_again(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        through(tmp_path / "work", on_event=stop_at(4))
    name = min(name for name in on_the_hub(hub) if name.endswith(".safetensors"))
    hub.repo(REPO).add_files({name: b"somebody else's"})

    through(tmp_path / "work")

    assert on_the_hub(hub) == expected


def test_finished_repository_is_left_as_it_is(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    through(tmp_path / "work")
    head = hub.repo(REPO).refs["main"]
    hub.log.clear()

    through(tmp_path / "work")

    assert hub.repo(REPO).refs["main"] == head
    assert not hub.log.requests("PUT", origin=Origin.STORAGE)


@pytest.mark.parametrize("there", ["weights", "another conversion"])
def test_repository_of_something_else_is_not_touched_unless_told(
    there: str, hub: Hub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    if there == "weights":
        hub.add_repo(REPO, {"model.safetensors": b"mine", "notes.txt": b"mine"})
    else:
        through(tmp_path / "other", threshold=3.0)
    before = hub.repo(REPO).files

    with pytest.raises(errors.OutputError, match=rf"'{REPO}' holds") as caught:
        through(tmp_path / "work")

    assert "--overwrite" in caught.value.hint
    assert hub.repo(REPO).files == before
    through(tmp_path / "work", overwrite=True)
    assert {name: hub.repo(REPO).files[name] for name in expected} == expected
    assert "model.safetensors" not in hub.repo(REPO).files


def test_disk_stays_within_its_bound(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled all the time: a model of 12 shards through the room of 2; and of 1, one after the other."""
    monkeypatch.setattr("int8convert.conversion.disk_budget._SMALL_BYTES", 200_000)
    add(hub, save_checkpoint("llama", tmp_path / "safe", max_shard_size="30KB"))
    connect(hub, hub.token)
    convert(NAME, tmp_path / "expected", reader="stream")
    expected = file_bytes(tmp_path / "expected")
    sizes = sorted(len(content) for name, content in expected.items() if name.endswith(".safetensors"))
    assert sum(sizes) > 4 * sizes[-1]
    hub.bandwidth.bytes_per_s = 3e6
    for bound in (201_000 + 2 * sizes[-1], 201_000 + sizes[-1]):
        work = tmp_path / f"work-{bound}"
        with sampling(work) as peak:
            destination = PublishedDestination(HubPublisher(f"me/bound-{bound}"), False, bound)
            convert(NAME, work, reader="stream", destination=destination)
        assert {n: c for n, c in hub.repo(f"me/bound-{bound}").files.items() if n != "README.md"} == expected
        assert 0 < peak[0] <= bound
    with pytest.raises(errors.DiskFullError, match="--max-disk allows 100,000") as caught:
        through(tmp_path / "work", max_disk=100_000)
    assert "--max-shard-size" in caught.value.hint


def test_disk_stays_within_its_bound_where_scales_are_in_the_next_shard(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard waits for the one its last scale is in, so two of them are here; planned is as much."""
    monkeypatch.setattr("int8convert.conversion.disk_budget._SMALL_BYTES", 60_000)
    add(hub, fp8_with_scales_behind(tmp_path))
    connect(hub, hub.token)
    convert(NAME, tmp_path / "expected", reader="stream")
    expected = file_bytes(tmp_path / "expected")
    n_largest = max(len(content) for name, content in expected.items() if name.endswith(".safetensors"))
    with pytest.raises(errors.DiskFullError) as caught:
        through(tmp_path / "work", max_disk=61_000 + n_largest)
    planned = int(re.search(r"take ([\d,]+) bytes", caught.value.message)[1].replace(",", ""))  # type: ignore[index]
    hub.bandwidth.bytes_per_s = 2e6

    with sampling(tmp_path / "work") as peak:
        through(tmp_path / "work", max_disk=planned)

    assert on_the_hub(hub) == expected
    assert n_largest < peak[0] <= planned


def fp8_with_scales_behind(folder: Path, n_shards: int = 6) -> Path:
    """FP8, the scales of a shard's last weights in the next shard."""
    source = save_checkpoint("llama", folder / "safe", torch.bfloat16)
    tensors = read_tensors(source)
    n_each = -(-len(tensors) // n_shards)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(n_shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        k, is_late = i // n_each, i % n_each >= n_each - 2
        if name.endswith("_proj.weight"):
            shards[min(n_shards - 1, k + is_late)][f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            tensor = (tensor.float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
        shards[k][name] = tensor
    directory = folder / "fp8"
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_config(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    weight_map = {}
    for k, shard in enumerate(shards):
        file_name = f"model-{k + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file(shard, directory / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


class sampling:
    """The most bytes that were ever in a folder, as a list of one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._peak, self._is_over = folder, [0], False
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._is_over:
            n_bytes = 0
            for parent, _, names in os.walk(self._folder):  # which bears that folders go meanwhile
                for name in names:
                    with suppress(FileNotFoundError):
                        status = os.lstat(os.path.join(parent, name))
                        n_bytes += max(status.st_size, 512 * status.st_blocks)
            self._peak[0] = max(self._peak[0], n_bytes)
            time.sleep(0.001)

    def __enter__(self) -> list[int]:
        self._thread.start()
        return self._peak

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()


WAY_UP = (
    *(FaultKind.CUT, FaultKind.RESET, FaultKind.STALL, FaultKind.TOO_MANY_REQUESTS, FaultKind.UNAVAILABLE),
    *(FaultKind.URL_EXPIRED, FaultKind.RESTART),
)


@pytest.mark.parametrize(
    "seeds", [pytest.param(range(1), id="few"), pytest.param(range(1, 23), id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", WAY_UP, ids=str)
def test_faults_on_the_way_up_are_mended(
    kind: FaultKind,
    seeds: range,
    hub: Hub,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At requests and bytes drawn from seeds. A stall is longer than an answer is waited for."""
    monkeypatch.setattr("int8convert.hub.branch._ANSWER_S", 0.4)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "10")
    close_session()
    seconds = {FaultKind.STALL: 1.0, FaultKind.TOO_MANY_REQUESTS: 0}.get(kind, 0.05)
    for seed in seeds:
        if hub.state.repository(REPO) is not None:
            hub.repo(REPO).commit("main", "begin anew", {}, list(hub.repo(REPO).files))
            for content in expected.values():
                hub.state.blobs.forget(hashlib.sha256(content).hexdigest())
        n_before = len(hub.faults.fired)
        for i, method in enumerate(("PUT", "POST", "PUT", "POST")):
            hub.faults.add(kind, method=method, nth=None, among=5, seed=10 * seed + i, seconds=seconds)

        through(tmp_path / "work")

        hub.await_restart()
        assert {fault.method for fault in hub.faults.fired[n_before:]} >= {"PUT"}, f"seed {seed}"
        assert on_the_hub(hub) == expected, f"seed {seed}"
        hub.faults.clear()


def test_hub_that_takes_no_more_is_told_and_what_it_has_counts(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.add(FaultKind.UNAVAILABLE, method="POST", path="/commit/", nth=3, times=10_000)

    with pytest.raises(errors.HubConnectionError) as caught:
        through(tmp_path / "work")

    here = len(list((tmp_path / "work").glob("*.safetensors")))
    assert here == 2
    assert caught.value.state == (
        f"2 finished shards are on the Hub and 2 finished shards are in {tmp_path / 'work'}: the same command "
        "resumes after them"
    )
    hub.faults.clear()
    through(tmp_path / "work")
    assert on_the_hub(hub) == expected


def test_record_that_was_tampered_with_is_not_believed(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A record is a stranger's file, too: one that names other bytes than the repository has counts as none."""
    with pytest.raises(Stopped):
        through(tmp_path / "work", on_event=stop_at(4))
    notes = {name: c for name, c in hub.repo(REPO).files.items() if name.startswith("int8convert/shards/")}
    hub.repo(REPO).add_files({name: c.replace(b'"sha256": "', b'"sha256": "0') for name, c in notes.items()})

    through(tmp_path / "work")

    assert on_the_hub(hub) == expected


def test_local_source_goes_the_same_way(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "safe", max_shard_size="60KB")
    connect(hub, hub.token)
    convert(source, tmp_path / "expected")

    convert(source, tmp_path / "work", destination=PublishedDestination(HubPublisher(REPO)))

    assert on_the_hub(hub) == file_bytes(tmp_path / "expected")
    assert not [name for name, content in hub.repo(REPO).files.items() if str(tmp_path).encode() in content]
    assert not (tmp_path / "work").exists()


def test_shard_killed_between_disk_and_hub_is_sent_by_the_next_run(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = HubPublisher.publish

    def dying(self: HubPublisher, record: ShardRecord, path: Path) -> None:
        if record.file_name.startswith("model-00002"):
            raise Stopped
        publish(self, record, path)

    with monkeypatch.context() as patch:
        patch.setattr(HubPublisher, "publish", dying)
        with pytest.raises(Stopped):
            through(tmp_path / "work")
    assert (tmp_path / "work" / "model-00002-of-00005.safetensors").is_file()

    through(tmp_path / "work")

    assert on_the_hub(hub) == expected
    assert not (tmp_path / "work").exists()
