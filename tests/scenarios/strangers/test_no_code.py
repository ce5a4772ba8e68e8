"""No code of a checkpoint runs unless the user says so, no library asks, and no kernel is fetched for it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import int8convert
from int8convert.errors import Int8ConvertError, ModelMapError, RemoteCodeError, SourceError
from int8convert.formats.skip_list import plain_rule
from int8convert.runtime.models import load_model as load_reference
from int8convert.runtime.pretrained import asking_nobody, load_model, read_config
from int8convert.runtime.text.tokenizer_process import TokenizerProcess
from int8convert.verification.verify import verify
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import change, change_block

OWN_CODE = "from transformers import {base} as {name}\nopen({canary!r}, 'w').write('ran')\n"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What the checkpoint's code would write."""
    return tmp_path / "canary"


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who would answer every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))


def add_tokenizer_code(out: Path, canary: Path) -> None:
    """A tokenizer that transformers has no class for: it asks where it is not told."""
    (out / "own.py").write_text(OWN_CODE.format(base="PreTrainedTokenizerFast", name="T", canary=str(canary)))
    change(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]}, tokenizer_class="Own")


def add_model_code(out: Path, canary: Path) -> None:
    (out / "own.py").write_text(OWN_CODE.format(base="LlamaConfig", name="C", canary=str(canary)))
    change(out / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})


@pytest.mark.usefixtures("yes", "map_in_process")
@pytest.mark.parametrize("spoil", [add_tokenizer_code, add_model_code])
@pytest.mark.parametrize("command", ["generate", "verify", "outliers"])
def test_commands_neither_run_it_nor_ask(
    command: str, spoil: Callable[[Path, Path], None], out: Path, source: Path, canary: Path, tmp_path: Path, run: Run
) -> None:
    spoil(out, canary)
    text = tmp_path / "text.txt"
    text.write_text("w5 w6 w7 w9 w11\n" * 60)
    few = ["--text", text, "--length", "8", "--sequences", "1", "--json"]
    words = {
        "generate": ["generate", out, "w5", "--max-new-tokens", "2", "--json"],
        "verify": ["verify", out, "--reference", source, *few],
        "outliers": ["outliers", out, *few],
    }
    code, output, errors = run(*words[command])
    assert not canary.exists() and "[y/N]" not in output + errors
    assert json.loads(output) and code in (0, 1, 3)
    assert sys.stdin.read(2) == "y\n"  # nobody read of it


def test_model_that_needs_code_is_refused_with_what_to_do(out: Path, canary: Path) -> None:
    add_model_code(out, canary)
    with pytest.raises(RemoteCodeError, match="is code in the checkpoint") as caught:
        int8convert.load(out)
    assert "int8convert.load(trust_remote_code=True)" in caught.value.hint
    with pytest.raises(RemoteCodeError):
        int8convert.generate(out, ["w5"])
    assert not canary.exists()


def test_tokenizer_code_runs_where_it_is_trusted_and_in_its_own_process(out: Path, canary: Path) -> None:
    add_tokenizer_code(out, canary)
    change(out / "config.json", model_type="novel")  # so that transformers knows no tokenizer for it
    with pytest.raises(RemoteCodeError) as caught:
        TokenizerProcess(str(out), "read that code, then pass --trust-remote-code to have it run")
    assert "--trust-remote-code" in caught.value.hint and not canary.exists()
    before = set(sys.modules)
    with TokenizerProcess(str(out), trust_remote_code=True) as tokenizer:
        assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert canary.read_text() == "ran" and not any("own" in name.split(".") for name in {*sys.modules} - before)


@pytest.mark.usefixtures("yes")
def test_question_about_a_part_of_a_model_is_answered_with_no(out: Path, canary: Path) -> None:
    """transformers asks for parts, whose `trust_remote_code` nobody can pass."""
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    with asking_nobody(), pytest.raises(ValueError, match="requires you to execute custom code"):
        resolve_trust_remote_code(None, str(out), has_local_code=False, has_remote_code=True)
    assert sys.stdin.read(2) == "y\n"


def test_nothing_is_read_from_stdin_nor_printed_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with asking_nobody(), pytest.raises(EOFError):
        input("Do you wish to run the custom code? [y/N] ")
    assert capsys.readouterr().out == "" and sys.stdin.read() == "y\n"


FOREIGN: list[dict[str, Any]] = [
    {"attn_implementation": "some/kernels"},
    {"_attn_implementation": "kernels-community/flash-attn2@v1"},
    {"_attn_implementation_internal": "some/kernels:attention"},
    {"attn_implementation": {"": "eager", "text_config": "some/kernels"}},
    {"experts_implementation": "some/experts"},
    {"text_config": {"attn_implementation": "some/kernels"}},
    {"fusion_config": {"rms_norm": True}},
    {"kernel_config": {"LlamaRMSNorm": "some/kernels:LlamaRMSNorm"}},
]


@pytest.mark.parametrize("entries", FOREIGN)
def test_kernels_from_elsewhere_are_refused(entries: dict[str, Any], out: Path) -> None:
    change(out / "config.json", **entries)
    with pytest.raises(SourceError, match="names code from elsewhere"):
        int8convert.load(out)


