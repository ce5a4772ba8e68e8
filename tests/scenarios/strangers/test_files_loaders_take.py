"""What is converted is what transformers loads, and nothing in the output sends it elsewhere.

Which files transformers chooses, `tests/checkpoint/test_loader_parity.py` compares on generated directories.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import CorruptFileError, SourceError
from int8convert.runtime.models import read_config
from int8convert.sources import open_source
from tests.scenarios.strangers.makers import change, convert, make_model, passes_exact, write, write_shards
from tests.tools.options import quantize

pytestmark = pytest.mark.usefixtures("map_in_process")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def equal(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other weights than that of `source`, in one file. Nobody writes to it."""
    return make_model(tmp_path_factory.mktemp("older") / "older", seed=7)


def put_beside(source: Path, older: Path) -> None:
    """Put other weights in two shards with an index beside those of a source."""
    write_shards(source, load_file(older / SINGLE), 2)


def test_single_file_beside_an_index_is_what_is_converted(source: Path, older: Path, out: Path, tmp_path: Path) -> None:
    put_beside(source, older)
    report = quantize(source, tmp_path / "new")
    assert equal(tmp_path / "new", out)
    assert report.notes[-2:] == (
        f"transformers' choice of weight files is converted; vLLM would load from this source: '{INDEX}'",
        f"not converted, because transformers loads '{SINGLE}': 'model-00001-of-00002.safetensors', "
        f"'model-00002-of-00002.safetensors', '{INDEX}'",
    )
    manifest = json.loads((tmp_path / "new" / "int8convert" / "manifest.json").read_text())
    assert manifest["notes"] == list(report.notes)
    assert passes_exact(tmp_path / "new")


@pytest.mark.parametrize("index", ["of shards that are gone", "not JSON"])
def test_index_that_transformers_does_not_read_stops_nothing(index: str, source: Path, older: Path, out: Path) -> None:
    put_beside(source, older)
    for path in source.glob("model-0*.safetensors"):
        path.unlink()
    if index == "not JSON":
        write(source / INDEX, "not JSON")
    assert equal(convert(source, source.parent / "new"), out)


def test_shards_of_pickles_count_for_nothing_beside_safetensors(source: Path, out: Path) -> None:
    """Not even where they are damaged; and an index of safetensors comes before a single pickle."""
    write(source / "pytorch_model.bin", "damaged")
    write(source / "pytorch_model.bin.index.json", "damaged")
    assert equal(convert(source, source.parent / "new"), out)
    write_shards(source, load_file(source / SINGLE), 2)
    (source / SINGLE).unlink()
    assert equal(convert(source, source.parent / "newer"), out)


def test_versioned_config_is_the_one_that_is_converted(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "config.json", source / "config.4.0.0.json")
    shutil.copy(source / "config.json", source / "config.99.0.0.json")
    change(source / "config.4.0.0.json", rms_norm_eps=0.25, vendor="its own")
    change(source / "config.json", configuration_files=["config.4.0.0.json", "config.99.0.0.json"])
    report = quantize(source, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["rms_norm_eps"] == 0.25 and written["vendor"] == "its own"
    assert "configuration_files" not in written and not list((tmp_path / "new").glob("config.*.json"))
    read = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    assert read.quantization_config["load_in_8bit"] and read.rms_norm_eps == 0.25
    assert any("'config.4.0.0.json' is the config that is converted" in note for note in report.notes)
    assert any("left out, because transformers reads 'config.4.0.0.json'" in note for note in report.notes)
    assert passes_exact(tmp_path / "new")


def test_versioned_configs_of_other_versions_are_left_out(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "config.json", source / "config.99.0.0.json")
    change(source / "config.json", configuration_files=["config.99.0.0.json"])
    report = quantize(source, tmp_path / "new")
    assert "configuration_files" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert not (tmp_path / "new" / "config.99.0.0.json").exists()
    assert any(note.startswith("configuration_files is left out of 'config.json'") for note in report.notes)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["config.4.0.0.json"], r"has transformers read 'config\.4\.0\.0\.json' in its place, which is not there"),
        (["config.old.json"], r"names the configuration file 'config\.old\.json', which has no version in its name"),
        ("config.4.0.0.json", "has configuration_files that are no list of names"),
        (None, "has configuration_files that are no list of names"),
    ],
)
def test_configuration_files_that_transformers_cannot_follow_are_refused(files: Any, match: str, source: Path) -> None:
    change(source / "config.json", configuration_files=files)
    with pytest.raises(CorruptFileError, match=match):
        open_source(source)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_weights_that_the_config_names_are_converted(n_shards: int, source: Path, older: Path, tmp_path: Path) -> None:
    named = "own.safetensors"
    if n_shards == 1:
        shutil.copy(older / SINGLE, source / named)
    else:
        put_beside(source, older)
        (source / INDEX).rename(source / "own.safetensors.index.json")
        named = "own.safetensors.index.json"
    change(source / "config.json", transformers_weights=named)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()["model.norm.weight"]
    report = quantize(source, tmp_path / "new")
    assert equal(tmp_path / "new", convert(older, tmp_path / "expected"))
    assert torch.equal(weights(tmp_path / "new")["model.norm.weight"], loaded)
    assert "transformers_weights" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert any("transformers_weights is left out" in note for note in report.notes)
    assert any(note.startswith(f"not converted, because transformers loads '{named}'") for note in report.notes)
    assert passes_exact(tmp_path / "new")


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ("gone.safetensors", "which are not there"),
        ("sub/own.safetensors", "which are not beside it"),
        ("../own.safetensors", "which are not beside it"),
        ("pytorch_model.bin", "expected a safetensors file"),
        (7, "expected a safetensors file"),
    ],
)
def test_weights_that_the_config_names_and_are_none_are_refused(named: Any, match: str, source: Path) -> None:
    change(source / "config.json", transformers_weights=named)
    with pytest.raises(SourceError, match=match):
        open_source(source)


