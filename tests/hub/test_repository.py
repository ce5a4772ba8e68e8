"""A repository is read at the commit that was found, and told of as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from int8convert.errors import CorruptFileError, SourceError
from int8convert.events import PlanMade
from int8convert.hub import repository
from int8convert.hub.repository import find_repository
from int8convert.hub.small_files import fetch_small_files
from tests.tools.hub_repositories import NAME, add, convert, opt_pickles, payload
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub

pytestmark = pytest.mark.usefixtures("map_in_process", "quick_waits")

INDEX = "pytorch_model.bin.index.json"


@pytest.mark.parametrize("reader", ["stream", "download"])
def test_revision_is_pinned_when_it_is_looked_up(hub: Hub, connect: Connect, tmp_path: Path, reader: str) -> None:
    source = opt_pickles(tmp_path)
    weights = add(hub, source)
    connect(hub)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, tmp_path / "local")
    repo = hub.repo(NAME)

    def push(event: object) -> None:
        if isinstance(event, PlanMade):
            repo.add_files(dict.fromkeys(weights, b"other"))

    convert(NAME, tmp_path / "out", reader=reader, on_event=push)
    assert payload(tmp_path / "out") == payload(tmp_path / "local")


def test_push_between_the_look_up_and_the_list_changes_neither_list_nor_files(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    expected, config = find_repository(NAME), hub.repo(NAME).files["config.json"]
    list_files = repository._list_files

    def pushing(name: str, commit: str) -> object:
        hub.repo(NAME).add_files({"config.json": b"{}", "model.safetensors": b"other"})
        return list_files(name, commit)

    monkeypatch.setattr(repository, "_list_files", pushing)
    found = find_repository(NAME)
    assert found == expected
    assert (fetch_small_files(found, ["config.json"]) / "config.json").read_bytes() == config


def test_repository_without_weights_says_what_it_has(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, {f"{i}.gguf": b"x" for i in range(7)})
    connect(hub)
    with pytest.raises(SourceError) as caught:
        convert(NAME, tmp_path / "out")
    assert caught.value.message.endswith("found '0.gguf', '1.gguf', '2.gguf', '3.gguf', '4.gguf', ...")
    assert not (tmp_path / "out").exists()


def test_index_that_names_a_shard_that_is_not_there(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    source = opt_pickles(tmp_path)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    add(hub, source)
    connect(hub)
    with pytest.raises(CorruptFileError) as caught:
        convert(NAME, tmp_path / "out")
    assert caught.value.message == (
        f"'{INDEX}' of '{NAME}' names shard 'pytorch_model-00002-of-00003.bin', which is not there"
    )


@pytest.mark.parametrize("reader", ["stream", "download"])
def test_index_that_differs_from_the_shards(hub: Hub, connect: Connect, tmp_path: Path, reader: str) -> None:
    """As on the disk: what no file holds is a note, and of a tensor in two files the last one counts."""
    source = opt_pickles(tmp_path)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["decoder.no_such.weight"] = "pytorch_model-00001-of-00003.bin"
    (source / INDEX).write_text(json.dumps(index))
    first, last = source / "pytorch_model-00001-of-00003.bin", source / "pytorch_model-00003-of-00003.bin"
    name = next(name for name in torch.load(last) if name.endswith("layer_norm.weight"))
    torch.save(torch.load(first) | {name: torch.full((64,), 7.0).half()}, first)
    convert(source, tmp_path / "local")
    add(hub, source)
    connect(hub)
    (made,) = [e for e in convert(NAME, tmp_path / "out", reader=reader) if isinstance(e, PlanMade)]
    assert made.notes == (
        f"'{name}' is in '{first.name}' and in '{last.name}': that of '{last.name}' is taken, as transformers and vLLM "
        "do of the two, which were not compared",
        "the index names 'decoder.no_such.weight', which no file holds: OPTForCausalLM does without",
    )
    files, expected = payload(tmp_path / "out"), payload(tmp_path / "local")
    assert {n: c for n, c in files.items() if n.endswith(".safetensors")} == {
        n: c for n, c in expected.items() if n.endswith(".safetensors")
    }
