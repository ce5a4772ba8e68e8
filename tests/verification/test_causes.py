"""Why predictions differ, and which conversion is nearer: against models whose causes are known, and by doing it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from int8convert.cli.app import main
from int8convert.formats.format import Format
from int8convert.outliers.damage import LayerDamage, estimate_damage
from int8convert.publish.verify_command import Gates
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.models import load_model
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import read_windows
from int8convert.verification.causes import Damage, Remedy, choose_remedy, find_causes, with_command
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.fidelity.level import FidelityReport
from int8convert.verification.options import Execution
from int8convert.verification.page import render
from int8convert.verification.verify import verify
from int8convert.verification.verify_report import VerifyReport, cause_lines
from tests.conftest import in_this_process
from tests.tools.language_models import SENTENCES, build_tokenizer, language_model
from tests.tools.options import print_nothing
from tests.tools.outlier_models import convert, save

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CPU = Execution("cpu")
WORST = "model.layers.0.self_attn.o_proj"
STRICT = Gates(9, 2e-3)


@torch.no_grad()
def save_source(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama with a large column in one `o_proj`, whose other weights then are rounded coarsely."""
    tokenizer = build_tokenizer()
    model = language_model("llama", tokenizer)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    o_proj, v_proj = (model.get_submodule(f"model.layers.0.self_attn.{name}_proj") for name in "ov")
    o_proj.weight[:, 3] *= 40
    v_proj.weight[3] /= 40
    return save(model, directory, tokenizer, dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 12), encoding="utf-8")
    with in_this_process():
        convert(save_source(folder / "source"), folder / "out")
    return folder


def measure(made: Path, out: Path, **options: Any) -> VerifyReport:
    text = Text(made / "text.txt", n_sequences=4, length=48)
    return verify(out, text=text, **{"execution": CPU, "gates": STRICT, "on_event": print_nothing, **options})


def test_kind_module_and_part_that_cause_it_are_found(made: Path) -> None:
    report = measure(made, made / "out")
    causes = report.causes
    assert not report.is_passed and causes is not None
    assert causes.modules[0].name == WORST and causes.kinds[0].name == "o_proj" and causes.kinds[0].n_modules == 2
    assert causes.modules[0].weights > 0.5 * causes.weights and causes.weights > 2 * causes.inputs
    assert sum(kind.weights for kind in causes.kinds) == pytest.approx(causes.weights)
    assert sum(kind.inputs for kind in causes.kinds) == pytest.approx(causes.inputs)
    assert causes.weights + causes.inputs == pytest.approx(report.fidelity[0].mean_kl, rel=0.4)
    assert causes.n_tokens == 4 * 48 and len(causes.modules) == 10


