"""`quantize --keep-budget`: what it keeps, that a rerun finds its own choice, and that the predictions get as near."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import int8convert
from int8convert.checkpoint.manifest import Manifest
from int8convert.outliers.damage import estimate_damage
from int8convert.outliers.keep import keep_budget
from int8convert.planning.plan_checkpoint import open_request
from int8convert.runtime import memory
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.models import load_model, open_tokenizer
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import read_windows
from int8convert.verification.exact.level import verify_exact
from tests.cli.conftest import Run
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import SENTENCES, build_tokenizer, language_model
from tests.tools.options import print_nothing
from tests.tools.outlier_models import outlier_model, save
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "hub"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
N_WEIGHTS = 2 * (4 * 64 * 64 + 2 * 64 * 128)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An OPT in three shards, whose layers differ in what they cost."""
    tokenizer = build_tokenizer()
    model = outlier_model(tokenizer)
    model.model.decoder.layers[1].fc1.weight.data *= 3
    directory = save(model, tmp_path / "source", tokenizer)
    model.save_pretrained(directory, max_shard_size="60KB")
    (directory / "model.safetensors").unlink()
    return directory


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """A Llama, whose q, k and v read one tensor, and gate and up another."""
    tokenizer = build_tokenizer()
    model = language_model("llama", tokenizer)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter.data, std=0.2)
    return save(model, tmp_path / "gated", tokenizer)


def test_kept_modules_are_copied_and_named_with_bytes_and_expected_divergence(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    code, printed, notes = run("quantize", source, tmp_path / "out", "--keep-budget", "20%", "--text", text, "--json")
    report = json.loads(printed)
    kept = report["kept_by_budget"]
    assert (code, notes) == (0, "") and kept["n_unmeasured"] == 0
    assert 0.1 * N_WEIGHTS < kept["n_weights"] == kept["n_bytes"] <= 0.2 * N_WEIGHTS
    assert report["n_int8_parameters"] == N_WEIGHTS - kept["n_weights"]
    assert 0 < kept["kl_after"] < 0.9 * kept["kl_before"]
    skipped = next(entry for entry in report["kept"] if entry["reason"] == "user skip")
    assert skipped == {"reason": "user skip", "n_tensors": len(kept["names"]), "n_parameters": kept["n_weights"]}

    code, printed, notes = run("quantize", source, tmp_path / "again", "--keep-budget", "20", "--text", text)
    expected = f"falls from {kept['kl_before']:.2g} to {kept['kl_after']:.2g} nats a token"
    assert "note: measuring the source's model in memory, about " in notes and "measured: 1 of 7 steps" in notes
    assert f"modules stay 16-bit and take {kept['n_bytes'] / 1000:.3g} kB more; the expected KL" in notes
    assert expected in notes and f"Kept in 16 bits by the budget: {', '.join(kept['names'])}" in printed


def divergence(source: Path, out: Path, text: Path) -> float:
    """The mean KL divergence of an output from its source, in nats a token."""
    gates = int8convert.Gates(max_dnll=9, max_kl=9)
    report = int8convert.verify(
        out,
        reference=source,
        text=Text(text, n_sequences=8, length=64),
        gates=gates,
        execution=int8convert.Execution("cpu"),
        on_event=print_nothing,
    )
    assert report.is_passed, report.failures
    return report.fidelity[0].mean_kl


def test_divergence_falls_as_expected(gated: Path, text: Path, tmp_path: Path, map_in_process: None) -> None:
    measured, expected = [], []
    for percent in (20, 60):
        keep = keep_budget(percent, Text(text, length=64), device="cpu")
        report = int8convert.quantize(
            gated, tmp_path / f"{percent}", int8convert.PlanOptions(keep=keep), on_event=print_nothing
        )
        kept = report.kept_by_budget
        assert kept is not None and kept.kl_before is not None and kept.kl_after is not None
        measured.append(divergence(gated, tmp_path / f"{percent}", text))
        expected.append(kept.kl_after / kept.kl_before)
    int8convert.quantize(gated, tmp_path / "all", on_event=print_nothing)
    whole = divergence(gated, tmp_path / "all", text)
    assert whole == pytest.approx(kept.kl_before, rel=0.2)
    assert [part / whole for part in measured] == pytest.approx(expected, rel=0.2)
    assert measured[1] < measured[0] < whole


@pytest.mark.parametrize(
    ("format", "inputs"), [("bitsandbytes", "inputs_by_rule"), ("compressed-tensors", "inputs_by_token")]
)
def test_cost_is_that_of_the_formats_loader(
    format: str, inputs: str, source: Path, text: Path, tmp_path: Path, map_in_process: None
) -> None:
    model = load_model(source, "cpu")
    with open_tokenizer(source) as tokenizer:
        windows = read_windows(text, tokenizer, 16, 64)
    layers = {name: model.get_submodule(name) for name in modules_to_replace(model)}
    damage = estimate_damage(model, layers, windows.ids)
    options = int8convert.PlanOptions(format=format, keep=keep_budget(10, Text(text, length=64), device="cpu"))
    kept = int8convert.quantize(source, tmp_path / "out", options, on_event=print_nothing).kept_by_budget
    assert kept is not None and kept.kl_before == pytest.approx(sum(layer.cost(inputs) for layer in damage))


def test_layers_of_one_input_stay_together(run: Run, gated: Path, text: Path, tmp_path: Path) -> None:
    """vLLM fuses q, k and v, and gate and up, and needs all of them in 16 bits or none."""
    seen: set[str] = set()
    for percent in ("12", "25", "40", "60"):
        _, printed, _ = run(
            *("quantize", gated, tmp_path / percent, "--format", "compressed-tensors"),
            *("--keep-budget", percent, "--text", text, "--json"),
        )
        names = set(json.loads(printed)["kept_by_budget"]["names"])
        for i in range(2):
            for fused in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            ):
                parts = {f"model.layers.{i}.{part}" for part in fused} & names
                assert len(parts) in (0, len(fused))
                seen |= parts
    assert any("q_proj" in name for name in seen) and any("gate_proj" in name for name in seen)


