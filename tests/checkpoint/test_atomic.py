"""Files appear whole, through no link, under names that the file system takes; nothing else writes."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from int8convert.checkpoint.atomic import (
    check_folder,
    check_lengths,
    copy_file,
    create_file,
    make_folder,
    temporary_path,
    write_bytes,
    write_json,
    write_text,
)
from int8convert.checkpoint.json_file import parse_json_object
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.errors import OutputError
from tests.test_layering import ROOT, sources

MAY_WRITE = {
    "int8convert/checkpoint/atomic.py": "the place for it",
    "int8convert/checkpoint/lock.py": "a lock is not written whole or not at all",
    "int8convert/runtime/stored_columns.py": "safetensors writes into a file that atomic has made",
    "int8convert/runtime/text/texts.py": "a temporary folder that nobody else can write to",
    "int8convert/checkpoint/utf8_path.py": "a link in such a folder",
    "int8convert/runtime/memory.py": "a file of the kernel",
    "int8convert/trace.py": "the one file that --trace names, which may be a pipe",
}

WRITING_METHODS = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to"}
WRITING_FUNCTIONS = {"copyfile", "copy", "copy2", "copytree", "move", "save_file", "fdopen"}


def writes(call: ast.Call) -> bool:
    """Whether a call may open a file by its name for writing."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    words = [ast.unparse(argument) for argument in (*call.args, *(keyword.value for keyword in call.keywords))]
    if name == "open" and owner == "os":
        return words[0] != "os.devnull" and any(
            "O_CREAT" in word or "O_WRONLY" in word or "O_RDWR" in word for word in words
        )
    if name == "open":
        return any(isinstance(a, ast.Constant) and set(str(a.value)) & set("wax+") for a in call.args[-2:])
    if name == "savefig":
        return words[0] != "buffer"
    return (name in WRITING_METHODS and owner != "") or (name in WRITING_FUNCTIONS and owner in ("", "shutil", "os"))


@pytest.mark.parametrize(
    "statement", ["path.open('w')", "open(path, 'ab')", "path.write_text('x')", "figure.savefig(path)"]
)
def test_writing_calls_are_recognised(statement: str) -> None:
    assert writes(ast.parse(statement, mode="eval").body)  # type: ignore[arg-type]


def test_nothing_else_opens_files_for_writing() -> None:
    found = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        lines = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and writes(n)]
        if lines and name not in MAY_WRITE:
            found[name] = lines
    assert not found


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file outside of the directory that is written to."""
    path = tmp_path / "private"
    path.write_text("precious")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["file", "file.incomplete"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_written_file_replaces_a_link(folder: Path, private: Path, name: str, kind: str) -> None:
    (folder / name).symlink_to(private) if kind == "link" else os.link(private, folder / name)
    write_text(folder / "file", "new")
    copy_file(folder / "file", folder / "other")
    assert private.read_text() == "precious"
    assert (folder / "file").read_text() == (folder / "other").read_text() == "new"
    assert sorted(path.name for path in folder.iterdir()) == ["file", "other"]
    assert not (folder / "file").is_symlink()


def test_created_file_is_no_longer_name_than_the_final_one(folder: Path) -> None:
    longest = folder / ("ä" * 127)
    assert len(os.fsencode(longest.name)) == 254
    write_bytes(longest, b"x")
    assert longest.read_bytes() == b"x"
    assert temporary_path(folder / "model.safetensors").name == "model.safetensors.incomplete"
    assert temporary_path(longest) != temporary_path(folder / ("ä" * 126 + "b"))


def test_failed_write_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(folder / "file", "old")

    def fail(fd: int) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk"):
        write_text(folder / "file", "new")
    assert (folder / "file").read_text() == "old"


def test_name_of_another_encoding_is_an_escape_in_json(folder: Path) -> None:
    name = os.fsdecode(b"mod\xe8le")
    write_json(folder / "file", {"source": name})
    content = (folder / "file").read_bytes()
    assert b"mod\\udce8le" in content
    assert parse_json_object(content, "it", "", allow_lone_surrogates=True) == {"source": name}


def test_pipe_of_the_temporary_name_is_removed_and_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "file.incomplete")
    os.close(create_file(folder / "file.incomplete"))
    assert (folder / "file.incomplete").is_file()


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "file", "pipe"])
def test_folder_must_be_one(tmp_path: Path, folder: Path, private: Path, kind: str) -> None:
    path = tmp_path / "own"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("")
    else:
        path.symlink_to(folder if kind == "link" else tmp_path / "nothing")
    with pytest.raises(OutputError, match=r"own' is (a link|no folder), expected a folder inside"):
        make_folder(path)
    with pytest.raises(OutputError, match="own"):
        check_folder(path)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "linked folder"])
def test_lock_is_a_file_of_its_own(tmp_path: Path, folder: Path, private: Path, kind: str) -> None:
    lock = folder / "lock"
    if kind == "linked folder":
        (tmp_path / "own").symlink_to(folder)
        lock = tmp_path / "own" / "lock"
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "link":
        lock.symlink_to(private)
    else:
        os.link(private, lock)
    with pytest.raises(OutputError, match=r"is a link"), DirectoryLock(lock):
        raise AssertionError("taken")
    assert private.read_text() == "precious"


@pytest.mark.parametrize("name", ["n" * 256, "ä" * 128, "folder/" + "n" * 256])
def test_names_too_long_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"a name may have 255 bytes .* found 256"):
        check_lengths(folder, ["config.json", name])


def test_path_too_long_is_refused(folder: Path) -> None:
    deep = folder.joinpath(*["d" * 200] * 21)
    with pytest.raises(OutputError, match=r"a path 4,095"):
        check_lengths(deep, ["config.json"])
    check_lengths(folder, ["n" * 255, "folder/" + "ä" * 127])
