"""Standard streams that are closed, that cannot show a name, or whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.scenarios.strangers.makers import command

ROOT = Path(__file__).parents[3]

STREAMS_ALONE = """
import os, sys
from int8convert.cli.terminal import open_missing_streams
open_missing_streams()
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("out"); print("err \\udce9", file=sys.stderr); sys.stdout.flush()
os.write(1, b"1"); os.write(2, b"2")
os.write(opened, f"{opened} {sys.stdin.read(1)!r}".encode())
"""


@pytest.mark.parametrize("closed", list(product((False, True), repeat=3)))
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, closed: tuple[bool, bool, bool]) -> None:
    """A file that is opened afterwards never is number 0, 1 or 2, and holds nothing of what is printed."""
    redirections = " ".join(sign for sign, is_closed in zip(("<&-", ">&-", "2>&-"), closed, strict=True) if is_closed)
    line = f'exec "$0" -c "$1" "$2" {redirections}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, STREAMS_ALONE, tmp_path / "file"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert int((tmp_path / "file").read_text().split()[0]) >= 3
    assert (tmp_path / "file").read_text().split()[1] == "''"
    assert done.stdout == (b"" if closed[1] else b"out\n1")
    assert done.stderr == (b"" if closed[2] else b"err \\udce9\n2")


def test_conversion_needs_no_stream(source: Path, tmp_path: Path) -> None:
    """As a daemon starts it; the whole of it in one process, model map included."""
    done = command("quantize", source, tmp_path / "out", preexec_fn=lambda: [os.close(fd) for fd in (0, 1, 2)])
    assert done.returncode == 0
    assert (tmp_path / "out/config.json").exists()
    assert {(tmp_path / "out/model.safetensors").read_bytes()[8:9]} == {b"{"}


def test_ascii_terminal_shows_escapes(source: Path, tmp_path: Path) -> None:
    """Accents in a C locale, and bytes that are no UTF-8, on a stdout that is ASCII and strict about it."""
    odd = source.rename(tmp_path / os.fsdecode(b"mod\xc3\xa8le\xe8"))
    for environment in ({"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        done = command("inspect", odd, environment={"PYTHONCOERCECLOCALE": "0", **environment})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(str(tmp_path)) and "le\\udce8: LlamaForCausalLM" in done.stdout


def test_reader_that_goes_ends_the_command_quietly(source: Path) -> None:
    line = f"'{sys.executable}' -m int8convert inspect '{source}' --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1, 141)
