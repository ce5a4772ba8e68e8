#!/usr/bin/env python3
"""Fuzz the safetensors header parser, guided by the coverage it reaches (atheris, that is libFuzzer).

How it goes:
1. A corpus of valid headers is written into a temporary folder, unless a folder is given.
2. libFuzzer mutates them: half the time by its own bytes, half the time in the structure of the JSON.
3. Of each mutant, the file's size is made to match what the header promises, or made to miss it by a little: a size of
   its own would let next to none get as far as the check of the tiling.
4. A parse must end in a `CorruptFileError` of two clean lines, or in tensors that tile the file and that the
   safetensors library finds there too. Anything else is a finding: the input is kept as `crash-*`, and the run ends.

Each header is parsed twice: first with Python's own JSON scanner, which coverage can look into, for the sake of that;
then with the one in C, and that is judged. (They differ: the one in Python takes "\\uF8_E" for a character.)

What it costs: the standard library, safetensors and this package; no torch. About 5,000 headers a second and core.

Left out on purpose: files on the disk; `tests/scenarios/test_fuzz.py` mutates those.
"""

from __future__ import annotations

import contextlib
import json.decoder
import json.scanner
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
from safetensors import deserialize

with atheris.instrument_imports(include=["int8convert"]):
    from int8convert.checkpoint.safetensors_file import encode_safetensors_header, parse_safetensors_header
    from int8convert.checkpoint.stored_tensor import StoredTensor
    from int8convert.errors import CorruptFileError

from tests.tools.attacks.mutate import mutate_json_text

DEFAULTS = {
    "-max_total_time": "60",
    "-max_len": "8192",
    "-timeout": "10",
    "-rss_limit_mb": "1024",
    "-print_final_stats": "1",
}
_ENDS = re.compile(rb"data_offsets\"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]")
MAX_LINE = 600
MAX_FILE_BYTES = 1_000_000


def valid_headers() -> list[bytes]:
    """The JSON of headers that are right, as this package and as others write them."""
    plans: list[dict[str, tuple[str, tuple[int, ...]]]] = [
        {},
        {"a": ("F16", (2, 3))},
        {"a.weight": ("BF16", (4, 4)), "a.bias": ("F32", (4,)), "n": ("I64", ())},
        {"empty": ("F64", (0, 5)), "b": ("BOOL", (1,)), "c": ("F8_E4M3", (3, 1, 1))},
        {f"model.layers.{i}.weight": ("F16", (8, 8)) for i in range(8)},
    ]
    others = [
        b'{"__metadata__":null,"b":{"data_offsets":[4,6],"shape":[1],"dtype":"F16"},'
        b'"a":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}',
        '{"ü.weight": {"dtype": "U8", "shape": [1, 1, 1], "data_offsets": [0, 1]}}'.encode(),
    ]
    return [encode_safetensors_header(plan)[8:] for plan in plans] + others


def file_size(header_json: bytes, choice: int) -> int:
    """The size of the file the header would stand in: the right one for most choices, else one nearby."""
    promised = max(map(int, _ENDS.findall(header_json)), default=0)
    return 8 + len(header_json) + promised + {0: -1, 1: 1, 2: 8}.get(choice, 0)


_SCANNERS: Any = {  # private parts of the json module: (make_scanner, scanstring)
    "C": (json.scanner.c_make_scanner, json.decoder.c_scanstring),  # type: ignore[attr-defined]
    "Python": (json.scanner.py_make_scanner, json.decoder.py_scanstring),  # type: ignore[attr-defined]
}
for _function in (json.decoder.JSONObject, json.decoder.JSONArray, *_SCANNERS["Python"]):  # type: ignore[attr-defined]
    atheris.instrument_func(_function)


@contextlib.contextmanager
def scanner(language: str) -> Iterator[None]:
    """Parse JSON by the scanner in that language."""
    json.scanner.make_scanner, json.decoder.scanstring = _SCANNERS[language]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        json.scanner.make_scanner, json.decoder.scanstring = _SCANNERS["C"]  # type: ignore[attr-defined]


def check_safetensors_agrees(header_json: bytes, file_bytes: int, tensors: tuple[StoredTensor, ...]) -> None:
    """The safetensors library finds the same tensors in such a file; looked at where the file would be small."""
    if file_bytes < MAX_FILE_BYTES:
        whole = len(header_json).to_bytes(8, "little") + header_json
        theirs = dict(deserialize(whole.ljust(file_bytes, b"\0")))
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in theirs.items()}
        assert found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, found


def check_parse(header_json: bytes, file_bytes: int) -> bool:
    """Whether a header is accepted; AssertionError where it should not have been, or the refusal is not clean."""
    try:
        tensors = parse_safetensors_header(header_json, file_bytes, "x.safetensors")
    except CorruptFileError as error:
        for line in (error.message, error.hint):
            assert line.isprintable() and len(line) < MAX_LINE, f"not one clean line: {line!r}"
        return False
    at = 8 + len(header_json)
    for tensor in tensors:
        assert tensor.name.isprintable() and tensor.offset == at and tensor.n_bytes >= 0, tensor
        at += tensor.n_bytes
    assert at == file_bytes, f"the tensors end at {at}, the file at {file_bytes}"
    check_safetensors_agrees(header_json, file_bytes, tensors)
    return True


def test_one_input(data: bytes) -> None:
    """The first byte chooses the file's size; the rest is the header."""
    if data:
        header_json, file_bytes = data[1:], file_size(data[1:], data[0])
        with scanner("Python"), contextlib.suppress(CorruptFileError):
            parse_safetensors_header(header_json, file_bytes, "x.safetensors")
        check_parse(header_json, file_bytes)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Bytes as libFuzzer changes them, or the structure of the JSON."""
    rng = random.Random(seed)
    if len(data) < 2 or rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    return (bytes([rng.choice((0, 1, 2, 3, 3, 3, 3))]) + mutate_json_text(data[1:], rng))[:max_size]


def main() -> None:
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    arguments = [*sys.argv, *(f"{key}={value}" for key, value in DEFAULTS.items() if key not in given)]
    if all(argument.startswith("-") for argument in sys.argv[1:]):
        # libFuzzer ends the process itself, so nothing here could remove the folder.
        corpus = Path(tempfile.mkdtemp(prefix="fuzz_header_"))
        for i, header in enumerate(valid_headers()):
            (corpus / str(i)).write_bytes(b"\x03" + header)
        print(f"corpus and findings in {corpus}", file=sys.stderr)
        arguments += [f"-artifact_prefix={corpus}{os.sep}", str(corpus)]
    accepted = sum(check_parse(header, file_size(header, 3)) for header in valid_headers())
    assert accepted == len(valid_headers()), "a header of the corpus is not valid"
    atheris.Setup(arguments, test_one_input, custom_mutator=mutate)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
