"""Train a small OPT from nothing: its settings, the model, the training loop and the perplexity that judges it.

How it goes: AdamW on windows that begin anywhere in one row of token ids, a linear warm-up times a cosine for the
learning rate, and a measurement of the held-out perplexity at each fifth, which is what the caller gets back.

Costs about five minutes on two idle cores with the settings as they are.

Left out on purpose: checkpoints on the way, because a run this short is repeated, and anything but the CPU.
"""

import math
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import nn
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM

from scripts.stdlib_text import END_OF_TEXT_ID

N_REPORTS = 5  # a measurement takes as long as several steps
WARM_UP_SHARE = 0.05
FINAL_LEARNING_RATE_SHARE = 0.05


@dataclass(frozen=True)
class TrainingSettings:
    """Everything the trained model depends on, apart from the Python version that its text comes from.

    Training ends after `steps` or after `seconds` of wall time, whichever is first; the learning rate follows the same
    clock. Only a training that ends by `steps` is repeatable.
    """

    vocabulary: int = 2048
    hidden: int = 256
    ffn: int = 1024
    layers: int = 4
    heads: int = 4
    sequence_length: int = 256
    # Measured: with so few tokens, many small batches learn more per second than few large ones.
    batch: int = 4
    peak_learning_rate: float = 1.5e-3
    steps: int = 1500
    seconds: float | None = None
    seed: int = 0


def build_model(settings: TrainingSettings) -> OPTForCausalLM:
    """Return an untrained OPT; without dropout, as it never sees its text twice."""
    config = OPTConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        word_embed_proj_dim=settings.hidden,
        ffn_dim=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.sequence_length,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        # OPT's default padding token would take an ordinary token out of the training.
        pad_token_id=None,
    )
    return OPTForCausalLM(config)


def train_model(
    model: OPTForCausalLM, train_ids: torch.Tensor, heldout: torch.Tensor, settings: TrainingSettings
) -> list[dict[str, float]]:
    """Train `model` in place and return its curve: at each fifth the step, the seconds and the held-out perplexity.

    Args:
        train_ids: int32 [n_tokens]; batches are windows that begin anywhere in it.
        heldout: int64 [n, sequence_length], what perplexity is measured on.
    """
    optimizer = _build_optimizer(model, settings)
    windows = train_ids.unfold(0, settings.sequence_length, 1)
    curve: list[dict[str, float]] = []
    started, step, done = time.perf_counter(), 0, 0.0
    with Progress("training") as progress:
        while True:
            elapsed_s = time.perf_counter() - started
            done = measure_progress(settings, step, elapsed_s)
            if done >= len(curve) / N_REPORTS:
                perplexity = measure_perplexity(model, heldout)
                curve.append({"step": step, "elapsed_s": round(elapsed_s, 1), "heldout_perplexity": perplexity})
                progress.report(done, f"step {step}, held-out perplexity {perplexity:.2f}")
            if done >= 1:
                return curve
            progress.advance(done)
            batch = windows[torch.randint(len(windows), (settings.batch,))].long()
            _take_step(model, optimizer, batch, plan_learning_rate(settings, done))
            step += 1


def measure_progress(settings: TrainingSettings, step: int, elapsed_s: float) -> float:
    """Return the share of the training that is behind, 1 at its end, by the limit that will be reached first."""
    by_steps = step / settings.steps
    by_time = elapsed_s / settings.seconds if settings.seconds is not None else 0.0
    return min(1.0, max(by_steps, by_time))


def plan_learning_rate(settings: TrainingSettings, done: float) -> float:
    """Return the learning rate at the share `done` of the training: a linear warm-up times a cosine down to 5 %."""
    warm_up = min(1.0, 0.01 + done / WARM_UP_SHARE)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    floor = FINAL_LEARNING_RATE_SHARE
    return settings.peak_learning_rate * warm_up * (floor + (1 - floor) * cosine)


def _build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=(0.9, 0.95))


def _take_step(
    model: OPTForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor, learning_rate: float
) -> None:
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    model(input_ids=batch, labels=batch).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def measure_perplexity(model: OPTForCausalLM, sequences: torch.Tensor, batch: int = 16) -> float:
    """Return exp of the mean negative log-likelihood of every token but each sequence's first.

    Args:
        sequences: int64 [n, length].
    """
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in torch.split(sequences, batch))
    return math.exp(total / len(sequences))


class Progress:
    """A bar on stderr where that is a terminal; otherwise one plain line per report."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(total=100, desc=self._title, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: float) -> None:
        """Move the bar to the share `done`; nothing without a terminal."""
        if self._bar is not None:
            self._bar.update(100 * done - self._bar.n)

    def report(self, done: float, text: str) -> None:
        """Say `text` once, at the share `done`."""
        self.advance(done)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            print(f"{self._title}: {done:4.0%}  {text}", file=sys.stderr, flush=True)
