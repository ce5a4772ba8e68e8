"""`--text <(zcat sample.gz)`: a pipe has its bytes once, so they are read once, and hashed as they were read."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from int8convert.errors import SourceError
from int8convert.outliers.find import find_outliers
from int8convert.runtime.text.texts import Text, reusable_file
from int8convert.runtime.text.windows import read_text
from int8convert.verification.verify import verify
from tests.cli.conftest import Run

TEXT = "w5 w6 w7 w9 w11\n" * 120
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()
FEW = ("--sequences", "2", "--length", "32")

MakePipe = Callable[[], Path]


@pytest.fixture(params=["/dev/fd", "FIFO"])
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakePipe]:
    """Makes pipes as a shell does for <(...), or with a name; what is written into them comes once."""
    ends, threads = [], []

    def fill(target: int | Path) -> None:
        with open(target, "w") as file:
            file.write(TEXT)

    def make() -> Path:
        if request.param == "FIFO":
            path = tmp_path / f"pipe-{len(threads)}"
            os.mkfifo(path)
            threads.append(threading.Thread(target=fill, args=[path], daemon=True))
        else:
            read_end, write_end = os.pipe()
            ends.append(read_end)
            path = Path(f"/dev/fd/{read_end}")
            threads.append(threading.Thread(target=fill, args=[write_end], daemon=True))
        threads[-1].start()
        return path

    yield make
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "somebody waits for a second reader"
    for end in ends:
        os.close(end)


@pytest.mark.usefixtures("map_in_process")
def test_library_reads_once(source: Path, out: Path, pipe: MakePipe) -> None:
    report = verify(out, text=Text(pipe(), n_sequences=2, length=32), reference=source)
    assert report.text is not None and report.text.sha256 == SHA256
    found = find_outliers(out, Text(pipe(), n_sequences=2, length=32))
    assert found.text_sha256 == SHA256


def test_commands_read_once(source: Path, out: Path, tmp_path: Path, pipe: MakePipe, run: Run) -> None:
    gates = ("--max-dnll", "9", "--max-kl", "9")
    page = tmp_path / "page.html"  # which runs the text a second time
    code, output, errors = run("verify", out, "--text", pipe(), *FEW, *gates, "--report", page, "--json")
    assert code == 0, errors
    assert json.loads(output)["text"]["sha256"] == SHA256 and page.exists()
    code, output, errors = run("outliers", out, "--text", pipe(), *FEW, "--json")
    assert code == 0 and json.loads(output)["text_sha256"] == SHA256, errors


def test_calibration_reads_once(source: Path, tmp_path: Path, pipe: MakePipe, run: Run) -> None:
    """The text is looked at before the conversion and run after it."""
    code, _, errors = run("quantize", source, tmp_path / "new", "--columns", pipe(), "-q")
    assert code == 0, errors
    header = (tmp_path / "new/int8convert/outliers.safetensors").read_bytes()[:3000]
    assert SHA256.encode() in header


def test_prompts_are_read_once(out: Path, pipe: MakePipe, run: Run) -> None:
    code, output, errors = run("generate", out, "--file", pipe(), "--max-new-tokens", "1", "--json")
    assert code == 0, errors
    assert len(json.loads(output)["texts"]) == 120


def test_exact_level_opens_no_text(out: Path, tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "nobody writes here")
    code, _, errors = run("verify", out, "--level", "exact", "--text", tmp_path / "nobody writes here")
    assert code == 2 and "--text has no effect at --level exact" in errors, errors


def test_files_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    with reusable_file(tmp_path / "text") as path:
        assert path == tmp_path / "text"
    assert read_text(tmp_path / "text") == ("a\nb\nc\n", hashlib.sha256(b"a\r\nb\rc\n").hexdigest())
    with reusable_file(None) as path:
        assert path is None
    with pytest.raises(SourceError, match="cannot be read: No such file"), reusable_file(tmp_path / "missing"):
        pass
