"""Small models with a tokenizer, and calibrations of them with second moments."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from int8convert.calibration.calibrate import calibrate
from int8convert.events import ignore
from int8convert.runtime.text.texts import Text
from tests.tools.language_models import build_tokenizer, language_model

LENGTH = 32


def letters(n: int, seed: int) -> str:
    """Return a text of random letters."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=n))


def save_source(name: str, directory: Path, max_shard_size: str = "1GB") -> Path:
    """Write a model of `tests.tools.tiny_models` in bf16, with its tokenizer."""
    tokenizer = build_tokenizer()
    language_model(name, tokenizer, torch.bfloat16).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


def save_calibration(source: Path, folder: Path, n_windows: int = 24, unmeasured: str = "no such layer") -> Path:
    """Calibrate with second moments, a quarter of the windows held out from them.

    Args:
        unmeasured: part of the names of layers whose second moments are then taken out.
    """
    text = folder.with_name(f"{folder.name}.txt")
    text.write_text(letters(4 * n_windows * LENGTH, seed=0))
    options = Text(text, n_sequences=n_windows, length=LENGTH)
    calibrate(source, folder, options, with_moments=True, device="cpu", on_event=ignore)
    record = json.loads((folder / "calibration.json").read_text())
    for entry in record["inputs"]:
        if any(unmeasured in name for name in entry["modules"]):
            entry["moments"] = None
    (folder / "calibration.json").write_text(json.dumps(record))
    return folder
