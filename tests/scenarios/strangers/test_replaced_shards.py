"""A weight file that is not, when it is read, what it was when its header was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.shard_access import LocalShards
from int8convert.errors import CorruptFileError
from int8convert.events import Event, PlanMade
from int8convert.sources import open_source
from tests.scenarios.strangers.makers import make_model

WEIGHTS = "model.safetensors"


def other_file(path: Path) -> None:
    """Another file of the same size, content and times."""
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)


def link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))  # first aside, lest it get the place of the file that goes
    path.with_name("pipe").replace(path)


def written_over(path: Path) -> None:
    """The same file, of the same size, with one byte changed."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


REPLACED = {
    other_file: "replaced by another file",
    link_out: "replaced by another file",
    pipe: None,  # is no file at all
    written_over: "changed",
}


@pytest.mark.parametrize("replace", REPLACED, ids=lambda replace: replace.__name__)
def test_replaced_file_is_noticed_however_it_is_opened(replace: Callable[[Path], None], source: Path) -> None:
    (shard,) = open_source(source).shards
    shard.open().close()
    replace(source / WEIGHTS)
    opening: list[Callable[[], object]] = [
        shard.open,
        lambda: LocalShards().open(shard),
        lambda: file_sha256(shard.path, shard.identity),
    ]
    for open_again in opening:
        with pytest.raises(CorruptFileError) as caught:
            open_again()
        if REPLACED[replace] is None:
            assert caught.value.message == f"'{WEIGHTS}' is a directory, pipe, socket or device, expected a file"
            continue
        assert caught.value.message.startswith(f"'{WEIGHTS}' was {REPLACED[replace]} since its header was read")
        assert caught.value.hint == "leave the checkpoint alone while it is read, and rerun the same command"


def test_file_that_is_changed_while_it_is_read_is_noticed_at_its_end(source: Path) -> None:
    (shard,) = open_source(source).shards
    access = LocalShards()
    access.open(shard).close()
    written_over(source / WEIGHTS)
    with pytest.raises(CorruptFileError, match="was changed since its header was read"):
        access.finish(shard)
    access.close()


@pytest.mark.usefixtures("map_in_process")
def test_conversion_ends_where_a_shard_was_replaced_after_the_plan(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", n_shards=2)

    def replace(event: Event) -> None:
        if isinstance(event, PlanMade):
            other_file(source / "model-00002-of-00002.safetensors")

    with pytest.raises(CorruptFileError, match=r"'model-00002-of-00002\.safetensors' was replaced") as caught:
        int8convert.quantize(source, tmp_path / "out", on_event=replace, workers=1)
    assert "the same command resumes after it" in caught.value.state
    assert not (tmp_path / "out" / "config.json").exists()
    # The file that took its place has the same size and times, so the same conversion goes on, and is whole.
    int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    int8convert.quantize(source, tmp_path / "undisturbed", on_event=lambda event: None)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert file_sha256(tmp_path / "out" / name) == file_sha256(tmp_path / "undisturbed" / name)
