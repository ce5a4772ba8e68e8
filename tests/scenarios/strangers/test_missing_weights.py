"""Weights that the model needs and no file holds: an error before anything is written, unless the user allows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import CorruptFileError, MissingWeightsError, OutputError
from int8convert.planning.plan_checkpoint import PlanOptions
from int8convert.runtime.load import load
from int8convert.verification.exact.level import ExactReport, verify_exact
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import (
    INDEX_NAME,
    change,
    convert,
    make_model,
    passes_exact,
    write_index,
    write_shards,
)
from tests.tools.family_models import build_family, families

pytestmark = pytest.mark.usefixtures("map_in_process")

UP, NORM, HEAD = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "score.weight"

Edit = Callable[[dict[str, torch.Tensor]], object]


def edit_weights(directory: Path, edit: Edit) -> Path:
    """Change the tensors of a model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def as_classifier(source: Path) -> Path:
    """A base checkpoint under the name of a class with a head that is yet to be trained."""
    change(source / "config.json", architectures=["LlamaForSequenceClassification"], num_labels=2, pad_token_id=0)
    return edit_weights(source, lambda tensors: tensors.pop("lm_head.weight"))


def findings(report: ExactReport, name: str) -> list[str]:
    return [str(finding) for check in report.checks if check.name == name for finding in check.findings]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ((NORM,), "'model.norm.weight' [64] is in no weight file, and LlamaForCausalLM needs it"),
        ((UP, NORM), f"2 tensors, the first '{UP}' [128, 64], are in no weight file, and LlamaForCausalLM needs them"),
        (("lm_head.weight",), "'lm_head.weight' [128, 64] is in no weight file"),
    ],
)
def test_missing_weights_are_named_and_nothing_is_written(
    lost: tuple[str, ...], message: str, source: Path, tmp_path: Path
) -> None:
    edit_weights(source, lambda tensors: [tensors.pop(name) for name in lost])
    for attempt in (lambda: convert(source, tmp_path / "out"), lambda: int8convert.plan(source)):
        with pytest.raises(MissingWeightsError) as caught:
            attempt()
        assert message in caught.value.message
        assert f"--allow-missing {lost[0].removesuffix('.weight')!r}" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_dry_run_ends_in_the_same_two_lines_after_the_plan(source: Path, run: Run) -> None:
    edit_weights(source, lambda tensors: tensors.pop(NORM))
    code, out, err = run("quantize", source, "--dry-run")
    assert code == 1 and "nothing was written" in out
    assert "error: 'model.norm.weight' [64] is in no weight file" in err and err.endswith("; nothing was written\n")
    code, out, err = run("quantize", source, "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["error"]["hint"].endswith("; nothing was written") and err.endswith("; nothing was written\n")
    assert (code, plan["error"]["code"], plan["missing"]) == (1, "missing_weights", [NORM])


def test_missing_weights_of_an_index_are_said_to_be_in_it(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", n_shards=2)
    index = json.loads((source / INDEX_NAME).read_text())
    shard = source / index["weight_map"][NORM]
    save_file({k: t for k, t in load_file(shard).items() if k != NORM}, shard, {"format": "pt"})
    with pytest.raises(MissingWeightsError, match=r"the index names 'model\.norm\.weight', which no file holds"):
        convert(source, tmp_path / "out")


def test_a_shard_that_the_index_does_not_name_is_pointed_out(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", n_shards=3)
    index = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    write_index(source, {name: file for name, file in index.items() if not file.startswith("model-00003")})
    with pytest.raises(MissingWeightsError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.message.endswith(
        "'model-00003-of-00003.safetensors' is beside the other files, and the index does not name it"
    )


def test_a_head_that_is_yet_to_be_trained_is_allowed_and_said(source: Path, tmp_path: Path, run: Run) -> None:
    as_classifier(source)
    with pytest.raises(MissingWeightsError, match=r"'score\.weight' \[2, 64\]"):
        convert(source, tmp_path / "out")
    code, out, _ = run("quantize", source, tmp_path / "out", "--allow-missing", "score", "--json")
    assert code == 0
    assert any("'score.weight' is in no weight file: loaders make up" in note for note in json.loads(out)["notes"])
    manifest = json.loads((tmp_path / "out" / "int8convert" / "manifest.json").read_text())
    assert manifest["missing"] == [HEAD] and manifest["conversion"]["options"]["allow_missing"] == ["score"]
    report = verify_exact(tmp_path / "out")
    assert report.is_passed
    assert "score.weight, which LlamaForSequenceClassification needs, is in no file" in report.notes[-1]


def test_plan_lists_what_is_missing_without_use_or_of_another_shape(source: Path) -> None:
    edit_weights(as_classifier(source), lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))
    plan = int8convert.plan(source, PlanOptions(allow_missing=["score.*"])).to_json()
    assert (plan["missing"], plan["unexpected"], plan["mismatched"]) == ([HEAD], ["extra.weight"], [])
    assert "'extra.weight' is of no use to LlamaForSequenceClassification, and kept as stored" in plan["notes"]


def test_a_conversion_that_was_allowed_other_weights_is_not_resumed(source: Path, tmp_path: Path) -> None:
    as_classifier(source)
    convert(source, tmp_path / "out", allow_missing=["score"])
    with pytest.raises(OutputError, match=r"--allow-missing score then, --allow-missing '\*' now"):
        convert(source, tmp_path / "out", allow_missing=["*"])


def test_allowed_patterns_do_not_cover_other_weights(source: Path, tmp_path: Path) -> None:
    edit_weights(as_classifier(source), lambda tensors: tensors.pop(NORM))
    with pytest.raises(MissingWeightsError, match=r"^'model\.norm\.weight'"):
        convert(source, tmp_path / "out", allow_missing=["score"])


@pytest.mark.parametrize(
    ("name", "shape"), [("model.embed_tokens.weight", (130, 64)), (UP, (64, 128)), (NORM, (32,)), (NORM, (64, 1))]
)
def test_other_shape_than_the_model_s_is_refused_with_both(
    name: str, shape: tuple[int, ...], source: Path, tmp_path: Path
) -> None:
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(shape).half()}))
    with pytest.raises(CorruptFileError) as caught:
        convert(source, tmp_path / "out", allow_missing=["*"])
    assert f"'{name}' has shape {list(shape)} in the weight files, expected [" in caught.value.message
    assert caught.value.message.endswith("for the LlamaForCausalLM of config.json")
    assert not (tmp_path / "out").exists()


