"""Whichever reader brings a repository, the output is the one of the same files on the disk, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from int8convert.checkpoint.rows import Block
from int8convert.decoding.source_weights import as_loaded
from int8convert.errors import DiskFullError, HubConnectionError, HubError
from int8convert.events import PlanMade, ShardFinished, ShardSkipped, ShardStarted, SourceFetched
from int8convert.formats.format import Format
from int8convert.hub.stream import ShardStream
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.planning.name_rules import map_by_name
from int8convert.planning.reading_order import ReadingOrder
from int8convert.planning.shard_layout import make_plan
from int8convert.sources import open_source
from tests.tools.hub_repositories import NAME, add, convert, fetched_bytes, opt_pickles, payload
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import edit_config, file_bytes, read_tensors, save_as_pickles, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "small_pieces")

READERS = ("stream", "download")


def safetensors(folder: Path) -> Path:
    return save_checkpoint("llama", folder / "safe", torch.bfloat16, "60KB")


def one_file(folder: Path) -> Path:
    return save_checkpoint("qwen3", folder / "safe", torch.float32)


def one_pickle(folder: Path) -> Path:
    return opt_pickles(folder, 1)


def transposed(folder: Path) -> Path:
    """GPT-2, whose matrices are read column by column: the stream has to hold all of one."""
    return save_checkpoint("gpt2", folder / "safe", max_shard_size="100KB")


def views_of_one_storage(folder: Path) -> Path:
    """q, k and v as views of one storage, in an order that is not that of their bytes."""
    source = save_checkpoint("opt", folder / "safe")
    tensors = read_tensors(source)
    layer = "model.decoder.layers.0.self_attn."
    fused = torch.cat([tensors[f"{layer}{name}_proj.weight"] for name in "vqk"])
    tensors |= {f"{layer}{name}_proj.weight": fused[64 * i : 64 * (i + 1)] for i, name in enumerate("vqk")}
    directory = folder / "views"
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(tensors, directory / "pytorch_model.bin")
    return directory


def before_torch_1_6(folder: Path) -> Path:
    directory = opt_pickles(folder, 1)
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return directory


def fp8_with_scales_elsewhere(folder: Path) -> Path:
    """FP8 codes, their scales in another shard, which is read while the codes are."""
    source = save_checkpoint("llama", folder / "safe", torch.bfloat16)
    tensors = read_tensors(source)
    codes, scales = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scales[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            tensor = (tensor.float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes[name] = tensor
    directory = folder / "fp8"
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_config(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(codes, directory / names[0])
    save_file(scales, directory / names[1])
    weight_map = dict.fromkeys(codes, names[0]) | dict.fromkeys(scales, names[1])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def empty_tensor_at_the_end(folder: Path) -> Path:
    """Its place is where the file ends, which no byte that is read is behind of."""
    source = save_checkpoint("llama", folder / "safe", torch.bfloat16)
    tensors = {**read_tensors(source), "zzz.empty": torch.empty((0, 4), dtype=torch.bfloat16)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert open_source(source).shards[0].tensors[-1].name == "zzz.empty"
    return source


KINDS: list[Callable[[Path], Path]] = [
    *(opt_pickles, safetensors, one_file, one_pickle, transposed, views_of_one_storage, before_torch_1_6),
    *(fp8_with_scales_elsewhere, empty_tensor_at_the_end),
]


@pytest.mark.parametrize("kind", KINDS)
def test_readers_give_the_bytes_of_a_local_conversion(
    kind: Callable[[Path], Path], hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    source = kind(tmp_path)
    add(hub, source)
    connect(hub)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, tmp_path / "local")

    for reader in READERS:
        convert(NAME, tmp_path / reader, reader=reader)
        assert payload(tmp_path / reader) == payload(tmp_path / "local"), reader

    assert file_bytes(tmp_path / "stream") == file_bytes(tmp_path / "download")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", ["20KB", "90KB", "1GB"])
@pytest.mark.parametrize("kind", [safetensors, empty_tensor_at_the_end])
def test_shards_cut_anew_are_the_same(
    kind: Callable[[Path], Path], reader: str, size: str, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    """Several output shards of one source shard, and one of several: none counts before all its bytes are checked."""
    source = kind(tmp_path)
    weights = add(hub, source)
    connect(hub)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, tmp_path / "local", max_shard_size=size)
    hub.log.clear()

    convert(NAME, tmp_path / "out", reader=reader, max_shard_size=size)

    assert payload(tmp_path / "out") == payload(tmp_path / "local")
    for name, n_bytes in fetched_bytes(hub, weights).items():
        assert n_bytes < weights[name].stat().st_size + 20_000, "a shard was fetched twice"


def test_manifest_names_repository_commit_licence_and_hashes(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    weights = add(hub, opt_pickles(tmp_path))
    connect(hub)

    convert(NAME, tmp_path / "out", reader="stream")

    manifest = json.loads((tmp_path / "out" / "int8convert" / "manifest.json").read_text())
    assert manifest["source"] == manifest["conversion"]["source"]["repository"] == NAME
    assert manifest["source_revision"] == manifest["conversion"]["source"]["commit"] == hub.repo(NAME).refs["main"]
    assert manifest["source_card"] == {"license": "other", "license_name": "opt", "language": "en"}
    read = {name: sha256 for shard in manifest["shards"] for name, sha256 in shard["sources"].items()}
    assert read == {path.name: sha256_of(path) for path in weights.values()}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_files_needed_are_fetched(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    """Both formats are there: safetensors is read, and of the others not a byte."""
    source = safetensors(tmp_path)
    save_as_pickles(source, tmp_path / "pickles", 2)
    for path in (tmp_path / "pickles").glob("pytorch*"):
        path.rename(source / path.name)
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"p" * 1000)
    add(hub, source)
    connect(hub)

    convert(NAME, tmp_path / "out", reader="stream")

    store = hub.log.requests("GET", origin=Origin.STORAGE)
    asked = hub.log.requests("GET", "/resolve/") + hub.log.requests("HEAD", "/resolve/")
    assert store
    assert not [r.path for r in asked if r.path.endswith((".bin", ".msgpack", ".h5", ".pth", "bin.index.json"))]


def test_large_file_of_no_known_kind_is_not_fetched(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.hub.open_repository.MAX_AUXILIARY_BYTES", 100_000)
    add(hub, opt_pickles(tmp_path), video=b"x" * 100_001)
    connect(hub)

    convert(NAME, tmp_path / "out")

    assert not hub.log.requests(path="video") and not (tmp_path / "out" / "video").exists()


def test_older_revision_is_converted_on_demand(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = one_file(tmp_path)
    add(hub, source)
    first = hub.repo(NAME).refs["main"]
    hub.repo(NAME).add_files({"model.safetensors": b"other"})
    connect(hub)

    convert(NAME, tmp_path / "out", reader="stream", revision=first)

    manifest = json.loads((tmp_path / "out" / "int8convert" / "manifest.json").read_text())
    assert manifest["source_revision"] == first


def test_resume_fetches_only_what_is_not_finished(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = safetensors(tmp_path)
    weights = add(hub, source)
    connect(hub)
    convert(NAME, tmp_path / "whole", reader="stream")
    n_shards = len(list((tmp_path / "whole").glob("*.safetensors")))

    class Stopped(Exception):
        pass

    for n_done in range(1, n_shards):
        out = tmp_path / f"out-{n_done}"
        stop_at = f"model-{n_done + 1:05d}"

        def stop(event: object, stop_at: str = stop_at) -> None:
            if isinstance(event, ShardStarted | ShardFinished) and event.file_name.startswith(stop_at):
                raise Stopped

        with pytest.raises(Stopped):
            convert(NAME, out, reader="stream", on_event=stop)
        n_kept = len(list((out / "int8convert" / "shards").glob("*")))
        hub.log.clear()

        events = convert(NAME, out, reader="download")

        assert sum(isinstance(event, ShardSkipped) for event in events) == n_kept >= n_done - 1
        fetched = fetched_bytes(hub, weights)
        whole = [name for name in weights if fetched[name] >= weights[name].stat().st_size]
        assert len(whole) == n_shards - n_kept, "a finished shard was fetched again"
        assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_auto_downloads_where_the_disk_has_room_and_streams_where_not(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, one_file(tmp_path))
    connect(hub)
    for reserved, expected in ((0, "download"), (1 << 60, "stream")):
        monkeypatch.setattr("int8convert.conversion.readers._RESERVED_BYTES", reserved)
        made = [e for e in convert(NAME, tmp_path / expected) if isinstance(e, PlanMade)]
        assert made[0].reader == expected
        assert "room" in made[0].reader_reason


def test_shard_that_the_client_cannot_download_is_streamed_or_refused_at_once(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By HTTP it downloads nothing larger than 50 GB."""
    weights = add(hub, one_file(tmp_path))
    connect(hub)
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 1000)
    monkeypatch.setattr("int8convert.conversion.readers._RESERVED_BYTES", 0)
    (name,) = weights

    with pytest.raises(HubError) as caught:
        convert(NAME, tmp_path / "download", reader="download")
    assert caught.value.message == (
        f"'{name}' of '{NAME}' has {weights[name].stat().st_size:,} bytes; the Hub's client downloads that much by "
        "xet alone, which is off or not installed"
    )
    made = [e for e in convert(NAME, tmp_path / "auto") if isinstance(e, PlanMade)]
    assert made[0].reader == "stream"


