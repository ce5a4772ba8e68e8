"""A repository is read by the same rule as a directory: which files are taken, which are left aside, which are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from int8convert.errors import CorruptFileError, SourceError
from int8convert.events import PlanMade
from int8convert.sources import open_source
from tests.tools.hub_repositories import convert, payload
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import save_checkpoint

NAME = "someone/model"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint("llama", tmp_path / "source")


def put(hub: Hub, directory: Path) -> None:
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    hub.add_repo(NAME, dict(files))


def stale_index(source: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def versioned_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.4.0.0.json").write_text(json.dumps({**config, "vendor": "its own"}))
    (source / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.4.0.0.json"]}))


def named_weights(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "model.safetensors").rename(source / "own.safetensors")
    (source / "model.safetensors").write_bytes(b"damaged")
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))


def sentence_encoder(source: Path) -> None:
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "pooling"}]))
    for name in ("pooling/config.json", "pooling/deep/model.safetensors", "runs/config.json", ".env"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")


@pytest.mark.usefixtures("map_in_process")
@pytest.mark.parametrize(
    "change", [stale_index, versioned_config, named_weights, sentence_encoder], ids=lambda change: change.__name__
)
def test_repository_gives_the_bytes_and_notes_of_its_directory(
    change: Callable[[Path], None], source: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    change(source)
    put(hub, source)
    connect(hub)
    notes = {}
    for name, out in ((NAME, tmp_path / "there"), (source, tmp_path / "here")):
        (made,) = (event for event in convert(name, out) if isinstance(event, PlanMade))
        notes[out] = made.notes
    there, here = notes
    assert {**payload(there), "int8convert/local.json": b""} == {**payload(here), "int8convert/local.json": b""}
    assert notes[there] == notes[here]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "README.md"])
def test_pointer_that_was_put_on_the_hub_is_refused(name: str, source: Path, hub: Hub, connect: Connect) -> None:
    (source / name).write_bytes(POINTER)
    put(hub, source)
    connect(hub)
    with pytest.raises(CorruptFileError, match=f"'{name}' is a Git LFS pointer"):
        open_source(NAME)


def test_adapter_on_the_hub_is_no_source(hub: Hub, connect: Connect) -> None:
    hub.add_repo(NAME, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "README.md": b"x"})
    connect(hub)
    with pytest.raises(SourceError, match="is a LoRA adapter and no model") as caught:
        open_source(NAME)
    assert f"`hf download {NAME} --local-dir DIR`" in caught.value.hint


def test_config_of_gigabytes_is_not_fetched(source: Path, hub: Hub, connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setattr("int8convert.checkpoint.json_file.MAX_CONFIG_BYTES", 100)
    put(hub, source)
    connect(hub)
    with pytest.raises(CorruptFileError, match=r"'config\.json' has \d+ bytes, expected at most 100"):
        open_source(NAME)
    assert not [request for request in hub.log.requests("GET") if "resolve" in request.path]
