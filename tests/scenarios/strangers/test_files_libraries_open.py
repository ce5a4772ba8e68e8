"""Files of an output that a library would open: no pipe is waited for, no link followed out, no LFS note parsed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from int8convert.errors import Int8ConvertError
from int8convert.runtime.generate import generate
from int8convert.runtime.load import load
from tests.scenarios.strangers.makers import write

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", FILES)
def test_pipe_is_not_opened(out: Path, name: str) -> None:
    (out / name).unlink()
    os.mkfifo(out / name)
    for run in (lambda: generate(out, ["w5"], max_new_tokens=1), lambda: load(out)):
        with pytest.raises(Int8ConvertError, match=f"'{name}' is a pipe"):
            run()


@pytest.mark.parametrize("name", [name for name in FILES if name != "model.safetensors"])
def test_link_out_is_not_followed(out: Path, name: str, tmp_path: Path) -> None:
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Int8ConvertError, match="outside the checkpoint"):
        generate(out, ["w5"], max_new_tokens=1)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_lfs_pointer_is_named(out: Path, name: str) -> None:
    write(out / name, POINTER)
    with pytest.raises(Int8ConvertError, match=f"'{name}' is a Git LFS pointer"):
        generate(out, ["w5"], max_new_tokens=1)
