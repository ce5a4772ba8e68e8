"""A small but real language model with outlier features, made on this machine and kept in a cache.

A checkpoint large enough to have outlier features is at hand in no test, and a small one has none. How both are got:
1. The text is the Python standard library's own source, which is wherever Python is (`stdlib_text`).
2. A byte-level BPE of 2,048 tokens and a 4-layer OPT of 256 features are trained on it (`train_small_model`):
   held-out perplexity falls from 2,112 to 78.
3. `outlier_injection` scales or shifts a few features of every LayerNorm and undoes it in the Linears that read them:
   the activations change, the function does not.
4. The result is saved as a sharded float16 checkpoint, the form that large models are published in.

Costs about five minutes on two idle cores, once: the cache is keyed by everything the model depends on, and a folder
there is complete because it was renamed into place. `INT8CONVERT_CACHE` names another root than the repository's
`.cache`.

Left out on purpose: a model that is good at anything. It only has to be trained enough for errors to show.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from scripts.outlier_injection import SOURCE_DTYPE, Outliers, inject_outliers
from scripts.stdlib_text import (
    collect_sources,
    cut_sequences,
    encode_texts,
    pick_evenly,
    save_tokenizer,
    train_tokenizer,
)
from scripts.train_small_model import TrainingSettings, build_model, train_model

# Part of the cache key: raise it when a change here or in the three modules above changes what is produced.
RECIPE = 1
N_HELD_OUT_SEQUENCES = 48
SOURCE_SHARD_SIZE = "2MB"  # 8 MB of weights in several shards


def find_cache(settings: TrainingSettings) -> Path:
    """Return the folder that holds what is made from `settings`; it need not exist."""
    root = os.environ.get("INT8CONVERT_CACHE") or Path(__file__).resolve().parents[1] / ".cache"
    ingredients = {"recipe": RECIPE, "python": platform.python_version(), **asdict(settings)}
    key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]
    return Path(root).resolve() / "small_model" / key


def prepare_trained(settings: TrainingSettings) -> Path:
    """Return the folder of the trained float32 model, training it where the cache does not hold it.

    Beside the checkpoint and its tokenizer lie `heldout.safetensors` (token ids), `heldout.txt` (the same as text) and
    `training.json` (the settings, and the held-out perplexity before, during and after).
    """
    folder = find_cache(settings) / "trained"
    if folder.is_dir():
        return folder
    with publish_folder(folder) as unfinished:
        torch.manual_seed(settings.seed)
        train_texts, heldout_texts = collect_sources()
        tokenizer = train_tokenizer(train_texts, settings.vocabulary)
        heldout_ids = encode_texts(tokenizer, heldout_texts)
        save_file({"ids": heldout_ids}, unfinished / "heldout.safetensors")
        (unfinished / "heldout.txt").write_text("\n".join(heldout_texts), encoding="utf-8")
        model = build_model(settings)
        heldout = pick_evenly(cut_sequences(heldout_ids, settings.sequence_length), N_HELD_OUT_SEQUENCES)
        curve = train_model(model, encode_texts(tokenizer, train_texts), heldout, settings)
        model.save_pretrained(unfinished)
        save_tokenizer(tokenizer, unfinished)
        record = {"settings": asdict(settings), "curve": curve, "heldout_perplexity": curve[-1]["heldout_perplexity"]}
        (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def prepare_source(settings: TrainingSettings, outliers: Outliers) -> Path:
    """Return the folder of the sharded float16 checkpoint that has `outliers`, making what the cache does not hold."""
    trained = prepare_trained(settings)
    folder = find_cache(settings) / f"source-{outliers.name}"
    if folder.is_dir():
        return folder
    with publish_folder(folder) as unfinished:
        model = load_model(trained)
        inject_outliers(model, outliers.kind, outliers.magnitude, outliers.channels, seed=settings.seed)
        model.to(SOURCE_DTYPE).save_pretrained(unfinished, max_shard_size=SOURCE_SHARD_SIZE)
        PreTrainedTokenizerFast.from_pretrained(trained).save_pretrained(unfinished)
    return folder


def load_model(folder: Path) -> OPTForCausalLM:
    """Load a checkpoint of this module in float32, whatever it is stored in, ready to be evaluated."""
    return cast(OPTForCausalLM, OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def load_heldout(trained: Path, sequence_length: int, n_sequences: int = N_HELD_OUT_SEQUENCES) -> torch.Tensor:
    """Return sequences from all over the held-out text, as int64 [n_sequences, sequence_length]."""
    ids = load_file(trained / "heldout.safetensors")["ids"]
    return pick_evenly(cut_sequences(ids, sequence_length), n_sequences)


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, and rename it to `folder` when the block ends without an error.

    A run that is killed therefore never leaves a `folder` that looks complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as scratch:
        # One level down, because a temporary directory is readable by its owner alone.
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process may have made the same thing meanwhile: then its folder is as good as ours.
            if not folder.is_dir():
                raise
