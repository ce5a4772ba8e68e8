"""What the other tests of this folder spoil is good before they do: else they would pass for the wrong reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8convert.runtime.generate import generate
from tests.scenarios.strangers.makers import convert, make_model, passes_exact


@pytest.mark.usefixtures("map_in_process")
def test_untouched_output_passes(out: Path, source: Path) -> None:
    assert passes_exact(out)
    assert passes_exact(out, source)


def test_untouched_output_generates(out: Path) -> None:
    assert generate(out, ["w5 w6"], max_new_tokens=2).n_new_tokens == 2


@pytest.mark.usefixtures("map_in_process")
def test_sharded_source_converts(tmp_path: Path) -> None:
    out = convert(make_model(tmp_path / "source", n_shards=2), tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) == 2
