"""Which columns to store in 16 bits: what each rule costs in bytes, and what it leaves of the error.

The small trained model of `scripts/demo` with its two kinds of outlier features; calibrated on held-out sequences and
judged on others, 48 of 256 tokens: mean KL divergence to the same weights in float32, with its standard error over
sequences. `dynamic`, which stores nothing and takes outlier columns out of the codes, is what bitsandbytes computes.
Prints a table in Markdown, which docs/results/static-set.md holds.

    .venv/bin/python scripts/compare_static_sets.py

Takes some minutes; the first time, the model is trained.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import OPTForCausalLM

import int8convert
from int8convert.runtime.column_choice import BUDGET, MIN_SHARE
from outlier_injection import Outliers
from small_model import N_HELD_OUT_SEQUENCES, load_heldout, load_model, prepare_source, prepare_trained
from train_small_model import TrainingSettings

INJECTIONS = (Outliers("scale", 200, 6), Outliers("shift", 60, 6))
ANY = {"min_share": 0.0, "budget": 0.0}
RULES: dict[str, dict[str, float]] = {
    **{f"any token >= {t:g}": {"threshold": t, **ANY} for t in (6.0, 5.0, 4.0, 3.0)},
    f"{MIN_SHARE:.0%} of the tokens >= 6": {"budget": 0.0},
    "the same and 0.5 % more bytes": {"budget": 0.005},
    f"the same and {BUDGET:.0%} more bytes (default)": {},
    "the same and 2 % more bytes": {"budget": 0.02},
}
N_CALIBRATION = (4, 16, 48)


@torch.inference_mode()
def run(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Natural logarithms of the next tokens' probabilities, [n, length - 1, vocabulary]."""
    return torch.cat([model(batch).logits[:, :-1].log_softmax(-1) for batch in sequences.split(16)])


def divergence(found: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and its standard error over sequences."""
    of_sequence = (reference.exp() * (reference - found)).sum(-1).mean(1).double()
    return float(of_sequence.mean()), float(of_sequence.std()) / len(of_sequence) ** 0.5


def measure(
    source: OPTForCausalLM, outliers: str | Mapping[str, Any], judged: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    return divergence(run(int8convert.quantize_(copy.deepcopy(source), outliers=outliers), judged), reference)


def main() -> None:
    settings = TrainingSettings()
    length = settings.sequence_length
    everything = load_heldout(prepare_trained(settings), length, 4 * N_HELD_OUT_SEQUENCES)
    judged, others = everything[::4], everything[torch.arange(len(everything)) % 4 != 0]
    print(
        "| outliers | rule | calibrated on | bytes, of the int8 weights | mean KL | of dynamic |\n|---|---|---|---|---|---|"
    )
    for injection in INJECTIONS:
        source = load_model(prepare_source(settings, injection))
        reference = run(source, judged)
        dynamic, error = measure(source, "dynamic", judged, reference)
        print(f"| {injection.name} | none stored (dynamic) | | 0 | {dynamic:.6f} ± {error:.6f} | 1 |", flush=True)
        n_int8 = sum(p.numel() for n, p in source.named_parameters() if p.dim() == 2 and "layers" in n)
        for n in N_CALIBRATION:
            texts = others[torch.arange(n) * len(others) // n]
            for rule, options in RULES.items():
                found = int8convert.calibrate(source, list(texts), **options)
                found = {name: stored for name, stored in found.items() if "layers" in name}
                share = sum(2 * stored.weight.numel() for stored in found.values()) / n_int8
                mean, error = measure(source, found, judged, reference)
                print(
                    f"| {injection.name} | {rule} | {n} | {share:.1%} | {mean:.6f} ± {error:.6f} | 1/{dynamic / mean:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
