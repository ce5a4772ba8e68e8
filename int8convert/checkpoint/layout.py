"""File names and JSON files of a checkpoint directory, read and written.

The directory looks as transformers writes it: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`; `config.json` beside them. What is ours alone goes into the folder `int8convert/`, which
no loader looks into.

A checkpoint is a stranger's: its files are found by `find_file`, which follows no link out of it, and its names are
printed by `quoted`, which lets no control character through.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from int8convert.errors import CorruptFileError, SourceError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
OWN_FOLDER = "int8convert"
OUTLIERS_FILE = f"{OWN_FOLDER}/outliers.safetensors"
"""What `int8convert.runtime.outliers` reads."""

MANIFEST_NAME = f"{OWN_FOLDER}/manifest.json"
VERIFY_FILE = f"{OWN_FOLDER}/verify.json"
REQUEST_FILE = f"{OWN_FOLDER}/conversion.json"
"""What `int8convert verify` found out."""

MAX_STEPS_AWAY = 0.6
"""By which a stored outlier column may differ from what its codes stand for, in steps of its row. A code is the nearest
to its weight, so half a step; bitsandbytes rounds float32 weights to float16 first, which can move them by another
sixteenth."""

TEMPLATES_FOLDER = "additional_chat_templates"
_MODULE_FILES = "[0-9]_*/*"
"""What modules.json of sentence-transformers names."""

MAX_JSON_BYTES = 200_000_000
"""For files of our own."""

MAX_INDEX_BYTES = 32_000_000
"""An index of 200,000 tensors takes about 20 MB. Parsed, JSON can take thirty times its size, so this bounds memory."""

MAX_CONFIG_BYTES = 8_000_000
"""A config that names 20,000 classes takes about 1 MB."""

MAX_CONFIG_DEPTH = 64
"""Levels of nesting. Real configs have under ten; the recursion of the encoder that writes it back ends near 1,000."""

MAX_JSON_CONTAINERS = 1_000_000
"""Objects and lists in JSON text. A header has three a tensor. `{"":0},` is 7 bytes of text and 200 bytes of memory."""

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".npz"),
    *(".index.json", ".incomplete", ".tflite", ".mlmodel", ".pkl", ".onnx_data", ".nemo", ".tar", ".gz", ".zip"),
)

MAX_CARRIED_BYTES = 200_000_000
"""Of a file that goes along. Tokenizers take up to 35 MB; what is larger is weights in some form."""
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
_NOT_CARRIED = frozenset({CONFIG_NAME, "README.md", ".gitattributes", ".gitignore", OWN_FOLDER})
"""The model card of the source describes the source; `upload` writes the converted checkpoint's own. A file named like
our own folder would be in its way."""


def shard_name(i: int, n: int) -> str:
    """The file name of output shard i of n, counted from 0."""
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def quoted(text: str, max_length: int = 100) -> str:
    """Somebody else's text between quotes, on one line: what does not print is escaped, what is long is cut."""
    shown = repr(text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 4] + "...'"


def find_file(directory: Path, name: str) -> Path | None:
    """The path of a checkpoint's file; None if it has none of that name.

    A link must stay inside the directory, or lead to a blob of the Hugging Face cache the directory is a snapshot of:
    of its repository, or of those that all repositories share. Anywhere else it could point to a private file of this
    machine, which would then be read into error messages or copied into an output that gets published.

    Raises:
        SourceError: there is something of that name, but no regular file of this checkpoint.
    """
    path = directory / name
    try:
        path.lstat()
    except ValueError:
        return None  # the name holds a null byte, or what no file system can encode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise
    _check_inside(path, directory, name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SourceError(
            f"{quoted(name)} is a link that leads nowhere: {error.strerror}",
            "fetch the file again, or remove the link; nothing was written",
        ) from None
    if not stat.S_ISREG(mode):
        # Looked at before it is opened: opening a named pipe waits for whoever may one day write into it.
        kind = "directory" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise SourceError(
            f"{quoted(name)} is a {kind}, expected a file", "fetch the file again, or remove it; nothing was written"
        )
    return path


def _check_inside(path: Path, directory: Path, name: str) -> None:
    target = Path(os.path.realpath(path))
    root = Path(os.path.realpath(directory))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots) and not _is_shared_blob(target, root):
        raise SourceError(
            f"{quoted(name)} is a link to {quoted(str(target))}, outside the checkpoint",
            "copy that file itself into the checkpoint's directory, or remove the link; nothing was written",
        )