def test_weights_that_a_part_of_the_config_names_are_refused(source: Path) -> None:
    change(source / "config.json", text_config={"transformers_weights": "model.safetensors"})
    with pytest.raises(SourceError, match="names transformers_weights in 'text_config'"):
        open_source(source)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of a source."""
    chance = torch.Generator().manual_seed(3)
    shapes = {"A": (2, 64), "B": (64, 2)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{module}.lora_{x}.weight": torch.randn(shape, generator=chance) for x, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    write(tmp_path / "adapter" / "adapter_config.json", config)
    save_file(matrices, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own
def test_adapter_beside_the_weights_is_left_out_or_merged(
    source: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    merged = convert(source, tmp_path / "expected", lora=adapter)
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, source)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert model.peft_config, "transformers adds it to the weights"
    report = quantize(source, tmp_path / "alone")
    assert equal(tmp_path / "alone", out)
    assert not list((tmp_path / "alone").glob("adapter*"))
    note = (
        "the adapter beside the weights is left out: where peft is installed, transformers adds it to them; "
        "the same directory given as --lora merges it"
    )
    assert note in report.notes
    assert passes_exact(tmp_path / "alone")
    report = quantize(source, tmp_path / "merged", lora=source)
    assert equal(tmp_path / "merged", merged)
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert "'adapter_config.json' is left out: its adapter is merged" in report.notes


def test_model_with_an_adapter_beside_it_is_not_loaded_for_a_comparison(source: Path, adapter: Path) -> None:
    """transformers would run the weights with the adapter, and the conversion is of the weights."""
    shutil.copy(adapter / "adapter_config.json", source)
    with pytest.raises(SourceError, match=r"holds adapter_config\.json beside its weights") as caught:
        read_config(source)
    assert caught.value.hint.startswith("name a checkpoint without adapter_config.json")


def test_adapter_weights_without_their_config_are_left_aside(source: Path, adapter: Path, out: Path) -> None:
    """So does transformers; vLLM takes them for weights of the model, which the user is told."""
    shutil.copy(adapter / "adapter_model.safetensors", source)
    report = quantize(source, source.parent / "new")
    assert equal(source.parent / "new", out)
    assert f"not converted, because transformers loads '{SINGLE}': 'adapter_model.safetensors'" in report.notes
    assert any(
        note.startswith("transformers' choice of weight files is converted; vLLM would load") for note in report.notes
    )


def test_adapter_in_place_of_a_model_is_told_the_option(adapter: Path) -> None:
    with pytest.raises(SourceError, match="is a LoRA adapter and no model") as caught:
        open_source(adapter)
    assert f"run `int8convert quantize MODEL OUT --lora '{adapter}'`" in caught.value.hint


def test_part_of_a_distributed_checkpoint_is_refused(source: Path) -> None:
    """By its name alone, transformers loads every safetensors file of the directory."""
    shutil.copy(source / SINGLE, source / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(SourceError, match="is a part of a distributed checkpoint"):
        open_source(source)


def test_variant_is_left_aside_or_named(source: Path, out: Path) -> None:
    shutil.copy(source / SINGLE, source / "model.fp16.safetensors")
    report = quantize(source, source.parent / "new")
    assert equal(source.parent / "new", out)
    assert f"not converted, because transformers loads '{SINGLE}': 'model.fp16.safetensors'" in report.notes
    (source / SINGLE).unlink()
    with pytest.raises(SourceError, match="holds no weights") as caught:
        open_source(source)
    assert "rename 'model.fp16.safetensors', which loaders take only if asked for the variant 'fp16'" in (
        caught.value.hint
    )


def test_format_of_mistral_is_left_aside_and_told(source: Path, older: Path, out: Path) -> None:
    shutil.copy(older / SINGLE, source / "consolidated.safetensors")
    write(source / "params.json", "{}")
    report = quantize(source, source.parent / "new")
    assert equal(source.parent / "new", out)
    assert not (source.parent / "new" / "consolidated.safetensors").exists()
    assert (
        "transformers' choice of weight files is converted; vLLM would load from this source: "
        "'consolidated.safetensors'" in report.notes
    )


def test_class_with_further_weight_files_is_refused(source: Path) -> None:
    shutil.copy(source / SINGLE, source / "head.safetensors")
    assert open_source(source)
    change(source / "config.json", model_type="jev")
    with pytest.raises(SourceError, match=r"transformers loads 'head\.safetensors' on top of the other weights"):
        open_source(source)


def modules(*paths: str) -> str:
    return json.dumps([{"idx": i, "name": str(i), "path": path, "type": "x.X"} for i, path in enumerate(paths)])


def test_modules_of_a_sentence_encoder_are_carried_whatever_their_folders_are_called(source: Path) -> None:
    write(source / "modules.json", modules("", "pooling", "1_Router", "3_Normalize"))
    names = ("pooling/config.json", "1_Router/query_0_Dense/model.safetensors", "1_Router/query_0_Dense/config.json")
    others = ("2_Dense/config.json", "pooling/.secret", "runs/x.json")
    for name in (*names, *others):
        write(source / name, "{}")
    out = convert(source, source.parent / "new")
    assert all((out / name).read_text() == "{}" for name in names)
    assert not any((out / name).exists() for name in others)
    assert passes_exact(out)


def test_model_in_a_folder_of_a_sentence_encoder_is_not_passed_over(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, source / "0_Transformer")
    write(source / "modules.json", modules("0_Transformer", "1_Pooling"))
    with pytest.raises(SourceError, match="has sentence-transformers load the model in '0_Transformer'"):
        open_source(source)
    (source / SINGLE).unlink()
    (source / "config.json").unlink()
    with pytest.raises(
        SourceError, match="holds no weights: those of this sentence encoder are in its folder"
    ) as caught:
        open_source(source)
    assert caught.value.hint.startswith("give that folder")
    assert open_source(source / "0_Transformer").shards


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b"])
def test_module_outside_the_checkpoint_is_refused(path: str, source: Path) -> None:
    write(source / "modules.json", modules("", path))
    with pytest.raises(SourceError, match="outside the checkpoint"):
        open_source(source)


def test_linked_folder_of_a_module_is_not_followed_out(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "private" / "config.json", "{}")
    (source / "1_Pooling").symlink_to(tmp_path / "private")
    write(source / "modules.json", modules("", "1_Pooling"))
    with pytest.raises(SourceError, match=r"'1_Pooling' is a link to '.*private', outside the checkpoint"):
        open_source(source)


def test_hidden_files_are_not_carried_and_code_of_generate_is(source: Path) -> None:
    for name in (".env", ".netrc", ".config.json", "additional_chat_templates/.x.jinja", "custom_generate/generate.py"):
        write(source / name, "secret")
    found = {path.relative_to(source).as_posix() for path in open_source(source).auxiliary_files}
    assert not any("/." in f"/{name}" for name in found)
    assert "custom_generate/generate.py" in found


def add_adapter(out: Path) -> None:
    write(out / "adapter_config.json", {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})


def add_versioned_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    write(out / "config.4.0.0.json", config)
    change(out / "config.json", configuration_files=["config.4.0.0.json"])


def add_equal_versioned_config(out: Path) -> None:
    """Whether it is read depends on the version of transformers; today nothing would change."""
    shutil.copy(out / "config.json", out / "config.4.0.0.json")
    change(out / "config.json", configuration_files=["config.4.0.0.json"])


def add_key_alone(out: Path) -> None:
    change(out / "config.json", configuration_files=[])


def name_other_weights(out: Path) -> None:
    tensors = load_file(out / SINGLE)
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "own.safetensors", {"format": "pt"})
    change(out / "config.json", transformers_weights="own.safetensors")


def name_the_same_weights(out: Path) -> None:
    change(out / "config.json", transformers_weights=SINGLE)


def add_distributed_part(out: Path) -> None:
    shutil.copy(out / SINGLE, out / "shard-00001-model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        *(add_adapter, add_versioned_config, add_equal_versioned_config, add_key_alone, name_other_weights),
        *(name_the_same_weights, add_distributed_part),
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_output_that_sends_loaders_elsewhere_does_not_pass(spoil: Callable[[Path], None], out: Path) -> None:
    spoil(out)
    try:
        assert not passes_exact(out)
    except SourceError as error:
        assert error.message and error.hint


def test_export_takes_what_loaders_take_and_says_what_it_leaves(out: Path, older: Path, tmp_path: Path) -> None:
    write_shards(out, load_file(older / SINGLE), 2)
    report = int8convert.export(out, tmp_path / "new", format="torchao")
    assert f"not converted, because transformers loads '{SINGLE}'" in " ".join(report.notes)
    assert torch.equal(
        weights(tmp_path / "new")["model.embed_tokens.weight"], load_file(out / SINGLE)["model.embed_tokens.weight"]
    )
