"""Text as windows of tokens, all of one length, from all over it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8convert.errors import SourceError


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows at equal distances over a text.

    Attributes:
        ids: int64 [n, length].
        text: file name, without its folder.
        text_sha256: of the file.
        n_text_tokens: of the whole text.
    """

    ids: torch.Tensor
    text: str
    text_sha256: str
    n_text_tokens: int


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file.

    Raises:
        SourceError: it cannot be read, or is no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start:,} is not UTF-8"
        raise SourceError(f"'{os.fspath(path)}' cannot be read: {reason}", "give a text file in UTF-8") from error
    if not text.strip():
        raise SourceError(f"'{os.fspath(path)}' holds no text", "give a text file in UTF-8")
    return text


def read_windows(path: str | os.PathLike[str], tokenizer: Any, n_windows: int, length: int) -> TokenWindows:
    """At most `n_windows` windows of `length` tokens; of a text shorter than one window, all of it.

    Windows do not overlap and hold no special tokens, but where the tokenizer puts one before each text it is the first
    of each window, too.

    Raises:
        SourceError: see `read_text`; or the text has fewer than two tokens.
    """
    text = read_text(path)
    first = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    step = min(max(1, length - len(first)), len(ids))
    if len(ids) < 2:
        raise SourceError(f"'{os.fspath(path)}' has {len(ids)} tokens, expected at least 2", "give a longer text")
    windows = ids[: len(ids) // step * step].view(-1, step)
    n = min(n_windows, len(windows))
    chosen = windows[torch.arange(n) * len(windows) // n]
    chosen = torch.cat((torch.tensor([first] * n, dtype=torch.long).view(n, -1), chosen), 1)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return TokenWindows(chosen, Path(path).name, digest, len(ids))


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