def test_skipped_modules_are_not_chosen_nor_counted(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    _, printed, _ = run(
        *("quantize", source, tmp_path / "out", "--skip", "*.fc1", "--skip", "*.fc2"),
        *("--keep-budget", "15", "--text", text, "--json"),
    )
    kept = json.loads(printed)["kept_by_budget"]
    assert kept["names"] and all(".self_attn." in name for name in kept["names"])
    assert kept["n_weights"] <= 0.15 * 2 * 4 * 64 * 64
    recorded = (Manifest(tmp_path / "out").read_request() or {})["options"]
    assert recorded["skip"] == ["*.fc1", "*.fc2", *kept["names"]] and recorded["keep_budget"] == 15.0


def failing(*_: object, **__: object) -> Any:
    raise AssertionError("the damage is measured again")


def test_interrupted_run_continues_with_its_own_choice(
    source: Path, text: Path, tmp_path: Path, map_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options() -> int8convert.PlanOptions:
        return int8convert.PlanOptions(keep=keep_budget(20, Text(text), device="cpu"))

    def interrupt(event: object) -> None:
        if type(event).__name__ == "ShardFinished":
            raise KeyboardInterrupt

    undisturbed = int8convert.quantize(source, tmp_path / "whole", options(), on_event=print_nothing)
    with pytest.raises(KeyboardInterrupt):
        int8convert.quantize(source, tmp_path / "out", options(), on_event=interrupt)
    monkeypatch.setattr("int8convert.outliers.keep.estimate_damage", failing)
    report = int8convert.quantize(source, tmp_path / "out", options(), on_event=print_nothing)
    assert report.n_done_shards >= 1
    assert undisturbed.kept_by_budget is not None and report.kept_by_budget is not None
    assert report.kept_by_budget.names == undisturbed.kept_by_budget.names and report.kept_by_budget.kl_before is None
    assert any("as an earlier run of this conversion chose" in note for note in report.notes)
    weights = [
        {name: data for name, data in file_bytes(tmp_path / out).items() if name.endswith(".safetensors")}
        for out in ("whole", "out")
    ]
    assert weights[0] == weights[1]
    assert verify_exact(tmp_path / "out", reference=source, on_event=print_nothing).is_passed


def test_other_budget_text_or_options_are_refused_before_anything_is_measured(
    run: Run, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("quantize", source, tmp_path / "out")
    run(*given, "--keep-budget", "20", "--text", text)
    monkeypatch.setattr("int8convert.outliers.keep.estimate_damage", failing)
    for options, difference in (
        (("--keep-budget", "10", "--text", text), "--keep-budget 20.0 then, --keep-budget 10.0 now"),
        (("--keep-budget", "20"), "then, --text "),
        (("--keep-budget", "20", "--text", text, "--threshold", "5"), "--threshold 6.0 then, --threshold 5.0 now"),
        ((), "--keep-budget 20.0 then, no --keep-budget now"),
    ):
        code, _, err = run(*given, *options)
        assert code == 1 and "holds a conversion that differs: " in err and difference in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    code, _, err = run("quantize", source, tmp_path / "full", "--keep-budget", "10")
    assert code == 1 and "full' exists and is not empty" in err


def test_model_that_does_not_fit_is_refused_in_two_lines(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.outliers.keep.available_bytes", lambda device: 1_000_000)
    code, _, err = run("quantize", source, tmp_path / "out", "--keep-budget", "5")
    lines = err.splitlines()
    assert code == 1 and lines[0].startswith("error: measuring what rounding costs takes the source's model in memory")
    assert lines[0].endswith(" and 1 MB are free") and "outliers SRC --text FILE --damage" in lines[1]
    assert not (tmp_path / "out").exists()
    assert memory.available_bytes("cpu") > 1_000_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--keep-budget", "0"), "it must be above 0"),
        (("--keep-budget", "101%"), "it is from 0 to 100 percent, not '101%'"),
        (("--keep-budget", "few"), "it is from 0 to 100 percent, not 'few'"),
        (("--text", "text.txt"), "--text needs --keep-budget PERCENT or --quality best"),
        (("--keep-budget", "5", "--lora", "a"), "give one of --keep-budget and --lora"),
    ],
)
def test_wrong_usage(run: Run, tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    code, _, err = run("quantize", tmp_path, tmp_path / "out", *options)
    assert code == 2 and expected in " ".join(err.split())


def test_other_weights_than_the_sources_are_refused_by_the_library_too(source: Path, text: Path) -> None:
    request = open_request(source, int8convert.PlanOptions())
    choose = keep_budget(5, Text(text)).choose
    adapter: Any = object()
    with pytest.raises(int8convert.Int8ConvertError, match="without the adapter is another model"):
        choose(replace(request, adapter=adapter), print_nothing)


@pytest.mark.usefixtures("rotation_in_process")
def test_rotated_weights_are_measured_rotated(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    """The rotation takes away what the weights cost, so the expected divergence falls, and the conversion is whole."""
    expected = {}
    for name, rotation in (("plain", ()), ("rotated", ("--rotate",))):
        code, out, err = run(
            "quantize", source, tmp_path / name, "--keep-budget", "10", "--text", text, "--json", *rotation
        )
        assert code == 0, err
        expected[name] = json.loads(out)["kept_by_budget"]["kl_before"]
    assert expected["rotated"] < 0.9 * expected["plain"]
    assert verify_exact(tmp_path / "rotated").is_passed


@pytest.mark.usefixtures("rotation_in_process")
def test_repository_is_measured_from_the_clients_cache(
    run: Run, source: Path, text: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    hub.add_repo("org/model", {path.name: path for path in source.iterdir()})
    connect(hub, hub.token)
    options = ("--keep-budget", "20", "--text", text, "--rotate", "--json")
    there, here = (
        json.loads(run("quantize", src, tmp_path / name, *options)[1])["kept_by_budget"]
        for src, name in (("org/model", "there"), (source, "here"))
    )
    assert there == here and there["names"]


def test_dry_run_says_that_it_measures_nothing(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.outliers.keep.estimate_damage", failing)
    code, _, err = run("quantize", source, "--dry-run", "--keep-budget", "5")
    assert code == 0 and "no effect in a dry run: --keep-budget" in err
