"""Where OUT lies and what its files are called: settled before the first byte is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from int8convert.errors import OutputError
from tests.scenarios.strangers.makers import convert, passes_exact

pytestmark = pytest.mark.usefixtures("map_in_process")


@pytest.mark.parametrize("name", ["n" * 250, "ä" * 127, "n" * 255])
def test_long_names_are_carried(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).write_text("x")
    assert (convert(source, tmp_path / "out") / name).read_text() == "x"


def test_path_too_long_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path.joinpath(*["d" * 200] * 19)
    deepest = out / ("e" * (4095 - len(os.fsencode(out)) - 60))
    (source / ("n" * 100)).write_text("x")
    with pytest.raises(OutputError, match=r"a path 4,095, found 100 and 4,\d+"):
        convert(source, deepest)
    assert not (tmp_path / ("d" * 200)).exists()


@pytest.mark.parametrize(
    "place", ["", "..", "link", "../linked-parent/{name}", "int8convert", "1_Pooling", "1_Pooling/x"]
)
def test_place_in_the_source_is_refused(source: Path, tmp_path: Path, place: str) -> None:
    (source / "link").symlink_to(source)
    (tmp_path / "linked-parent").symlink_to(tmp_path)
    before = sorted(source.rglob("*"))
    with pytest.raises(OutputError, match=r"is the source itself, or holds it|is in .* a folder of the source"):
        convert(source, source / place.format(name=source.name), overwrite=True)
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("place", ["int8", "linked-parent/int8"])
def test_other_folder_in_the_source_is_as_good_as_any(source: Path, tmp_path: Path, place: str) -> None:
    (source / "linked-parent").symlink_to(source)
    out = convert(source, source / place)
    assert passes_exact(out, source)
    convert(source, source / place)
    assert not (out / "int8").exists(), "the output is not carried into itself"


def test_source_in_out_is_refused_however_it_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(source.parent)
    with pytest.raises(OutputError, match="is the source itself, or holds it"):
        convert(source, tmp_path / "elsewhere/link", overwrite=True)
