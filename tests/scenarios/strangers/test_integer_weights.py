"""Float parameters stored as integers: codes without their scale, or values that an int8 loader would not cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import CorruptFileError
from int8convert.verification.exact.level import verify_exact
from tests.scenarios.strangers.makers import convert, make_model

pytestmark = pytest.mark.usefixtures("map_in_process")

Q, HEAD, NORM = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def store_as(directory: Path, name: str, dtype: torch.dtype) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = (tensors[name] * 100).to(dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("name", "dtype", "found"),
    [
        (
            Q,
            torch.int8,
            "I8, expected floats for the LlamaForCausalLM of config.json: most likely codes that have lost",
        ),
        (HEAD, torch.int32, "I32, expected floats"),
        (HEAD, torch.bool, "BOOL, expected floats"),
        (NORM, torch.int64, "I64, expected floats"),
        (EMBEDDING, torch.uint8, "U8, expected floats"),
        (EMBEDDING, torch.int16, "I16, expected floats"),
    ],
)
def test_a_float_parameter_of_integers_is_refused(
    name: str, dtype: torch.dtype, found: str, source: Path, tmp_path: Path
) -> None:
    store_as(source, name, dtype)
    for attempt in (lambda: convert(source, tmp_path / "out"), lambda: int8convert.plan(source)):
        with pytest.raises(CorruptFileError) as caught:
            attempt()
        assert caught.value.message.startswith(f"'{name}' is stored as {found}")
    assert not (tmp_path / "out").exists()


def test_integers_the_model_has_no_use_for_are_a_note(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"steps": torch.ones(1, dtype=torch.int64)}, source / "model.safetensors", {"format": "pt"})
    assert "'steps' is of no use to LlamaForCausalLM, and kept as stored" in int8convert.plan(source).model_map.notes


def test_verify_finds_them_in_an_output_of_a_version_that_did_not_look(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    out = convert(source, tmp_path / "out")
    for directory in (source, out):
        store_as(directory, NORM, torch.int32)
    report = verify_exact(out, reference=source)
    assert any(f"{NORM}: expected floats in the source" in str(f) for check in report.checks for f in check.findings)


@pytest.mark.parametrize(
    ("form", "leaf"),
    [
        ("bitsandbytes", "SCB"),
        ("bitsandbytes", "weight_format"),
        ("compressed-tensors", "weight_scale"),
        ("compressed-tensors", "weight_zero_point"),
        ("compressed-tensors", "weight_g_idx"),
    ],
)
def test_a_stray_tensor_that_the_loader_would_take_for_part_of_an_int8_layer(
    form: str, leaf: str, source: Path, tmp_path: Path
) -> None:
    name = Q.replace("weight", leaf)
    tensors = load_file(source / "model.safetensors")
    tensors[name] = torch.ones(64, 1, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=f"written as '{name}', or read as part of one int8 weight"):
        convert(source, tmp_path / "out", format=form)
