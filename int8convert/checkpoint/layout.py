"""File names and JSON files of a checkpoint directory, read and written.

The directory looks as transformers writes it: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`; `config.json` beside them. What is ours alone goes into the folder `int8convert/`, which
no loader looks into.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from int8convert.errors import CorruptFileError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
OWN_FOLDER = "int8convert"
MAX_JSON_BYTES = 200_000_000
"""An index of 200,000 tensors takes about 20 MB."""

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".npz"),
    *(".index.json", ".incomplete", ".tflite", ".mlmodel", ".pkl"),
)
_NOT_CARRIED = frozenset({CONFIG_NAME, "README.md", ".gitattributes", ".gitignore"})
"""The model card of the source describes the source; `upload` writes the converted checkpoint's own."""


def shard_name(i: int, n: int) -> str:
    """The file name of output shard i of n, counted from 0."""
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CorruptFileError: absurdly large, not JSON, or not an object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptFileError(
            f"'{path.name}' has {path.stat().st_size:,} bytes, expected under {MAX_JSON_BYTES:,}",
            "this is not the file transformers writes; fetch it again",
        )
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"'{path.name}' is not valid JSON: {error}", "fetch this file again; nothing was written"
        ) from None
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"'{path.name}' holds a JSON {type(value).__name__}, expected an object",
            "fetch this file again; nothing was written",
        )
    return value


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights in some framework's format, or belongs to such files."""
    return name.lower().endswith(_WEIGHT_SUFFIXES)


def carried_files(directory: Path) -> tuple[Path, ...]:
    """The files of a source that belong beside the converted weights too: tokenizer, templates, licence, code.

    Regular files of the root, and the folder of additional chat templates. Code is carried, never run.
    """
    found = [
        entry
        for entry in (*directory.iterdir(), *directory.glob("additional_chat_templates/*"))
        if entry.is_file() and entry.name not in _NOT_CARRIED and not is_weight_file(entry.name)
    ]
    return tuple(sorted(found))


def build_index(weight_map: Mapping[str, str], n_bytes: int, n_parameters: int) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    return {
        "metadata": {"total_parameters": n_parameters, "total_size": n_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }


def bitsandbytes_config(
    config: Mapping[str, Any], dtype: str, threshold: float, skip_modules: Iterable[str]
) -> dict[str, Any]:
    """The source's config.json with the block that makes transformers load the int8 weights through bitsandbytes.

    The skip list replaces the loader's own default, so it must be complete. The threshold is written as a float:
    transformers refuses an int. Where the config names no dtype, one is added: loaders go by the first float tensor,
    which in the output may be that of a scale.
    """
    named = {} if config.get("dtype") or config.get("torch_dtype") else {"torch_dtype": dtype}
    return {
        **config,
        **named,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": float(threshold),
            "llm_int8_skip_modules": sorted(skip_modules),
        },
    }
