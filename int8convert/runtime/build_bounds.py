"""Bounds for the model that a stranger's config.json describes, while transformers builds it on the meta device.

Weights cost nothing there, but each module is a Python object, and what no file holds is allocated later. Hooks that
torch calls for every module, parameter and buffer count them, so a config that asks for a vocabulary of a billion words
ends as soon as the model exceeds what the checkpoint's files could ever fill.

Does not know what a class computes in Python without registering anything, such as a table of sinusoids.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from int8convert.errors import CorruptFileError
from int8convert.text import quoted

MAX_LAYERS = 10_000
"""Largest number of layers that config.json may name. Models have up to 200."""

MAX_MODULES = 1_000_000
"""Modules of a model whose files are not known yet. Kimi K2 has 100,000, each expert's projections apart."""

_MODULES_PER_TENSOR, _SPARE_MODULES = 20, 20_000
_ELEMENTS_PER_STORED, _SPARE_ELEMENTS = 8, 500_000_000
"""Elements allowed per stored element, and extra elements allowed in all; likewise for modules per stored tensor. A
quantizer registers a weight again, some buffers are in no file, and twenty modules hold one tensor of fused experts."""

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def check_layer_counts(stated: Mapping[str, Any]) -> None:
    """Refuse an absurd number of layers before a config class makes a list of so many entries.

    Raises:
        CorruptFileError: it names more than MAX_LAYERS layers.
    """
    for part in _objects(stated):
        for name in part:
            value = part[name]
            is_count = name in _LAYER_COUNTS or name.endswith(("_layers", "_blocks"))
            if is_count and isinstance(value, int | float) and value > MAX_LAYERS:
                raise CorruptFileError(
                    f"config.json says {quoted(name)} = {quoted(str(value), 40)[1:-1]}, "
                    f"expected at most {MAX_LAYERS:,}",
                    "fetch config.json again",
                )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in a JSON value, including the value itself."""
    if isinstance(value, Mapping):
        yield value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from _objects(child)


@contextmanager
def bounded_build(n_tensors: int | None, n_elements: int | None) -> Iterator[None]:
    """Context in which a model built by this thread raises once it grows beyond what files can fill.

    Args:
        n_tensors, n_elements: counts in the checkpoint's weight files; None if not known yet.

    Raises:
        CorruptFileError: a model exceeds them.
    """
    max_modules = MAX_MODULES if n_tensors is None else _SPARE_MODULES + _MODULES_PER_TENSOR * n_tensors
    modules = _Budget("modules", max_modules, lambda module: 1)
    budgets = [(register_module_module_registration_hook, modules)]
    if n_elements is not None:
        most = _SPARE_ELEMENTS + _ELEMENTS_PER_STORED * n_elements
        parameters, buffers = (_Budget(f"elements of {what}", most, _size) for what in ("parameters", "buffers"))
        budgets += [(register_module_parameter_registration_hook, parameters)]
        budgets += [(register_module_buffer_registration_hook, buffers)]
    with ExitStack() as stack:
        for register, budget in budgets:
            stack.callback(register(budget.spend).remove)
        yield


def _size(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.numel())


class _Budget:
    """Return a torch hook that counts its calls."""

    def __init__(self, what: str, most: int, size: Callable[[Any], int]) -> None:
        self._what, self._most, self._size = what, most, size
        self._left = most
        self._thread = threading.get_ident()

    def spend(self, owner: Any, name: str, value: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._left -= self._size(value)
        if self._left < 0:
            raise CorruptFileError(
                f"config.json describes a model of more than {self._most:,} {self._what}, "
                f"which its weight files cannot fill (reached in {type(owner).__name__})",
                "its config.json and its weights do not belong together; write or fetch the checkpoint again",
            )
