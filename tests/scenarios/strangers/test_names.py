"""Paths with brackets, accents, emoji names, quotes or bytes that are not UTF-8: every command works and names them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Run

NAMES = {
    "brackets": "model[v2]",
    "closing tag": "a[-b]",
    "markup": "[red]x[bold]\\",
    "emoji": ":smile:[link=x]",
    "accent": "modèle",
    "not UTF-8": os.fsdecode(b"mod\xe8le"),
    "spaces": "a  b'c\"d",
}


TOGETHER = {
    "markup": "model[v2] a[-b] [red]x[bold]\\",
    "not ASCII": ":smile:[link=x] modèle  b'c\"d",
    "not UTF-8": NAMES["not UTF-8"],
}
"""All of the above in fewer names, for what takes seconds for each."""


def shown(text: str) -> str:
    """As it is printed: what UTF-8 cannot hold is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return NAMES[request.param]


@pytest.fixture(params=TOGETHER)
def every_name(request: pytest.FixtureRequest) -> str:
    return TOGETHER[request.param]


@pytest.fixture
def text(tmp_path: Path, every_name: str) -> Path:
    path = tmp_path / f"{every_name}.txt"
    path.write_text("w5 w6 w7 w9 w11\n" * 200)
    return path


def test_every_command_names_the_path(
    source: Path, out: Path, text: Path, every_name: str, tmp_path: Path, run: Run
) -> None:
    name = every_name
    src, int8 = source.rename(tmp_path / f"src-{name}"), out.rename(tmp_path / f"out-{name}")
    new = tmp_path / f"new-{name}"
    prompts = tmp_path / f"prompts-{name}"
    prompts.write_text("w5\n")
    gates = ("--max-dnll", "9", "--max-kl", "9", "--sequences", "2", "--length", "32")
    commands = {
        "inspect": (("inspect", src), src),
        "quantize": (("quantize", src, new, "-q"), new),
        "dry run": (("quantize", src, new, "--dry-run"), src),
        "verify": (("verify", int8, "--reference", src, "--text", text, *gates), int8),
        "outliers": (("outliers", int8, "--text", text, "--write", int8, "--source", src), int8),
        "export": (("export", int8, tmp_path / f"fp16-{name}", "--dequantize", "float16"), tmp_path / f"fp16-{name}"),
        "generate": (("generate", int8, "--file", prompts, "--max-new-tokens", "1"), None),
    }
    for command, (words, named) in commands.items():
        code, output, errors = run(*words)
        assert code == 0, (command, errors)
        assert named is None or shown(str(named)) in output, (command, output)
    for command in ("inspect", "verify", "outliers"):
        code, output, _ = run(*commands[command][0], "--json")
        assert code == 0, command
        assert str(named_in(json.loads(output))) in (str(src), str(int8)), command


def named_in(result: dict[str, object]) -> object:
    return result.get("out") or result.get("path")


def test_errors_name_the_path(source: Path, name: str, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("quantize", tmp_path / name, tmp_path / "out")
    assert code == 1 and "error: " in errors and "hint: " in errors
    taken = tmp_path / name
    taken.mkdir()
    (taken / "x").write_text("")
    code, output, errors = run("quantize", source, taken)
    assert (code, output) == (1, "")
    assert f"OUT '{shown(str(taken))}' exists and is not empty" in errors


def test_files_of_such_names_are_carried(source: Path, tmp_path: Path, run: Run, name: str) -> None:
    (source / f"{name}.txt").write_text("x")
    code, _, errors = run("quantize", source, tmp_path / "out", "-q")
    is_printable = name.isprintable()
    assert code == (0 if is_printable else 1), errors
    assert (tmp_path / "out" / f"{name}.txt").exists() == is_printable
