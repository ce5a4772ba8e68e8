"""Language models with a tokenizer of their own, small enough to be made in a test, that can be spoken to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import int8convert
from tests.tools.tiny_models import build_model

SENTENCES = [
    "The cat sat on the mat, and the dog lay by the door.",
    "A quantized model is a model with fewer bits.",
    "Grüße aus München: 5 € für zwei Äpfel 🍏🍎!",
    "the quick brown fox jumps over the lazy dog",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def build_tokenizer(chat_template: str | None = None) -> Any:
    """Byte-level BPE, as GPT-2, OPT, Llama 3 and Qwen have: any character in one to four tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template, **tokens)


def language_model(name: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `tests.tools.tiny_models` with the vocabulary of a tokenizer."""
    model = build_model(name, dtype)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if model.config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = 0
    return model


def save_int8(name: str, directory: Path, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    """An int8 checkpoint with its tokenizer; what it was made of stays beside it."""
    source = directory.with_name(f"{directory.name}-source")
    model = language_model(name, tokenizer, dtype)
    for path in (source, directory):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        int8convert.quantize_(model)
    return directory


def reciter(tokenizer: Any, text: str) -> Any:
    """A model that recites a text and ends, from wherever in it a prompt ends; its layers add nothing.

    Each token's embedding is a direction of its own, and the head's row for the next one the same direction. So no
    rounding changes what it says.
    """
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids) <= 64, "a token that comes twice would be followed by the same one twice"
    model = language_model("llama", tokenizer)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "embed_tokens.weight")):
            parameter.data.zero_()
    for direction, (token, following) in enumerate(pairwise(ids)):
        model.model.embed_tokens.weight.data[token, direction] = 1.0
        model.lm_head.weight.data[following, direction] = 1.0
    return model


def save_reciter(text: str, directory: Path, tokenizer: Any) -> Path:
    """An int8 checkpoint of it."""
    model = int8convert.quantize_(reciter(tokenizer, text))
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)
    return directory
