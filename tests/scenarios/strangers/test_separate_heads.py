"""Tied parameters that are stored apart: one is left out only where both are the same elements of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.scenarios.strangers.makers import change, convert, make_model, passes_exact, write
from tests.tools.tiny_models import read_tensors

pytestmark = pytest.mark.usefixtures("map_in_process")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(source: Path) -> Tensors:
    """Those of the source, whose config now ties its head, and whose weights are yet to be written."""
    change(source / "config.json", tie_word_embeddings=True)
    found = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    return found


def write_pickles(directory: Path, *parts: Tensors) -> None:
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file_name = f"pytorch_model-{i:05d}-of-{len(parts):05d}.bin"
        torch.save(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    write(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def loaded_head(directory: Path) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).lm_head.weight.detach()


def test_a_head_at_the_same_place_of_another_file_is_written(source: Path, tensors: Tensors, tmp_path: Path) -> None:
    embedding, head = tensors.pop(EMBEDDING), tensors.pop(HEAD)
    write_pickles(source, {EMBEDDING: embedding}, {HEAD: head}, tensors)
    out = convert(source, tmp_path / "out")
    assert torch.equal(read_tensors(out)[HEAD], head)
    assert torch.equal(loaded_head(out), loaded_head(source))
    assert passes_exact(out)


def test_a_head_that_is_the_embedding_turned_is_written(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tie_word_embeddings=True, vocab_size=64)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    embedding = tensors[EMBEDDING][:64].clone()
    torch.save(tensors | {EMBEDDING: embedding, HEAD: embedding.t()}, source / "pytorch_model.bin")
    out = convert(source, tmp_path / "out")
    assert torch.equal(read_tensors(out)[HEAD], embedding.t())
    assert torch.equal(loaded_head(out), loaded_head(source))


def test_the_same_elements_are_written_once(source: Path, tensors: Tensors, tmp_path: Path) -> None:
    torch.save(tensors | {HEAD: tensors[EMBEDDING]}, source / "pytorch_model.bin")
    out = convert(source, tmp_path / "out")
    assert HEAD not in read_tensors(out)
    assert torch.equal(loaded_head(out), loaded_head(source))


def test_equal_bytes_in_two_files_load_as_one(source: Path, tensors: Tensors, tmp_path: Path) -> None:
    embedding = tensors.pop(EMBEDDING)
    write_pickles(source, {EMBEDDING: embedding}, {HEAD: embedding.clone()}, {**tensors, HEAD: embedding.clone()})
    out = convert(source, tmp_path / "out")
    assert torch.equal(loaded_head(out), embedding)
