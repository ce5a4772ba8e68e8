"""A checkpoint as a model to measure, int8 or not, and its tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig

from int8convert.checkpoint.source import open_source
from int8convert.errors import CorruptFileError, SourceError
from int8convert.runtime.load import load, model_class
from int8convert.runtime.prompts import read_tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        SourceError: it has none that transformers can read, or is no checkpoint itself.
    """
    open_source(path)  # transformers would look for a path that is not there on the hub
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size == 0:  # what transformers makes of no files for some models
        raise SourceError(
            f"'{os.fspath(path)}' has no tokenizer that transformers can read: its vocabulary is empty",
            "copy the files of the source's tokenizer into it",
        )
    return tokenizer


def is_int8(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a checkpoint that is quantized; FP8, which transformers loads by itself, is not meant.

    Raises:
        SourceError: it holds no checkpoint.
    """
    block = open_source(path).config.get("quantization_config")
    return isinstance(block, dict) and "fp8" not in str(block.get("quant_method"))


def load_model(path: str | os.PathLike[str], device: str) -> Any:
    """A checkpoint's model in eval mode: int8 as `int8convert.load` has it, others in float32 on the CPU, where 16 bits
    are slower and less exact, and in their own dtype elsewhere.

    Raises:
        SourceError: it cannot be loaded.
        CorruptFileError: weights are missing.
    """
    if is_int8(path):
        return load(path, device_map={"": device})
    name = os.fspath(path)
    try:
        config = AutoConfig.from_pretrained(name)
        model, info = model_class(config).from_pretrained(
            name,
            dtype=torch.float32 if device == "cpu" else "auto",
            device_map={"": device},
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(
            f"transformers cannot load '{name}': {str(error).splitlines()[0]}",
            "mend that, or give the int8 checkpoint made of it",
        ) from error
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise CorruptFileError(
            f"'{name}' has no weights, or none of the right shape, for {lacking[0]!r}"
            + (f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""),
            "its config.json and its weights do not belong together; fetch the checkpoint again",
        )
    return model.eval()
