"""The model card says what is known and no more, in a form the Hub reads, whatever strangers wrote into the files."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard

import int8convert
from int8convert.inspection import inspect
from int8convert.publish.card import CARD_MARK, make_card
from int8convert.publish.finished import read_finished
from int8convert.runtime.text.texts import DEFAULT_TEXT, Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from tests.cli.conftest import Run, run
from tests.publish.conftest import LOOSE
from tests.tools.tiny_models import edit_config, save_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

__all__ = ["run"]

REPO = "me/model-int8"


def card_of(out: Path, repository: str = REPO) -> str:
    return make_card(read_finished(out), repository, inspect(out))


def edit_manifest(out: Path, **changes: Any) -> None:
    path = out / "int8convert" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_from_the_hub(out: Path) -> None:
    """Let the manifest say that the source was a repository."""
    manifest = json.loads((out / "int8convert" / "manifest.json").read_text())
    manifest["conversion"]["source"] |= {"repository": "org/model", "commit": "c" * 40}
    edit_manifest(out, conversion=manifest["conversion"], source="org/model", source_revision="c" * 40)


def test_the_hub_s_own_reader_understands_the_metadata(verified: Path) -> None:
    as_from_the_hub(verified)
    data = ModelCard(card_of(verified)).data

    assert data.base_model == "org/model"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert (data.license, data.language) == ("mit", ["en", "de"])
    assert data.tags == ["int8", "llm.int8", "8-bit", "bitsandbytes"]


def test_results_are_those_of_verify(out: Path, verified: Path) -> None:
    report = json.loads((verified / "int8convert" / "verify.json").read_text())
    run = report["fidelity"][0]
    results = ModelCard(card_of(verified)).data.eval_results

    assert results is not None
    found = {result.metric_type: result.metric_value for result in results}
    keys = ("perplexity", "reference_perplexity", "mean_kl", "same_top1")
    assert found == {key: float(f"{run[key]:.6g}") for key in keys}
    assert {result.task_type for result in results} == {"text-generation"}
    assert f"{run['perplexity']:.6g}" in card_of(verified) and f"{run['mean_kl']:.6f}" in card_of(verified)


def test_what_was_not_verified_is_said_and_no_number_invented(out: Path) -> None:
    card = card_of(out)

    assert "**Not verified**: how far it is from its source was not measured. `int8convert verify me/model-int8" in card
    assert ModelCard(card).data.eval_results is None
    assert "perplexity" not in card.lower()


def test_local_source_is_no_base_model_and_its_path_stays_here(out: Path, tmp_path: Path) -> None:
    card = card_of(out)

    assert ModelCard(card).data.base_model is None
    assert str(tmp_path) not in card
    assert "The weights of a local checkpoint, `source`, in 8-bit integers" in card
    assert f"`int8convert verify {REPO} --reference SOURCE`" in card
    assert "int8convert quantize SOURCE OUT" in card


def test_coverage_and_weight_error_are_those_of_the_files(out: Path) -> None:
    found = inspect(out)
    card = card_of(out)

    assert f"\n{100 * found.coverage:.1f} % of 94.7 k parameters." in card and "of the bytes" not in card
    manifest = json.loads((out / "int8convert" / "manifest.json").read_text())
    values = [
        tensor["sqnr_db"]
        for shard in manifest["shards"]
        for name, tensor in shard["tensors"].items()
        if name.endswith("fc1.weight")
    ]
    row = next(line for line in card.splitlines() if line.startswith("| fc1 |"))
    assert row.split(" | ")[1:4] == [f"{len(values)}", f"{sum(values) / len(values):.1f}", f"{min(values):.1f}"]


def test_stored_outlier_columns_are_counted(source: Path, out: Path) -> None:
    assert "outliers.safetensors" not in card_of(out) and "stored outlier columns" not in card_of(out)
    int8convert.store_outliers(source, out, {"model.decoder.layers.0.fc1": [1, 5], "model.decoder.layers.1.fc1": [2]})

    assert "holds 3 columns of 2 weights in 16 bits, chosen in a way that the file does not record: " in card_of(out)
    assert "int8convert, by its own runtime, which also uses the stored outlier columns:" in card_of(out)


@pytest.mark.parametrize("is_told", [False, True])
def test_columns_are_excepted_from_what_the_command_makes_again(is_told: bool, source: Path, out: Path) -> None:
    assert "The first command writes the same bytes, on any machine (int8convert 0.1.0)." in card_of(out)
    calibration = {"text": "a.txt", "text_sha256": "ab" * 32, "n_sequences": 16, "length": 256}
    how = "by running 16 windows of 256 tokens of `a.txt` (sha256 `abababababababab`) through the model"
    columns = {"model.decoder.layers.0.fc1": [1]}
    int8convert.store_outliers(source, out, columns, calibration if is_told else None)

    chosen = how if is_told else "in a way that the file does not record"
    assert f"but not `int8convert/outliers.safetensors`, whose columns were chosen {chosen}." in card_of(out)
    assert f"\nint8convert verify {REPO} --reference SOURCE\n" in card_of(out)
    as_from_the_hub(out)
    assert f"\nint8convert verify {REPO}\n" in card_of(out)


def test_command_to_reproduce_has_the_options_of_the_conversion(
    source: Path, tmp_path: Path, map_in_process: None
) -> None:
    int8convert.quantize(
        source, tmp_path / "o", int8convert.PlanOptions(skip=["*.fc2"]), threshold=5.0, on_event=lambda event: None
    )
    as_from_the_hub(tmp_path / "o")

    expected = f"int8convert quantize org/model OUT --revision {'c' * 40} --skip '*.fc2' --threshold 5.0"
    assert expected in card_of(tmp_path / "o")


def test_command_with_many_patterns_is_whole(source: Path, tmp_path: Path, map_in_process: None) -> None:
    patterns = ["model.decoder.layers.0.fc2"] * 32
    int8convert.quantize(
        source, tmp_path / "o", int8convert.PlanOptions(skip=patterns), threshold=5.0, on_event=lambda event: None
    )

    (command,) = re.findall(r"\nint8convert quantize (.*)\n", card_of(tmp_path / "o"))
    assert command.count("--skip") == 32 and command.endswith(" --threshold 5.0")


def test_other_layout_has_its_own_tag_and_loader(tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    int8convert.quantize(
        source, tmp_path / "o", int8convert.PlanOptions(format="compressed-tensors"), on_event=lambda event: None
    )
    card = card_of(tmp_path / "o")

    assert "compressed-tensors" in (ModelCard(card).data.tags or [])
    assert f'model = LLM("{REPO}")\n' in card
    assert "--format compressed-tensors" in card


def test_command_to_verify_gives_the_numbers_of_the_card(verified: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "sample.txt"
    text.write_text(DEFAULT_TEXT.read_text()[:5000])
    for more, command in (
        ({"path": text}, "--text sample.txt --sequences 3 --length 20 --max-dnll 9 --max-kl 9"),
        ({"path": text, "convention": "halves"}, "--text sample.txt --sequences 3 --length 20 --convention halves"),
        ({}, "verify OUT --sequences 3 --length 20 --max-dnll 9"),
    ):
        report = int8convert.verify(
            verified, text=Text(n_sequences=3, length=20, **more), gates=LOOSE, execution=Execution("cpu")
        )
        write_report(report)
        card = card_of(verified)
        (line,) = re.findall(r"\nint8convert (verify OUT .*)\n", card)
        assert command in line
        assert f"has the sha256 `{hashlib.sha256((text if more else DEFAULT_TEXT).read_bytes()).hexdigest()}`" in card

        words = line.replace(" OUT ", f" {verified} ").replace("sample.txt", str(text)).split()
        code, printed, _ = run(*words, "--device", "cpu", "--json")

        again = json.loads(printed)["fidelity"][0]
        assert code == 0
        assert [again[key] for key in ("perplexity", "mean_kl")] == [
            getattr(report.fidelity[0], key) for key in ("perplexity", "mean_kl")
        ]


def edit_verify(out: Path, **changes: Any) -> None:
    path = out / "int8convert" / "verify.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_command_to_verify_names_dataset_and_tasks(verified: Path) -> None:
    text = {"name": "c4", "dataset": "c4", "sha256": "ab" * 32, "n_sequences": 256, "length": 2048}
    tasks = [{"task": "piqa", "metric": metric, "int8": 0.7123456789} for metric in ("acc", "acc_norm")]
    edit_verify(verified, text={**text, "convention": "contiguous: 256", "description": "c4: a file"}, tasks=tasks)
    card = card_of(verified)

    windows = "--dataset c4 --sequences 256 --length 2048"
    assert f"int8convert verify OUT {windows} --level tasks --tasks piqa --max-dnll 9 --max-kl 9\n" in card
    results = ModelCard(card).data.eval_results or []
    found = {(result.dataset_name, result.dataset_type) for result in results}
    assert found == {("c4: a file", "c4"), ("piqa", "piqa")}
    assert {result.metric_value for result in results if result.dataset_type == "piqa"} == {0.712346}


def test_text_of_one_s_own_is_no_dataset(verified: Path, tmp_path: Path) -> None:
    text = tmp_path / "README.md"
    text.write_text(DEFAULT_TEXT.read_text())
    write_report(
        int8convert.verify(verified, text=Text(text, n_sequences=3, length=20), execution=Execution("cpu"), gates=LOOSE)
    )

    found = ModelCard(card_of(verified)).data.eval_results or []
    assert {(result.dataset_name, result.dataset_type) for result in found} == {("custom text, README.md", "custom")}


def test_verdict_names_the_gates_that_were_passed(verified: Path) -> None:
    dnll, kl = "upper end of the interval of the change of NLL at most 9", "mean KL divergence at most 9"
    run = f"{dnll}, upper end of the interval of the {kl}"
    assert f"**Passed**: {run}. By int8convert 0.1.0." in card_of(verified)
    edit_verify(verified, tasks=[{"task": "piqa", "metric": "acc", "int8": 0.7}])
    assert f"**Passed**: {run}, no task done worse with p below 0.001." in card_of(verified)
    edit_verify(verified, fidelity=[], text=None, tasks=[])
    assert "**Passed.** By int8convert 0.1.0." in card_of(verified)
    assert card_of(verified).endswith("int8convert verify OUT --level exact\n```\n")


def test_older_report_without_a_verdict_names_the_gate_that_its_version_had(verified: Path) -> None:
    path = verified / "int8convert" / "verify.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({name: report[name] for name in report.keys() - {"verdict", "undecided"}}))
    dnll, kl = "upper end of the interval of the change of NLL at most 9", "mean KL divergence at most 9"
    assert f"**Passed**: {dnll}, {kl}. By int8convert 0.1.0." in card_of(verified)


def test_too_few_tokens_are_not_verified_and_the_card_says_how_many_would_do(verified: Path) -> None:
    line = "fidelity (dynamic): mean KL is 0.0098; about 6,400 tokens in 100 windows would do"
    undecided = [{"line": line, "gate": "max_kl", "n_sequences": 100, "n_tokens": 6400}]
    edit_verify(verified, is_passed=False, verdict="undecided", undecided=undecided)

    expected = f"**Not verified**: too few tokens were measured to say whether it passes: {line}. "
    assert expected in card_of(verified)


def test_what_failed_is_no_lack_of_measuring(verified: Path) -> None:
    edit_verify(verified, is_passed=False, failures=["codes: fc1.weight row 3 is off", "more"])

    expected = "**Not verified**: it did not pass when it was verified: codes: fc1.weight row 3 is off; more. "
    assert expected in card_of(verified)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (453.32, 453.01612345, ["453.320", "453.016"]),
        (9.9999996, 10.1234567, ["10.0000", "10.1235"]),
        (123456.7, 3.0, ["123457", "3"]),
        ("inf", 2.5, ["inf", "2.50000"]),
    ],
)
def test_perplexities_have_the_same_decimals(before: Any, after: float, shown: list[str], verified: Path) -> None:
    run = json.loads((verified / "int8convert" / "verify.json").read_text())["fidelity"][0]
    edit_verify(verified, fidelity=[{**run, "reference_perplexity": before, "perplexity": after}])

    assert f"| dynamic | {' | '.join(shown)} | " in card_of(verified)


def test_size_stands_beside_that_of_the_source(source: Path, out: Path) -> None:
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    after = sum(path.stat().st_size for path in out.glob("*.safetensors"))

    assert f"\n{after / 1e3:.3g} kB in 2 files, instead of the {before / 1e3:.3g} kB of its source, " in card_of(out)


@pytest.mark.parametrize(
    ("said", "link"),
    [
        ({"license": "other", "license_name": "opt"}, "LICENSE"),
        ({"license": "other", "license_link": "https://x.example/l"}, "https://x.example/l"),
        ({"license": "mit"}, None),
        ({}, None),
    ],
)
def test_text_of_a_licence_of_its_own_is_linked(said: dict[str, str], link: str | None, out: Path) -> None:
    edit_manifest(out, source_card=said)

    assert ModelCard(card_of(out)).data.to_dict().get("license_link") == link


def test_licence_is_said_as_far_as_it_is_known(out: Path) -> None:
    assert "Licence: that of the source, `mit`, see [LICENSE](LICENSE)." in card_of(out)
    edit_manifest(out, source_card={})
    assert "Licence: that of the source, which is not known here, see [LICENSE](LICENSE)." in card_of(out)
    (out / "LICENSE").unlink()
    as_from_the_hub(out)
    assert "Licence: that of [org/model](https://huggingface.co/org/model).\n" in card_of(out)
    card = {"license": "other", "license_name": "opt", "license_link": "https://x.example/l"}
    edit_manifest(out, source_card=card)
    assert "[org/model](https://huggingface.co/org/model), `opt`, see <https://x.example/l>.\n" in card_of(out)


def test_link_to_the_source_leads_to_the_hub_in_use_and_holds_no_login(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_from_the_hub(out)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:secret@hub.example")

    assert "The weights of [org/model](https://hub.example/org/model) at commit `ccc" in card_of(out)
    assert "secret" not in card_of(out)


def test_export_is_made_again_by_an_export(out: Path, tmp_path: Path) -> None:
    int8convert.export(out, tmp_path / "exported", format="compressed-tensors")
    card = card_of(tmp_path / "exported")

    assert "\nint8convert export SOURCE OUT --format compressed-tensors\n" in card
    assert "instead of" not in card and "multiplied in 16" not in card


HOSTILE = (
    "x | y\n\n# Free money\n<script>alert(1)</script> ![i](http://evil.example/p.png) `` ``` ```\n---\nlicense: mit\n"
)


def test_strangers_words_end_no_table_block_or_metadata(verified: Path) -> None:
    before = card_of(verified)
    edit_manifest(
        verified,
        source=HOSTILE,
        model_class=HOSTILE,
        tool=HOSTILE,
        source_card={"license": HOSTILE, "language": [HOSTILE], "pipeline_tag": HOSTILE},
    )
    verify = json.loads((verified / "int8convert" / "verify.json").read_text())
    verify["tool"] = verify["text"]["description"] = verify["text"]["convention"] = verify["text"]["name"] = HOSTILE
    verify["files"]["int8convert/manifest.json"] = hashlib.sha256(
        (verified / "int8convert" / "manifest.json").read_bytes()
    ).hexdigest()
    (verified / "int8convert" / "verify.json").write_text(json.dumps(verify))

    card = card_of(verified)

    block, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    assert yaml.safe_load(block)["license"] == HOSTILE  # as a value, quoted
    assert body.lstrip().startswith(CARD_MARK)
    outside = re.sub(r"`[^`\n]*`", "", body)  # in a line of code nothing means anything
    assert (
        "\n# Free money" not in body and "<script>" not in outside and not re.search(r"(?<!\\)\]\(http://evil", outside)
    )
    assert body.count("```") == before.count("```")
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        line for line in before.splitlines() if line.startswith("#")
    ]


def test_python_of_every_snippet_is_python(verified: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", card_of(verified), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize("format_name", ["bitsandbytes", "compressed-tensors"])
def test_vllm_is_told_of_where_it_has_a_loader(format_name: str, tmp_path: Path, map_in_process: None) -> None:
    """That of bitsandbytes left vLLM for a plugin, and refuses models with experts."""
    dense = save_checkpoint("llama", tmp_path / "dense")
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, intermediate_size=128, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    cards = {}
    for source in (dense, tmp_path / "experts"):
        out = tmp_path / f"{source.name}-int8"
        int8convert.quantize(
            source, out, int8convert.PlanOptions(format=format_name, min_coverage=0), on_event=lambda event: None
        )
        cards[source.name] = card_of(out)

    needs = "vllm vllm-bnb-plugin" if format_name == "bitsandbytes" else "vllm"
    assert f"vLLM (`pip install {needs}`):\n\n```python\nfrom vllm import LLM\n" in cards["dense"]
    assert ("from vllm import LLM" in cards["experts"]) is (format_name == "compressed-tensors")
    refused = "vLLM does not load this layout of a model with experts; for that, convert with `--format compressed-"
    assert (refused in cards["experts"]) is (format_name == "bitsandbytes")
    assert refused not in cards["dense"]


def test_model_of_no_known_task_has_no_pipeline_and_no_generation(tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    int8convert.quantize(source, tmp_path / "o", on_event=lambda event: None)
    edit_config(tmp_path / "o", architectures=["SomethingElse"])
    card = card_of(tmp_path / "o")

    assert ModelCard(card).data.pipeline_tag is None
    assert "AutoModel.from_pretrained" in card and "generate(" not in card
