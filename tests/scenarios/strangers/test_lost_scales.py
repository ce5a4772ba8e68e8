"""FP8 codes without their scale, and scales without their codes: never weights that are off by a factor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import CorruptFileError, MissingWeightsError
from tests.scenarios.strangers.makers import change, change_block, convert, make_model
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.tiny_models import read_tensors

pytestmark = pytest.mark.usefixtures("map_in_process")

DOWN = "model.layers.1.mlp.down_proj.weight"
MODULE = DOWN.removesuffix(".weight")

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A checkpoint with scales of blocks and the block in config.json, in one file."""
    plain = make_model(tmp_path / "plain")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    change(plain / "config.json", dtype="bfloat16")
    save_fp8(plain, tmp_path / "fp8", "block")
    write(tmp_path / "fp8", read_tensors(tmp_path / "fp8"))
    return tmp_path / "fp8"


def write(directory: Path, tensors: Tensors) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def rename_scales(directory: Path, name: str) -> None:
    """Call the scale of each module `name` instead of `weight_scale_inv`."""
    suffix = "weight_scale_inv"
    tensors = read_tensors(directory)
    write(directory, {k.removesuffix(suffix) + name if k.endswith(suffix) else k: t for k, t in tensors.items()})


def remove_block(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))


def refused(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(CorruptFileError) as caught:
        convert(source, out, **options)
    assert not out.exists()
    return caught.value.message


@pytest.mark.parametrize("neighbour", ["", "scales", "scale_weight", "weight.scale", "weight_scales"])
def test_matrix_without_its_scale_is_named_with_what_looks_like_one(neighbour: str, fp8: Path, tmp_path: Path) -> None:
    tensors = read_tensors(fp8)
    scale = tensors.pop(f"{DOWN}_scale_inv")
    write(fp8, tensors | ({f"{MODULE}.{neighbour}": scale} if neighbour else {}))
    assert refused(fp8, tmp_path / "out") == (
        f"the FP8 matrix '{DOWN}', F8_E4M3 [64, 128], has no scale: expected '{DOWN}_scale_inv' or '{DOWN}_scale', "
        + (f"found '{MODULE}.{neighbour}'" if neighbour else "found none")
    )


@pytest.mark.parametrize("name", ["weight_scale", "scale", "qscale_weight"])
def test_scales_under_the_names_transformers_knows_are_the_same_weights(name: str, fp8: Path, tmp_path: Path) -> None:
    expected = read_tensors(convert(fp8, tmp_path / "expected"))
    rename_scales(fp8, name)
    found = read_tensors(convert(fp8, tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_plain_casts_without_a_block_are_what_they_say(fp8: Path, tmp_path: Path) -> None:
    tensors = {k: t for k, t in read_tensors(fp8).items() if not k.endswith("scale_inv")}
    write(fp8, tensors)
    remove_block(fp8)
    found = read_tensors(convert(fp8, tmp_path / "out"))
    assert torch.equal(found[f"{MODULE}.SCB"], tensors[DOWN].float().abs().amax(1))


@pytest.mark.parametrize("name", ["scale_weight", "scale"])
def test_without_a_block_scales_of_other_tools_are_not_passed_over(name: str, fp8: Path, tmp_path: Path) -> None:
    """As ComfyUI names them, and DeepSeek: no loader would use them, so the codes would be taken for weights."""
    rename_scales(fp8, name)
    remove_block(fp8)
    assert f".{name}'" in refused(fp8, tmp_path / "out").rpartition("found ")[2]


def test_a_module_that_is_no_fp8_by_the_config_is_a_cast(fp8: Path, tmp_path: Path) -> None:
    tensors = read_tensors(fp8)
    tensors.pop(f"{DOWN}_scale_inv")
    write(fp8, tensors)
    change_block(fp8, modules_to_not_convert=["layers.0", "down_proj"])
    found = read_tensors(convert(fp8, tmp_path / "out"))
    assert torch.equal(found[f"{MODULE}.SCB"], tensors[DOWN].float().abs().amax(1))


@pytest.mark.parametrize("has_block", [True, False])
def test_codes_of_other_modules_are_a_cast(has_block: bool, fp8: Path, tmp_path: Path) -> None:
    """A loader replaces Linear modules only; it reads the codes of others as numbers."""
    names = ("model.embed_tokens.weight", "model.norm.weight")
    tensors = read_tensors(fp8)
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn) for name in names}
    if not has_block:
        tensors = {k: t[:1, :1] if k.endswith("scale_inv") else t for k, t in tensors.items()}
        remove_block(fp8)
    write(fp8, tensors)
    found = read_tensors(convert(fp8, tmp_path / "out"))
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in names)


def test_codes_that_were_widened_beside_their_scale(fp8: Path, tmp_path: Path) -> None:
    """A loader multiplies by the scale, so the weights would be off by it."""
    tensors = read_tensors(fp8)
    write(fp8, tensors | {DOWN: tensors[DOWN].bfloat16()})
    message = refused(fp8, tmp_path / "out")
    assert message.startswith(f"'{DOWN}' is BF16, expected the FP8 codes that '{DOWN}_scale_inv' is the scale of")


def test_a_scale_whose_weight_is_gone(fp8: Path, tmp_path: Path) -> None:
    tensors = read_tensors(fp8)
    tensors.pop(DOWN)
    write(fp8, tensors)
    with pytest.raises(MissingWeightsError, match=rf"^'{DOWN}' \[64, 128\] is in no weight file"):
        convert(fp8, tmp_path / "out")


def test_a_scale_of_nothing_the_model_has_is_a_note(fp8: Path) -> None:
    write(fp8, read_tensors(fp8) | {"model.layers.7.weight_scale_inv": torch.ones(1, 1)})
    assert int8convert.plan(fp8).model_map.notes == (
        "'model.layers.7.weight_scale_inv' is of no use to LlamaForCausalLM, and kept as stored",
    )


@pytest.mark.parametrize("how", ["dry run", "run"])
def test_plan_and_run_say_the_same(how: str, fp8: Path, tmp_path: Path) -> None:
    tensors = read_tensors(fp8)
    tensors.pop(f"{DOWN}_scale_inv")
    write(fp8, tensors)
    with pytest.raises(CorruptFileError, match="has no scale"):
        int8convert.plan(fp8) if how == "dry run" else convert(fp8, tmp_path / "out")


@pytest.mark.parametrize("neighbour", ["", "weight_amax"])
def test_without_a_block_one_lost_scale_among_others_is_no_plain_cast(
    neighbour: str, fp8: Path, tmp_path: Path
) -> None:
    tensors = {k: t[:1, :1] if k.endswith("scale_inv") else t for k, t in read_tensors(fp8).items()}
    scale = tensors.pop(f"{DOWN}_scale_inv")
    write(fp8, tensors | ({f"{MODULE}.{neighbour}": scale} if neighbour else {}))
    remove_block(fp8)
    assert f"the FP8 matrix '{DOWN}', F8_E4M3 [64, 128], has no scale" in refused(fp8, tmp_path / "out")


def test_without_a_block_an_amax_beside_codes_is_named(fp8: Path, tmp_path: Path) -> None:
    rename_scales(fp8, "weight_amax")
    remove_block(fp8)
    assert ".weight_amax'" in refused(fp8, tmp_path / "out").rpartition("found ")[2]
