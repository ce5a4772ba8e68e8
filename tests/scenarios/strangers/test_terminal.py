"""Escape sequences of a stranger never reach the terminal, whichever library prints them."""

from __future__ import annotations

import logging
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
from rich.text import Text

import int8convert
from int8convert.checkpoint.library_errors import library_errors
from int8convert.cli.console import print_line, print_table, stderr
from int8convert.cli.generate import _Output
from int8convert.cli.terminal import PlainConsole, escaping_messages, plain
from int8convert.errors import DeviceError, Int8ConvertError, RemoteCodeError, SourceError
from int8convert.text import printable
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import Spoil, change, change_block, spoil_entries, spoil_text

HOSTILE = "\x1b[2J\x1b]0;owned\x07"
SHOWN = r"\x1b[2J\x1b]0;owned\x07"
BY_RICH = SHOWN.removesuffix(r"\x07")
"""rich itself leaves out the bell."""

SPOILED: dict[str, Spoil] = {
    "model type": spoil_entries("config.json", model_type="x" + HOSTILE),
    "architecture": spoil_entries("config.json", architectures=[HOSTILE]),
    "dtype": spoil_entries("config.json", dtype=HOSTILE),
    "activation": spoil_entries("config.json", hidden_act=HOSTILE),
    "attention": spoil_entries("config.json", attn_implementation=HOSTILE),
    "quantization method": lambda out: change_block(out, quant_method=HOSTILE),
    "skip list": lambda out: change_block(out, llm_int8_skip_modules=[HOSTILE]),
    "tokenizer class": spoil_entries("tokenizer_config.json", tokenizer_class=HOSTILE),
    "tokenizer model": spoil_entries("tokenizer.json", model={"type": HOSTILE}),
    "template": spoil_text("chat_template.jinja", "{{ raise_exception('" + HOSTILE + "') }}"),
    "template's name": spoil_text("chat_template.jinja", "{{ '" + HOSTILE + "' | nope }}"),
    "end of text": spoil_entries("generation_config.json", eos_token_id=HOSTILE),
    "stop string": spoil_entries("generation_config.json", stop_strings=[[HOSTILE]]),
    "key": lambda out: change(out / "config.json", **{HOSTILE: 1, "num_hidden_layers": HOSTILE}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_error_shows_it_escaped(what: str, out: Path, run: Run) -> None:
    SPOILED[what](out)
    code, output, errors = run("generate", out, "w5", "--max-new-tokens", "1")
    assert "\x1b" not in output + errors and "\x07" not in output + errors
    assert code in (0, 1) and (code == 0 or len(errors.splitlines()) == 2)


def test_errors_of_our_tree_escape_what_they_quote() -> None:
    error = SourceError(f"a {HOSTILE}\nb", f"c\r{HOSTILE}")
    assert (error.message, error.hint, str(error)) == (rf"a {SHOWN}\nb", rf"c\r{SHOWN}", rf"a {SHOWN}\nb")
    assert printable("Grüße, 日本 'x' \\n") == "Grüße, 日本 'x' \\n"
    assert printable("a\u202eb\u2028c\ud800") == r"a\u202eb\u2028c\ud800"


def test_boundary_names_the_class_and_the_first_line_escaped_and_cut() -> None:
    with pytest.raises(SourceError) as caught, library_errors("it fails", "do that"):
        raise KeyError(f"\n\n{HOSTILE}\nmore")
    assert caught.value.message.startswith("it fails: KeyError: ") and "\x1b" not in caught.value.message
    with pytest.raises(SourceError) as caught, library_errors("it fails", "do that"):
        raise ValueError(f"  {HOSTILE}{'x' * 5000}\nmore")
    assert caught.value.message.startswith(f"it fails: ValueError: {SHOWN}xxx") and len(caught.value.message) < 320
    assert caught.value.hint == "do that" and isinstance(caught.value.__cause__, ValueError)


def test_boundary_lets_our_own_errors_and_the_ends_of_the_process_pass() -> None:
    passing: list[BaseException] = [Int8ConvertError("a", "b"), MemoryError(), KeyboardInterrupt(), SystemExit(3)]
    for error in passing:
        with pytest.raises(type(error)) as caught, library_errors("it fails", "do that"):
            raise error
        assert caught.value is error


def test_boundary_knows_panics_of_rust_a_lack_of_memory_and_the_wish_for_code() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SourceError, match="it fails: PanicException: at x"), library_errors("it fails", "do that"):
        raise panic("at x")
    for error in (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), RuntimeError("can't allocate memory: 9 TB")):
        with pytest.raises(DeviceError) as no_memory, library_errors("it fails", "do that"):
            raise error
        assert no_memory.value.hint == "free memory, or use a device that has more"
    with pytest.raises(RemoteCodeError) as caught, library_errors("it fails", "do that", "trust it"):
        raise ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
    assert caught.value.hint == "trust it"


def test_log_records_and_warnings_of_libraries_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("a.library")
    logger.addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        with escaping_messages():
            logger.error("found %s", HOSTILE)
            warning = warnings.formatwarning(f"deprecated {HOSTILE}", UserWarning, "a.py", 1)
            try:
                raise ValueError(HOSTILE)
            except ValueError:
                logger.exception("it failed")
        found = capsys.readouterr().err
        assert "\x1b" not in found and "\x07" not in found
        assert f"found {SHOWN}\n" in found and f"ValueError: {SHOWN}" in found
        assert warning == f"a.py:1: UserWarning: deprecated {SHOWN}\n"
        before = logging.getLogRecordFactory(), warnings.formatwarning, sys.excepthook
        with escaping_messages():
            assert logging.getLogRecordFactory() is not before[0]
        assert (logging.getLogRecordFactory(), warnings.formatwarning, sys.excepthook) == before
    finally:
        logger.removeHandler(handler)


def test_traceback_of_a_bug_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(AttributeError) as caught, escaping_messages():
        raise AttributeError(HOSTILE)
    sys.excepthook(AttributeError, caught.value, caught.value.__traceback__)
    found = capsys.readouterr().err
    assert found.startswith("Traceback") and f"AttributeError: {SHOWN}\n" in found and "\x1b" not in found


def test_consoles_escape_text_tables_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE, head=HOSTILE)
    print_table(HOSTILE, ("a", HOSTILE), [("b", HOSTILE)])
    stderr.print(HOSTILE)
    output, errors = capsys.readouterr()
    assert "\x1b" not in output + errors and output.count(BY_RICH) == 5 and errors == f"{BY_RICH}\n"


def test_colours_of_our_own_stay() -> None:
    console = PlainConsole(file=StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(Text.assemble(("error:", "bold red"), f" {HOSTILE}"))
    found = console.file.getvalue()
    assert found == f"\x1b[1;31merror:\x1b[0m {BY_RICH}\n"


def test_marks_that_turn_text_around_are_escaped_and_letters_are_not() -> None:
    assert plain("a\tb\nÄ 日 \u202e\u2066\x9b\x7f\r") == "a\tb\nÄ 日 \\u202e\\u2066\\x9b\\x7f\\r"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "expected"), [(Terminal(), f"a\n{SHOWN}"), (StringIO(), f"a\n{HOSTILE}")])
def test_text_of_the_model_is_escaped_on_a_terminal_and_whole_in_a_file(
    stream: StringIO, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    _Output().write(f"a\n{HOSTILE}")
    assert stream.getvalue() == expected


def test_error_in_a_callers_own_function_is_not_the_models(out: Path) -> None:
    def fail(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError):
        int8convert.generate(out, ["w5 w6"], max_new_tokens=4, on_text=fail)