def test_what_is_advised_is_done_and_comes_out_as_expected(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causes = measure(made, made / "out").causes
    assert causes is not None and causes.remedy is not None
    remedy = causes.remedy
    assert WORST in remedy.keep and remedy.is_enough and remedy.mean_kl <= STRICT.max_kl
    words = shlex.split(remedy.command)
    assert words[:4] == ["int8convert", "quantize", str(made / "source"), f"{made / 'out'}-kept"]
    words[3] = str(tmp_path / "kept")
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    after = measure(made, tmp_path / "kept")
    assert after.is_passed and after.fidelity[0].mean_kl == pytest.approx(remedy.mean_kl, rel=0.4)
    assert after.causes is not None and after.causes.remedy is None
    grown = sum((tmp_path / "kept").joinpath(name).stat().st_size for name in ("model.safetensors",))
    grown -= (made / "out" / "model.safetensors").stat().st_size
    n_rows = sum(load_model(made / "source", "cpu").get_submodule(name).out_features for name in remedy.keep)
    assert grown == pytest.approx(remedy.n_bytes - 4 * n_rows, abs=1000)


@pytest.mark.parametrize(
    ("mode", "inputs"),
    [
        ("none", "inputs_by_token"),
        ("dynamic", "inputs_by_rule"),
        ("dynamic+blocks", "inputs_by_blocks"),
        ("weight-only", None),
    ],
)
def test_inputs_are_those_of_the_arithmetic_that_ran(made: Path, mode: str, inputs: str | None) -> None:
    report = measure(made, made / "out", execution=replace(CPU, modes=(mode,)))
    assert report.causes is not None and report.causes.mode == mode
    model = load_model(made / "source", "cpu")
    layers = {name: model.get_submodule(name) for name in modules_to_replace(model)}
    ids = read_windows(made / "text.txt", build_tokenizer(), 4, 48).ids
    damage = estimate_damage(model, layers, ids)
    assert report.causes.inputs == pytest.approx(sum(layer.of_inputs(inputs) for layer in damage))
    assert report.causes.weights == pytest.approx(sum(layer.weights for layer in damage))


def test_gate_and_result_are_said_beside_the_sources_own_rounding(tmp_path: Path, made: Path) -> None:
    """bfloat16 has steps eight times as wide as float16, and float32 none that matter."""
    found = {}
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        source = save_source(tmp_path / name, dtype)
        causes = measure(made, convert(source, tmp_path / f"{name}-out")).causes
        assert causes is not None and causes.source_dtype == name and causes.source_rounding is not None
        found[name] = causes.source_rounding
    assert found["BF16"] == pytest.approx(64 * found["F16"], rel=0.05)
    report = measure(made, tmp_path / "BF16-out")
    times = report.fidelity[0].mean_kl / found["BF16"]
    (line,) = [line for line in cause_lines(report) if line.startswith("the source")]
    assert line == (
        f"the source's own rounding to BF16 costs about {found['BF16']:.2g}: the mean KL is {times:,.0f} times that, "
        f"the gate {STRICT.max_kl / found['BF16']:,.0f} times"
    )
    causes = measure(made, made / "out").causes
    assert causes is not None and (causes.source_dtype, causes.source_rounding) == ("F32", None)


def test_outcome_is_in_verify_json_on_the_page_and_in_the_summary(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from int8convert.cli.verify_summary import print_report

    report = measure(made, made / "out")
    assert report.causes is not None and report.causes.remedy is not None
    command = report.causes.remedy.command
    assert report.to_json()["causes"]["remedy"]["command"] == command
    path = write_report(report)
    assert path is not None
    written = json.loads(path.read_text(encoding="utf-8"))["causes"]
    assert "command" not in written["remedy"] and str(made) not in json.dumps(written)
    assert written["modules"][0]["name"] == WORST and written["remedy"]["keep"] == list(report.causes.remedy.keep)
    page = render(report, [])
    assert "Estimated causes of the divergence, dynamic" in page and command in page
    print_report(report)
    printed = capsys.readouterr().out
    assert "Estimated causes, dynamic: KL divergence by what is rounded (192 tokens)" in printed
    assert command in printed and f"costliest modules: {WORST}" in printed and "within the gates" in printed


def test_streamed_run_says_how_to_get_the_causes_if_it_failed(made: Path) -> None:
    stream = replace(CPU, stream=True)
    failed = measure(made, made / "out", execution=stream)
    assert failed.causes is None
    (note,) = failed.exact.notes
    assert note.startswith("the source was run layer by layer, so the causes are not known; int8convert outliers SRC ")
    passed = measure(made, made / "out", execution=stream, gates=Gates(9, 9))
    assert passed.is_passed and passed.causes is None and passed.exact.notes == ()


def test_source_that_does_not_fit_is_no_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.outliers.keep.available_bytes", lambda device: 1000)
    report = measure(made, made / "out")
    (note,) = report.exact.notes
    assert report.causes is None and "takes the source's model in memory" in note and "so the causes are not" in note
    assert measure(made, made / "out", gates=Gates(9, 9)).is_passed


RUN = FidelityReport(
    **dict.fromkeys(("reference_perplexity", "perplexity", "same_top1", "outlier_share", "seconds"), 1.0),
    **dict.fromkeys(("median_kl", "p99_kl", "p999_kl", "delta_p"), 0.0),
    n_sequences=16,
    n_tokens=1600,
    delta_nll=0.0,
    delta_nll_interval=(-0.001, 0.001),
    mean_kl=0.02,
    mean_kl_interval=(0.018, 0.022),
    mode="none",
    threshold=None,
    layer_errors=(),
    dtype="float16",
    reference_dtype="float32",
    device="cpu",
    streamed=False,
    peak_memory_bytes=1,
    convention="spread",
)


def layer(name: str, group: int, weights: float, inputs: float = 0.0, n_weights: int = 1000) -> LayerDamage:
    return LayerDamage(name, n_weights, group, weights, inputs, 0.0, 0.0)


def damage(*layers: LayerDamage) -> Damage:
    """A hundred layers of a thousand weights, most of which cost nothing."""
    others = (layer(f"other{i}", 100 + i, 0.0) for i in range(100 - len(layers)))
    return Damage((*layers, *others), 1024, 100_000, "BF16")


def test_smallest_budget_that_is_expected_to_meet_the_gate_is_chosen() -> None:
    found = damage(layer("a", 0, 0.004, 0.004), layer("b", 1, 0.0, 0.006), layer("c", 2, 0.006))
    small = choose_remedy(found, RUN, Gates(0.01, 0.0135))
    assert small == Remedy(("a",), 0.01, 1000, pytest.approx(0.02 * 0.6), True)
    wide = choose_remedy(found, RUN, Gates(0.01, 0.0125))  # the interval would reach above this gate
    assert wide is not None and wide.keep[:2] == ("a", "b") and wide.n_bytes == 2000 and wide.is_enough
    assert wide.mean_kl == pytest.approx(0.02 * 0.3)
    by_dnll = choose_remedy(found, replace(RUN, delta_nll_interval=(0.05, 0.1)), Gates(0.035, 1.0))
    assert by_dnll is not None and by_dnll.keep[:2] == ("a", "b")
    most = choose_remedy(found, RUN, Gates(0.01, 1e-9))
    assert most is not None and set("abc") <= set(most.keep) and most.mean_kl == pytest.approx(0, abs=1e-12)


def test_fused_partners_are_kept_together_and_count_together() -> None:
    found = damage(layer("q", 0, 0.01), layer("k", 0, 0.0), layer("v", 0, 0.0), layer("o", 1, 0.001))
    remedy = choose_remedy(found, RUN, Gates(0.01, 1e-5))
    assert remedy is not None and {"q", "k", "v", "o"} <= set(remedy.keep)
    first = choose_remedy(found, RUN, Gates(0.01, 0.0205))
    assert first is not None and first.keep == ("o",) and first.mean_kl == pytest.approx(0.02 * 10 / 11)


def test_nothing_is_advised_where_nothing_is_lost_or_nothing_fits() -> None:
    assert choose_remedy(damage(), RUN, Gates(0.01, 0.01)) is None
    one = Damage((layer("a", 0, 0.01),), 1024, 1000, "BF16")
    assert choose_remedy(one, RUN, Gates(0.01, 0.01)) is None
    assert find_causes(damage(), RUN).kinds[0].cost == 0


def test_advice_that_is_not_enough_says_so() -> None:
    found = damage(*(layer(f"l{i}", i, 0.0004) for i in range(50)))
    remedy = choose_remedy(found, RUN, Gates(0.01, 0.01))
    assert remedy is not None and not remedy.is_enough and remedy.share == pytest.approx(0.1)
    assert remedy.mean_kl == pytest.approx(0.02 * 0.8)


@pytest.mark.parametrize(
    ("found", "out", "expected"),
    [
        (Provenance("/m/src", Format.BITSANDBYTES), "/m/out", "/m/src out-kept --skip a --skip b"),
        (
            Provenance(
                "org/src",
                Format.COMPRESSED_TENSORS,
                skip=("*.fc2",),
                only=("layers.*",),
                threshold=5.0,
                kept_for_values=("x",),
                revision="abc",
                allow_missing=("score",),
                calibrated=frozenset({"y"}),
                is_known=True,
            ),
            "me/out",
            "org/src out-kept --format compressed-tensors --revision abc --only 'layers.*' --skip '*.fc2' --skip a "
            "--skip b --allow-missing score --threshold 5 --calibration CAL --round calibrated --on-nonfinite keep "
            "--trust-remote-code",
        ),
    ],
)
def test_command_repeats_the_options_of_the_conversion(found: Provenance, out: str, expected: str) -> None:
    remedy = with_command(Remedy(("a", "b"), 0.1, 1, 0.1, True), found, out, found.is_known)
    assert remedy.command == f"int8convert quantize {expected}"


def test_export_is_not_made_by_one_command() -> None:
    from int8convert.verification.exact.provenance import ExportStep

    found = Provenance("/m/src", Format.BITSANDBYTES, exports=(ExportStep.__new__(ExportStep),))
    assert with_command(Remedy(("a",), 0.1, 1, 0.1, True), found, "/m/out", False).command == ""


@pytest.mark.usefixtures("rotation_in_process")
def test_causes_of_a_rotated_checkpoint_are_those_of_its_rotated_weights(made: Path, tmp_path: Path) -> None:
    convert(made / "source", tmp_path / "out", rotate=True)
    report = measure(made, tmp_path / "out", gates=Gates(9, 1e-9))
    causes = report.causes
    assert causes is not None and causes.remedy is not None and " --rotate" in causes.remedy.command
    assert causes.weights + causes.inputs == pytest.approx(report.fidelity[0].mean_kl, rel=0.5)
