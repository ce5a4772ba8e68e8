"""Templates and tokenizers of strangers run within bounds of time and memory, and let nothing out but their answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import int8convert
from int8convert.errors import Int8ConvertError, PromptError, SourceError
from int8convert.runtime.text import tokenizer_process
from int8convert.runtime.text.tokenizer_process import TokenizerProcess
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import change

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def write_template(out: Path, template: str) -> None:
    (out / "chat_template.jinja").write_text(template)


def test_template_that_never_ends_is_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_process, "TEMPLATE_S", 0.5)
    write_template(out, LOOPS)
    with pytest.raises(PromptError, match="the chat template takes more than 0 s and was stopped") as caught:
        int8convert.generate(out, ["w5"], max_new_tokens=1)
    assert caught.value.hint == "--no-chat gives the model the bare prompt"
    assert int8convert.generate(out, ["w5"], max_new_tokens=1, chat=False).n_new_tokens == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ (messages | string).ljust(10**10) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ '%01000000000d' % 5 }}{{ '%09000000000d' % 5 }}",
    ],
)
def test_template_that_wants_all_the_memory_gets_none_of_this_process(
    template: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_process, "MAX_BYTES", 300_000_000)
    write_template(out, template)
    with pytest.raises(PromptError, match=r"more than 0 GB of memory|MemoryError|more memory than it may|Overflow"):
        int8convert.generate(out, ["w5"], max_new_tokens=1)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ raise_exception('" + ESCAPE + "') }}", r"TemplateError: \x1b[2J\x1b]0;owned\x07"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ messages[9].role.x }}", "UndefinedError"),
    ],
)
def test_template_that_fails_is_named_with_its_reason(template: str, reason: str, out: Path) -> None:
    write_template(out, template)
    with pytest.raises(PromptError, match="the chat template refuses the messages") as caught:
        int8convert.generate(out, ["w5"], max_new_tokens=1)
    assert reason in caught.value.message and caught.value.message.isprintable()


SPLIT = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$\d"}, "behavior": "Isolated", "invert": False}


def test_expression_of_a_tokenizer_that_never_ends_is_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oniguruma gives up on one place after ten million steps, and there are as many places as letters."""
    monkeypatch.setattr(tokenizer_process, "ANSWER_S", 0.2)
    monkeypatch.setattr(tokenizer_process, "CHARACTERS_PER_S", 10**9)
    change(out / "tokenizer.json", pre_tokenizer=SPLIT)
    with pytest.raises(SourceError, match=r"takes more than 0 s and was stopped|PanicException") as caught:
        int8convert.generate(out, ["a" * 3000 + "!"], max_new_tokens=1)
    assert caught.value.hint == "copy the files of the source's tokenizer into the checkpoint"


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"type": "Nope"}},
        {"model": {"type": "WordLevel", "vocab": {"w5": 5}, "unk_token": "absent"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": 7},
        {"added_tokens": [{"id": -1, "content": ESCAPE}]},
    ],
    ids=str,
)
def test_damaged_tokenizer_is_an_error_and_prints_nothing(
    sections: dict[str, Any], out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rust's own messages go past Python, to the file descriptor."""
    change(out / "tokenizer.json", **sections)
    with pytest.raises(SourceError, match=r"the tokenizer|no tokenizer that transformers can read") as caught:
        int8convert.generate(out, ["w5 x"], max_new_tokens=1)
    assert caught.value.message.isprintable()
    assert capfd.readouterr() == ("", "")


def test_token_that_the_model_does_not_know_is_refused(out: Path) -> None:
    change(
        out / "tokenizer.json", model={"type": "WordLevel", "vocab": {"<unk>": 0, "w5": 10**6}, "unk_token": "<unk>"}
    )
    with pytest.raises(SourceError, match=r"makes token 1,000,000 of a prompt, and the model knows 128"):
        int8convert.generate(out, ["w5"], max_new_tokens=1)


def test_process_ends_with_its_owner(out: Path) -> None:
    with TokenizerProcess(str(out)) as tokenizer:
        pid = tokenizer._pid
        assert tokenizer("w5 w6")["input_ids"] == [5, 6] and tokenizer.decode([7, 8, 2]) == "w7 w8"
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(SourceError, match="ended its process"):
        tokenizer("w5")
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_tokenizer_that_cannot_be_read_leaves_no_process(out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    with pytest.raises(SourceError, match="has no tokenizer that transformers can read") as caught:
        TokenizerProcess(str(out))
    assert caught.value.__traceback__ is not None  # which holds what it came through
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.usefixtures("map_in_process")
@pytest.mark.parametrize("command", ["verify", "outliers"])
def test_evaluations_bound_the_tokenizer_too(
    command: str, out: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(tokenizer_process, "ANSWER_S", 0.2)
    monkeypatch.setattr(tokenizer_process, "CHARACTERS_PER_S", 10**9)
    change(out / "tokenizer.json", pre_tokenizer=SPLIT)
    text = tmp_path / "text.txt"
    text.write_text("a" * 3000 + "!")
    words = [command, out, *(["--reference", source] if command == "verify" else []), "--text", text]
    code, output, errors = run(*words)
    assert (code, output) == (1, "") and ("was stopped" in errors or "PanicException" in errors)


def test_errors_are_of_our_tree(out: Path) -> None:
    write_template(out, "{{ 1 / 0 }}")
    with pytest.raises(Int8ConvertError):
        int8convert.generate(out, ["w5"])
