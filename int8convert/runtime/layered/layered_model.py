"""A model with one decoder layer in memory at a time, loaded by transformers' own loader.

1. `from_pretrained` builds the model without memory, as always, but loads only weights outside of the decoder layers:
   embeddings and norms. All else, such as the choice of int8 layers and the buffers, is as for a whole model.
2. `holding` loads the weights of one part, a decoder layer or the output head, by the same function and the same
   mapping from the checkpoint's names to the model's, and releases them afterwards.

Costs the memory of the held part, and of its tensors that are being cast. Weights are read by pread, once each time the
part is held. Left out on purpose: layers that share weights, and `.bin` files that are no zip archives, which torch
reads as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.checkpoint.utf8_path import utf8_path
from int8convert.errors import CorruptFileError, LayerwiseError
from int8convert.runtime.layered.decoder_layers import decoder_layers
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.stored_columns import StoredOutliers, attach_outliers, live_names
from int8convert.transformers_internals import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    load_state_dict,
    loading_weights_by,
    mark_loaded,
    rename_source_key,
    tied_parameters,
)

_MAY_LACK = "weight_format"
"""Suffix of tensors that checkpoints of early bitsandbytes lack, see `int8convert.runtime.load`."""

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""Environment variable by which transformers loads without threads."""


class LayeredModel:
    """A transformers model whose parts are still in their files.

    Attributes:
        model: the model, on its device; the weights of the parts are on the meta device.
        layers: the decoder layers by name, in order.
        parts: names of the parts: the layers, and the output head if it is not tied to the embedding.
        n_loads: how many times a part was loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        load: Callable[[], Any],
        settle: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        """Load a checkpoint's model without its parts.

        Args:
            load: loads the whole model by `from_pretrained`; its errors are passed on.
            settle: does to a part what `load` does to a whole model after loading.
        """
        self._settle = settle
        self._path = Path(path)
        self._tensors: dict[str, Any] = {}
        self._keys: dict[str, list[str]] = {}
        self._load_config: Any = None
        self.layers: dict[str, nn.Module] = {}
        self.n_loads = 0
        with self._deferring():
            self.model = load()
        self._outliers = self._find_outliers()

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._keys)

    @property
    def head(self) -> str | None:
        """The output head's name, if it is a part."""
        return next((name for name in self._keys if name not in self.layers), None)

    @contextmanager
    def holding(self, part: str | None) -> Iterator[None]:
        """Load a part's weights until the context ends; None loads nothing.

        Raises:
            CorruptFileError: the checkpoint lacks weights of the part.
            LayerwiseError: the part shares weights with another one.
        """
        if part is None:
            yield
            return
        modules = list(self.model.get_submodule(part).modules())
        before = [(dict(module._parameters), dict(module._buffers)) for module in modules]
        expected = self._shapes(part)
        try:
            self._load_part(part)
            self._check_part(part, expected)
            self._attach_outliers(part)
            self._settle(self.model.get_submodule(part))
            yield
        finally:
            for module, (parameters, buffers) in zip(modules, before, strict=True):
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _load_part(self, part: str) -> None:
        tensors = {key: self._tensors[key] for key in self._keys[part]}
        with _without_bars(), _one_after_the_other():
            convert_and_load_state_dict_in_model(self.model, tensors, self._load_config)
        if self._load_config.hf_quantizer is not None:
            self._load_config.hf_quantizer._process_model_after_weight_loading(self.model)
        self.n_loads += 1

    def _shapes(self, part: str) -> dict[str, torch.Size]:
        state = self.model.get_submodule(part).state_dict(prefix=f"{part}.")
        return {name: tensor.shape for name, tensor in state.items()}

    def _check_part(self, part: str, expected: dict[str, torch.Size]) -> None:
        hint = "write or fetch the checkpoint again: its config.json and its weights do not belong together"
        for name, tensor in self.model.get_submodule(part).state_dict(prefix=f"{part}.").items():
            if tensor.shape != expected[name]:
                raise CorruptFileError(
                    f"'{self._path}' holds '{name}' in the shape {list(tensor.shape)}, expected {list(expected[name])}",
                    hint,
                )
            if tensor.is_meta and name in tied_parameters(self.model):
                raise LayerwiseError(
                    f"'{name}' of '{self._path}' is a weight of another layer, too: it cannot be run layer by layer",
                    "run it where the whole model fits into memory, and without --stream",
                )
            if tensor.is_meta and not name.endswith(_MAY_LACK):
                raise CorruptFileError(f"'{self._path}' has no '{name}', or none of the right shape", hint)

    def _find_outliers(self) -> dict[str, str]:
        """Return the modules with stored outlier columns -> their names in the file."""
        path = self._path / OUTLIERS_FILE
        if not path.is_file() or not any(isinstance(module, Int8Linear) for module in self.model.modules()):
            return {}
        with safe_open(utf8_path(path), framework="pt") as file:
            stored = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118, not a mapping
        return {live: name for name, live in live_names(self.model, stored).items()}

    def _attach_outliers(self, part: str) -> None:
        """Attach stored columns to the part's layers: like the weights, these were left on the meta device."""
        names = {live: name for live, name in self._outliers.items() if live.startswith(f"{part}.")}
        if not names:
            return
        stored = {}
        with safe_open(utf8_path(self._path / OUTLIERS_FILE), framework="pt") as file:
            for name in names.values():
                columns, weight = (file.get_tensor(f"{name}.{leaf}") for leaf in ("outlier_columns", "outlier_weight"))
                stored[name] = StoredOutliers(columns.to(torch.int32), weight)
        mode = next(module.mode for module in self.model.modules() if isinstance(module, Int8Linear))
        attach_outliers(self.model, stored, mode)

    @contextmanager
    def _deferring(self) -> Iterator[None]:
        """Make `from_pretrained` skip the parts' weights until the context ends."""

        def load_rest(
            load_all: Any, model: Any, state_dict: dict[str, Any] | None, files: list[str], load_config: Any, *_: Any
        ) -> tuple[Any, Any]:
            self._load_config = load_config
            self._tensors = state_dict if state_dict is not None else _open_lazily(files)
            self.layers = decoder_layers(model)
            names = [*self.layers, *_own_head(model)]
            targets = _targets(self._tensors, model, load_config)
            part_of = {key: _part_of(target, names) for key, target in targets}
            self._keys = {name: [key for key, part in part_of.items() if part == name] for name in names}
            rest = {key: tensor for key, tensor in self._tensors.items() if part_of[key] is None}
            expected = [name for name in model.state_dict() if _part_of(name, names) is None]
            info, index = load_all(model, rest, None, load_config, expected)
            info.missing_keys &= set(expected)
            for name, tensor in model.state_dict(keep_vars=True).items():
                if _part_of(name, names) is not None:
                    mark_loaded(tensor)  # else transformers would make weights up, and trip over int8
            return info, index

        with loading_weights_by(lambda load_all: partial(load_rest, load_all)):
            yield


