"""Headers: read as the safetensors library reads them, refused where they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from int8convert.checkpoint.safetensors_file import encode_safetensors_header, read_safetensors_header
from int8convert.errors import CorruptFileError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(begin: int, end: int, dtype: str = "F16", shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape or ((end - begin) // 2,)), "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "a": torch.arange(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.empty(0, 5),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    found = {tensor.name: tensor for tensor in read_safetensors_header(tmp_path / "x.safetensors")}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert stored.shape == tuple(tensor.shape)
        raw = content[stored.offset : stored.offset + stored.n_bytes]
        assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_header_we_encode_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    header = encode_safetensors_header({"ü.weight": ("F32", (2,)), "q": ("I8", (3, 1)), "s": ("U8", ())})
    data = struct.pack("<2f3bB", 1.5, -2.0, 1, -127, 3, 9)
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + data)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("ü.weight").tolist() == [1.5, -2.0]
        assert file.get_tensor("q").tolist() == [[1], [-127], [3]]
        assert file.get_tensor("s").item() == 9


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{]", b"", "not valid JSON"),
    "a list": ([], b"", "not an object"),
    "a key twice": (b'{"a":{},"a":{}}', b"", "occurs twice"),
    "no offsets": ({"a": {"dtype": "F16", "shape": [1]}}, b"", "without dtype, shape and data_offsets"),
    "an unknown dtype": ({"a": entry(0, 2, "F13")}, b"xx", "dtype 'F13'"),
    "a shape that does not fit": ({"a": entry(0, 4, shape=(3,))}, b"xxxx", "does not fill"),
    "a negative dimension": ({"a": entry(0, 4, shape=(-1, -2))}, b"xxxx", "does not fill"),
    "a boolean dimension": ({"a": {**entry(0, 2), "shape": [True]}}, b"xx", "does not fill"),
    "reversed offsets": ({"a": entry(4, 2)}, b"xxxx", "does not fill"),
    "a hole": ({"a": entry(0, 2), "b": entry(4, 6)}, b"xxxxxx", "overlap or leave a hole"),
    "an overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"xxxxxx", "overlap or leave a hole"),
    "missing data": ({"a": entry(0, 4)}, b"xx", "is truncated"),
    "data behind the end": ({"a": entry(0, 2)}, b"xxxx", "is too long"),
    "deep nesting": (b'{"a":' * 100_000, b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, expected = BROKEN[case]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptFileError, match=expected) as caught:
        read_safetensors_header(path)
    assert "x.safetensors" in caught.value.message and "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "content", [b"", b"12345678", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 9) + b"{}"]
)
def test_header_longer_than_the_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match="no safetensors file"):
        read_safetensors_header(tmp_path / "x.safetensors")
