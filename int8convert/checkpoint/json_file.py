"""JSON of strangers, read within bounds of size and depth, without duplicate keys."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from int8convert.checkpoint.names import refuse_pointer
from int8convert.errors import CorruptFileError
from int8convert.text import quoted

MAX_JSON_BYTES = 200_000_000
"""Largest size of a file of our own."""

MAX_INDEX_BYTES = 32_000_000
"""An index of 200,000 tensors takes about 20 MB. Parsed, JSON can take thirty times its size, so this bounds memory."""

MAX_CONFIG_BYTES = 8_000_000
"""A config that names 20,000 classes takes about 1 MB."""

MAX_CONFIG_DEPTH = 64
"""Levels of nesting. Real configs have under ten; the recursion of the encoder that writes it back ends near 1,000."""

MAX_JSON_CONTAINERS = 1_000_000
"""Objects and lists in JSON text. A header has three a tensor. `{"":0},` is 7 bytes of text and 200 bytes of memory."""


def read_json_object(
    path: Path, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = True, allow_lone_surrogates: bool = False
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        max_bytes: a larger file is not read.
        allow_nan: accept the numbers NaN and Infinity, as Python writes them and JSON has not; some configs hold them.
        allow_lone_surrogates: see `parse_json_object`.

    Raises:
        CorruptFileError: absurdly large, a Git LFS pointer, not JSON, or not an object.
    """
    hint = "fetch this file again"
    return parse_json_object(_read(path, max_bytes), quoted(path.name), hint, allow_nan, allow_lone_surrogates)


def check_config_bytes(name: str, n_bytes: int) -> None:
    """Refuse a small JSON file that is too large for one; raises a CorruptFileError."""
    _check_bytes(name, n_bytes, MAX_CONFIG_BYTES)


def _check_bytes(name: str, n_bytes: int, max_bytes: int) -> None:
    if n_bytes > max_bytes:
        raise CorruptFileError(
            f"{quoted(name)} has {n_bytes:,} bytes, expected at most {max_bytes:,}",
            "this is not the file transformers writes; fetch it again",
        )


def read_own_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that int8convert wrote, or a stranger in its name; raises as `read_json_object`.

    Paths in it may hold `\\udce9` and the like, by which a name that is not UTF-8 is written down.
    """
    return read_own_hashed_json(path)[0]


def read_own_hashed_json(path: Path) -> tuple[dict[str, Any], str]:
    """As `read_own_json`, with the sha256 of the very bytes that were parsed."""
    content = _read(path, MAX_JSON_BYTES)
    hint = "fetch this file again"
    value = parse_json_object(content, quoted(path.name), hint, allow_nan=True, allow_lone_surrogates=True)
    return value, hashlib.sha256(content).hexdigest()


def _read(path: Path, max_bytes: int) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe waits until somebody writes into it
        raise CorruptFileError(f"{quoted(path.name)} is no file", "fetch this file again")
    _check_bytes(path.name, status.st_size, max_bytes)
    content = path.read_bytes()
    refuse_pointer(content, path.name)
    return content


def parse_json_object(
    encoded: bytes,
    what: str,
    hint: str,
    allow_nan: bool = False,
    allow_lone_surrogates: bool = False,
    parse_int: Callable[[str], Any] = int,
) -> dict[str, Any]:
    """Return the object in JSON text, in UTF-8. Duplicate keys are refused: readers disagree about them.

    Args:
        what: the subject of the error, such as "'config.json'".
        hint: the error's hint.
        allow_lone_surrogates: accept escapes such as `\\udce9`, by which a path that is not UTF-8 is written down.
        parse_int: makes a value of an integer's digits and sign.

    Raises:
        CorruptFileError: the text is not such an object.
    """
    value = _parse(encoded, what, hint, allow_nan, allow_lone_surrogates, parse_int)
    if not isinstance(value, dict):
        raise CorruptFileError(f"{what} holds a JSON {type(value).__name__}, not an object", hint)
    return value


def _parse(
    encoded: bytes,
    what: str,
    hint: str,
    allow_nan: bool,
    allow_lone_surrogates: bool = False,
    parse_int: Callable[[str], Any] = int,
) -> Any:
    n_containers = encoded.count(b"{") + encoded.count(b"[")  # and braces in names, of which there are few
    if n_containers > MAX_JSON_CONTAINERS:
        raise CorruptFileError(
            f"{what} holds {n_containers:,} lists and objects, expected at most {MAX_JSON_CONTAINERS:,}", hint
        )
    try:
        text = encoded.decode()
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=float if allow_nan else _refuse_constant,
            parse_int=parse_int,
        )
        if "\\u" in text and not allow_lone_surrogates:  # escapes can write half a character, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CorruptFileError(f"{what} is not valid JSON: nested too deeply", hint) from None
    except ValueError as error:
        raise CorruptFileError(f"{what} is not valid JSON: {str(error)[:160]}", hint) from None
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
    """Return a source's config.json, if it can be written back."""
    value = read_config_value(path)
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{quoted(path.name)} holds a JSON {type(value).__name__}, not an object",
            "fetch this file again",
        )
    return value


def read_config_value(path: Path) -> dict[str, Any] | list[Any]:
    """Return the content of a small JSON file of a source, an object or not; raises as `read_config`."""
    hint = "fetch this file again"
    value = _parse(_read(path, MAX_CONFIG_BYTES), quoted(path.name), hint, allow_nan=True)
    if not isinstance(value, dict | list):
        raise CorruptFileError(f"{quoted(path.name)} holds a JSON {type(value).__name__}, not an object", hint)
    level: list[Any] = [value]
    for _ in range(MAX_CONFIG_DEPTH):
        nested = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in nested for item in values if isinstance(item, dict | list)]
    if level:
        raise CorruptFileError(
            f"{quoted(path.name)} is nested more than {MAX_CONFIG_DEPTH} levels deep",
            hint,
        )
    return value
