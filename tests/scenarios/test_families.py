"""Some families of those that `scripts/check_families` tries all of, one for each trick that needs care."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

from tests.tools.family_check import FamilyResult, Outcome, check_family
from tests.tools.family_models import families

# transformers, bitsandbytes and torch have their remarks on tiny models, on tied weights and on int8.
pytestmark = pytest.mark.filterwarnings("ignore")


def check(name: str, folder: Path) -> FamilyResult:
    return check_family(next(family for family in families() if family.name == name), folder)


@pytest.mark.parametrize(
    "name",
    [
        "causal/gptj",
        "causal/jamba",
        "causal/qwen3_moe",
        "causal/zamba",
        "masked/modernbert",
        "seq2seq/bart",
        "seq2seq/qwen2_audio",
    ],
)
def test_family_matches_bitsandbytes(name: str, tmp_path: Path, map_in_process: None) -> None:
    result = check(name, tmp_path)
    assert result.outcome is Outcome.MATCHES, result


def test_inputs_of_four_dimensions_are_the_operations_limit_not_the_checkpoints(
    tmp_path: Path, map_in_process: None
) -> None:
    result = check("causal/deepseek_v3", tmp_path)
    assert result.outcome is Outcome.MATCHES_FLAT, result
    assert result.bitsandbytes_fails.startswith("running")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal/mamba", "read by the model's own code"),
        ("causal/hy_v4", "the model's own code casts to its weight's dtype"),
        ("masked/mobilebert", "read by the model's own code"),
        ("masked/nomic_bert", "merged or split on loading"),
        ("causal/inkling2_text", "renamed on loading, its scale is not"),
    ],
)
def test_what_bitsandbytes_breaks_stays_16_bit(name: str, reason: str, tmp_path: Path, map_in_process: None) -> None:
    result = check(name, tmp_path)
    assert result.outcome is Outcome.MATCHES_WITH_OUR_SKIPS, result
    assert reason in result.kept


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal/falcon", "FalconLinear: not replaced by the bitsandbytes loader"),
        ("causal/llama4_text", "makes model.layers.0.feed_forward.experts a SequentialLlama4TextExperts"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(
    name: str, reason: str, tmp_path: Path, map_in_process: None
) -> None:
    result = check(name, tmp_path)
    assert result.outcome is Outcome.REFUSED, result
    assert reason in result.detail
