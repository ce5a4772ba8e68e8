"""Links in a stranger's directory lead no write, no lock and no removal out of it; pipes are not opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from int8convert.checkpoint.atomic import write_text
from int8convert.conversion.quantize import quantize
from int8convert.errors import Int8ConvertError, OutputError, SourceError
from int8convert.outliers.store import store_outliers
from int8convert.publish.upload import upload
from int8convert.runtime.stored_columns import write_outliers
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.verify import verify
from tests.scenarios.strangers.makers import change, convert, passes_exact

pytestmark = pytest.mark.usefixtures("map_in_process")

PRECIOUS = b"precious"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder of the user's, outside of OUT, with a file in it."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "file").write_bytes(PRECIOUS)
    (folder / "x.incomplete").write_bytes(PRECIOUS)
    return folder


def untouched(private: Path) -> bool:
    return {path.name: path.read_bytes() for path in private.iterdir()} == dict.fromkeys(
        ("file", "x.incomplete"), PRECIOUS
    )


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_overwriting_goes_through_no_link(source: Path, out: Path, private: Path, tmp_path: Path) -> None:
    """Every file that a conversion writes is there as a link, under its own name and under the temporary one."""
    change(source / "additional_chat_templates" / "a.json", x=1)
    expected = content(convert(source, tmp_path / "fresh"))
    names = [*expected, "int8convert/conversion.json", "int8convert/shards/model.safetensors.json"]
    spoiled = tmp_path / "spoiled"
    for name in names:
        (spoiled / name).parent.mkdir(parents=True, exist_ok=True)
        (spoiled / name).symlink_to(private / "file")
        (spoiled / f"{name}.incomplete").symlink_to(private / "file")
    convert(source, spoiled, overwrite=True)
    assert untouched(private)
    assert content(spoiled) == expected
    assert not [path for path in spoiled.rglob("*") if path.is_symlink()]


def test_verify_writes_its_report_through_no_link(out: Path, private: Path) -> None:
    for name in ("verify.json", "verify.json.incomplete"):
        (out / "int8convert" / name).symlink_to(private / "file")
    write_report(verify(out, level="exact"))
    assert untouched(private)
    assert not (out / "int8convert/verify.json").is_symlink()


@pytest.mark.parametrize("name", ["outliers.safetensors", "outliers.safetensors.incomplete"])
def test_stored_columns_go_through_no_link(source: Path, out: Path, private: Path, name: str) -> None:
    (out / "int8convert" / name).symlink_to(private / "file")
    store_outliers(source, out, {"model.layers.0.mlp.up_proj": [3]})
    write_outliers(torch.nn.Module(), out)
    assert untouched(private)


def lock_link(out: Path, private: Path) -> None:
    (out / "int8convert/lock").symlink_to(private / "file")


def own_folder(out: Path, private: Path) -> None:
    shutil.rmtree(out / "int8convert")
    (out / "int8convert").symlink_to(private)


def records_folder(out: Path, private: Path) -> None:
    (out / "int8convert/shards").symlink_to(private)


def incoming(out: Path, private: Path) -> None:
    (out / "int8convert/incoming").symlink_to(private)


def own_folder_is_a_pipe(out: Path, private: Path) -> None:
    shutil.rmtree(out / "int8convert")
    os.mkfifo(out / "int8convert")


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "quantize": lambda source, out: quantize(source, out, on_event=lambda event: None),
    "quantize --overwrite": lambda source, out: quantize(source, out, overwrite=True, on_event=lambda event: None),
    "verify": lambda source, out: write_report(verify(out, level="exact", reference=source)),
    "outliers": lambda source, out: store_outliers(source, out, {"model.layers.0.mlp.up_proj": [3]}),
    "upload": lambda source, out: upload(out, "me/x", allow_unverified=True),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spoil", [lock_link, own_folder, own_folder_is_a_pipe, records_folder, incoming])
def test_linked_folders_and_locks_are_refused(
    source: Path,
    out: Path,
    private: Path,
    command: str,
    spoil: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two lines, by each command that would write there; nothing outside is written, emptied or removed."""
    monkeypatch.setattr("int8convert.hub.branch.Branch.check_access", lambda target: None)
    spoil(out, private)
    is_written = {"quantize", "quantize --overwrite"} if spoil in (records_folder, incoming) else set(COMMANDS)
    if spoil is lock_link:
        is_written -= {"verify"}
    if command in is_written:
        with pytest.raises(OutputError, match=r"(lock|int8convert|shards|incoming)' is (a link|no folder)"):
            COMMANDS[command](source, out)
    elif command != "upload":
        COMMANDS[command](source, out)
    assert untouched(private)
    assert spoil is own_folder_is_a_pipe or any(path.is_symlink() for path in out.rglob("*"))


def test_linked_folder_of_templates_is_refused(source: Path, out: Path, private: Path) -> None:
    change(source / "additional_chat_templates" / "file", x=1)
    (out / "additional_chat_templates").symlink_to(private)
    with pytest.raises(OutputError, match="additional_chat_templates' is a link"):
        convert(source, out, overwrite=True)
    assert untouched(private)
    assert (out / "model.safetensors").exists(), "refused before anything was removed"


def test_out_itself_may_be_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert passes_exact(convert(source, tmp_path / "link"), source)
    assert (tmp_path / "disk/int8convert/verify.json").exists()


def test_manifest_that_is_a_link_out_is_not_read(source: Path, out: Path, tmp_path: Path) -> None:
    (out / "int8convert/manifest.json").rename(tmp_path / "elsewhere.json")
    (out / "int8convert/manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputError, match="exists and is not empty"):
        convert(source, out)


@pytest.mark.parametrize("name", ["int8convert/manifest.json", "int8convert/verify.json", "config.json", "README.md"])
def test_pipes_in_out_are_not_opened(source: Path, out: Path, name: str) -> None:
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    for command in ("quantize", "verify", "outliers"):
        try:
            COMMANDS[command](source, out)
        except Int8ConvertError as error:
            assert isinstance(error, SourceError | OutputError)
    write_text(out / name, "x")
    assert (out / name).read_text() == "x"
