"""The paper's Table 1 for a checkpoint and a text: what each int8 method leaves of the model's predictions.

    .venv/bin/python -m scripts.compare_methods                                   the small trained model
    .venv/bin/python -m scripts.compare_methods --source opt-1.3b --text a.txt    any other model

Prints a table in Markdown: perplexity, mean KL divergence to the model in floating point, share of equal likeliest
tokens. Without arguments it uses the small trained model with both kinds of outliers, on 16 held-out sequences of 256
tokens; that takes less than a minute, and the first time the model is trained.

The methods are simulated in floating point (`simulated_methods`), so the model must fit in memory. What an int8
checkpoint computes is measured by `int8convert verify`.
"""

from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

import torch

from int8convert.runtime.models import load_model, open_tokenizer
from int8convert.runtime.text.windows import read_windows
from int8convert.verification.fidelity.paired_statistics import PairedStatistics
from scripts.outlier_injection import Outliers
from scripts.simulated_methods import compare_methods
from scripts.small_model import load_heldout, prepare_source, prepare_trained
from scripts.train_small_model import TrainingSettings

INJECTIONS = (Outliers("scale", 200, 6), Outliers("shift", 60, 6))
N_SEQUENCES = 16
LENGTH = 256


def print_table(name: str, source: Path, windows: Iterable[torch.Tensor]) -> None:
    for method, statistics in compare_methods(load_model(source, "cpu"), list(windows), PairedStatistics).items():
        s = statistics.summarize()
        print(f"| {name} | {method} | {s.perplexity:.2f} | {s.mean_kl:.5f} | {s.same_top1:.1%} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description="Compare the int8 methods of the paper's Table 1 on one model and text.")
    parser.add_argument("--source", type=Path, help="the checkpoint in 16 or 32 bits; default: the small trained model")
    parser.add_argument("--text", type=Path, help="the text in UTF-8; needed with --source")
    arguments = parser.parse_args()
    if (arguments.source is None) != (arguments.text is None):
        parser.error("give --source and --text together")
    print("| model | method | perplexity | mean KL | same top-1 |\n|---|---|---|---|---|")
    if arguments.source is not None:
        with open_tokenizer(arguments.source, False) as tokenizer:
            windows = read_windows(arguments.text, tokenizer, N_SEQUENCES, LENGTH).ids
        print_table(arguments.source.name, arguments.source, windows)
        return
    settings = TrainingSettings()
    held_out = load_heldout(prepare_trained(settings), settings.sequence_length, N_SEQUENCES)
    for injection in INJECTIONS:
        print_table(injection.name, prepare_source(settings, injection), held_out)


if __name__ == "__main__":
    main()
