"""Tokenizers of other files are the same if they read texts alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from int8convert.verification.exact.foreign_tokenizer import compare_tokenizers
from tests.scenarios.strangers.makers import change, write


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A copy that transformers saved, with a tokenizer.json, and its source, which has vocabulary and merges only."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    words.train_from_iterator(["the quick brown fox jumps over the lazy dog 12 34"] * 9, trainer)
    write(source / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    write(source / "config.json", {"model_type": "gpt2"})
    words.model.save(str(source))
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(copy)
    write(copy / "config.json", {"model_type": "gpt2"})
    return copy, source


def test_file_that_was_made_of_vocabulary_and_merges_is_the_same(pair: tuple[Path, Path]) -> None:
    assert (pair[0] / "tokenizer.json").exists() and not (pair[1] / "tokenizer.json").exists()
    assert list(compare_tokenizers(*pair)) == []


def test_first_text_that_is_read_otherwise_is_shown(pair: tuple[Path, Path]) -> None:
    change(pair[0] / "tokenizer_config.json", add_prefix_space=True)
    (found,) = compare_tokenizers(*pair)
    assert 'the tokenizer reads "The quick brown fox' in str(found)


def test_copy_that_cannot_be_loaded_is_found(pair: tuple[Path, Path]) -> None:
    write(pair[0] / "tokenizer.json", "{}")
    (found,) = compare_tokenizers(*pair)
    assert "no tokenizer that transformers can read" in str(found)


def test_source_that_cannot_be_loaded_says_nothing(pair: tuple[Path, Path]) -> None:
    for name in ("vocab.json", "tokenizer_config.json"):
        write(pair[1] / name, "[")
    assert list(compare_tokenizers(*pair)) == []