def test_attention_of_a_package_is_left_to_transformers(out: Path) -> None:
    """Old checkpoints name flash_attention_2, which may not be here, or would be fetched from the Hub."""
    plain = int8convert.load(out).config._attn_implementation
    change(out / "config.json", attn_implementation="flash_attention_2")
    assert int8convert.load(out).config._attn_implementation == plain
    change(out / "config.json", attn_implementation="eager")
    assert int8convert.load(out).config._attn_implementation == "eager" != plain


@pytest.mark.parametrize(
    "name", ["Trainer", "pipeline", "PreTrainedTokenizerFast", "logging", "LlamaConfig", "__doc__"]
)
def test_architecture_that_is_no_model_is_read_by_the_models_type(name: str, out: Path) -> None:
    change(out / "config.json", architectures=[name])
    assert type(int8convert.load(out)) is transformers.LlamaForCausalLM


# Expressions and sizes: what a stranger's config makes transformers do for ever, or with all the memory.

HOSTILE_NAMES: list[Any] = [
    ["lm_head", "(([a-z._0-9])+)+X"],
    ["lm_head", "model.layers.0.*"],
    ["lm_head", "(?:)"],
    ["a" * 501],
    ["lm_head", 7],
    ["lm_head", None],
    "lm_head",
    {"lm_head": 1},
    ["lm_head"] * 20_001,
]


@pytest.mark.parametrize("names", HOSTILE_NAMES, ids=lambda names: str(names)[:30])
def test_skip_list_of_anything_but_names_is_refused(names: Any, out: Path) -> None:
    change_block(out, llm_int8_skip_modules=names)
    with pytest.raises(SourceError, match=r"llm_int8_skip_modules in config\.json"):
        int8convert.load(out)


def test_plain_names_are_skipped_by_transformers_own_rule() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = [
        "lm_head",
        "model.layers.1",
        "model.layers.1.mlp",
        "model.layers.11",
        "x.lm_head",
        "lm_head.x",
        "a_b",
        "ab",
    ]
    lists = [[], ["lm_head"], ["model.layers.1"], ["mlp"], ["layers.1", "ab"], ["b"], ["a.b"], ["model", "x.lm_head"]]
    for names in lists:
        expected = [not should_convert_module(module, names) for module in modules]
        assert [plain_rule(names)(module) for module in modules] == expected, names


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e300},
        {"num_hidden_layers": 9000},
        {"vocab_size": 10**10},
        {"intermediate_size": 10**12},
        {"num_key_value_heads": 10**9, "num_attention_heads": 10**9, "head_dim": 64},
        {"text_config": {"num_layers": 10**9}},
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": 8,
            "n_embd": 64,
            "max_position_embeddings": 10**9,
        },
    ],
    ids=str,
)
def test_model_that_no_file_could_fill_is_refused_before_it_is_built(entries: dict[str, Any], out: Path) -> None:
    change(out / "config.json", **entries)
    with pytest.raises(Int8ConvertError) as caught:
        int8convert.load(out)
    assert any(
        words in caught.value.message
        for words in ("expected at most 10,000", "which its weight files cannot fill", "cannot be read as a checkpoint")
    ), caught.value.message


def test_bound_is_of_this_load_alone(out: Path) -> None:
    import torch

    load_model(str(out), read_config(str(out)), device_map="cpu", quantization_config=int8convert.Int8ConvertConfig())
    with torch.device("meta"):
        assert torch.nn.Linear(10**6, 10**6).weight.numel() == 10**12


@pytest.mark.usefixtures("map_in_process")
def test_conversion_bounds_the_model_it_maps(source: Path, tmp_path: Path) -> None:
    """The map is made by a class of transformers, too, in a process with no time limit."""
    for entries in ({"num_hidden_layers": 10**9}, {"vocab_size": 10**10}, {"num_hidden_layers": 9000}):
        spoiled = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(source, spoiled)
        change(spoiled / "config.json", **entries)
        with pytest.raises(ModelMapError, match=r"expected at most 10,000|which its weight files cannot fill"):
            int8convert.plan(spoiled)


@pytest.mark.usefixtures("map_in_process")
def test_conversion_needs_no_kernels_that_config_json_names(source: Path) -> None:
    plain = int8convert.plan(source).model_map
    change(source / "config.json", attn_implementation="some/kernels", experts_implementation="some/experts")
    assert int8convert.plan(source).model_map == plain


@pytest.mark.usefixtures("map_in_process")
def test_verify_matches_no_expression_of_a_skip_list(out: Path, source: Path) -> None:
    change_block(out, llm_int8_skip_modules=["lm_head", "(([a-z._0-9])+)+X"])
    assert not verify(out, level="exact", reference=source).is_passed


def test_reference_in_fp8_brings_no_expressions(source: Path) -> None:
    """transformers loads such a source by itself, and would match them."""
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["(([a-z._0-9])+)+X"]}
    change(source / "config.json", quantization_config=block)
    with pytest.raises(SourceError, match=r"modules_to_not_convert in config\.json holds"):
        load_reference(source, "cpu")
