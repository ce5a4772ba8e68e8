"""The factors by which a conversion smooths a model, and their file `int8convert/smoothing.safetensors`.

A group is a tensor that layers read, and what writes it: a norm, or a layer of an attention's values or of a gated MLP.
With s > 0, one factor for each feature, what writes the tensor is divided by s, and the columns of the layers that read
it are multiplied by s. So the model computes the same, and outliers move from inputs into weights, or back.

Source: SmoothQuant, arXiv:2211.10438. `conversion.smoothing_search` chooses the factors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.names import SMOOTHING_FILE
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import CorruptFileError, SourceError
from int8convert.planning.fold import Factors, Values
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class SmoothGroup:
    """A group whose smoothing is proved to change no output.

    Attributes:
        name: the norm or the layer that writes the tensor.
        readers: the layers that read it.
        size: number of factors.
        head: size of the heads whose factors repeat in the readers' columns; 0 if each column has its own.
    """

    name: str
    readers: tuple[str, ...]
    size: int
    head: int = 0

    def of_columns(self, values: Values) -> Values:
        """Return the largest value of all columns [in] that share a factor, [size]."""
        if not self.head:
            return values
        largest: Values = values.reshape(self.size // self.head, -1, self.head).max(1).reshape(-1)
        return largest


def spread(factors: Values, n_columns: int, head: int) -> Values:
    """Return the factor of each column [n_columns], from those of a group: each head's for all heads that share it."""
    if not head:
        return factors
    repeats = n_columns // len(factors)
    return np.ascontiguousarray(np.repeat(factors.reshape(-1, head), repeats, axis=0)).reshape(-1)


@dataclass(frozen=True, slots=True)
class SmoothingFactors:
    """Factors of groups, float32.

    Attributes:
        by_group: name of a group -> its factors [size]. Groups that are left alone are not in it.
    """

    by_group: Mapping[str, Values] = field(repr=False)

    def content(self) -> bytes:
        """Return the bytes of the file."""
        found: bytes = save(dict(self.by_group))
        return found

    def of_rows(self, name: str) -> Factors | None:
        """Return the factors 1 / s of the rows of a group's norm or writing layer; None if it is not smoothed."""
        return Factors.of(np.float32(1) / self.by_group[name]) if name in self.by_group else None

    def of_columns(self, name: str, n_columns: int, head: int) -> Factors | None:
        """Return the factors s of the columns of a group's readers; None if it is not smoothed."""
        return Factors.of(spread(self.by_group[name], n_columns, head)) if name in self.by_group else None


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Where the factors of a conversion come from.

    Attributes:
        path: the folder of a calibration, or a file of factors.
        sha256: hash of the calibration's record, or of the file.
        factors: None until they are chosen.
    """

    path: Path
    sha256: str
    factors: SmoothingFactors | None = None


def open_calibrated(folder: str | os.PathLike[str], source: CheckpointSource) -> Smoothing:
    """Open the calibration of a source, by which factors will be chosen.

    Raises:
        SourceError: the folder holds no calibration, or that of another source.
        CorruptFileError: a file is damaged.
    """
    from int8convert.calibration.folder import RECORD, read_calibration

    read_calibration(Path(folder), source)
    return Smoothing(Path(folder), file_sha256(Path(folder) / RECORD))


def open_factors(path: str | os.PathLike[str]) -> Smoothing:
    """Open a file of factors.

    Raises:
        SourceError: there is no such file.
        CorruptFileError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"'{path}' is no file of factors", f"pass the {SMOOTHING_FILE} of an earlier conversion")
    return Smoothing(path, file_sha256(path), read_factors(path))


def read_factors(path: Path) -> SmoothingFactors:
    """Read a file of factors.

    Raises:
        CorruptFileError: it holds something else, or a factor that is not positive.
    """
    read_safetensors_header(path)  # describes what is wrong with a file in another format
    found = load(path.read_bytes())
    for name, values in found.items():
        is_vector = values.dtype == np.float32 and values.ndim == 1
        if not is_vector or not (np.isfinite(values) & (values > 0)).all():
            raise CorruptFileError(
                f"{quoted(name)} in '{path}' holds no positive float32 factors", "convert the source again"
            )
    return SmoothingFactors(found)
