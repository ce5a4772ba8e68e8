"""A config.json without a dtype: the output is in the dtype that transformers loads the source in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import ModelMapError
from tests.scenarios.strangers.makers import INDEX_NAME, change, convert, make_model
from tests.tools.tiny_models import read_tensors

pytestmark = pytest.mark.usefixtures("map_in_process")

EMBEDDING = "model.embed_tokens.weight"


def without_dtype(directory: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def with_float32(directory: Path, word: str, file_name: str) -> Path:
    """Store the tensors with a word in their names in float32, which safetensors puts first."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    changed = {name: tensor.float() if word in name else tensor for name, tensor in tensors.items()}
    if file_name.endswith(".bin"):
        torch.save(changed, directory / file_name)
    else:
        save_file(changed, directory / file_name, {"format": "pt"})
    return directory


def same_dtype(source: Path, out: Path) -> torch.dtype:
    """The dtype of the loaded source, which its conversion is stored and loaded in, too."""
    dtype = transformers.AutoModelForCausalLM.from_pretrained(source).dtype
    assert read_tensors(convert(source, out))[EMBEDDING].dtype == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    return dtype


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("word", "dtype"), [("norm", torch.float16), ("lm_head", torch.float32), ("embed", torch.float16)]
)
def test_the_first_tensor_by_name_decides(
    word: str, dtype: torch.dtype, file_name: str, source: Path, tmp_path: Path
) -> None:
    with_float32(without_dtype(source), word, file_name)
    assert same_dtype(source, tmp_path / "out") == dtype


@pytest.mark.parametrize("first", [EMBEDDING, "model.norm.weight"])
def test_in_a_pickle_the_first_entry_decides(first: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(without_dtype(source) / "model.safetensors")
    (source / "model.safetensors").unlink()
    others = {name: tensor for name, tensor in tensors.items() if name != first}
    torch.save({first: torch.ones(tensors[first].shape), **others}, source / "pytorch_model.bin")
    assert same_dtype(source, tmp_path / "out") == torch.float32


@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
def test_the_dtype_of_an_index_counts(stated: str | None, tmp_path: Path) -> None:
    source = without_dtype(make_model(tmp_path / "source", n_shards=2))
    change(source / INDEX_NAME, metadata={"dtype": stated} if stated else {})
    assert same_dtype(source, tmp_path / "out") == getattr(torch, stated or "float16")


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    source = without_dtype(make_model(tmp_path / "source", n_shards=2))
    change(source / INDEX_NAME, metadata={"dtype": "torch.float16"})
    with pytest.raises(ModelMapError, match=r"the dtype in the index of the weights is 'torch\.float16', expected"):
        int8convert.plan(source)
    change(source / "config.json", dtype="float16")
    assert int8convert.plan(source).model_map.dtype == "float16"