def test_vocabulary_larger_than_the_config_says(source: Path, tmp_path: Path) -> None:
    change(source / "config.json", vocab_size=120)
    with pytest.raises(
        CorruptFileError, match=r"'lm_head\.weight' has shape \[128, 64\].*expected \[120, 64\].*1 more"
    ):
        convert(source, tmp_path / "out")


def test_verify_finds_what_source_and_output_lack_alike(source: Path, tmp_path: Path) -> None:
    """As an output of a version that did not look, with a manifest and without."""
    edit_weights(source, lambda tensors: tensors.pop(NORM))
    out = convert(source, tmp_path / "out", allow_missing=["*"])
    manifest = out / "int8convert" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["conversion"]["options"].pop("allow_missing")
    manifest.write_text(json.dumps(value))
    expected = (
        "model.norm.weight: expected [64], which LlamaForCausalLM needs, "
        "found no such tensor: loaders initialize it at random"
    )
    assert findings(verify_exact(out), "needs") == [expected]
    manifest.unlink()
    assert findings(verify_exact(out, reference=source), "needs") == [expected]
    assert not passes_exact(out, source)


def test_verify_finds_another_shape(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    change(source / "config.json", num_key_value_heads=2)
    change(out / "config.json", num_key_value_heads=2)
    found = findings(verify_exact(out, reference=source), "needs")
    assert (
        "model.layers.0.self_attn.k_proj.weight: expected [32, 64], which LlamaForCausalLM has, found [64, 64]" in found
    )


@pytest.mark.filterwarnings("ignore")
def family_without(name: str, tail: str, directory: Path) -> Path:
    """A tiny model of a family, saved without the tensors whose names end so."""
    family = next(family for family in families() if family.name == name)
    build_family(family).save_pretrained(directory)
    before = load_file(directory / "model.safetensors")
    edit_weights(directory, lambda tensors: [tensors.pop(name) for name in before if name.endswith(tail)])
    assert len(load_file(directory / "model.safetensors")) < len(before)
    return directory


def test_positions_that_the_class_sets_are_a_note(tmp_path: Path) -> None:
    source = family_without("masked/mra", "position_ids", tmp_path / "source")
    plan = int8convert.plan(source)
    assert plan.model_map.notes == (
        "'mra.embeddings.position_ids' is in no weight file: MraForMaskedLM sets the values itself",
    )
    assert plan.to_json()["missing"] == ["mra.embeddings.position_ids"]
    report = verify_exact(convert(source, tmp_path / "out", min_coverage=0))
    assert findings(report, "needs") == []
    assert load(tmp_path / "out").config.model_type == "mra"


def test_a_learned_buffer_that_the_class_can_do_without_is_a_note(tmp_path: Path) -> None:
    source = family_without("causal/axk1", "e_score_correction_bias", tmp_path / "source")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    plan = int8convert.plan(source)
    assert plan.to_json()["missing"] == []
    assert (
        f"'{name}' is in no weight file: AXK1ForCausalLM allows that, and loaders leave the values that the class "
        "begins with"
    ) in plan.model_map.notes
    convert(source, tmp_path / "out")
    assert name in (tmp_path / "out" / "int8convert" / "manifest.json").read_text()


def test_a_table_of_integers_that_was_learned_is_not(tmp_path: Path) -> None:
    source = family_without("causal/deepseek_v4", "tid2eid", tmp_path / "source")
    with pytest.raises(MissingWeightsError, match=r"^'model\.layers\.0\.mlp\.gate\.tid2eid'"):
        int8convert.plan(source)


@pytest.mark.parametrize("lost", ["experts.1.down_proj.weight", "experts.3.gate_proj.weight"])
def test_one_expert_without_its_weights(lost: str, tmp_path: Path) -> None:
    """The experts are merged on loading, so what is there is one too short, or does not fit together."""
    source = family_without("causal/qwen3_moe", f"layers.0.mlp.{lost}", tmp_path / "source")
    with pytest.raises(CorruptFileError, match=r"'model\.layers\.0\.mlp\.experts\.\w+_proj'.*expected \[4, "):
        int8convert.plan(source, PlanOptions(allow_missing=["*"]))


def test_output_without_a_head_loads_with_the_head_16_bit(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = convert(as_classifier(source), tmp_path / "out", allow_missing=["score"])
    model, info = transformers.LlamaForSequenceClassification.from_pretrained(
        out, output_loading_info=True, device_map="cpu"
    )
    assert model.score.weight.dtype == torch.float16 and set(info["missing_keys"]) == {HEAD}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_coverage_counts_the_model_s_parameters(source: Path) -> None:
    before = int8convert.plan(source)
    edit_weights(source, lambda tensors: tensors.update({"extra.weight": torch.ones(1000, 1000)}))
    assert int8convert.plan(source).n_parameters == before.n_parameters
    edit_weights(source, lambda tensors: tensors.pop(UP))
    after = int8convert.plan(source, PlanOptions(allow_missing=["*"]))
    assert after.n_parameters == before.n_parameters
    assert after.n_int8_parameters == before.n_int8_parameters - 128 * 64


def test_single_and_sharded_sources_are_judged_alike(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", without=(UP,))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    write_shards(source, tensors, 3)
    with pytest.raises(MissingWeightsError, match=rf"^'{UP}' \[128, 64\] is in no weight file, .* make up the values$"):
        convert(source, tmp_path / "out")
