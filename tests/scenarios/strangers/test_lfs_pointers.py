"""A clone without `git lfs pull`: any file of it may be a note of where the content is. None is read or copied."""

from __future__ import annotations

from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.model_card import read_source_card
from int8convert.errors import CorruptFileError
from int8convert.verification.exact.level import verify_exact
from tests.scenarios.strangers.conftest import Copy
from tests.scenarios.strangers.makers import make_model, write

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "modeling_own.py"),
        *("chat_template.jinja", "additional_chat_templates/rag.jinja"),
        *("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"),
    ],
)
def test_pointer_in_place_of_a_file_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    if "_" in name.partition("/")[0][:2]:
        write(source / "modules.json", MODULES)
    write(source / name, POINTER)
    with pytest.raises(CorruptFileError) as caught:
        int8convert.quantize(source, tmp_path / "new", on_event=lambda event: None)
    assert caught.value.message.startswith(f"'{name}' is a Git LFS pointer")
    assert "`git lfs pull`" in caught.value.hint
    assert not (tmp_path / "new").exists()


def test_pointer_in_place_of_an_index_or_a_shard_is_refused(tmp_path: Path, copy: Copy) -> None:
    sharded = make_model(tmp_path / "sharded", n_shards=2)
    for name in ("model.safetensors.index.json", "model-00002-of-00002.safetensors"):
        spoiled = copy(sharded)
        write(spoiled / name, POINTER)
        with pytest.raises(CorruptFileError, match=f"'{name}' is a Git LFS pointer"):
            int8convert.plan(spoiled)


def test_pointer_in_an_output_is_not_verified(out: Path) -> None:
    write(out / "tokenizer.json", POINTER)
    (check,) = verify_exact(out).checks
    assert [finding.found for finding in check.findings] == [
        "'tokenizer.json' is a Git LFS pointer, a note of where the file's content is, not the content"
    ]


@pytest.mark.usefixtures("map_in_process")
def test_text_about_pointers_is_none(source: Path) -> None:
    """What counts is how a file begins, not what it speaks of; and a large file is none, however it begins."""
    write(source / "vocab.txt", "a\nversion https://git-lfs.github.com/spec/v1\n")
    write(source / "notes.txt", POINTER + "x" * 1024)
    assert {path.name for path in int8convert.plan(source).source.auxiliary_files} >= {"vocab.txt", "notes.txt"}
    assert read_source_card(source) == {}
