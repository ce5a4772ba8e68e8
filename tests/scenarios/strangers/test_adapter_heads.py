"""Adapters that bring a head along, which the base checkpoint has no place for: a hint that leads somewhere."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import int8convert
from int8convert.errors import AdapterError
from tests.scenarios.strangers.makers import change, convert, passes_exact, write_shards

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]


def save_classifier_adapter(source: Path, directory: Path) -> Path:
    """An adapter as PEFT saves it after training a classifier on a base checkpoint."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification.from_pretrained(source, num_labels=2)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("task_type", "named"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        (None, "the class it was trained with"),
        (7, "the class it was trained with"),
    ],
)
def test_hint_names_the_class_to_merge_with(task_type: object, named: str, source: Path, tmp_path: Path) -> None:
    adapter = save_classifier_adapter(source, tmp_path / "adapter")
    change(adapter / "adapter_config.json", task_type=task_type)
    with pytest.raises(AdapterError) as caught:
        convert(source, tmp_path / "out", lora=adapter)
    assert "has a head of its own, 'score.weight', which the checkpoint has no place for" in caught.value.message
    assert caught.value.hint.startswith(f"load the checkpoint as {named}, merge the adapter with PEFT")
    assert not (tmp_path / "out").exists()


def test_what_the_hint_says_works(source: Path, tmp_path: Path) -> None:
    adapter = save_classifier_adapter(source, tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert int8convert.plan(tmp_path / "merged").model_map.model_class == "LlamaForSequenceClassification"
    assert passes_exact(convert(tmp_path / "merged", tmp_path / "out"))


def test_an_adapter_of_another_model_is_still_said_to_be_that(source: Path, tmp_path: Path) -> None:
    adapter = save_classifier_adapter(source, tmp_path / "adapter")
    change(source / "config.json", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    write_shards(source, {name: t for name, t in tensors.items() if ".layers.1." not in name}, 1)
    with pytest.raises(AdapterError, match=r"tensors the adapter .* changes are not in the checkpoint") as caught:
        convert(source, tmp_path / "out", lora=adapter)
    assert caught.value.hint.startswith("give the adapter with the model it was trained on")