def _is_shared_blob(target: Path, snapshot: Path) -> bool:
    """Whether a file is a blob that the cache keeps once for all its repositories, as the client does with xet."""
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs"
    name = target.relative_to(shared).as_posix() if target.is_relative_to(shared) else ""
    return _SHARED_BLOB.fullmatch(name) is not None


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = True) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
        max_bytes: what is larger is not even read.
        allow_nan: accept the numbers NaN and Infinity, as Python writes them and JSON has not; some configs hold them.

    Raises:
        CorruptFileError: absurdly large, not JSON, or not an object.
    """
    n_bytes = path.stat().st_size
    if n_bytes > max_bytes:
        raise CorruptFileError(
            f"{quoted(path.name)} has {n_bytes:,} bytes, expected at most {max_bytes:,}",
            "this is not the file transformers writes; fetch it again",
        )
    hint = "fetch this file again; nothing was written"
    return parse_json_object(path.read_bytes(), quoted(path.name), hint, allow_nan)


def parse_json_object(encoded: bytes, what: str, hint: str, allow_nan: bool = False) -> dict[str, Any]:
    """JSON text that must be an object, in UTF-8, with no key twice: two readers of it could otherwise disagree.

    Args:
        what: the subject of the error, such as "'config.json'".
        hint: the error's hint.

    Raises:
        CorruptFileError: it is none.
    """
    n_containers = encoded.count(b"{") + encoded.count(b"[")  # and braces in names, of which there are few
    if n_containers > MAX_JSON_CONTAINERS:
        raise CorruptFileError(
            f"{what} holds {n_containers:,} lists and objects, expected at most {MAX_JSON_CONTAINERS:,}", hint
        )
    try:
        text = encoded.decode()
        value = json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=float if allow_nan else _refuse_constant
        )
        if "\\u" in text:  # escapes can write half a character, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CorruptFileError(f"{what} is not valid JSON: nested too deeply", hint) from None
    except ValueError as error:
        raise CorruptFileError(f"{what} is not valid JSON: {str(error)[:160]}", hint) from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{what} holds a JSON {type(value).__name__}, not an object", hint)
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} occurs twice")
    return entries


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def read_config(path: Path) -> dict[str, Any]:
    """A source's config.json, checked to be one that can be written back.

    Raises:
        CorruptFileError: it is no JSON object, or nested absurdly deep.
    """
    config = read_json_object(path, MAX_CONFIG_BYTES)
    level: list[Any] = [config]
    for _ in range(MAX_CONFIG_DEPTH):
        nested = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in nested for item in values if isinstance(item, dict | list)]
    if level:
        raise CorruptFileError(
            f"{quoted(path.name)} is nested more than {MAX_CONFIG_DEPTH} levels deep",
            "fetch this file again; nothing was written",
        )
    return config


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights in some framework's format, or belongs to such files."""
    return name.lower().endswith(_WEIGHT_SUFFIXES)


def is_loaded_as_weights(name: str) -> bool:
    """Whether transformers, given a checkpoint with such a file by its path with `/`, might load weights from it."""
    is_format = name.endswith(".safetensors") or fnmatchcase(name, "pytorch_model*.bin")
    return "/" not in name and (is_format or name in (INDEX_NAME, PICKLE_INDEX_NAME))


