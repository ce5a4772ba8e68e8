"""Which columns to store in 16 bits: what each rule costs in bytes, and what it leaves of the error.

The small trained model of `scripts/demo` with its two kinds of outlier features; calibrated on held-out sequences and
judged on others, 48 of 256 tokens: mean KL divergence to the same weights in float32, with its standard error over
sequences, and at how many positions the likeliest token is the same. `dynamic`, which stores nothing and takes outlier
columns out of the codes, is what bitsandbytes computes. Prints a table in Markdown, which docs/results/static-set.md
holds.

    .venv/bin/python -m scripts.compare_static_sets

Takes four minutes on one core; the first time, the model is trained.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import OPTForCausalLM

import int8convert
from int8convert.outliers.choice import BUDGET, MIN_SHARE
from scripts.outlier_injection import Outliers
from scripts.small_model import N_HELD_OUT_SEQUENCES, load_heldout, load_model, prepare_source, prepare_trained
from scripts.train_small_model import TrainingSettings

INJECTIONS = (Outliers("scale", 200, 6), Outliers("shift", 60, 6))
ANY = {"min_share": 0.0, "budget": 0.0}
RULES: dict[str, dict[str, float]] = {
    **{f"any token >= {t:g}": {"threshold": t, **ANY} for t in (6.0, 5.0, 4.0, 3.0)},
    f"{100 * MIN_SHARE:g} % of the tokens >= 6": {"budget": 0.0},
    "the same, 0.5 % more bytes": {"budget": 0.005},
    f"the same, {100 * BUDGET:g} % more bytes (default)": {},
    "the same, 2 % more bytes": {"budget": 0.02},
}
N_CALIBRATION = (4, 16, 48)


@torch.inference_mode()
def run(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Natural logarithms of the next tokens' probabilities, [n, length - 1, vocabulary]."""
    return torch.cat([model(batch).logits[:, :-1].log_softmax(-1) for batch in sequences.split(16)])


@dataclass(frozen=True)
class Fidelity:
    """Mean KL divergence in nats, its standard error over sequences, and the share of equal likeliest tokens."""

    mean: float
    error: float
    same_top1: float

    def cells(self, dynamic: float) -> str:
        return f"{self.mean:.6f} ± {self.error:.6f} | 1/{dynamic / self.mean:.0f} | {100 * self.same_top1:.2f} %"


def measure(
    source: OPTForCausalLM, outliers: str | Mapping[str, Any], judged: torch.Tensor, reference: torch.Tensor
) -> Fidelity:
    found = run(int8convert.quantize_(copy.deepcopy(source), outliers=outliers), judged)
    of_sequence = (reference.exp() * (reference - found)).sum(-1).mean(1).double()
    is_same = found.argmax(-1) == reference.argmax(-1)
    return Fidelity(
        float(of_sequence.mean()), float(of_sequence.std()) / len(of_sequence) ** 0.5, float(is_same.double().mean())
    )


def main() -> None:
    settings = TrainingSettings()
    length = settings.sequence_length
    everything = load_heldout(prepare_trained(settings), length, 4 * N_HELD_OUT_SEQUENCES)
    judged, others = everything[::4], everything[torch.arange(len(everything)) % 4 != 0]
    print("| outliers | stored columns | calibrated on | bytes, of int8 | mean KL | of dynamic | same top-1 |")
    print("|---|---|---|---|---|---|---|")
    for injection in INJECTIONS:
        source = load_model(prepare_source(settings, injection))
        reference = run(source, judged)
        dynamic = measure(source, "dynamic", judged, reference)
        print(f"| {injection.name} | none (dynamic) | | 0 | {dynamic.cells(dynamic.mean)} |", flush=True)
        n_int8 = sum(p.numel() for n, p in source.named_parameters() if p.dim() == 2 and "layers" in n)
        for n in N_CALIBRATION:
            texts = others[torch.arange(n) * len(others) // n]
            for rule, options in RULES.items():
                found = int8convert.choose_outliers(source, list(texts), **options)
                found = {name: stored for name, stored in found.items() if "layers" in name}
                share = sum(2 * stored.weight.numel() for stored in found.values()) / n_int8
                cells = measure(source, found, judged, reference).cells(dynamic.mean)
                print(f"| {injection.name} | {rule} | {n} | {100 * share:.1f} % | {cells} |", flush=True)


if __name__ == "__main__":
    main()
