"""`int8convert generate` as its users meet it: text on stdout, all else on stderr, errors in two lines."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch

import int8convert
from int8convert.runtime import load
from tests.cli.conftest import Run
from tests.tools.language_models import CHAT_TEMPLATE, build_tokenizer, save_int8, save_reciter

RECITED = "né 🦙[b]!"
NOTE = re.compile(
    r"note: (\d+) tokens?, the first after [\d.]+ s, then [\d.]+ tokens/s on the cpu; "
    r"loaded in [\d.]+ s, at most [\d.]+ [MG]B of memory"
)


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It continues whatever part of RECITED the prompt ends with, and ends."""
    return save_reciter(RECITED, tmp_path_factory.mktemp("reciter"), build_tokenizer())


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_int8("llama", tmp_path_factory.mktemp("chat") / "int8", build_tokenizer(CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without positions, which only --max-new-tokens stops."""
    return save_int8("bloom", tmp_path_factory.mktemp("endless") / "int8", build_tokenizer())


def test_stdout_is_the_text_and_stderr_what_it_took(run: Run, reciter: Path) -> None:
    code, out, err = run("generate", reciter, "n")
    assert (code, out) == (0, RECITED[1:] + "\n")
    (line,) = err.splitlines()
    match = NOTE.fullmatch(line)
    assert match is not None and match[1] == "11"


def test_quiet_prints_the_text_alone(run: Run, reciter: Path) -> None:
    assert run("generate", reciter, "n", "--quiet") == (0, RECITED[1:] + "\n", "")


def test_json_is_one_object_and_nothing_else(run: Run, reciter: Path) -> None:
    code, out, err = run("generate", reciter, "n", "--json")
    report = json.loads(out)
    assert (code, err, report["schema"]) == (0, "", 1)
    assert report["texts"] == [RECITED[1:]] and report["is_complete"] == [True]
    assert (report["n_prompt_tokens"], report["n_new_tokens"], report["max_new_tokens"]) == (1, 11, 128)
    assert report["device"] == "cpu"
    for key in ("load_s", "first_token_s", "decode_tokens_per_s", "peak_memory_bytes"):
        assert report[key] > 0


def test_prompt_that_looks_like_markup_is_text(run: Run, reciter: Path) -> None:
    assert run("generate", reciter, "[bold]né 🦙[b", "-q") == (0, "]!\n", "")


def test_prompts_of_a_file_are_continued_in_their_order(run: Run, reciter: Path, tmp_path: Path) -> None:
    r"""Lines end with \n or \r\n, and not with what else Unicode counts as an end; empty ones are left out."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff[b\r\n\n  \nné\u2028 🦙\nn".encode())
    code, out, err = run("generate", reciter, "--file", file)
    assert (code, out) == (0, "]!\n[b]!\né 🦙[b]!\n")
    assert NOTE.fullmatch(err.strip()) is not None
    _, out, _ = run("generate", reciter, "--file", file, "--json")
    assert json.loads(out)["texts"] == ["]!", "[b]!", "é 🦙[b]!"]


def test_options_reach_the_model(run: Run, endless: Path) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 3, "outliers": "none"}

    def text(**changes: Any) -> str:
        rest = {**options, **changes}
        sampling = int8convert.Sampling(*(rest.pop(name) for name in ("temperature", "top_p", "top_k", "seed")))
        return int8convert.generate(endless, ["The cat"], sampling=sampling, **rest).texts[0]

    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert run("generate", endless, "The cat", "-q", *flags) == (0, text() + "\n", "")
    for key, value in {"max_new_tokens": 8, "temperature": 0.1, "top_p": 0.1, "top_k": 2, "seed": 4}.items():
        assert text(**{key: value}) != text(), key


