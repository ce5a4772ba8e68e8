"""Maps checkpoint keys to a model's parameters and back, by transformers' renaming.

Old checkpoints have other names: a base model's prefix or none, `gamma` for `weight`, `language_model.model.` for
`model.language_model.`. transformers renames them on loading, and back on saving. So the output may keep the source's
names, provided that the int8 loader finds all tensors of a module under them.

Runs in the child process. Does not know values or the arithmetic of conversions: a tensor that is merged or split on
loading is marked as converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from int8convert.transformers_internals import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


@dataclass(frozen=True)
class LoadedInto:
    """The parameter that transformers loads a checkpoint tensor into, and the conversion on the way."""

    parameter: str
    pattern: str | None = None
    """Source pattern of the conversion that matched; None for a tensor that is loaded as it is."""
    converter: Any = None
    """transformers' WeightConverter, shared by all tensors of the pattern."""

    @property
    def is_converted(self) -> bool:
        return self.pattern is not None

    @property
    def operations(self) -> tuple[Any, ...]:
        return tuple(self.converter.operations) if self.is_converted else ()


class ModelKeys:
    """The renaming of one model's keys.

    Args:
        moved_together: see `FormatModule.MOVED_TOGETHER`.

    Attributes:
        loaded: key -> the parameter it is loaded into; None where the model does not use it.
        unmatched: unused key -> the parameters it would be loaded into if the model had them.
    """

    def __init__(self, model: Any, names: list[str], moved_together: tuple[str, ...]) -> None:
        self._moved_together = moved_together
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        # What the int8 loader adds, after the model's own; the operation is never run here.
        added = [WeightConverter(list(moved_together), "weight", [Transpose()])] if moved_together else []
        self._int8_converters = [*self._converters, *added]
        self._converter_of = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._base_prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self.unmatched: dict[str, list[str]] = {}
        self.loaded = {name: self._load(name) for name in sorted(names, key=dot_natural_key)}
        # As when a model is saved: what was of use on loading, undone in the opposite order.
        used = [entry for entry in self._renamings if entry.was_used()]
        self._reversed = [entry.reverse_transform() for entry in reversed(used)]

    def _load(self, key: str) -> LoadedInto | None:
        renamed, pattern = self._rename(key, self._converters)
        converter = None if pattern is None else self._converter_of[pattern]
        if renamed in self._parameters:
            return LoadedInto(renamed, pattern, converter)
        first, *_ = targets = [renamed] if converter is None else converter.target_patterns
        self.unmatched[key] = [renamed.replace(first, target) for target in targets]
        return None

    def _rename(self, key: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
        """The two calls and their order are those of `transformers.core_model_loading`."""
        renamed, pattern = rename_source_key(key, self._renamings, converters, self._base_prefix, self._parameters)
        if renamed not in self._parameters and key in self._parameters:
            renamed, pattern = rename_source_key(key, [], [], self._base_prefix, self._parameters)
        return str(renamed), pattern

    def output_name(self, key: str, parameter: str) -> str:
        """Return the key of a copied tensor: the one under which transformers saves it, mostly the source's."""
        names = (apply_renamings(parameter, self._reversed), key, parameter)
        return next((name for name in names if self._rename(name, self._int8_converters)[0] == parameter), key)

    def int8_output_name(self, key: str, parameter: str) -> str | None:
        """Return the key of a weight that becomes int8; None if the loader would not find it and what is beside it."""
        if not self._moved_together:
            name = self.output_name(key, parameter)
            return name if name.endswith(".weight") else None
        for name in (apply_renamings(parameter, self._reversed), key, parameter):
            _, *others = self._moved_together
            parts = [name, *(f"{name.removesuffix('.weight')}.{leaf}" for leaf in others)]
            found = [self._rename(part, self._int8_converters) for part in parts]
            if all(renamed == parameter and pattern in (None, *self._moved_together) for renamed, pattern in found):
                return name
        return None
