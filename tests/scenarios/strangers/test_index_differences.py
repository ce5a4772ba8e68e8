"""An index that says other things than its shards: what transformers loads is what is converted, and it is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.sources import open_source
from int8convert.verification.exact.level import verify_exact
from tests.scenarios.strangers.makers import INDEX_NAME, convert, make_model, write_index
from tests.tools.tiny_models import read_tensors

pytestmark = pytest.mark.usefixtures("map_in_process")

NORM = "model.norm.weight"
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Path]:
    """A source of three shards; the norm is in the last."""
    source = make_model(tmp_path / "sharded", n_shards=3)
    assert weight_map(source)[NORM] == SHARDS[2]
    yield source


def weight_map(source: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    return found


def change_index(source: Path, **entries: str) -> None:
    write_index(source, weight_map(source) | entries)


def put(source: Path, file_name: str, value: torch.Tensor | None) -> None:
    """The norm into a shard, or out of it."""
    tensors = load_file(source / file_name)
    tensors.pop(NORM, None)
    save_file(tensors if value is None else tensors | {NORM: value}, source / file_name, {"format": "pt"})


def loaded_norm(source: Path) -> torch.Tensor:
    return transformers.LlamaForCausalLM.from_pretrained(source).state_dict()[NORM]


def notes(source: Path) -> tuple[str, ...]:
    return int8convert.plan(source).model_map.notes


def test_name_that_no_file_holds_and_no_model_needs(sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, **{"model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]})
    assert notes(sharded) == (
        "the index names 'model.layers.0.self_attn.rotary_emb.inv_freq', which no file holds: "
        "LlamaForCausalLM does without",
    )
    report = verify_exact(convert(sharded, tmp_path / "out"))
    assert report.is_passed


def test_tensor_in_another_file_than_the_index_says(sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, **{NORM: SHARDS[0]})
    assert notes(sharded) == (
        f"the index puts '{NORM}' into '{SHARDS[0]}', and '{SHARDS[2]}' holds it: it is read from there, as loaders do",
    )
    assert torch.equal(read_tensors(convert(sharded, tmp_path / "out"))[NORM], loaded_norm(sharded))


@pytest.mark.parametrize("indexed", SHARDS[1:])
@pytest.mark.parametrize("is_equal", [True, False])
def test_of_a_tensor_in_two_files_the_last_counts(is_equal: bool, indexed: str, sharded: Path, tmp_path: Path) -> None:
    """Whichever the index names: transformers does not look."""
    first = torch.full((64,), 1.0 if is_equal else 3.0).half()
    put(sharded, SHARDS[1], first)
    put(sharded, SHARDS[2], torch.ones(64).half())
    change_index(sharded, **{NORM: indexed})
    (note,) = notes(sharded)
    start = f"'{NORM}' is in '{SHARDS[1]}' and in '{SHARDS[2]}': that of '{SHARDS[2]}' is taken, as transformers "
    assert note.startswith(start)
    assert note.removeprefix(start) == (
        "does; their bytes are equal" if is_equal else "and vLLM do of the two, which differ"
    )
    found = read_tensors(convert(sharded, tmp_path / "out"))[NORM]
    assert torch.equal(found, loaded_norm(sharded)) and torch.equal(found, torch.ones(64).half())
    assert verify_exact(tmp_path / "out").is_passed


def test_vllm_takes_another_where_numbers_sort_otherwise(sharded: Path, tmp_path: Path) -> None:
    """transformers sorts names as text, vLLM the numbers in them as numbers."""
    (sharded / SHARDS[1]).rename(sharded / "model-10.safetensors")
    (sharded / SHARDS[2]).rename(sharded / "model-9.safetensors")
    renamed = {SHARDS[1]: "model-10.safetensors", SHARDS[2]: "model-9.safetensors"}
    write_index(sharded, {name: renamed.get(file_name, file_name) for name, file_name in weight_map(sharded).items()})
    put(sharded, "model-10.safetensors", torch.full((64,), 3.0).half())
    (note,) = notes(sharded)
    assert note.endswith(
        f"that of 'model-9.safetensors' is taken, as transformers does of the two, which differ; "
        f"vLLM takes '{NORM}' from 'model-10.safetensors'"
    )
    found = read_tensors(convert(sharded, tmp_path / "out"))[NORM]
    assert torch.equal(found, loaded_norm(sharded)) and float(found[0]) == 1.0


def test_a_last_byte_that_differs_is_found(sharded: Path) -> None:
    name = "model.embed_tokens.weight"
    tensors = load_file(sharded / SHARDS[0])
    other = tensors[name].clone()
    other[-1, -1] += 1
    for value, is_equal in ((tensors[name], True), (other, False)):
        held = load_file(sharded / SHARDS[2])
        save_file(held | {name: value}, sharded / SHARDS[2], {"format": "pt"})
        (repeated,) = open_source(sharded).index.repeated
        assert repeated.is_equal() is is_equal


def test_other_dtypes_are_known_to_differ(sharded: Path) -> None:
    put(sharded, SHARDS[1], torch.ones(64))
    (repeated,) = open_source(sharded).index.repeated
    assert repeated.is_equal() is False


def test_a_shard_that_is_wholly_superseded_is_not_read(sharded: Path, tmp_path: Path) -> None:
    overlay = {name: tensor * 2 for name, tensor in load_file(sharded / SHARDS[2]).items()}
    save_file(overlay, sharded / "overlay.safetensors", {"format": "pt"})
    change_index(sharded, **dict.fromkeys(overlay, "overlay.safetensors"), extra=SHARDS[2])
    assert open_source(sharded).shards[-1].path.name == "overlay.safetensors"
    (sharded / "overlay.safetensors").rename(sharded / "z.safetensors")
    change_index(sharded, **dict.fromkeys(overlay, "z.safetensors"), extra=SHARDS[2])
    out = convert(sharded, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) == 3
    assert torch.equal(read_tensors(out)[NORM], loaded_norm(sharded))


def test_verify_finds_each_difference_in_an_output(sharded: Path, tmp_path: Path) -> None:
    out = convert(sharded, tmp_path / "out")
    held = load_file(out / SHARDS[1])
    save_file(held | {NORM: torch.ones(64).half()}, out / SHARDS[1], {"format": "pt"})
    embed = "model.embed_tokens.weight"
    change_index(out, **{embed: SHARDS[2], "gone": SHARDS[0]})
    found = {c.name: [str(f) for f in c.findings] for c in verify_exact(out).checks}
    assert found["needs"] == [
        f"gone: expected a tensor in {SHARDS[0]}, as the index says, found no such tensor",
        f"{embed}: expected a tensor in {SHARDS[2]}, as the index says, found it in {SHARDS[0]}",
        f"{NORM}: expected a tensor in one file, found it in {SHARDS[1]} and {SHARDS[2]}",
    ]
