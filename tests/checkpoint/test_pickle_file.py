"""`.bin` shards: every byte where torch finds it, and nothing run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from int8convert.checkpoint.file_reader import FileReader
from int8convert.checkpoint.pickle.reader import read_pickle_header
from int8convert.checkpoint.rows import Scratch, as_array, read_rows
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import CorruptFileError

NUMPY = {"F16": np.float16, "F32": np.float32, "I64": np.int64}


def odd_state_dict() -> dict[str, torch.Tensor]:
    """Tensors as torch programs leave them: views, transposes, expansions, ties."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    qkv = torch.arange(36, dtype=torch.float16).reshape(9, 4)
    tied = torch.ones(3, 2, dtype=torch.float16)
    return {
        "plain": base.clone(),
        "transposed": base.t(),
        "every second column": base[:, ::2],
        "expanded": torch.tensor([5.0]).expand(3, 2),
        **{f"qkv.{i}": part for i, part in enumerate(qkv.split(3))},
        "embedding": tied,
        "head": tied,
        "counter": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


def read(path: Path, stored: StoredTensor) -> np.ndarray:
    reader = FileReader(path)
    try:
        n_rows = stored.shape[0] if stored.shape else 1
        block = read_rows(stored, reader, 0, n_rows, Scratch())
        return as_array(stored, block, 0, n_rows).reshape(stored.shape)
    finally:
        reader.close()


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_are_where_torch_finds_them(is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    state_dict = odd_state_dict()
    torch.save(state_dict, path, _use_new_zipfile_serialization=is_zip)
    stored = {tensor.name: tensor for tensor in read_pickle_header(path)}
    assert set(stored) == set(state_dict)
    for name, tensor in state_dict.items():
        values = read(path, stored[name])
        np.testing.assert_array_equal(values.view(NUMPY[stored[name].dtype]), tensor.numpy(), err_msg=name)


def test_tied_tensors_share_a_storage_and_others_do_not(tmp_path: Path) -> None:
    torch.save(odd_state_dict(), tmp_path / "x.bin")
    stored = {tensor.name: tensor for tensor in read_pickle_header(tmp_path / "x.bin")}
    assert (stored["head"].storage, stored["head"].offset) == (stored["embedding"].storage, stored["embedding"].offset)
    assert stored["qkv.0"].storage == stored["qkv.1"].storage and stored["qkv.0"].offset != stored["qkv.1"].offset
    assert stored["plain"].storage != stored["transposed"].storage


class RunsCode:
    """A pickle of it runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_would_run_code_runs_none(is_zip: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    torch.save({"a": torch.ones(2), "b": RunsCode(trace)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CorruptFileError, match="weights-only pickle"):
        read_pickle_header(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"a": 3}, "'a' is a int"),
        ({3: torch.ones(2)}, "entry 3"),
        ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
        ({"a": torch.ones(2).to_sparse()}, "not hold a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_anything_but_a_flat_dictionary_of_tensors_is_refused(content: Any, expected: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CorruptFileError, match=expected):
        read_pickle_header(tmp_path / "x.bin")


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no pickle at all", pickle.dumps({"a": 1})):
        (tmp_path / "y.bin").write_bytes(content)
        with pytest.raises(CorruptFileError):
            read_pickle_header(tmp_path / "y.bin")


def test_compressed_record_is_refused(tmp_path: Path) -> None:
    """A zip bomb is a small file; offsets into compressed bytes would be garbage."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as stored,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for info in stored.infolist():
            bomb.writestr(info.filename, stored.read(info))
    with pytest.raises(CorruptFileError, match="compressed or truncated"):
        read_pickle_header(tmp_path / "y.bin")
