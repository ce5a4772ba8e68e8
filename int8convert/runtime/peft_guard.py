"""Restricts what PEFT's adapters do to an int8 layer, which they take for an nn.Linear with a weight.

Most adapters call the layer and add to its output, which works. Two things silently go wrong:

1. Merging adds a float to codes. Some adapters cast it to int8 first, which makes it zero, and unload themselves.
2. Some adapters compute with the weight in every forward, or change it at once, and would use the codes.

PEFT cannot exclude a layer. But torch calls a hook when a module gets a child, and an adapter's layer gets the layer it
wraps as `base_layer`. The hook makes the adapter's `merge` an error, or refuses the adapter.

Measured on PEFT 0.21 with all its adapters for Linear layers, on a layer's codes and on the weights of the codes.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from int8convert.errors import AdapterError

READ_THE_WEIGHT = frozenset({"hira", "hra", "peanut", "unilora"})
"""Packages in `peft.tuners` whose adapters computed something else on int8 layers. DoRA's do, too,
and ask for the dequantized weight of a layer that has what `Int8Linear.W_q` is."""

KASA_CHILD = "lora_diag"
"""What a LoRA layer gets on its way to becoming one of KaSA, which then takes the smallest singular values out of the
weight itself."""


def guard_adapters(layer_class: type[nn.Module]) -> None:
    """Register the hook, for adapters that wrap a layer of this class."""

    def is_around(child: Any) -> bool:
        while child is not None and not isinstance(child, layer_class):
            child = getattr(child, "base_layer", None)  # one adapter around another
        return child is not None

    def on_child(parent: Any, name: str, child: nn.Module | None) -> None:
        if name == "base_layer" and hasattr(parent, "merge") and is_around(child):
            package = type(parent).__module__.removeprefix("peft.tuners.").partition(".")[0]
            if package in READ_THE_WEIGHT:
                _refuse(package)
            parent.merge = _refuse_to_merge
        elif name == KASA_CHILD and is_around(getattr(parent, "base_layer", None)):
            _refuse("KaSA")

    register_module_module_registration_hook(on_child)


def _refuse(method: str) -> NoReturn:
    raise AdapterError(
        f"PEFT's {method} computes with the weight it wraps, and an int8 layer has only its codes",
        "use an adapter that does not, such as LoRA or DoRA, or a base model in 16 bits",
    )


def _refuse_to_merge(*_: object, **__: object) -> NoReturn:
    raise AdapterError(
        "an adapter cannot be merged into an int8 weight: nearly all of it would be rounded away",
        "keep it beside the model, or merge it while converting: int8convert quantize SRC OUT --lora ADAPTER",
    )
