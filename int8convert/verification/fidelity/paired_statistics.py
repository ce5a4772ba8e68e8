"""Paired statistics: how one model's predictions differ from another's on the same tokens, with 95 % intervals.

At each position both models give a distribution over the vocabulary, p of the reference and q of the other, and a
token t follows:

    delta NLL = ln p(t) - ln q(t)            its mean is the logarithm of the ratio of the perplexities
    KL        = sum_v p(v) (ln p(v) - ln q(v))
    delta p   = q(t) - p(t)

Both models see the same tokens, so the difficulty of the text cancels: an interval of the difference is a hundred times
tighter than those of the two perplexities. Tokens of one sequence depend on each other and sequences hardly do, so
intervals come from the means of the sequences:

    M +- t(0.975, n - 1) * s / sqrt(n),  s^2 = sum_i (w_i (m_i - M))^2 / (n - 1)

with m_i the mean of sequence i, w_i its tokens divided by those of the average sequence, M the mean over all tokens.

Computed in float64 in blocks of tokens, so that no second [tokens, vocabulary] is held. One float for each token is
kept, so percentiles are exact. Does not know how other texts would come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

BLOCK_ELEMENTS = 1 << 22
"""Elements of a block of [tokens, vocabulary]: 32 MiB in float64, of which a handful are alive at a time."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairedSummary:
    """The statistics of all tokens.

    Attributes:
        n_sequences, n_tokens: numbers of sequences, and of tokens that were predicted.
        reference_perplexity, perplexity: exp of the mean negative log-likelihood; infinite if that overflows.
        delta_nll: mean difference of the log-likelihoods, in nats a token; positive if the reference is better.
        mean_kl, median_kl, p99_kl, p999_kl: over tokens, in nats.
        delta_nll_interval, mean_kl_interval: 95 %, infinite for one sequence.
        same_top1: share of the positions at which both models have the same likeliest token, 0 to 1.
        delta_p: root mean square of delta p, 0 to 1.
    """

    n_sequences: int
    n_tokens: int
    reference_perplexity: float
    perplexity: float
    delta_nll: float
    delta_nll_interval: Interval
    mean_kl: float
    mean_kl_interval: Interval
    median_kl: float
    p99_kl: float
    p999_kl: float
    same_top1: float
    delta_p: float


@dataclass(slots=True)
class _Sequence:
    """Sums over the tokens of one sequence."""

    n_tokens: int = 0
    reference_nll: float = 0.0
    nll: float = 0.0
    kl: float = 0.0


@dataclass(slots=True)
class PairedStatistics:
    """Accumulates predictions, block by block."""

    _sequences: list[_Sequence] = field(default_factory=list)
    _kl: list[torch.Tensor] = field(default_factory=list)
    _n_same_top1: int = 0
    _squared_delta_p: float = 0.0

    def add(
        self, log_probs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor, *, continues: bool = False
    ) -> None:
        """Count positions of a sequence.

        Args:
            log_probs, reference: [positions, vocabulary] of any float dtype: logits or natural logarithms of
                probabilities; a constant at each position does not matter.
            targets: int64 [positions], the tokens that follow.
            continues: whether the positions belong to the sequence of the last call.
        """
        if not continues:
            self._sequences.append(_Sequence())
        sums = self._sequences[-1]
        for block in _blocks(*reference.shape):
            p, q = reference[block].double().log_softmax(-1), log_probs[block].to(reference.device).double()
            q = q.log_softmax(-1)
            came = targets[block].to(p.device)[:, None]
            p_came, q_came = p.gather(1, came), q.gather(1, came)
            kl = _divergence(p, q)
            sums.n_tokens += len(kl)
            sums.reference_nll -= float(p_came.sum())
            sums.nll -= float(q_came.sum())
            sums.kl += float(kl.sum())
            self._kl.append(kl.cpu())
            self._n_same_top1 += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._squared_delta_p += float((q_came.exp() - p_came.exp()).square().sum())

    def summarize(self) -> PairedSummary:
        """Return the statistics of at least one token."""
        n = np.array([sums.n_tokens for sums in self._sequences], dtype=np.float64)
        reference, nll, kl = (
            np.array([getattr(sums, name) for sums in self._sequences]) for name in ("reference_nll", "nll", "kl")
        )
        n_tokens = int(n.sum())
        by_token = torch.cat(self._kl).numpy()
        median, p99, p999 = (float(value) for value in np.quantile(by_token, (0.5, 0.99, 0.999)))
        return PairedSummary(
            n_sequences=len(n),
            n_tokens=n_tokens,
            reference_perplexity=_exp(float(reference.sum()) / n_tokens),
            perplexity=_exp(float(nll.sum()) / n_tokens),
            delta_nll=float((nll - reference).sum()) / n_tokens,
            delta_nll_interval=interval(nll - reference, n),
            mean_kl=float(kl.sum()) / n_tokens,
            mean_kl_interval=interval(kl, n),
            median_kl=median,
            p99_kl=p99,
            p999_kl=p999,
            same_top1=self._n_same_top1 / n_tokens,
            delta_p=math.sqrt(self._squared_delta_p / n_tokens),
        )


def interval(sums: np.ndarray, n_tokens: np.ndarray) -> Interval:
    """Return the 95 % interval of a mean over tokens, from sums over sequences; see the module.

    Args:
        sums: float64 [sequences].
        n_tokens: float64 [sequences].
    """
    n = len(sums)
    mean = float(sums.sum() / n_tokens.sum())
    if n < 2:
        return -math.inf, math.inf
    away = (sums - n_tokens * mean) / n_tokens.mean()
    half = t_quantile(n - 1) * math.sqrt(float(away @ away) / (n - 1) / n)
    return mean - half, mean + half


@cache
def t_quantile(n_free: int) -> float:
    """Return the two-sided 95 % quantile of Student's t with `n_free` degrees of freedom.

    With t = sqrt(n_free) tan(a), the probability of [0, t] is c * integral of cos(x)^(n_free - 1) from 0 to a, with
    c = Gamma((n_free + 1) / 2) / (sqrt(pi) Gamma(n_free / 2)). Gauss's rule integrates, and bisection finds a.
    """
    c = math.exp(math.lgamma((n_free + 1) / 2) - math.lgamma(n_free / 2)) / math.sqrt(math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    low, high = 0.0, min(math.pi / 2, 20 / math.sqrt(n_free))
    for _ in range(60):
        a = (low + high) / 2
        within = c * a / 2 * float(weights @ np.cos(a / 2 * (nodes + 1)) ** (n_free - 1))
        low, high = (a, high) if within < 0.475 else (low, a)
    return math.sqrt(n_free) * math.tan(low)


def _blocks(n_positions: int, n_tokens: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // n_tokens)
    return (slice(begin, begin + step) for begin in range(0, n_positions, step))


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the divergence at each position; tokens with p = 0 contribute nothing."""
    terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)
    return terms.sum(-1)


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)
