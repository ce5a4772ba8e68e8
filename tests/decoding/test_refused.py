"""Forms that share names with those that are decoded are refused by name, with what would be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import int8convert
from int8convert.errors import AlreadyQuantizedError, Int8ConvertError
from tests.tools.low_bit_checkpoints import save_tensors

CODES = {"a.weight": torch.zeros(8, 32, dtype=torch.uint8)}
CT = {"quant_method": "compressed-tensors"}

FORMS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "AWQ of ModelOpt": ({"quant_method": "modelopt"}, {"a.pre_quant_scale": torch.ones(64)}, "inputs are multiplied"),
    "SVDQuant": ({"quant_method": "modelopt"}, {"a.svdquant_lora_a": torch.ones(4)}, "only part of a sum"),
    "rotated": ({**CT, "transform_config": {"config_groups": {"u": {}}}}, {}, "weights are rotated"),
    "sparse": ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "without the zeros"),
    "marlin of compressed-tensors": ({**CT, "format": "marlin-24"}, {}, "in another order"),
    "6 bits": ({**CT, "format": "mxfp6-pack-quantized"}, {}, "four codes share three bytes"),
    "marlin of GPTQ": ({"quant_method": "gptq", "is_marlin_format": True}, {}, "in another order"),
    "planar GPTQ": ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, {}, "in another order"),
    "AWQ gemv": ({"quant_method": "awq", "version": "GEMV"}, {}, "in another order"),
    "auto-round": ({"quant_method": "auto-round", "packing_format": "auto_round:marlin"}, {}, "in another order"),
    "HQQ": ({"quant_method": "hqq"}, {}, "scales are quantized themselves"),
    "AQLM": ({"quant_method": "aqlm"}, {}, "indices of codebooks"),
    "EXL3": ({"quant_method": "exl3"}, {}, "indices of codebooks"),
}


@pytest.mark.parametrize("form", FORMS)
def test_form_is_refused_with_a_reason(form: str, tmp_path: Path) -> None:
    block, tensors, why = FORMS[form]
    save_tensors(tmp_path / "source", {**CODES, **tensors}, block)
    with pytest.raises(AlreadyQuantizedError, match=why):
        int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty", [{"transform_config": {}}, {"sparsity_config": {"format": "dense"}}])
def test_empty_entries_are_no_such_form(empty: dict[str, Any], tmp_path: Path) -> None:
    save_tensors(tmp_path / "source", CODES, {**CT, **empty})
    with pytest.raises(AlreadyQuantizedError, match="names quant_method"):
        int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)


KEYS = (
    "quant_method",
    "format",
    "checkpoint_format",
    "packing_format",
    "version",
    "bits",
    "group_size",
    "config_groups",
)
VALUES: list[Any] = [[], {}, [[]], 0, -1, 10**30, 1.5, "", "x" * 2000, {"a": []}, {"a": {"weights": {"num_bits": [4]}}}]


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"])
def test_entries_of_any_type_are_errors_of_ours(method: str, tmp_path: Path) -> None:
    """Words, scales and codes under the names of every format, which a config of nonsense is to explain."""
    words = torch.zeros(8, 32, dtype=torch.int32)
    tensors = {
        **{"a.qweight": words, "a.qzeros": words.clone(), "a.scales": torch.zeros(8, 32)},
        **{
            "b.weight_packed": words.clone(),
            "b.weight_scale": torch.zeros(8, 2),
            "b.weight_shape": torch.tensor([8, 64]),
        },
        "c.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn),
    }
    for key in KEYS:
        for value in VALUES:
            save_tensors(tmp_path / "source", tensors, {"quant_method": method, key: value})
            with pytest.raises(Int8ConvertError):
                int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)