def carried_files(directory: Path) -> tuple[Path, ...]:
    """The files of a source that belong beside the converted weights too: tokenizer, templates, licence, code.

    Files of the root, the folder of additional chat templates, and those of a sentence encoder's further modules
    (`1_Pooling`), their small weights included. Code is carried, never run.

    What is no file of the checkpoint - a link out of it, a pipe - is refused and not passed over in silence: an output
    without its tokenizer is broken, and one with a copy of this machine's `/etc/passwd` under that name is worse.

    Raises:
        SourceError: an entry that would be carried is no regular file of this checkpoint, or its name does not print.
    """
    entries = (*directory.iterdir(), *directory.glob(f"{TEMPLATES_FOLDER}/*"), *directory.glob(_MODULE_FILES))
    names = (entry.relative_to(directory).as_posix() for entry in entries if not entry.is_dir())
    return carried_paths(directory, filter(is_carried, names))


def is_carried(name: str) -> bool:
    """Whether a source's file, by its path with `/`, belongs beside the converted weights; see `carried_files`."""
    folder, _, file_name = name.rpartition("/")
    if folder and folder != TEMPLATES_FOLDER:
        return fnmatchcase(name, _MODULE_FILES) and "/" not in folder
    return file_name not in _NOT_CARRIED and not is_weight_file(file_name)


def carried_paths(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The paths of files to be carried over, each seen to be a file of this checkpoint; raises as `carried_files`."""
    found = (find_file(directory, name) for name in names)
    carried = tuple(sorted(path for path in found if path is not None))
    for path in carried:
        if not path.name.isprintable():  # whoever lists the output would have it act on the terminal
            raise SourceError(
                f"the name of the file {quoted(path.name)} holds characters that cannot be printed",
                "rename the file, or remove it; nothing was written",
            )
    return carried


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
    transformers refuses an int.

    Args:
        dtype: written where the config names none.
    """
    return {
        **config,
        **_dtype_if_missing(config, dtype),
        "quantization_config": bitsandbytes_block(threshold, skip_modules),
    }


def bitsandbytes_block(threshold: float, skip_modules: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in the bitsandbytes layout; see `bitsandbytes_config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": float(threshold),
        "llm_int8_skip_modules": sorted(skip_modules),
    }


def compressed_tensors_config(config: Mapping[str, Any], dtype: str, ignore: Iterable[str]) -> dict[str, Any]:
    """The source's config.json with the block by which compressed-tensors and vLLM read the int8 weights.

    Weights by row, symmetric; activations by token, symmetric, quantized while it runs. The block's groups allow no key
    of ours.

    Args:
        dtype: written where the config names none.
        ignore: full names of every Linear module that stays 16-bit; all others are taken to be int8.

    Source: compressed_tensors/quantization/quant_config.py, version 0.20.
    """
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        **config,
        **_dtype_if_missing(config, dtype),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": sorted(ignore),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                    "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
                }
            },
        },
    }


def torchao_config(config: Mapping[str, Any], dtype: str, skip_modules: Iterable[str]) -> dict[str, Any]:
    """The source's config.json with the block by which transformers reads the int8 weights through torchao.

    Weight-only: what is known of the weights is said, and nothing about activations. torchao's other int8 form rounds
    outlier features to 8 bits with all others, which LLM.int8() is there to avoid.

    Source: torchao/core/config.py, version 0.18.
    """
    granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    weight_only = {"group_size": None, "granularity": granularity, "set_inductor_config": True}
    return {
        **config,
        **_dtype_if_missing(config, dtype),
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": weight_only}},
            "modules_to_not_convert": sorted(skip_modules),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        },
    }


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config.json for weights that are not quantized, to be loaded in `dtype`."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**kept, **dict.fromkeys(names, dtype)}


def _dtype_if_missing(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """Loaders go by the first float tensor where the config names no dtype, which may be that of a scale."""
    return {} if config.get("dtype") or config.get("torch_dtype") else {"torch_dtype": dtype}