def _open_lazily(files: list[str]) -> dict[str, Any]:
    """Return tensor name -> object that reads the tensor when it is indexed."""
    tensors: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            opened: Any = safe_open(utf8_path(file), framework="pt", backend="pread")
            tensors |= {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118, not a mapping
        else:
            tensors |= load_state_dict(file)
    return tensors


def _targets(keys: Iterable[str], model: Any, load_config: Any) -> Iterator[tuple[str, str]]:
    """Yield each tensor of a checkpoint with its parameter, the first of several, as transformers finds it."""
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    for key in keys:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and key in parameters:
            target, _ = rename_source_key(key, [], [], model.base_model_prefix, parameters)
        yield key, target


def _own_head(model: Any) -> list[str]:
    """Return the name of the output head in a list; [] if its weight is that of another module."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head and head is not None), None)
    tied = {name for pair in tied_parameters(model).items() for name in pair}
    return [] if name is None or any(key.startswith(f"{name}.") for key in tied) else [name]


def _part_of(name: str, parts: list[str]) -> str | None:
    return next((part for part in parts if name.startswith(f"{part}.")), None)


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Make transformers load with one thread: the heaps of its four threads took up to a third more memory at the peak,
    and were no faster from a disk of 2 GB/s or from memory."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the bar that transformers shows for each call of its loader."""
    logging = transformers.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
