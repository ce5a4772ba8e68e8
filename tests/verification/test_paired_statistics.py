"""Paired statistics: the plain formulas, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from int8convert.verification.fidelity import paired_statistics
from int8convert.verification.fidelity.paired_statistics import PairedStatistics, PairedSummary, interval, t_quantile

STUDENT = {
    1: 12.70620474,
    2: 4.30265273,
    3: 3.18244631,
    4: 2.77644511,
    7: 2.36462425,
    15: 2.13144955,
    63: 1.99834054,
    255: 1.96931057,
    100_000: 1.95998771,
}
"""Degrees of freedom -> quantile at 0.975, as scipy.stats 1.17 has it."""


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def summarize(reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> PairedSummary:
    """All of it: [sequences, positions, vocabulary] and [sequences, positions]."""
    statistics = PairedStatistics()
    for i in range(len(targets)):
        statistics.add(other[i], reference[i], targets[i])
    return statistics.summarize()


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of five sequences of 12 tokens out of 50: reference, other, targets."""
    reference = random_logits(0, 5, 12, 50)
    targets = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(1))
    return reference, reference + 0.2 * random_logits(2, 5, 12, 50), targets


def test_values_are_those_of_the_plain_formulas(
    predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_statistics, "BLOCK_ELEMENTS", 150)  # three positions at a time
    reference, other, targets = predictions
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (reference, other))
    at = targets.numpy()[..., None]
    p_came, q_came = (np.take_along_axis(x, at, 2)[..., 0] for x in (p, q))
    delta = np.log(p_came) - np.log(q_came)
    kl = (p * np.log(p / q)).sum(-1)
    found = summarize(*predictions)
    assert (found.n_sequences, found.n_tokens) == (5, 60)
    assert found.reference_perplexity == pytest.approx(math.exp(-np.log(p_came).mean()), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(-np.log(q_came).mean()), rel=1e-12)
    assert found.delta_nll == pytest.approx(delta.mean(), rel=1e-10)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-12)
    assert (found.median_kl, found.p99_kl, found.p999_kl) == pytest.approx(
        tuple(np.quantile(kl, [0.5, 0.99, 0.999])), rel=1e-12
    )
    assert found.same_top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0.5 < found.same_top1 < 1
    assert found.delta_p == pytest.approx(math.sqrt(((q_came - p_came) ** 2).mean()), rel=1e-10)
    for values, (low, high) in ((delta, found.delta_nll_interval), (kl, found.mean_kl_interval)):
        half = STUDENT[4] * values.mean(1).std(ddof=1) / math.sqrt(5)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-7)


def test_identical_logits_differ_by_exactly_nothing() -> None:
    logits = random_logits(3, 4, 10, 30)
    logits[0, 0, 5] = -math.inf  # a token that is ruled out
    targets = torch.zeros(4, 10, dtype=torch.long)
    found = summarize(logits, logits.clone(), targets)
    assert found.reference_perplexity == found.perplexity
    assert (found.delta_nll, found.mean_kl, found.p999_kl, found.delta_p, found.same_top1) == (0, 0, 0, 0, 1)
    assert found.delta_nll_interval == found.mean_kl_interval == (0, 0)


def test_log_probabilities_and_logits_are_taken_alike(
    predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    reference, other, targets = predictions
    found = summarize(reference.double().log_softmax(-1), other.double().log_softmax(-1), targets)
    expected = summarize(*predictions)
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-12)
    assert found.delta_nll == pytest.approx(expected.delta_nll, rel=1e-10)


def test_a_sequence_may_come_in_parts(predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, other, targets = predictions
    statistics = PairedStatistics()
    for i in range(5):
        for part, continues in ((slice(0, 7), False), (slice(7, 12), True)):
            statistics.add(other[i, part], reference[i, part], targets[i, part], continues=continues)
    assert statistics.summarize().n_sequences == 5
    assert statistics.summarize().mean_kl_interval == pytest.approx(summarize(*predictions).mean_kl_interval, rel=1e-12)


@pytest.mark.parametrize("n_free", STUDENT)
def test_quantiles_are_those_of_students_t(n_free: int) -> None:
    assert t_quantile(n_free) == pytest.approx(STUDENT[n_free], abs=1e-8)


def test_one_sequence_says_nothing_about_others() -> None:
    assert interval(np.array([3.0]), np.array([10.0])) == (-math.inf, math.inf)


def test_longer_sequences_count_for_more() -> None:
    """(1 - 10 m) / 20 and (6 - 30 m) / 20 with m = 7 / 40 are -0.0375 and 0.0375."""
    half = STUDENT[1] * 0.0375
    assert interval(np.array([1.0, 6.0]), np.array([10.0, 30.0])) == pytest.approx((0.175 - half, 0.175 + half))


@pytest.fixture(scope="module")
def population() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over 2,000 sequences of different lengths, tokens of which depend on each other; reference, other, n."""
    generator = np.random.default_rng(0)
    n = generator.integers(20, 60, 2000).astype(float)
    hardness = generator.normal(3.0, 0.6, 2000)  # of a sequence, for both models
    drift = generator.gamma(2.0, 0.002, 2000)  # of a sequence, skewed as KL is
    reference = n * hardness + generator.normal(0, 2.0, 2000) * np.sqrt(n)
    return reference, reference + n * drift + generator.normal(0, 0.01, 2000) * np.sqrt(n), n


@pytest.mark.parametrize("n_drawn", [16, 64])
def test_intervals_hold_the_truth_95_times_of_100(
    population: tuple[np.ndarray, np.ndarray, np.ndarray], n_drawn: int
) -> None:
    reference, other, n = population
    truth = (other - reference).sum() / n.sum()
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        drawn = generator.choice(len(n), n_drawn)
        low, high = interval((other - reference)[drawn], n[drawn])
        held += low <= truth <= high
    assert 0.90 <= held / 1000 <= 0.98


def test_pairing_makes_intervals_tighter(population: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    reference, other, n = (values[:64] for values in population)
    paired, unpaired = interval(other - reference, n), interval(other, n)
    assert (unpaired[1] - unpaired[0]) > 50 * (paired[1] - paired[0])
