"""The model card says what is known and no more, in a form the Hub reads, whatever strangers wrote into the files."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import int8convert
from int8convert.checkpoint.inspection import inspect
from int8convert.publish.card import CARD_MARK, make_card
from int8convert.publish.finished import read_finished
from tests.tiny_models import edit_config, save_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

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
    assert found == {key: run[key] for key in ("perplexity", "reference_perplexity", "mean_kl", "same_top1")}
    assert {result.task_type for result in results} == {"text-generation"}
    assert f"{run['perplexity']:.6g}" in card_of(verified) and f"{run['mean_kl']:.6f}" in card_of(verified)


def test_what_was_not_verified_is_said_and_no_number_invented(out: Path) -> None:
    card = card_of(out)

    assert "**Not verified**" in card
    assert ModelCard(card).data.eval_results is None
    assert "perplexity" not in card.lower()


def test_local_source_is_no_base_model_and_its_path_stays_here(out: Path, tmp_path: Path) -> None:
    card = card_of(out)

    assert ModelCard(card).data.base_model is None
    assert str(tmp_path) not in card
    assert "a local checkpoint, `source`" in card


def test_coverage_and_weight_error_are_those_of_the_files(out: Path) -> None:
    found = inspect(out)
    card = card_of(out)

    assert f"{100 * found.coverage:.1f} % of" in card
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
    assert "outliers.safetensors" not in card_of(out)
    int8convert.store_outliers(source, out, {"model.decoder.layers.0.fc1": [1, 5], "model.decoder.layers.1.fc1": [2]})

    assert "holds 3 columns of 2 weights in 16 bits" in card_of(out)


def test_command_to_reproduce_has_the_options_of_the_conversion(
    source: Path, tmp_path: Path, map_in_process: None
) -> None:
    int8convert.quantize(source, tmp_path / "o", skip=["*.fc2"], threshold=5.0, on_event=lambda event: None)
    as_from_the_hub(tmp_path / "o")

    expected = f"int8convert quantize org/model OUT --revision {'c' * 40} --skip '*.fc2' --threshold 5.0"
    assert expected in card_of(tmp_path / "o")


def test_other_layout_has_its_own_tag_and_loader(tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    int8convert.quantize(source, tmp_path / "o", format="compressed-tensors", on_event=lambda event: None)
    card = card_of(tmp_path / "o")

    assert "compressed-tensors" in (ModelCard(card).data.tags or [])
    assert f'print(LLM("{REPO}").generate(' in card
    assert "--format compressed-tensors" in card


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


def test_model_of_no_known_task_has_no_pipeline_and_no_generation(tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    int8convert.quantize(source, tmp_path / "o", on_event=lambda event: None)
    edit_config(tmp_path / "o", architectures=["SomethingElse"])
    card = card_of(tmp_path / "o")

    assert ModelCard(card).data.pipeline_tag is None
    assert "AutoModel.from_pretrained" in card and "generate(" not in card
