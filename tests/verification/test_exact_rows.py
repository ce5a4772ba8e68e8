"""The judge of rows agrees with the reference on what is right, and finds whatever is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cuda_kernels import reference
from int8convert.formats.format import Format
from int8convert.verification.exact import rows
from int8convert.verification.exact.comparison import rules_for
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.exact.rows import Judgement, RowRules, judge_rows

OURS = RowRules(stores_absmax=True)
FOREIGN = RowRules(True, needs_reference_codes=False, scale_tolerance=None, may_be_fp16=True)


def random_rows(seed: int, exponent: int = 0, dtype: type = np.float32) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((5, 33)).astype(np.float32) * np.float32(2.0**exponent)
    return values.astype(dtype).astype(np.float32)


def judge(
    weight: npt.NDArray[np.float32],
    codes: npt.NDArray[np.int8],
    stored: npt.NDArray[np.float32],
    rules: RowRules = OURS,
) -> Judgement:
    return judge_rows("w", weight, codes, stored, 100, rules)


@given(st.integers(0, 2**32 - 1), st.integers(-140, 100), st.sampled_from([np.float32, np.float16]))
def test_what_the_reference_gives_passes(seed: int, exponent: int, dtype: type) -> None:
    weight = random_rows(seed, exponent, dtype if abs(exponent) < 10 else np.float32)
    weight[2] = 0
    right = reference.row_quantize(weight)
    assert judge(weight, right.codes, right.absmax) == Judgement(0, 0, {})
    scale = right.absmax / np.float32(127)
    assert judge(weight, right.codes, scale, RowRules(stores_absmax=False)) == Judgement(0, 0, {})


@given(st.integers(0, 2**32 - 1), st.integers(-110, 100))
def test_reference_rounding_is_within_half_a_step_and_two_ulps(seed: int, exponent: int) -> None:
    """What lets rows with the right codes pass without measuring the distance: here it is measured."""
    weight = random_rows(seed, exponent)
    right = reference.row_quantize(weight)
    for stored, rules in ((right.absmax, OURS), (right.absmax / np.float32(127), RowRules(stores_absmax=False))):
        absmax = np.abs(weight).max(axis=1)
        judged = rows._Rows(
            "w", weight, right.codes, stored, 0, rules, absmax, np.ones_like(absmax), stored, right.codes
        )
        assert judged.judge().findings == {}


def test_what_rounding_adds_to_half_a_step_is_allowed_and_no_more() -> None:
    """Of a million weights, some lie so near to halfway that float32 sends them to the farther code."""
    weight = np.random.default_rng(0).standard_normal((1, 1 << 20)).astype(np.float32)
    right = reference.row_quantize(weight)
    step = right.absmax.astype(np.float64) / 127
    beyond = np.abs(weight - right.codes * step[:, None]) - step / 2
    assert 0 < beyond.max() <= 2 * np.spacing(right.absmax).max()
    # Codes that differ somewhere else send all of the row through the measurement.
    stored = np.nextafter(right.absmax, np.float32(0))
    assert judge(weight, right.codes, stored, replace(OURS, scale_tolerance=1e-6, slack_steps=1e-5)).findings == {}
    odd = right.codes.copy()
    odd[0, np.argmax(right.codes < 127)] += 1
    assert judge(weight, odd, right.absmax).findings["weights"].n_places == 1


def test_merged_weights_may_differ_in_their_last_bits_from_machine_to_machine() -> None:
    rules = rules_for(Provenance("", Format.BITSANDBYTES, lora="adapter", is_known=True), Format.BITSANDBYTES)
    weight = np.array([[127, 100.5, 3.5, 1]], np.float32)
    there = reference.row_quantize(weight * np.float32(1 + 8e-6) + np.array([[0, 1e-4, 0, 0]], np.float32))
    found = judge(weight, there.codes, there.absmax, rules)
    assert found.findings == {} and found.n_codes > 0 and found.n_scales > 0
    assert judge(weight, there.codes, there.absmax).findings.keys() == {"codes", "scales", "weights"}
    wrong = there.absmax * np.float32(1.0001)
    assert "scales" in judge(weight, there.codes, wrong, rules).findings


@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(0, 32), st.sampled_from([-1, 1]))
def test_any_code_moved_by_one_is_found_where_it_is(seed: int, row: int, column: int, by: int) -> None:
    weight = random_rows(seed, dtype=np.float16)
    right = reference.row_quantize(weight)
    in_steps = weight[row, column] / (right.absmax[row] / 127)
    assume(abs(abs(in_steps - right.codes[row, column]) - 0.5) > 1e-3)  # halfway, either code is as near
    codes = right.codes.copy()
    codes[row, column] += by if abs(int(codes[row, column]) + by) <= 127 else -by
    for rules in (OURS, FOREIGN):
        found = judge(weight, codes, right.absmax, rules)
        assert (found.n_codes, found.n_scales) == (1, 0)
        finding = found.findings["weights"]
        assert (finding.row, finding.column, finding.n_places) == (100 + row, column, 1)
        assert ("codes" in found.findings) is (rules is OURS)


@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.sampled_from([0.99, 1.01]))
def test_scale_one_percent_off_is_found_by_itself_and_by_the_weights(seed: int, row: int, factor: float) -> None:
    weight = random_rows(seed)
    right = reference.row_quantize(weight)
    stored = right.absmax.copy()
    stored[row] *= np.float32(factor)
    found = judge(weight, right.codes, stored)
    assert found.findings.keys() == {"weights", "scales"} and found.n_scales == 1
    assert found.findings["scales"].row == 100 + row == found.findings["weights"].row
    assert judge(weight, right.codes, stored, FOREIGN).findings.keys() == {"weights"}


def test_scale_one_ulp_off_is_found_unless_it_was_exported() -> None:
    weight = random_rows(0)
    right = reference.row_quantize(weight)
    stored = np.nextafter(right.absmax, np.float32(np.inf))
    assert judge(weight, right.codes, stored).findings.keys() == {"scales"}
    assert judge(weight, right.codes, stored, replace(OURS, scale_tolerance=2.0**-22)).findings == {}


def test_code_of_a_weight_that_lies_halfway_must_be_the_even_one_in_ours_alone() -> None:
    weight = np.array([[127, 2.5, 3.5, -0.5]], np.float32)
    absmax = np.array([127], np.float32)
    assert judge(weight, np.array([[127, 2, 4, 0]], np.int8), absmax).findings == {}
    odd = np.array([[127, 3, 3, -1]], np.int8)
    found = judge(weight, odd, absmax)
    assert found.findings.keys() == {"codes"} and found.findings["codes"].n_places == 3
    assert (found.findings["codes"].expected, found.findings["codes"].found) == ("code 2", "code 3")
    assert judge(weight, odd, absmax, FOREIGN) == Judgement(3, 0, {})


def test_zeroed_row_and_row_that_does_not_use_its_codes_are_named() -> None:
    weight = random_rows(3)
    right = reference.row_quantize(weight)
    codes = right.codes.copy()
    codes[1] = 0
    finding = judge(weight, codes, right.absmax, FOREIGN).findings["rows"]
    assert (finding.row, finding.found) == (101, "a row of zeros")
    stored = right.absmax.copy()
    stored[4] = 0
    assert judge(weight, right.codes, stored, FOREIGN).findings["rows"].row == 104
    halved = (right.codes // 2).astype(np.int8)
    finding = judge(weight, halved, right.absmax * 2, FOREIGN).findings["rows"]
    assert finding.expected == "largest |code| 127" and finding.n_places == 5


def test_code_minus_128_is_no_code_of_ours() -> None:
    weight = random_rows(5)
    right = reference.row_quantize(weight)
    codes = np.where(right.codes == -127, -128, right.codes).astype(np.int8)
    assert "rows" in judge(weight, codes, right.absmax).findings


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_source_that_is_not_finite_has_no_int8_form(value: float) -> None:
    weight = random_rows(6)
    weight[3, 7] = value
    finding = judge(weight, np.zeros((5, 33), np.int8), np.ones(5, np.float32)).findings["weights"]
    assert finding.row == 103 and "finite" in finding.expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scale_that_is_no_scale_is_found(value: float) -> None:
    weight = random_rows(7)
    right = reference.row_quantize(weight)
    stored = right.absmax.copy()
    stored[2] = value
    for rules in (OURS, FOREIGN):
        assert judge(weight, right.codes, stored, rules).findings["weights"].row == 102


def test_weights_rounded_to_fp16_first_pass_where_that_may_have_been() -> None:
    weight = random_rows(8)
    first = reference.row_quantize(weight.astype(np.float16).astype(np.float32))
    assert "weights" in judge(weight, first.codes, first.absmax, replace(FOREIGN, may_be_fp16=False)).findings
    assert judge(weight, first.codes, first.absmax, FOREIGN).findings == {}
