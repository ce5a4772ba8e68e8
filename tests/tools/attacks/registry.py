"""The list of attacks, and the valid checkpoint each of them spoils.

An attack is a small function that is given a folder. The checkpoint to open lies in `folder/checkpoint`; beside it lies
`secret.txt`, which nothing may read, and a private checkpoint for links to point to. Nothing depends on the time, the
machine or chance, so two corpora are equal byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8convert.checkpoint.safetensors_file import encode_safetensors_header
from int8convert.errors import Int8ConvertError

CANARY = "canary_of_int8convert"
"""A file code of an attack would make in the current directory, were it run."""

SECRET = b"this machine's own secret"
CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Attack:
    """One crafted checkpoint.

    Attributes:
        make: writes it.
        error: what opening it raises; None where it must work, so that no defence refuses what people have.
        match: a regular expression the message contains.
        is_heavy: made to eat memory or time, so both are measured, in a process of its own.
    """

    name: str
    make: Callable[[Path], None]
    error: type[Int8ConvertError] | None
    match: str
    is_heavy: bool


ATTACKS: dict[str, Attack] = {}


def attack(
    error: type[Int8ConvertError] | None, match: str = "", is_heavy: bool = False
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Put a function into the list, with what is expected."""

    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        assert make.__name__ not in ATTACKS, make.__name__
        ATTACKS[make.__name__] = Attack(make.__name__, make, error, match, is_heavy)
        return make

    return register


def prepare(folder: Path) -> Path:
    """The files every attack starts from; the checkpoint's directory."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    (folder / "secret.txt").write_bytes(SECRET)
    write_json(folder / "secret.json", {"architectures": [SECRET.decode()]})
    write_safetensors(folder / "secret.safetensors")
    write_json(checkpoint / "config.json", CONFIG)
    (checkpoint / "tokenizer.json").write_text("{}")
    write_safetensors(checkpoint / "model.safetensors")
    return checkpoint


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_safetensors(path: Path, name: str = "model.a.weight") -> None:
    """A valid shard of one tensor, F16 [4, 4]."""
    path.write_bytes(encode_safetensors_header({name: ("F16", (4, 4))}) + bytes(32))


def write_header(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """Make the weights a safetensors file with this header, given as JSON or as bytes."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    n_header = len(encoded) if length is None else length
    (folder / "checkpoint" / "model.safetensors").write_bytes(n_header.to_bytes(8, "little") + encoded + data)


def write_index(folder: Path, index: Any) -> None:
    """Make the checkpoint one of two shards, `a` and `b`, behind this index, given as JSON or as bytes."""
    checkpoint = folder / "checkpoint"
    (checkpoint / "model.safetensors").unlink()
    write_safetensors(checkpoint / "a.safetensors", "a")
    write_safetensors(checkpoint / "b.safetensors", "b")
    if isinstance(index, bytes):
        (checkpoint / INDEX).write_bytes(index)
    else:
        write_json(checkpoint / INDEX, index)


def write_config(folder: Path, config: Any) -> None:
    """Replace config.json, by JSON or by bytes."""
    path = folder / "checkpoint" / "config.json"
    if isinstance(config, bytes):
        path.write_bytes(config)
    else:
        write_json(path, config)


def write_sparse(path: Path, n_bytes: int, start: bytes = b"") -> None:
    """A file that is large and takes no room."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(n_bytes)
