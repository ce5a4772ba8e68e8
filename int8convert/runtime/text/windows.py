"""Cuts a text into windows of tokens of one length, and selects the tokens that are scored.

Two perplexities are comparable only if both cut the text alike, so the windows record the cut. For the usual figure of
WikiText-2, the text is its test split joined by blank lines. For that of C4, it is the first 1,100 documents of the
first validation shard joined by spaces, in 256 windows.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8convert.errors import SourceError
from int8convert.runtime.text.texts import Convention


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of a text.

    Attributes:
        ids: int64 [n, length].
        text: file name, without its folder.
        n_text_tokens: tokens of the whole text.
        first_scored: index of the first scored token of each window; empty for 1 in all.
    """

    ids: torch.Tensor
    text: str
    text_sha256: str
    n_text_tokens: int
    cut: Convention = Convention.SPREAD
    first_scored: tuple[int, ...] = ()

    @property
    def n_scored(self) -> int:
        n, length = self.ids.shape
        return sum(length - self.scored_from(i) for i in range(n))

    def scored_from(self, i: int) -> int:
        """Return the index of the first scored token of window i."""
        return self.first_scored[i] if self.first_scored else 1

    @property
    def convention(self) -> str:
        """Return the definition of perplexity, in words."""
        n, length = self.ids.shape
        return (
            f"{self.cut}: {n:,} windows of {length:,} tokens (of {self.n_text_tokens:,} in {self.text}), "
            f"{self.n_scored:,} tokens scored; perplexity is exp of their mean negative log-likelihood"
        )


def read_text(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a file, and the sha256 of its bytes. Opens the file once, because it may be a pipe.

    Raises:
        SourceError: the file cannot be read, or is not text.
    """
    try:
        content = Path(path).read_bytes()
        text = io.StringIO(content.decode("utf-8"), newline=None).getvalue()  # with \n at the end of every line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start:,} is not UTF-8"
        raise SourceError(f"'{os.fspath(path)}' cannot be read: {reason}", "give a text file in UTF-8") from error
    if not text.strip():
        raise SourceError(f"'{os.fspath(path)}' holds no text", "give a text file in UTF-8")
    return text, hashlib.sha256(content).hexdigest()


def read_windows(path: str | os.PathLike[str], tokenizer: Any, n_windows: int, length: int) -> TokenWindows:
    """Return at most `n_windows` windows of `length` tokens. A text shorter than one window becomes one shorter window.

    Windows do not overlap. They hold no special tokens, except the one that the tokenizer puts before each text, which
    then begins each window.

    Raises:
        SourceError: see `read_text`; or the text has fewer than two tokens.
    """
    text, digest = read_text(path)
    first = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    step = min(max(1, length - len(first)), len(ids))
    if len(ids) < 2:
        raise SourceError(f"'{os.fspath(path)}' has {len(ids)} tokens, expected at least 2", "give a longer text")
    windows = ids[: len(ids) // step * step].view(-1, step)
    n = min(n_windows, len(windows))
    chosen = windows[torch.arange(n) * len(windows) // n]
    chosen = torch.cat((torch.tensor([first] * n, dtype=torch.long).view(n, -1), chosen), 1)
    return TokenWindows(chosen, Path(path).name, digest, len(ids))


def read_windows_by(
    convention: Convention | str, path: str | os.PathLike[str], tokenizer: Any, n_windows: int, length: int
) -> TokenWindows:
    """Return at most `n_windows` windows of `length` tokens by a convention, without a shorter last one.

    Raises:
        SourceError: see `read_text`; or the text is shorter than one window.
    """
    cut = Convention(convention)
    if cut is Convention.SPREAD:
        return read_windows(path, tokenizer, n_windows, length)
    text, digest = read_text(path)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        raise SourceError(
            f"'{os.fspath(path)}' has {len(ids):,} tokens, expected at least a window of {length:,}",
            "give a longer text, or shorter windows",
        )
    step = length // 2 if cut is Convention.STRIDED else length
    windows = ids.unfold(0, length, step)[:n_windows].clone()
    first_scored = {
        Convention.STRIDED: (1, *(length - step,) * (len(windows) - 1)),
        Convention.HALVES: (length // 2 + 1,) * len(windows),
    }
    if cut is Convention.HALVES and _begins_with_bos(tokenizer):
        windows[:, 0] = tokenizer.bos_token_id
    return TokenWindows(windows, Path(path).name, digest, len(ids), cut, first_scored.get(cut, ()))


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
