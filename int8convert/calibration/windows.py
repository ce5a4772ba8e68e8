"""The windows of tokens that a checkpoint reads for its calibration."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.errors import SourceError
from int8convert.events import EventSink
from int8convert.runtime.models import open_tokenizer
from int8convert.runtime.text.texts import Text, open_text
from int8convert.runtime.text.windows import TokenWindows, read_windows_by
from int8convert.sources import open_source

DEFAULT_LENGTH = 256


def local_directory(path: str | os.PathLike[str], on_event: EventSink) -> Path:
    """Return a checkpoint's directory; of a repository on the Hub, that in the Hub's cache, with all of its weights."""
    if os.path.isdir(path):
        return Path(path)
    from int8convert.hub.cached_copy import fetch_beside, fetch_checkpoint

    source = open_source(path)
    fetch_beside(source, (OUTLIERS_FILE,))
    return fetch_checkpoint(source, on_event)


def read_windows_for(directory: Path, text: Text, trust_remote_code: bool, label: str) -> TokenWindows:
    """Return the windows of a text by a checkpoint's tokenizer, 256 tokens each by default.

    Args:
        label: the user's name of the checkpoint.
    """
    with open_text(text) as file, open_tokenizer(directory, trust_remote_code, label) as tokenizer:
        return read_windows_by(text.cut, file.path, tokenizer, text.n_sequences, text.length or DEFAULT_LENGTH)


def fit_windows(model: Any, windows: TokenWindows, may_cut: bool) -> TokenWindows:
    """Cut windows to what the model takes; refuse tokens that it does not know."""
    n_tokens = model.get_input_embeddings().num_embeddings
    if int(windows.ids.max()) >= n_tokens:
        raise SourceError(
            f"the text has token {int(windows.ids.max())}, and the model knows only {n_tokens}",
            "copy the tokenizer files of this model into the checkpoint; the present ones are another model's",
        )
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(n_positions, int) or windows.ids.shape[1] <= n_positions:
        return windows
    if may_cut:
        return replace(windows, ids=windows.ids[:, :n_positions])
    raise SourceError(
        f"the model takes {n_positions:,} tokens, and the windows have {windows.ids.shape[1]:,}",
        f"pass --length {n_positions} or less",
    )
