"""Both levels together: gates, what is measured on, what is written."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import int8convert
from int8convert.checkpoint.names import VERIFY_FILE
from int8convert.errors import AdapterError, SourceError
from int8convert.publish.verify_command import Gates
from int8convert.runtime.text.texts import DEFAULT_TEXT, Text, open_text
from int8convert.verification import verify as module
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.fidelity.level import FidelityReport
from int8convert.verification.options import Execution
from int8convert.verification.verdict import fidelity_failures, undecided_measurements
from int8convert.verification.verify import verify
from tests.conftest import in_this_process
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import convert, outlier_model, save
from tests.tools.tiny_models import edit_config

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WINDOWS: dict[str, Any] = {"n_sequences": 4, "length": 32}
CPU = Execution("cpu")
LOOSE = {"gates": Gates(0.5, 1e-3)}
"""What the model below passes as it is, and without its outlier columns does not. It is not trained, so its
likelihoods are of no text at all."""

OUTLIERS = {7: 400.0, 50: -400.0}


@torch.no_grad()
def save_source(directory: Path) -> Path:
    """A model with outlier features whose weights int8 holds exactly, so that all depends on finding their columns."""
    tokenizer = build_tokenizer()
    model = outlier_model(tokenizer, OUTLIERS, {})
    model.model.decoder.final_layer_norm.weight *= 2  # a model that is surer of its tokens
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.fc1):
            linear.weight[:, sorted(OUTLIERS)] = 0
    return save(model, directory, tokenizer, torch.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with in_this_process():
        convert(save_source(folder / "source"), folder / "out")
    return folder


@pytest.fixture
def out(made: Path) -> Path:
    return made / "out"


@pytest.fixture
def own_out(made: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def test_both_levels_pass_and_say_on_what(out: Path, text: Path) -> None:
    report = verify(out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE)
    assert report.is_passed and report.failures == () and report.exact.is_passed
    (fidelity,) = report.fidelity
    assert fidelity.mode == "dynamic" and 0 < fidelity.mean_kl < 1e-3
    assert report.text is not None and not report.text.is_default
    assert (report.text.name, report.text.n_sequences, report.text.length) == ("text.txt", 4, 32)
    assert report.text.convention.startswith("spread: 4 windows of 32 tokens") and report.sweep == ()


def test_gates_look_at_whole_intervals(out: Path, text: Path) -> None:
    (found,) = verify(out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE).fidelity
    (dnll_low, dnll_high), (kl_low, kl_high) = found.delta_nll_interval, found.mean_kl_interval
    assert dnll_low < found.delta_nll < dnll_high and kl_low < found.mean_kl < kl_high
    below = [math.nextafter(low, -math.inf) for low in (dnll_low, kl_low)]
    for gates, failed, undecided in (
        ((dnll_high, kl_high), [], []),
        ((found.delta_nll, kl_high), [], ["max_dnll"]),
        ((dnll_high, math.nextafter(kl_high, 0)), [], ["max_kl"]),
        ((dnll_low, kl_low), [], ["max_dnll", "max_kl"]),
        ((below[0], kl_high), ["delta-NLL"], []),
        ((below[0], kl_low), ["delta-NLL"], ["max_kl"]),
        ((dnll_high, below[1]), ["mean KL"], []),
    ):
        lines = list(fidelity_failures(Gates(*gates), found))
        assert [line.partition(" is ")[0] for line in lines] == [f"fidelity (dynamic): {name}" for name in failed]
        assert [each.gate for each in undecided_measurements(Gates(*gates), found)] == undecided
    report = verify(out, text=Text(text, **WINDOWS), execution=CPU, gates=Gates(0.5, below[1]))
    assert not report.is_passed and report.exact.is_passed and len(report.failures) == 1


def test_number_that_is_none_fails_the_gate(out: Path, text: Path) -> None:
    (found,) = verify(out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE).fidelity
    nothing = replace(found, mean_kl=math.nan, delta_nll_interval=(math.nan, math.nan))
    assert len(list(fidelity_failures(Gates(1e9, 1e9), nothing))) == 2
    assert list(undecided_measurements(Gates(1e9, 1e9), nothing)) == []


def test_threshold_that_misses_the_outliers_passes_the_exact_level_and_fails_fidelity(
    own_out: Path, text: Path
) -> None:
    """The manifest agrees: whoever converted it wanted that."""
    block = json.loads((own_out / "config.json").read_text())["quantization_config"]
    edit_config(own_out, quantization_config={**block, "llm_int8_threshold": 1000.0})
    manifest = own_out / "int8convert" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["conversion"]["options"]["threshold"] = 1000.0
    manifest.write_text(json.dumps(content))
    good = verify(own_out, text=Text(text), level="exact")
    assert good.is_passed
    report = verify(own_out, text=Text(text, n_sequences=8, length=32), execution=CPU, **LOOSE)
    assert report.exact.is_passed and not report.is_passed
    assert report.failures[-1].startswith("fidelity (dynamic): mean KL is ") and report.fidelity[0].threshold == 1000


def test_thresholds_are_compared_and_not_gated(out: Path, text: Path) -> None:
    report = verify(out, text=Text(text, **WINDOWS), execution=Execution("cpu", thresholds=(math.inf, 0.5)), **LOOSE)
    assert report.is_passed
    assert [r.threshold for r in report.fidelity] == [6.0]
    assert [r.threshold for r in report.sweep] == [0.5, 6.0, math.inf]
    kl = [r.mean_kl for r in report.sweep]
    assert kl[2] > 1e-3 > kl[1] and report.sweep[0].outlier_share > report.sweep[1].outlier_share > 0
    assert report.to_json()["sweep"][2]["threshold"] == "inf"
    json.dumps(report.to_json(), allow_nan=False)


def test_models_are_not_run_where_the_exact_level_fails(
    own_out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(own_out, activation_function="gelu")
    monkeypatch.setattr(module, "_measure", lambda *arguments, **options: pytest.fail("measured"))
    report = verify(own_out, text=Text(text, **WINDOWS), execution=CPU)
    assert report.failures == ("config: config.json: activation_function: expected 'relu', found 'gelu'",)
    assert (report.text, report.fidelity) == (None, ())


def test_what_is_written_is_the_report_and_of_the_files_that_are_there(own_out: Path, text: Path) -> None:
    report = verify(own_out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE)
    assert not (own_out / VERIFY_FILE).exists()
    written = json.loads(write_report(report).read_text())
    assert (
        written == report.to_published_json()
        and written["schema"] == 1
        and list(written)[:3]
        == [
            "schema",
            "is_passed",
            "verdict",
        ]
    )
    there = {path.relative_to(own_out).as_posix() for path in own_out.rglob("*") if path.is_file()}
    assert written["files"].keys() == there - {f"int8convert/{name}" for name in ("verify.json", "local.json", "lock")}
    assert (
        written["gates"] == {"max_dnll": 0.5, "max_kl": 1e-3, "min_task_p": 0.001}
        and written["exact"]["is_passed"] is True
    )
    documented = (Path(__file__).parents[2] / "docs" / "verify-json.md").read_text()
    names = {
        *written,
        *written["exact"],
        *written["text"],
        *written["fidelity"][0],
        *written["gates"],
        *written["causes"],
    }
    names |= {check["name"] for check in written["exact"]["checks"]}
    assert [name for name in names if f"`{name}`" not in documented] == []
    int8convert.store_outliers(str(report.exact.reference), own_out, {"model.decoder.layers.0.fc1": [7]})
    again = verify(own_out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE)
    assert again.files.keys() - written["files"].keys() == {"int8convert/outliers.safetensors"}
    assert again.fidelity[0].mode == "static+guard"


def test_default_text_is_said_to_be_one(out: Path) -> None:
    report = verify(out, text=Text(n_sequences=2), execution=CPU, **LOOSE)
    assert report.text is not None and report.text.is_default and "blunt" in report.text.description
    assert (report.text.name, report.text.n_sequences) == (DEFAULT_TEXT.name, 2)
    assert report.text.length == 64, "what the model takes, if that is less than 256"
    assert report.text.n_text_tokens > 4000


def test_bad_text_is_said_before_anything_is_compared(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "verify_exact", lambda *arguments, **options: pytest.fail("compared"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SourceError, match="holds no text"):
        verify(out, text=Text(tmp_path / "empty.txt"))
    with pytest.raises(SourceError, match="'nowhere' is not a checkpoint directory"):
        verify("nowhere")
    with pytest.raises(AdapterError, match="another model"):
        verify(out, lora=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"level": "all"},
        {"gates": {"max_kl": math.nan}},
        {"text": {"n_sequences": 0}},
        {"text": {"length": 1}},
        {"text": {"convention": "mine"}},
        {"text": {"path": "a", "dataset": "c4"}},
        {"text": {"dataset": "imagenet"}},
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], out: Path) -> None:
    makers = {"gates": Gates, "text": Text}
    with pytest.raises(ValueError):
        verify(out, **{name: makers[name](**each) if name in makers else each for name, each in options.items()})


def cache_file(cache: Path, repository: str, file_name: str) -> Path:
    """Where a file lies that the Hugging Face client has downloaded."""
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    path = folder / "snapshots" / "0123" / file_name
    path.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_c4_is_its_first_documents_joined_by_spaces_and_cut_without_gaps(out: Path, hub_cache: Path) -> None:
    path = cache_file(hub_cache, "allenai/c4", "en/c4-validation.00000-of-00008.json.gz")
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i in range(1200):
            file.write(json.dumps({"text": f"Document {i}: ümlaut", "url": ""}) + "\n")
    with open_text(Text(dataset="c4")) as found:
        content = found.path.read_text(encoding="utf-8")
        assert content.startswith("Document 0: ümlaut Document 1: ümlaut ") and content.endswith(" 1099: ümlaut")
    assert not found.path.exists()
    report = verify(out, text=Text(dataset="c4", n_sequences=2, length=32), execution=CPU, **LOOSE)
    assert report.text is not None and "allenai/c4" in report.text.description
    assert report.text.convention.startswith("contiguous: ")


def test_dataset_that_is_not_there_is_an_error_with_a_way_out(hub_cache: Path) -> None:
    with (
        pytest.raises(SourceError, match="dataset allenai/c4 cannot be fetched") as raised,
        open_text(Text(dataset="c4")),
    ):
        pass
    assert "--text FILE" in raised.value.hint


def test_wikitext2_joins_its_lines_by_blank_lines_or_says_what_it_needs(hub_cache: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(SourceError, match="needs pyarrow"), open_text(Text(dataset="wikitext2")):
            pass
        return
    path = cache_file(hub_cache, "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", "A line."]}), path)
    with open_text(Text(dataset="wikitext2")) as found:
        assert found.path.read_text(encoding="utf-8") == "\n\n = Title = \n\n\nA line."


def test_reports_of_the_fidelity_level_are_those_of_measure_fidelity(out: Path, text: Path) -> None:
    from int8convert.runtime.models import open_tokenizer
    from int8convert.runtime.text.windows import read_windows
    from int8convert.verification.fidelity.level import measure_fidelity

    execution = Execution("cpu", modes=("weight-only", "none"))
    report = verify(out, text=Text(text, n_sequences=8, length=32), execution=execution, **LOOSE)
    windows = read_windows(text, open_tokenizer(out), 8, 32)
    expected = measure_fidelity(
        out.parent / "source", out, windows, Execution(modes=("weight-only", "none"), device="cpu")
    )
    assert [values(r) for r in report.fidelity] == [values(r) for r in expected]
    assert [r.mode for r in report.fidelity] == ["weight-only", "none"]
    assert report.failures and all(line.startswith("fidelity (none)") for line in report.failures)


def values(report: FidelityReport) -> FidelityReport:
    return replace(report, seconds=0.0, peak_memory_bytes=0)


def test_lower_level_keeps_what_was_measured_of_the_same_files(own_out: Path, text: Path) -> None:
    measured = verify(own_out, text=Text(text, **WINDOWS), execution=Execution("cpu", thresholds=(3.0,)), **LOOSE)
    earlier = json.loads(write_report(measured).read_text())  # type: ignore[union-attr]
    assert "kept" not in earlier

    for _ in range(2):
        again = json.loads(write_report(verify(own_out, level="exact")).read_text())  # type: ignore[union-attr]
        names = ("text", "fidelity", "sweep", "causes", "gates", "level", "files")
        assert {name: again[name] for name in names} == {name: earlier[name] for name in names}
        assert again["kept"] == ["causes", "fidelity", "sweep", "text"]
        assert again["exact"]["elapsed_s"] != earlier["exact"]["elapsed_s"]


def other_files(out: Path) -> None:
    edit_config(out, dtype="bfloat16")


def other_version(out: Path) -> None:
    path = out / VERIFY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "tool": "int8convert 0.0.1"}))


def failed_before(out: Path) -> None:
    path = out / VERIFY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_passed": False}))


def broken_now(out: Path) -> None:
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def unreadable(out: Path) -> None:
    (out / VERIFY_FILE).write_text("{")


def without_gates(out: Path) -> None:
    path = out / VERIFY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "gates": 1}))


@pytest.mark.parametrize("change", [other_files, other_version, failed_before, broken_now, unreadable, without_gates])
def test_what_was_measured_is_not_kept_for_anything_else(
    change: Callable[[Path], None], own_out: Path, text: Path
) -> None:
    write_report(verify(own_out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE))
    change(own_out)

    again = json.loads(write_report(verify(own_out, level="exact")).read_text())  # type: ignore[union-attr]

    assert (again["level"], again["fidelity"], again["text"]) == ("exact", [], None) and "kept" not in again


def test_tasks_are_kept_with_their_gate_by_a_run_of_the_models(own_out: Path, text: Path) -> None:
    report = verify(own_out, text=Text(text, **WINDOWS), execution=CPU, **LOOSE)
    path = write_report(report)
    assert path is not None
    tasks = [{"task": "piqa", "metric": "acc", "int8": 0.7}]
    earlier = {**json.loads(path.read_text()), "level": "tasks", "tasks": tasks, "gates": {"min_task_p": 0.5}}
    path.write_text(json.dumps(earlier))

    again = json.loads(write_report(report).read_text())  # type: ignore[union-attr]

    assert (again["tasks"], again["level"], again["kept"]) == (tasks, "tasks", ["tasks"])
    assert again["gates"] == {"max_dnll": 0.5, "max_kl": 1e-3, "min_task_p": 0.5}