def test_the_head_becomes_int8_on_request(run: Run, endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[str] = []
    monkeypatch.setattr(load, "quantize_head", lambda model: heads.append(type(model).__name__))
    for flags in ((), ("--int8-head",)):
        assert run("generate", endless, "The cat", "-q", "--max-new-tokens", "2", *flags)[0] == 0
    assert heads == ["BloomForCausalLM"]


def test_chat_options_reach_the_model(run: Run, chat: Path) -> None:
    options = ("-q", "--max-new-tokens", "12")
    bare = "<s>system: be brief</s><s>user: The cat</s><s>assistant:"
    _, with_system, _ = run("generate", chat, "The cat", "--system", "be brief", *options)
    assert with_system == run("generate", chat, bare, "--no-chat", *options)[1]
    _, by_template, _ = run("generate", chat, "The cat", *options)
    _, by_choice, _ = run("generate", chat, "The cat", "--chat", *options)
    _, without, _ = run("generate", chat, "The cat", "--no-chat", *options)
    assert by_template == by_choice and len({with_system, by_template, without}) == 3


def test_text_that_is_cut_off_is_told(run: Run, reciter: Path, tmp_path: Path) -> None:
    _, _, err = run("generate", reciter, "n", "--max-new-tokens", "3")
    assert err.splitlines()[0] == "note: the text was cut off after 3 tokens: --max-new-tokens asks for no more"
    file = tmp_path / "prompts.txt"
    file.write_text("n\n[b")
    _, _, err = run("generate", reciter, "--file", file, "--max-new-tokens", "3")
    assert err.splitlines()[0].startswith("note: 1 of 2 texts were cut off after 3 tokens")


def test_text_at_the_end_of_the_positions_is_told(run: Run, tmp_path: Path) -> None:
    checkpoint = save_int8("opt", tmp_path / "int8", build_tokenizer())
    code, _, err = run("generate", checkpoint, "!" * 60)
    assert code == 0
    assert err.splitlines()[0] == "note: the text was cut off after 4 tokens: the model has no more positions"


def test_limits_on_a_draw_that_is_none_are_told(run: Run, reciter: Path) -> None:
    code, out, err = run("generate", reciter, "n", "--top-p", "0.9")
    assert (code, out) == (0, RECITED[1:] + "\n")
    assert err.splitlines()[0] == "note: --seed, --top-p and --top-k have no effect at --temperature 0"
    _, _, err = run("generate", reciter, "n", "--top-p", "0.9", "--temperature", "0.1")
    assert len(err.splitlines()) == 1


def test_logging_and_warnings_are_as_before(run: Run, reciter: Path) -> None:
    filters = list(warnings.filters)
    run("generate", reciter, "n")
    assert logging.root.manager.disable == 0 and warnings.filters == filters


# One test for each error.


def check_error(result: tuple[int, str, str], error: str, hint: str) -> None:
    code, out, err = result
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("error: ") and error in first
    assert second.startswith("hint: ") and hint in second


def test_no_such_checkpoint(run: Run, tmp_path: Path) -> None:
    check_error(
        run("generate", tmp_path / "[bold]nowhere", "n"), "[bold]nowhere' is no directory", "int8convert quantize wrote"
    )


def test_source_in_16_bits(run: Run, chat: Path) -> None:
    check_error(
        run("generate", chat.with_name("int8-source"), "n"),
        "is no int8 checkpoint",
        "convert it first: `int8convert quantize ",
    )


def test_no_tokenizer(run: Run, tmp_path: Path) -> None:
    checkpoint = save_reciter(RECITED, tmp_path, build_tokenizer())
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    check_error(run("generate", checkpoint, "n"), "has no tokenizer", "copy the files of the source's tokenizer")


def test_no_such_file(run: Run, reciter: Path, tmp_path: Path) -> None:
    check_error(
        run("generate", reciter, "--file", tmp_path / "prompts.txt"),
        "prompts.txt' cannot be read: No such file or directory",
        "a text file in UTF-8 with one prompt on each line",
    )


def test_file_that_is_a_directory(run: Run, reciter: Path, tmp_path: Path) -> None:
    check_error(run("generate", reciter, "--file", tmp_path), "cannot be read: Is a directory", "a text file")


def test_file_that_is_no_text(run: Run, reciter: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"The cat\n\xff\xfe")
    result = run("generate", reciter, "--file", tmp_path / "prompts.txt")
    check_error(result, "is not UTF-8 text: byte 8", "a text file in UTF-8")


def test_file_without_a_prompt(run: Run, reciter: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n  \n")
    check_error(run("generate", reciter, "--file", tmp_path / "prompts.txt"), "holds no prompt", "a text file")


def test_prompt_without_tokens(run: Run, reciter: Path) -> None:
    check_error(run("generate", reciter, ""), "a prompt is empty", "at least one word")


def test_chat_without_a_template(run: Run, reciter: Path) -> None:
    check_error(run("generate", reciter, "n", "--chat"), "no chat template", "leave --chat out")


def test_system_message_without_a_template(run: Run, reciter: Path) -> None:
    check_error(run("generate", reciter, "n", "--system", "x"), "no chat template", "leave --system out")


def test_outliers_that_are_not_stored(run: Run, reciter: Path) -> None:
    check_error(run("generate", reciter, "n", "--outliers", "static"), "needs stored columns", "dynamic")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(run: Run, reciter: Path) -> None:
    check_error(
        run("generate", reciter, "n", "--device", "cuda"), "--device cuda: torch finds no usable GPU", "--device cpu"
    )


def test_error_as_json(run: Run, reciter: Path) -> None:
    code, out, err = run("generate", reciter, "", "--json")
    assert code == 1 and json.loads(out)["error"]["code"] == "prompt" and len(err.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["OUT"],
        ["OUT", "n", "--file", "prompts.txt"],
        ["OUT", "n", "--max-new-tokens", "0"],
        ["OUT", "n", "--temperature", "-1"],
        ["OUT", "n", "--top-p", "1.1"],
        ["OUT", "n", "--top-k", "-1"],
        ["OUT", "n", "--seed", "one"],
        ["OUT", "n", "--outliers", "paper"],
        ["OUT", "n", "--device", "tpu"],
        ["OUT", "n", "--no-chat", "--system", "be brief"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], run: Run) -> None:
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "") and "Error" in err and "Traceback" not in err


# The real command.


def start(endless: Path) -> subprocess.Popen[bytes]:
    """One that has begun to write a text without an end."""
    command = [sys.executable, "-m", "int8convert", "generate", str(endless), "The cat", "--max-new-tokens", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    if not process.stdout.read(1):
        raise AssertionError(process.communicate())
    return process


def test_signal_ends_the_line_and_says_so(endless: Path) -> None:
    process = start(endless)
    process.send_signal(SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143 and out.endswith(b"\n")
    assert err.decode().splitlines()[-2:] == ["error: terminated", "hint: nothing was written"]


def test_reader_that_goes_away_ends_it_without_a_traceback(endless: Path) -> None:
    with start(endless) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait() == 1
        assert b"Traceback" not in process.stderr.read()
