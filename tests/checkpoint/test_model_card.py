"""What is inherited of a source's card, and that a stranger's YAML can do nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import int8convert
from int8convert.checkpoint.model_card import read_card, read_source_card
from int8convert.errors import CorruptFileError
from int8convert.inspection import inspect
from int8convert.verification.exact.level import verify_exact
from tests.tools.options import print_nothing
from tests.tools.tiny_models import save_checkpoint


def card(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "README.md").write_text(text)
    return read_source_card(tmp_path)


def test_licence_language_and_task_are_inherited_and_nothing_else(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: opt\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [a]\n---\n# OPT\n"
    expected = {"license": "other", "license_name": "opt", "license_link": "LICENSE", "language": ["en", "de"]}

    assert card(tmp_path, text) == expected
    assert card(tmp_path, text.replace("\n", "\r\n")) == expected
    assert card(tmp_path, "\n" + text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# No metadata\n\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\n[1, 2]\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['touch x']\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: 3\n---\n",
        '---\nlicense: "a\\e[2Jb"\n---\n',
        f"---\nlicense: {'x' * 300}\n---\n",
        f"---\nlicense: {'[' * 50_000}\n---\n",
        f"---\na: {'x' * 200_000}\nlicense: mit\n---\n",
        "---\na: &a [x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
    ],
)
def test_what_is_no_plain_text_counts_as_none(text: str, tmp_path: Path) -> None:
    assert card(tmp_path, text) == {}


def test_missing_card_is_no_card(tmp_path: Path) -> None:
    assert read_source_card(tmp_path) == {}


def test_card_that_is_no_text_is_no_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n" + bytes(range(256)))
    assert read_source_card(tmp_path) in ({}, {"license": "\ufffd\ufffd"})


def test_card_that_multiplies_itself_is_not_expanded(tmp_path: Path) -> None:
    """Each of 40 entries merges the one before it twice: 2**40 in the last."""
    entries = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)]
    assert card(tmp_path, "\n".join(["---", "license: mit", "a0: &a0 {x: y}", *entries, "---", ""])) == {}


def test_card_without_end_is_read_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.checkpoint.model_card.MAX_CARD_BYTES", 1000)
    path = tmp_path / "README.md"
    path.write_bytes(b"x" * 1000)
    assert read_card(path) == b"x" * 1000
    path.write_bytes(b"x" * 1001)
    with pytest.raises(CorruptFileError, match="has more than 1,000 bytes"):
        read_card(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_commands_do_without_a_card_that_is_no_file(
    make: Callable[[Path], None], tmp_path: Path, map_in_process: None
) -> None:
    source, out = save_checkpoint("opt", tmp_path / "source"), tmp_path / "out"
    make(source / "README.md")
    int8convert.quantize(source, out, on_event=print_nothing)
    make(out / "README.md")
    assert inspect(out).n_shards == 1
    assert verify_exact(out).is_passed == (make is Path.mkdir)  # a pipe is a finding, and stops nothing
    int8convert.export(out, tmp_path / "new", format="compressed-tensors", on_event=print_nothing)
    int8convert.load(out)
