"""The model map: which tensors of a checkpoint are Linear weights that the output's loader expects as int8.

Names mislead, the model's class does not. So transformers makes the map (`process`). Where it cannot build the model,
`name_rules` decide by name and shape, and the map carries a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from int8convert.errors import AlreadyQuantizedError, ModelMapError, PatternError
from int8convert.formats.format import Format
from int8convert.patterns import matches
from int8convert.planning.expert_layouts import ExpertLayout
from int8convert.text import quoted


class Action(StrEnum):
    QUANTIZE = "quantize"
    QUANTIZE_TRANSPOSED = "quantize transposed"
    """Stored [in, out], as Conv1D does; written as [out, in]."""
    SPLIT = "split"
    """Holds the matrices of several experts; each is written by itself."""
    KEEP = "keep"
    DROP = "drop"
    """Another name of a tensor that is written anyway."""


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """The decision on one tensor.

    Attributes:
        reason: why it is kept or dropped; "" where it becomes int8.
        output_name: its key in the output: the source's, with the base model's prefix where the loader expects it.
        output_dtype: I8 where it becomes int8; else the dtype that a plain load of the source gives it.
        experts: its layout where it is split; `output_name` is then unused.
    """

    action: Action
    reason: str
    output_name: str
    output_dtype: str
    experts: ExpertLayout | None = None


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """The parameters that a checkpoint lacks, and the tensors that its model does not use.

    Attributes:
        n_parameters: elements of the model's parameters; tied ones count once, buffers do not count.
        missing: parameter or persistent buffer -> its shape; loaders would make up its values.
        defaulted: further missing parameters and buffers, which the class declares it can do without; loaders leave
            them as the class makes them. Without counters, tied parameters and rotary frequencies.
        counters: those of `missing` that are buffers of positions and counts, which the class sets itself.
        unexpected: names of unused tensors, without those that the class declares it may meet.
        mismatched: parameter -> its shape in the checkpoint, and in the model; the first is None where its tensors do
            not fit together.
        integers: tensor of integers that goes into a float parameter -> its dtype.
    """

    n_parameters: int
    missing: dict[str, Shape]
    defaulted: tuple[str, ...]
    counters: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[Shape | None, Shape]]
    integers: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The decisions on all tensors.

    Attributes:
        model_class: the transformers class that decided; None where the name rules did.
        dtype: the model's dtype as in config.json: float16.
        tensors: source name -> decision.
        skip_modules: full names of the modules that the loader would replace and must not.
        output_format: the format whose loader the map is for.
        parameters: the model's parameter -> the source name it is loaded from, and whether it is stored [in, out].
            Without those made of several tensors; empty where name rules decided.
        needs: what the checkpoint lacks; None where name rules decided.
    """

    model_class: str | None
    dtype: str
    tensors: dict[str, MappedTensor] = field(repr=False)
    skip_modules: tuple[str, ...]
    output_format: Format = Format.BITSANDBYTES
    parameters: dict[str, tuple[str, bool]] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()
    needs: ModelNeeds | None = field(repr=False, default=None)

    @property
    def linears(self) -> set[str]:
        """Source names of the Linear weights: those that become int8, and those of `skip_modules`."""
        skipped = {f"{module}.weight" for module in self.skip_modules}
        kept = (Action.KEEP, Action.DROP)
        return {
            name for name, mapped in self.tensors.items() if mapped.action not in kept or mapped.output_name in skipped
        }


@dataclass(frozen=True, slots=True)
class ModuleFilter:
    """The user's choice of modules and format.

    A pattern matches a module's full name or a dotted tail of it, with shell wildcards: `fc2`, `layers.0.*`, `*_proj`.

    Attributes:
        only: if not empty, no other module becomes int8.
        output_format: modules that its loader does not replace stay 16-bit.
        trusts_code: the checkpoint's own code may run.
    """

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    output_format: Format = Format.BITSANDBYTES
    trusts_code: bool = False

    def allows(self, module_name: str) -> bool:
        matched_only = not self.only or any(matches(module_name, pattern) for pattern in self.only)
        return matched_only and not any(matches(module_name, pattern) for pattern in self.skip)

    def check_used(self, module_names: Sequence[str]) -> None:
        """Raise a PatternError for a pattern that matches none of the modules, most likely a typing error."""
        for option, patterns in (("--skip", self.skip), ("--only", self.only)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in module_names):
                    examples = ", ".join(repr(name) for name in module_names[:3]) or "none"
                    raise PatternError(
                        f"{option} {pattern!r} matches no module that could become int8",
                        f"give a full module name or a dotted tail of one, such as {examples}",
                    )


def check_config(config: dict[str, Any], is_decodable: bool = False) -> None:
    """Refuse a config that cannot be mapped, as far as that is known without transformers.

    Args:
        is_decodable: the weights are quantized in a form that is decoded while they are read.

    Raises:
        AlreadyQuantizedError: the weights are quantized already.
        ModelMapError: config.json is missing, names no architecture, or has a name that is not a name.
    """
    block = config.get("quantization_config")
    if block is not None and not is_decodable:
        method = block.get("quant_method") if isinstance(block, dict) else None
        raise AlreadyQuantizedError(
            "the source is quantized already: its config.json names quant_method "
            + (quoted(method) if isinstance(method, str) else "'unnamed'"),
            "convert the 16-bit checkpoint it was made from",
        )
    architectures = config.get("architectures")
    # Looked up in transformers and printed: so it has to be a name, and the name of a class at that.
    if not (
        isinstance(architectures, list)
        and architectures
        and all(isinstance(a, str) and a.isidentifier() and a.isascii() and len(a) <= 200 for a in architectures)
    ):
        raise ModelMapError(
            "config.json names no architecture, so which weights belong to Linear layers is unknown"
            if config
            else "config.json is missing, so which weights belong to Linear layers is unknown",
            'add the class the weights were saved from, such as "architectures": ["LlamaForCausalLM"]',
        )
    for key in ("model_type", "dtype", "torch_dtype"):
        # transformers repeats these word for word in its complaints, which are shown to the user.
        name = config.get(key)
        if name is not None and not (isinstance(name, str) and name.isprintable() and len(name) <= 200):
            shown = quoted(name) if isinstance(name, str) else f"a {type(name).__name__}"
            raise ModelMapError(
                f"{key} in config.json is {shown}, expected a name",
                "fetch config.json again, from a source you trust",
            )
