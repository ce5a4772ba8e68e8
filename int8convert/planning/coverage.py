"""Decides whether enough of a model becomes int8 for the output to be worth writing.

Two shares are used. The user sees the share of all parameters. It is low for a good reason in a small model with a
large vocabulary, whose parameters are mostly embeddings (37 % of Gemma 3 270M). The share of Linear weights leaves out
what no LLM.int8() model has as int8. Without --min-coverage, only this share can refuse a plan.
"""

from __future__ import annotations

import math

from int8convert.errors import CoverageError
from int8convert.formats.format import QUANTIZE_FORMATS
from int8convert.formats.modules import module_of
from int8convert.planning.plan import ConversionPlan

LOW_COVERAGE = 0.5
"""Share of all parameters below which the plan carries a note. A map by name rules is then taken for a wrong guess."""

MIN_LINEAR_SHARE = 0.2
"""Share of the Linear weights below which nearly all of them stay 16-bit, as Mixtral's experts do (97 %)."""

_NEVER_INT8 = ("embedding", "output head", "not a matrix product", "router", "not used by", "keep in fp32", "user skip")
"""Beginnings of reasons that are the model's or the user's, not limits of the format."""


def linear_share(plan: ConversionPlan) -> float:
    """Return the share of the Linear weights, by parameters, that become int8; 0 to 1."""
    kept = sum(n for reason, (_, n) in plan.kept_by_reason().items() if not reason.startswith(_NEVER_INT8))
    return plan.n_int8_parameters / max(1, plan.n_int8_parameters + kept)


def coverage_note(plan: ConversionPlan) -> str | None:
    """Return a note on a plan that leaves much in 16 bits, or None."""
    if plan.coverage >= LOW_COVERAGE:
        return None
    return f"{100 * plan.coverage:.1f} % of the parameters become int8; what stays 16-bit: {_reasons(plan)}"


def check_coverage(plan: ConversionPlan, min_coverage: float | None) -> None:
    """Refuse a conversion that would leave nearly everything as it is, or more than the user wants.

    Args:
        min_coverage: share of the parameters, 0 to 1, that must become int8; None refuses only a plan that leaves
            nearly all Linear weights 16-bit, and one of name rules with low coverage.

    Raises:
        CoverageError: too little becomes int8; the message names what stays and why.
    """
    share = linear_share(plan)
    problem = ""
    passing: float | None = plan.coverage
    if not plan.n_int8_parameters:
        problem, passing = "none of the parameters would become int8", None
    elif min_coverage is not None:
        if plan.coverage < min_coverage:
            problem = (
                f"only {100 * plan.coverage:.1f} % of the parameters would become int8; --min-coverage asks for "
                f"{100 * min_coverage:g} %"
            )
    elif share < MIN_LINEAR_SHARE:
        problem = (
            f"only {100 * share:.1f} % of the Linear weights would become int8, expected at least "
            f"{100 * MIN_LINEAR_SHARE:g} %"
        )
    elif plan.model_map.model_class is None and plan.coverage < LOW_COVERAGE:
        problem = (
            f"the model's class is unknown, and by their names only {100 * plan.coverage:.1f} % of the parameters "
            f"would become int8, expected at least {100 * LOW_COVERAGE:g} %"
        )
    if problem:
        reasons = _reasons(plan)
        raise CoverageError(f"{problem} (16-bit: {reasons})" if reasons else problem, _hint(plan, passing))


def _reasons(plan: ConversionPlan) -> str:
    """Return the reasons that keep the most parameters, without those that keep less than half a percent."""
    shares = ((reason, round(100 * n / max(1, plan.n_parameters))) for reason, (_, n) in plan.kept_by_reason().items())
    return ", ".join([f"{reason} {share} %" for reason, share in shares if share][:3])


def _hint(plan: ConversionPlan, passing: float | None) -> str:
    """Return the hint: what makes more become int8, or lets the plan pass."""
    ways = []
    own = plan.model_map.output_format
    wider = [format for format in QUANTIZE_FORMATS if module_of(format).HOLDS_EXPERTS]
    if own not in wider and any(f"{own} loader" in reason for reason in plan.kept_by_reason()):
        ways.append(f"pass --format {wider[0]}, which holds such modules as int8")
    if passing is not None:
        ways.append(f"pass --min-coverage {math.floor(100 * passing)} to accept it")
    return f"{', or '.join(ways) or 'name a checkpoint with Linear weights'}"
