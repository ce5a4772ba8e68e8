"""The Python standard library's own source as text to train a small language model on, and the tokens it becomes.

How it goes:
1. `collect_sources` reads every module, and a hash of a file's name decides whether it is trained on or held out.
2. `train_tokenizer` makes a byte-level BPE of the texts, `encode_texts` one long row of token ids.
3. `cut_sequences` and `pick_evenly` take the sequences from that row which perplexity is measured on.

Costs about five seconds.

Left out on purpose: any cleaning of the text.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "</s>"
END_OF_TEXT_ID = 0  # special tokens come first
HELD_OUT_SHARE = 12  # one file in twelve
# Tests repeat themselves, encodings are tables of characters, and the rest of these is not the standard library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` into `folder` in the form that transformers loads."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    ).save_pretrained(folder)


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
