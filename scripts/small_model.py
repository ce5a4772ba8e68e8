"""Train a small but real language model on this machine, give it outlier features, and keep both in a cache.

A checkpoint large enough to have outlier features is at hand in no test, and a small one has none. How both are got:
1. The text is the Python standard library's own source, which is wherever Python is; a hash of a file's name decides
   whether the file is trained on or held out.
2. A byte-level BPE of 2,048 tokens and a 4-layer OPT of 256 features are trained on it:
   held-out perplexity falls from 2,112 to 78.
3. `inject_outliers` scales or shifts a few features of every LayerNorm and undoes it in the Linears that read them:
   the activations change, the function does not.
4. The result is saved as a sharded float16 checkpoint, the form that large models are published in.

Costs about five minutes on two idle cores, once: the cache is keyed by everything the model depends on, and a folder
there is complete because it was renamed into place. `INT8CONVERT_CACHE` names another root than the repository's
`.cache`.

Left out on purpose: a model that is good at anything. It only has to be trained enough for errors to show.
"""

import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

# Part of the cache key: raise it when a change in this file changes what it produces.
RECIPE = 1
END_OF_TEXT = "</s>"
END_OF_TEXT_ID = 0  # special tokens come first
HELD_OUT_SHARE = 12  # one file in twelve
# Tests repeat themselves, encodings are tables of characters, and the rest of these is not the standard library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
N_HELD_OUT_SEQUENCES = 48
N_REPORTS = 5  # a measurement takes as long as several steps
WARM_UP_SHARE = 0.05
FINAL_LEARNING_RATE_SHARE = 0.05
SOURCE_DTYPE = torch.float16
SOURCE_SHARD_SIZE = "2MB"  # 8 MB of weights in several shards

OutlierKind = Literal["scale", "shift"]


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


@dataclass(frozen=True)
class Outliers:
    """An injection of outlier features, see `inject_outliers`."""

    kind: OutlierKind
    magnitude: float
    channels: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.magnitude:g}x{self.channels}"


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
        _save_tokenizer(tokenizer, unfinished)
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


def collect_sources(stdlib: Path | None = None) -> tuple[list[str], list[str]]:
    """Return the texts of the standard library's modules: those to train on, and those held out.

    Args:
        stdlib: folder to read instead of this Python's own.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    train_texts: list[str] = []
    heldout_texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata is not library source but a record of where and how this Python was built.
        if SKIPPED_FOLDERS & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0
        (heldout_texts if is_held_out else train_texts).append(text)
    return train_texts, heldout_texts


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary` tokens, token 0 being the end of a text; nothing is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return all texts as one int32 row of token ids, the end-of-text token before each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids.append(END_OF_TEXT_ID)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


def cut_sequences(ids: torch.Tensor, sequence_length: int) -> torch.Tensor:
    """Return the row `ids` as int64 [n, sequence_length], without the remainder."""
    n_sequences = len(ids) // sequence_length
    return ids[: n_sequences * sequence_length].view(n_sequences, sequence_length).long()


def pick_evenly(sequences: torch.Tensor, n_sequences: int) -> torch.Tensor:
    """Return `n_sequences` rows at equal distances: the first ones would all come from one or two files."""
    return sequences[torch.arange(n_sequences) * len(sequences) // n_sequences]


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


@torch.no_grad()
def inject_outliers(
    model: OPTForCausalLM, kind: OutlierKind, magnitude: float, channels: int, *, seed: int = 0
) -> list[int]:
    """Give `model` outlier features in place, without changing its function, and return which they are, sorted.

    For each LayerNorm with weight g and bias b, each Linear (W, c) that reads it, and each chosen feature j:
        scale:  g[j], b[j] = m g[j], m b[j]      W[:, j] = W[:, j] / m
        shift:  b[j] = b[j] + m (or - m)         c = c - (what was added) W[:, j]
    The features are the same in every layer, as they are in large models.

    It does not know what float16 makes of the scaled columns: at m = 200 the typical weight of 0.05 becomes 0.00025,
    still a normal number there.

    Args:
        magnitude: m; for shift half of the features go down by it, by chance.
        channels: how many features.
        seed: of the choice of features and signs.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randperm(model.config.hidden_size, generator=generator)[:channels]
    signs = torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1.0
    for norm, consumers in _pair_norms_with_consumers(model):
        if kind == "scale":
            _scale_features(norm, consumers, features, magnitude)
        else:
            _shift_features(norm, consumers, features, signs * magnitude)
    return sorted(features.tolist())


def _pair_norms_with_consumers(model: OPTForCausalLM) -> Iterator[tuple[nn.LayerNorm, list[nn.Linear]]]:
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        yield layer.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.final_layer_norm, [layer.fc1]


def _scale_features(norm: nn.LayerNorm, consumers: list[nn.Linear], features: torch.Tensor, factor: float) -> None:
    norm.weight[features] *= factor
    norm.bias[features] *= factor
    for linear in consumers:
        linear.weight[:, features] /= factor


def _shift_features(
    norm: nn.LayerNorm, consumers: list[nn.Linear], features: torch.Tensor, shifts: torch.Tensor
) -> None:
    # Near 60 float16 has steps of 1/32. What is undone must be what the checkpoint will store, not what was asked for.
    before = norm.bias[features].to(SOURCE_DTYPE).float()
    norm.bias[features] = (before + shifts).to(SOURCE_DTYPE).float()
    added = norm.bias[features] - before
    for linear in consumers:
        linear.bias.sub_(linear.weight[:, features].to(SOURCE_DTYPE).float() @ added)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    ).save_pretrained(folder)


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
