"""`load` and outputs that were allowed to be incomplete, or hold more than the model takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import int8convert
from int8convert.errors import CorruptFileError
from tests.scenarios.strangers.makers import convert, make_model, write_shards
from tests.tools.tiny_models import read_tensors

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]


def test_head_that_may_be_missing_is_loaded_when_asked_for(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", without=("lm_head.weight",))
    out = convert(source, tmp_path / "out", allow_missing=["lm_head"])
    with pytest.raises(CorruptFileError, match=r"has no 'lm_head.weight'") as refused:
        int8convert.load(out)
    assert "allow_missing=['lm_head']" in refused.value.hint
    model = int8convert.load(out, allow_missing=["lm_head"])
    embedding = read_tensors(source)["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_tensor_of_no_use_is_left_aside(source: Path, tmp_path: Path) -> None:
    write_shards(source, {**read_tensors(source), "extra.weight": torch.ones(4, 4)}, 1)
    model = int8convert.load(convert(source, tmp_path / "converted"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.int8


def test_int8_layer_the_model_does_not_have_is_an_error(out: Path) -> None:
    tensors = read_tensors(out)
    more = {n.replace("layers.1", "layers.2"): tensors[n].clone() for n in tensors if "layers.1.mlp.up" in n}
    write_shards(out, {**tensors, **more}, 1)
    with pytest.raises(CorruptFileError, match=r"the model has no, 'model.layers.2.mlp.up_proj.SCB'"):
        int8convert.load(out)
