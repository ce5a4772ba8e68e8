"""The module of each format, and what all of them hold.

A new format is one module with these names, a member of `Format`, and a line in `module_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from int8convert.formats import bitsandbytes, compressed_tensors, torchao
from int8convert.formats.format import Difference, Format, TensorSpecs, WeightNames


class FormatModule(Protocol):
    """What a format's module holds. A weight's name ends in `.weight`; its shape is [out, in].

    Attributes:
        NAMES: the last parts of the names of an int8 weight's tensors.
        MOVED_TOGETHER: the leaves that the loader renames together, so that a weight need not be stored under its
            module's name; empty where it must be.
        STORES_ABSMAX: whether the stored scale is the row's absmax; else it is absmax / 127.
        HOLDS_CONV1D: whether the loader replaces GPT-2's Conv1D.
        HOLDS_EXPERTS: whether the experts of a mixture may be int8.
        KEEPS_ROUTERS: whether servers build the Linear layers that choose experts in 16 bits, whatever the list says.
        HAS_THRESHOLD: whether the config block holds the outlier threshold.
        ROTATES_INPUTS: whether the config block can have loaders rotate inputs, see `transforms`.
        SHOWS_CODES: whether a loaded layer's `weight` is int8 to the model's own code.
        RUNTIME_LOADS: whether `int8convert.load` reads it.
        PLANNED_AS: the format of `quantize` that chooses the same modules.
        PACKAGES: what `pip install` needs for transformers to load it.
        VLLM_PACKAGES: what it needs for vLLM.
        GAINS_MEMORY_ONLY: whether its products are slower than 16-bit ones for models below 6.7 B parameters.
        VLLM_LOADS_EXPERTS: whether vLLM loads models with experts in it, int8 or not.
    """

    NAMES: WeightNames
    MOVED_TOGETHER: tuple[str, ...]
    STORES_ABSMAX: bool
    HOLDS_CONV1D: bool
    HOLDS_EXPERTS: bool
    KEEPS_ROUTERS: bool
    HAS_THRESHOLD: bool
    ROTATES_INPUTS: bool
    SHOWS_CODES: bool
    RUNTIME_LOADS: bool
    PLANNED_AS: Format
    PACKAGES: str
    VLLM_PACKAGES: str
    VLLM_LOADS_EXPERTS: bool
    GAINS_MEMORY_ONLY: bool

    def weight_specs(self, name: str, shape: tuple[int, ...]) -> TensorSpecs:
        """Return the tensors that a weight becomes: its codes, its scale, and what else the loader demands."""

    def names_beside(self, name: str) -> list[str]:
        """Return the names that the loader reads as part of an int8 weight, those it does without included.

        A tensor of such a name that means something else would change the layer.
        """

    def from_absmax(self, absmax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the stored form of the rows' absmax, float32 [out]."""

    def from_scale(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the stored form of the rows' scale, absmax / 127, float32 [out]."""

    def to_scale(self, stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what a code is multiplied by, from its stored form, float32 [out]."""

    def tensors_beside(self, name: str, stored: npt.NDArray[np.float32]) -> dict[str, memoryview]:
        """Return the bytes of a weight's tensors but its codes.

        Args:
            stored: the stored form of the scale, float32 [out].
        """

    def dequantize(self, codes: npt.NDArray[np.int8], stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the float32 weights [rows, cols] that the loader computes from codes and stored scales [rows]."""

    def block(self, skip_modules: Iterable[str], threshold: float) -> dict[str, Any]:
        """Return `quantization_config`.

        Args:
            skip_modules: full names of all modules that the loader would replace and must not.
            threshold: outlier threshold; ignored where the format has none.
        """

    def block_problem(self, block: Mapping[str, Any]) -> str:
        """Return why a block's codes are not those of LLM.int8(), or ""."""

    def listed_names(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the modules that a block tells the loader to leave alone, by plain names.

        Without a list, loaders leave the output head alone.
        """

    def leaves_alone(self, module_name: str, block: Mapping[str, Any]) -> bool:
        """Return whether a block makes the loader leave a Linear module as it is, by plain names alone.

        For judging a stranger's block: its regular expressions are not run, and count as naming nothing.
        """

    def covered(self, module_names: Iterable[str], listed: Iterable[str]) -> set[str]:
        """Return the modules that the loader would leave alone, given a list of others.

        Args:
            listed: names of our own choice; they may be run as regular expressions.
        """

    def replaces(self, module: Any) -> bool:
        """Return whether the loader makes a torch module int8, as far as its class goes."""

    def int8_modules(self, model: Any, block: Mapping[str, Any]) -> Callable[[str, Any], bool]:
        """Return the loader's rule for a checkpoint: (module name, module) -> whether it is int8.

        Args:
            model: of transformers; its class decides where the block has no list.

        Raises:
            SourceError: the block names modules by an expression that cannot be run in bounded time.
        """

    def foreign_entries(self, block: Mapping[str, Any]) -> Iterator[Difference]:
        """Yield the entries of another tool's block that would make a loader read the weights differently."""

    def file_metadata(self, tensors: Mapping[str, tuple[int, ...] | None], dtype: str) -> dict[str, str]:
        """Return what the loader demands in the header of each file beside the tensors.

        Args:
            tensors: all tensors of the model by name, with the shape of those that are int8 weights.
            dtype: what the model computes in, as config.json spells it.
        """

    def merged_metadata(self, headers: Iterable[Mapping[str, str]], weight_names: Iterable[str]) -> dict[str, str]:
        """Return the same for a copy of a checkpoint that has this format already.

        Args:
            headers: the metadata of its files.
            weight_names: its int8 weights.

        Raises:
            CorruptFileError: no header describes one of the weights.
        """


def module_of(format: Format) -> FormatModule:
    match format:
        case Format.BITSANDBYTES:
            return bitsandbytes
        case Format.COMPRESSED_TENSORS:
            return compressed_tensors
        case Format.TORCHAO:
            return torchao


def endings_beside(formats: Iterable[Format]) -> tuple[str, ...]:
    """Return the ends of the names of tensors that only int8 weights have: their scales and zeros."""
    names = [module_of(format).NAMES for format in formats]
    return tuple(f".{leaf}" for each in names for leaf in (each.scale, each.zeros))
