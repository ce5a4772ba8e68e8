"""A compressed-tensors block of other tools is taken if loaders read it as they read ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from int8convert.formats import compressed_tensors


def block() -> dict[str, Any]:
    return copy.deepcopy(compressed_tensors.block(["lm_head"], 6.0))


def with_entries(where: tuple[str, ...], **entries: Any) -> dict[str, Any]:
    made = block()
    place = made["config_groups"]["group_0"] if where else made
    for name in where[1:]:
        place = place[name]
    place.update(entries)
    return made


GROUP, WEIGHTS, INPUTS = ("group",), ("group", "weights"), ("group", "input_activations")
OF_OTHER_TOOLS = {
    "ours": block(),
    "llm-compressor's": with_entries(
        (),
        **{"global_compression_ratio": 1.2, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}},
        version="0.13.0",
    ),
    "its group": with_entries(GROUP, output_activations=None, format="int-quantized"),
    "its weights": with_entries(WEIGHTS, observer="mse", observer_kwargs={}, group_size=None, actorder=None),
    "its activations": with_entries(INPUTS, observer=None, block_structure=None, zp_dtype=None),
}
WRONG = {
    "targets": with_entries(GROUP, targets=["Linear", "Embedding"]),
    "targets.": with_entries(GROUP, targets=["re:.*proj"]),
    "targets..": with_entries(GROUP, targets=[]),
    "input_activations": with_entries(GROUP, input_activations=None),
    "output_activations": with_entries(GROUP, output_activations={"num_bits": 8}),
    "format": with_entries(GROUP, format="pack-quantized"),
    "transform_config": with_entries((), transform_config={"config_groups": {"a": {}}}),
    "sparsity_config": with_entries((), sparsity_config={"format": "sparse-bitmask"}),
    "kv_cache_scheme": with_entries((), kv_cache_scheme={"num_bits": 8}),
    "x": with_entries((), x=1),
    "x.": with_entries(WEIGHTS, x=1),
    "strategy": with_entries(INPUTS, strategy="tensor"),
    "strategy.": with_entries(WEIGHTS, strategy="tensor"),
    "dynamic": with_entries(INPUTS, dynamic=False),
    "dynamic.": with_entries(WEIGHTS, dynamic=True),
    "symmetric": with_entries(WEIGHTS, symmetric=1),
    "actorder": with_entries(WEIGHTS, actorder="weight"),
    "group_size": with_entries(WEIGHTS, group_size=32),
    "config_groups": with_entries((), config_groups={}),
    "config_groups.": with_entries((), config_groups={"a": {}, "b": {}}),
    "config_groups.*": with_entries((), config_groups={"a": 7}),
}


@pytest.mark.parametrize("name", OF_OTHER_TOOLS)
def test_same_scheme_in_other_words_is_taken(name: str) -> None:
    assert list(compressed_tensors.foreign_entries(OF_OTHER_TOOLS[name])) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_loaders_read_in_another_way_is_found(name: str) -> None:
    (found,) = compressed_tensors.foreign_entries(WRONG[name])
    assert found[0].endswith(f".{name.rstrip('.')}")
