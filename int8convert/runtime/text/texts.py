"""The text that a model is measured on: the user's, a dataset's, or a small one that comes with int8convert.

    default     22 kB of the Declaration of Independence, the Constitution of the United States and the Gettysburg
                Address, all in the public domain. Models know it by heart, so its perplexity is low and says little of
                one model. It shows differences between two models.
    wikitext2   wikitext-2-raw-v1, test split, its lines joined by blank lines (the convention of GPTQ's evaluation)
    c4          en, first validation file, its first 1,100 documents joined by spaces (likewise)

Datasets come from the Hugging Face Hub or its cache. Nothing else here needs a network.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

from int8convert.errors import SourceError

DEFAULT_TEXT = Path(__file__).with_name("default_text.txt")
DATASETS = ("wikitext2", "c4")

_N_C4_DOCUMENTS = 1100
_FILES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "c4": ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
}
"""Repository and file."""


class Convention(StrEnum):
    """The way a text is cut into windows.

    - spread: windows at equal distances over it, no special tokens but one that the tokenizer puts before each text,
      before each window. Every token but a window's first is scored.
    - contiguous: windows one after the other from its start, special tokens as the tokenizer has them for one text.
      Scored as above. This is GPTQ's way, and of most published figures.
    - strided: the same, but each window begins half a window after the one before, and its later half is scored; of the
      first, all. This is transformers' way, but for a shorter window at the end.
    - halves: windows one after the other, in each the first token replaced by one that the tokenizer puts before each
      text; the later half is scored, but for its first token. This is llama.cpp's way.
    """

    SPREAD = "spread"
    CONTIGUOUS = "contiguous"
    STRIDED = "strided"
    HALVES = "halves"


@dataclass(frozen=True, slots=True)
class Text:
    """A text to run models on, and the way it is cut.

    Attributes:
        path: a file in UTF-8; None for `dataset`, or for a small text that comes with int8convert.
        dataset: "wikitext2" or "c4".
        n_sequences: the largest number of windows, at least 1.
        length: tokens of each window, at least 2; None for the default of the function that takes this.
        convention: how the text is cut; None for "contiguous" of a dataset, as published figures are, else "spread".

    Raises:
        ValueError: a value is out of its range.
    """

    path: str | os.PathLike[str] | None = None
    dataset: str | None = None
    n_sequences: int = 16
    length: int | None = None
    convention: Convention | str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.dataset is not None:
            raise ValueError("path and dataset of a text exclude each other")
        if self.dataset is not None and self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {self.dataset!r}")
        if self.n_sequences < 1 or (self.length is not None and self.length < 2):
            raise ValueError("n_sequences must be at least 1, length at least 2")
        Convention(self.convention or Convention.SPREAD)

    @property
    def is_default(self) -> bool:
        """Whether this is the text that comes with int8convert."""
        return self.path is None and self.dataset is None

    @property
    def cut(self) -> Convention:
        """The convention, with the default filled in."""
        default = Convention.SPREAD if self.dataset is None else Convention.CONTIGUOUS
        return Convention(self.convention or default)


@dataclass(frozen=True, slots=True)
class TextFile:
    """The file of a text, and its description."""

    path: Path
    description: str


@contextmanager
def open_text(text: Text) -> Iterator[TextFile]:
    """Provide a text as a file that can be read repeatedly, until the context ends.

    Raises:
        SourceError: the dataset cannot be fetched, or the pipe cannot be read.
    """
    if text.is_default:
        yield TextFile(DEFAULT_TEXT, "the text that comes with int8convert: a blunt default")
    elif text.path is not None:
        path = Path(text.path)
        with reusable_file(path) as reusable:
            yield TextFile(reusable or path, path.name)
    else:
        dataset = str(text.dataset)
        content = _read_wikitext2() if dataset == "wikitext2" else _read_c4()
        with tempfile.TemporaryDirectory(prefix="int8convert-") as folder:
            path = Path(folder) / dataset
            path.write_text(content, encoding="utf-8")
            yield TextFile(path, f"{dataset}: {_FILES[dataset][1]} of {_FILES[dataset][0]}")


@contextmanager
def reusable_file(path: Path | None) -> Iterator[Path | None]:
    """Provide a file that can be opened repeatedly: the file itself, or a copy of a pipe's content; None for None."""
    content = _read_pipe(path) if path is not None else None
    if path is None or content is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="int8convert-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        yield copy


def _read_pipe(path: Path) -> bytes | None:
    """Return the content of a pipe or a device; None for a file, and for a path without anything to read."""
    try:
        mode = path.stat().st_mode
        return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else path.read_bytes()
    except OSError as error:
        raise SourceError(f"'{path}' cannot be read: {error.strerror}", "give a text file in UTF-8") from error


def _read_c4() -> str:
    with gzip.open(_fetch("c4"), "rt", encoding="utf-8") as lines:
        return " ".join(json.loads(line)["text"] for line in islice(lines, _N_C4_DOCUMENTS))


def _read_wikitext2() -> str:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SourceError(
            "wikitext2 is a Parquet file, which needs pyarrow to be read",
            "pip install pyarrow, or give a text of your own with --text FILE",
        ) from error
    return "\n\n".join(parquet.read_table(_fetch("wikitext2"), columns=["text"])["text"].to_pylist())


def _fetch(dataset: str) -> str:
    """Return the file in the Hub's cache. Downloads it if it is missing."""
    from huggingface_hub import hf_hub_download

    repository, file_name = _FILES[dataset]
    try:
        return hf_hub_download(repository, file_name, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{file_name} of the dataset {repository} cannot be fetched: {str(error).splitlines()[0][:160]}",
            "fetch it once where there is a network, or give a text of your own with --text FILE",
        ) from error
