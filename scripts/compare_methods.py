"""The paper's Table 1 on the small trained model: what each int8 method leaves of it, with both kinds of outliers.

Perplexity, mean KL divergence to the model in floating point, and how often the likeliest token is the same, on 16
held-out sequences of 256 tokens. Prints a table in Markdown.

    PYTHONPATH=. .venv/bin/python scripts/compare_methods.py

Takes less than a minute; the first time, the model is trained.
"""

import math
from dataclasses import dataclass

import torch

from int8convert.verification.baselines import compare_methods
from outlier_injection import Outliers
from small_model import load_heldout, load_model, prepare_source, prepare_trained
from train_small_model import TrainingSettings

INJECTIONS = (Outliers("scale", 200, 6), Outliers("shift", 60, 6))
N_SEQUENCES = 16


@dataclass
class Sums:
    """Over positions: negative log-likelihood, KL divergence, equal likeliest tokens, all."""

    nll: float = 0.0
    divergence: float = 0.0
    n_same: int = 0
    n: int = 0

    def add(self, log_probs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        self.nll -= float(log_probs.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        self.divergence += float((reference.exp() * (reference - log_probs)).sum(dtype=torch.float64))
        self.n_same += int((log_probs.argmax(-1) == reference.argmax(-1)).sum())
        self.n += len(targets)

    def cells(self) -> str:
        perplexity = math.exp(self.nll / self.n)
        return f"{perplexity:.2f} | {self.divergence / self.n:.5f} | {100 * self.n_same / self.n:.1f} %"


def main() -> None:
    settings = TrainingSettings()
    windows = load_heldout(prepare_trained(settings), settings.sequence_length, N_SEQUENCES)
    print("| outliers | method | perplexity | mean KL | same top-1 |\n|---|---|---|---|---|")
    for injection in INJECTIONS:
        rows = compare_methods(load_model(prepare_source(settings, injection)), list(windows), Sums)
        for name, sums in rows.items():
            print(f"| {injection.name} | {name} | {sums.cells()} |", flush=True)


if __name__ == "__main__":
    main()
