"""A spoiled OUT ends `generate`, `outliers` and `verify` in text or in two lines, whatever is spoiled.

Case number n is the same on every machine, so a failure names all that is needed to see it again.
CI takes the first 80 and `--slow` those up to 240; `INT8CONVERT_FUZZ_CASES` sets their number, `INT8CONVERT_FUZZ_FIRST`
the first one. They run in this process, so a segmentation fault ends the whole run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.cli.app import main
from int8convert.runtime.text import tokenizer_process
from tests.conftest import MAP_PROCESS, InProcessMap, in_this_process
from tests.scenarios.strangers.makers import convert, make_model
from tests.scenarios.strangers.mutations import mutate
from tests.tools.attacks.open_measured import time_limit

FIRST_CASE = int(os.environ.get("INT8CONVERT_FUZZ_FIRST", "0"))
CASES = [
    pytest.param(FIRST_CASE, int(os.environ.get("INT8CONVERT_FUZZ_CASES", "80")), id="few"),
    pytest.param(80, 160, id="many", marks=pytest.mark.slow),
]
"""The first case, and the number of cases."""

MAX_CASE_S = 60
"""Seconds for one case on a busy machine; the first of a model's class imports it."""

MAX_ADDRESS_BYTES = 8_000_000_000
"""Beyond what the process has mapped when the cases begin: what asks for more fails."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What gets spoiled, and what the commands need beside it."""

    source: Path
    outs: tuple[Path, Path]
    text: Path

    def command_lines(self, out: Path) -> list[list[str]]:
        """The commands that read an OUT, as cheap as they can be."""
        few = ["--text", str(self.text), "--length", "8", "--sequences", "3"]
        verify = ["verify", str(out), "--reference", str(self.source)]
        few_of_verify = [*few, "--max-dnll", "9", "--max-kl", "9"]
        generate = ["generate", str(out), "w5 w6", "--max-new-tokens", "2"]
        return [
            *(generate, [*generate, "--json", "--no-chat"], ["outliers", str(out), *few]),
            *(
                [*verify, "--level", "exact", "--json"],
                [*verify, *few_of_verify, "--json"],
                [*verify, *few_of_verify, "--stream"],
            ),
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Outputs with a chat template and stored columns: in one file, and in shards with an index."""
    folder = tmp_path_factory.mktemp("whole")
    source = make_model(folder / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with in_this_process():
        outs = convert(source, folder / "one"), convert(source, folder / "shards", max_shard_size="100KB")
        for each in outs:
            columns = {"model.layers.0.mlp.up_proj": [1, 5], "model.layers.1.self_attn.q_proj": [0]}
            int8convert.store_outliers(source, each, columns)
    assert len(list(outs[1].glob("model-*.safetensors"))) > 1 and (outs[1] / OUTLIERS_FILE).is_file()
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{3 + i * 7 % 120}" for i in range(400)))
    return Whole(source, outs, text)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Short limits for tokenizers and templates."""
    monkeypatch.setattr(tokenizer_process, "ANSWER_S", 5.0)
    monkeypatch.setattr(tokenizer_process, "TEMPLATE_S", 2.0)
    monkeypatch.setattr(MAP_PROCESS, InProcessMap)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, and all that came to the file descriptors of stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["int8convert", *words])
    with time_limit(MAX_CASE_S), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as an error, a warning of transformers would only hide what comes after it
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0), *capfd.readouterr()


def judge(words: list[str], code: int, output: str, errors: str) -> None:
    """See that a command ended in its result or in two lines."""
    assert code in ((0, 1, 3, 4) if words[0] == "verify" else (0, 1)), (code, errors)
    assert "\x1b" not in output + errors and "Traceback" not in errors
    if "--json" in words:
        json.loads(output)
    if code == 1:
        lines = [line for line in errors.splitlines() if not line.startswith("note:")]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], errors
        assert max(map(len, lines)) < 1500


@contextmanager
def bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MAX_ADDRESS_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("i", range(6))
def test_commands_succeed_on_what_is_whole(
    i: int, whole: Whole, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for out in whole.outs:
        words = whole.command_lines(out)[i]
        code, output, errors = run(words, monkeypatch, capfd)
        assert code == 0 and output.strip(), errors
        judge(words, code, output, errors)


@pytest.mark.parametrize(("first", "n_cases"), CASES)
def test_mutants_end_in_a_result_or_in_two_lines(
    first: int,
    n_cases: int,
    whole: Whole,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tally: Counter[str] = Counter()
    failures: list[str] = []
    slowest = (0.0, "")
    with bounded_memory():
        for n in range(first, first + n_cases):
            rng = random.Random(f"out {n}")
            out = Path(shutil.copytree(rng.choice(whole.outs), tmp_path / "out"))
            what = f"case {n}: {mutate(out, rng)}"
            words = rng.choice(whole.command_lines(out))
            begin = time.perf_counter()
            try:
                code, output, errors = run(words, monkeypatch, capfd)
                judge(words, code, output, errors)
                tally[f"{words[0]} {code}"] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever ends a command otherwise is a fault
                failures.append(f"{what}; {' '.join(words)}: {type(error).__name__}: {error}")
                capfd.readouterr()
            slowest = max(slowest, (time.perf_counter() - begin, what))
            shutil.rmtree(out)
    if n_cases > 1000:
        with capfd.disabled():
            print(f"\n{n_cases:,} cases from {first:,}: {dict(tally)}, slowest {slowest}", flush=True)
    assert not failures, "\n".join([f"{len(failures)} of {n_cases} cases", *failures[:20]])
    # A test whose mutants all end alike finds nothing.
    assert min(tally[each] for each in ("generate 0", "generate 1", "verify 0", "verify 1", "verify 3")) > n_cases / 100