def test_downloads_leave_nothing_behind(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)

    events = convert(NAME, tmp_path / "out", reader="download")

    assert not (tmp_path / "out" / "int8convert" / "incoming").exists()
    assert not list((tmp_path / "client").rglob("*.bin")), "weights went into the cache"
    assert any(isinstance(event, SourceFetched) for event in events)


def test_full_disk_that_xet_meets_is_told_as_one(
    xet_hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet has no type for it, only words."""
    add(xet_hub, one_file(tmp_path))
    connect(xet_hub, xet=True)
    n_tries = 0

    def fail(**_: object) -> None:
        nonlocal n_tries
        n_tries += 1
        raise RuntimeError("Data processing error: IO Error: No space left on device (os error 28)")

    monkeypatch.setattr("huggingface_hub.file_download.xet_get", fail)

    with pytest.raises(DiskFullError, match=r"no room left in .* while downloading 'model.safetensors'"):
        convert(NAME, tmp_path / "out", reader="download")
    assert n_tries == 1


def test_cache_dir_keeps_downloads_and_the_next_run_uses_them(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    weights = add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "one", cache_dir=tmp_path / "kept")
    hub.log.clear()

    convert(NAME, tmp_path / "two", cache_dir=tmp_path / "kept")

    sent = fetched_bytes(hub, weights)
    assert all(sent[name] < path.stat().st_size for name, path in weights.items())  # headers alone
    assert {path.name for path in (tmp_path / "kept").rglob("*.bin")} == set(weights)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")


def test_what_others_put_into_the_cache_is_read_and_never_deleted(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    weights = add(hub, opt_pickles(tmp_path))
    api = connect(hub)
    there = [Path(api.hf_hub_download(NAME, name)) for name in weights]
    hub.log.clear()

    convert(NAME, tmp_path / "out", reader="download")

    assert all(path.is_file() for path in there)
    sent = fetched_bytes(hub, weights)
    assert all(sent[name] < path.stat().st_size for name, path in weights.items())


def test_wrong_file_in_the_cache_is_not_believed(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = opt_pickles(tmp_path)
    add(hub, source)
    api = connect(hub)
    convert(NAME, tmp_path / "right", reader="stream")
    cached = Path(api.hf_hub_download(NAME, "pytorch_model-00002-of-00003.bin")).resolve()
    content = bytearray(cached.read_bytes())
    content[-9000] ^= 1
    cached.write_bytes(content)

    convert(NAME, tmp_path / "out", reader="download")

    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")
    assert cached.read_bytes() == content, "somebody else's cache was changed"


def test_offline_means_the_cache_and_nothing_else(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "online", cache_dir=tmp_path / "kept")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()

    convert(NAME, tmp_path / "offline", cache_dir=tmp_path / "kept")
    assert file_bytes(tmp_path / "offline") == file_bytes(tmp_path / "online")
    with pytest.raises(HubConnectionError, match="HF_HUB_OFFLINE is set, and 'org/other' is not in the cache"):
        convert("org/other", tmp_path / "nowhere")
    assert not hub.log.requests()


@pytest.mark.parametrize("reader", READERS)
def test_xet_on_either_side(reader: str, xet_hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = opt_pickles(tmp_path)
    add(xet_hub, source)
    connect(xet_hub, xet=True)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, tmp_path / "local")

    convert(NAME, tmp_path / "out", reader=reader)

    assert payload(tmp_path / "out") == payload(tmp_path / "local")


def test_cache_that_xet_filled_is_read_as_a_directory_and_without_the_network(
    xet_hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are links to links, to blobs that all repositories of the cache share."""
    add(xet_hub, safetensors(tmp_path))
    api = connect(xet_hub, xet=True)
    cache = tmp_path / "cache"
    convert(NAME, tmp_path / "out", cache_dir=cache)
    snapshot = Path(api.snapshot_download(NAME, cache_dir=cache, allow_patterns="*.safetensors"))
    assert {len(path.resolve().relative_to(cache).parts) for path in snapshot.glob("*.safetensors")} == {3}

    convert(snapshot, tmp_path / "by path")

    assert payload(tmp_path / "by path") == payload(tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    convert(NAME, tmp_path / "offline", cache_dir=cache)
    assert payload(tmp_path / "offline") == payload(tmp_path / "out")


def test_stream_holds_no_more_than_its_window(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, transposed(tmp_path))
    connect(hub)
    used: list[int] = []
    allowed: list[int] = []
    take = ShardStream._take

    def counting(self: ShardStream, *arguments: object) -> None:
        take(self, *arguments)  # type: ignore[arg-type]
        used.append(self._n_used)
        allowed.append(self._max_chunks)

    monkeypatch.setattr(ShardStream, "_take", counting)
    convert(NAME, tmp_path / "out", reader="stream", workers=2)

    assert max(used) <= allowed[0]
    assert 2048 * allowed[0] < sum(path.stat().st_size for path in (tmp_path / "safe").glob("*.safetensors")) / 2


def test_reading_order_knows_what_is_needed_last(tmp_path: Path) -> None:
    """Of three views whose order is not that of their bytes, nothing may go before the last of them was read."""
    source = open_source(views_of_one_storage(tmp_path))
    modules = ModuleFilter((), (), Format.BITSANDBYTES, False)
    plan = make_plan(source, map_by_name(as_loaded(source), modules, None, "test"))
    order = ReadingOrder(plan)
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    begins = [tensor.source.offset for tensor in tensors]
    for i, tensor in enumerate(tensors):
        last = Block(np.empty(tensor.source.n_bytes, np.uint8), tensor.source.offset)
        expected = min([*begins[i + 1 :], source.shards[0].n_bytes])
        assert order.needed_from(tensor, last, is_last=True) == expected
