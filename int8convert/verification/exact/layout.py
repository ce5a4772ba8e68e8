"""Pairs the tensors of an int8 checkpoint with the source's, by the plan.

The plan is rebuilt from the source, with the options in the manifest. A tensor that is present as planned is paired
with its source, to be compared. Tensors that are missing, unexpected, or of another dtype or shape are findings.

Without a manifest, three differences are allowed: modules that config.json keeps in 16 bits, an output head in int8,
and the float dtype of kept tensors.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES
from int8convert.formats import transforms
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.modules import module_of
from int8convert.planning.plan import ConversionPlan, PlannedTensor
from int8convert.verification.checks import Finding
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.exact.values import FLOATS

_CHOICES = ("output head", "last module of the model", "covered by a skipped name", "user skip")
"""Reasons to keep a module that other tools may decide otherwise; loaders read both."""


@dataclass(frozen=True, slots=True)
class Int8Pair:
    """An int8 weight and its source.

    Attributes:
        zeros: a zero point or a format number; None if there is none.
        matrix: the matrix by which loaders rotate its input; None if they do not.
    """

    planned: PlannedTensor
    codes: PlacedTensor
    scale: PlacedTensor
    zeros: PlacedTensor | None
    matrix: PlacedTensor | None = None

    @property
    def module_name(self) -> str:
        return self.planned.output_name.removesuffix(".weight")

    @property
    def main(self) -> PlacedTensor:
        """The tensor that decides the order of comparison."""
        return self.codes


@dataclass(frozen=True, slots=True)
class KeptPair:
    """A tensor that is not int8, and its source.

    Attributes:
        must_be_non_finite: whether it may be kept only because its values have no int8 form.
    """

    planned: PlannedTensor
    tensor: PlacedTensor
    must_be_non_finite: bool = False

    @property
    def main(self) -> PlacedTensor:
        return self.tensor


Pair = Int8Pair | KeptPair


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a checkpoint, paired with the plan.

    Attributes:
        findings: tensors that are missing, unexpected, or not as planned.
        planned_modules: modules that should be int8, paired or not.
    """

    format: Format
    pairs: tuple[Pair, ...] = field(repr=False)
    findings: tuple[Finding, ...]
    n_expected: int
    planned_modules: frozenset[str] = field(repr=False)

    @property
    def int8_modules(self) -> set[str]:
        return {pair.module_name for pair in self.pairs if isinstance(pair, Int8Pair)}


def lay_out(out: CheckpointSource, plan: ConversionPlan, provenance: Provenance) -> Layout:
    """Pair the tensors of an int8 checkpoint with those of the plan."""
    return _Pairing(out, plan, provenance).result()


class _Pairing:
    def __init__(self, out: CheckpointSource, plan: ConversionPlan, provenance: Provenance) -> None:
        self._out = out
        self._plan = plan
        self._provenance = provenance
        self._format = read_format(out.config)
        self._module = module_of(self._format)
        self._left = {t.name: PlacedTensor(t, shard) for shard in out.shards for t in shard.tensors}
        self._pairs: list[Pair] = []
        self._findings: list[Finding] = []
        self._n_expected = 0
        self._modules: set[str] = set()

    def result(self) -> Layout:
        order = {name: i for i, name in enumerate(self._left)}
        for planned in self._plan.tensors:
            if planned.is_quantized:
                self._place_int8(planned)
            else:
                self._place_kept(planned)
        for name, tensor in self._left.items():
            self._findings.append(Finding(name, "no such tensor: the source gives none", _shown(tensor)))
        self._pairs.sort(key=lambda pair: order[pair.main.name])
        return Layout(
            self._format, tuple(self._pairs), tuple(self._findings), self._n_expected, frozenset(self._modules)
        )

    def _place_int8(self, planned: PlannedTensor) -> None:
        module = planned.output_name.removesuffix(".weight")
        there = self._left.get(planned.output_name)
        if there is not None and there.stored.dtype in FLOATS and self._may_be_kept(module):
            self._place_kept(replace(planned, output_dtype=there.stored.dtype, reason="named in config.json"))
            return
        self._modules.add(module)
        shape = planned.shape
        names = self._module.NAMES.under(module)
        specs = self._module.weight_specs(f"{module}.weight", shape)
        codes = self._take(names.codes, {"I8"}, [shape])
        dtypes: Set[str] = {"F32"} if self._provenance.is_known else FLOATS
        scale = self._take(names.scale, dtypes, [specs[names.scale][1], shape[:1]])
        zeros = None
        if names.zeros in self._left or (names.zeros in specs and self._provenance.is_known):
            zeros = self._take(names.zeros, set(DTYPE_BYTES), [(), shape[:1], (shape[0], 1)])
        matrix = None
        if planned.rotates_input:
            name = transforms.matrix_name(planned.output_name)
            matrix = self._take(name, {"F16"}, [planned.output_specs()[name][1]])
        if codes is not None and scale is not None:
            self._pairs.append(Int8Pair(planned, codes, scale, zeros, matrix))

    def _may_be_kept(self, module: str) -> bool:
        """Return whether config.json tells loaders to keep a module, and no manifest says otherwise."""
        if self._provenance.is_known:
            return False
        return self._module.leaves_alone(module, self._out.config["quantization_config"])

    def _place_kept(self, planned: PlannedTensor) -> None:
        name = planned.output_name
        there = self._left.get(name)
        if there is not None and there.stored.dtype == "I8" and planned.output_dtype in FLOATS:
            self._place_other_choice(planned)
            return
        dtypes: Set[str] = {planned.output_dtype}
        if not self._provenance.is_known and planned.output_dtype in FLOATS:
            dtypes = FLOATS
        tensor = self._take(name, dtypes, [planned.shape])
        if tensor is not None:
            must_be = name.removesuffix(".weight") in self._provenance.kept_for_values and name.endswith(".weight")
            self._pairs.append(KeptPair(planned, tensor, must_be))

    def _place_other_choice(self, planned: PlannedTensor) -> None:
        """Place int8 codes of a tensor that the plan keeps: a finding, or another tool's choice."""
        if not self._provenance.is_known and planned.reason.startswith(_CHOICES) and len(planned.shape) == 2:
            self._place_int8(replace(planned, output_dtype="I8", reason=""))
            return
        self._n_expected += 1
        names = self._module.NAMES.under(planned.output_name.removesuffix(".weight"))
        for name in (planned.output_name, names.scale, names.zeros):
            self._left.pop(name, None)
        expected = f"{planned.output_dtype}, which stays as it is: {planned.reason}"
        self._findings.append(Finding(planned.output_name, expected, "int8 codes"))

    def _take(self, name: str, dtypes: Set[str], shapes: Sequence[tuple[int, ...]]) -> PlacedTensor | None:
        """Return a tensor by its name; if it is missing or another, add a finding and return None."""
        self._n_expected += 1
        there = self._left.pop(name, None)
        if there is not None and there.stored.dtype in dtypes and there.stored.shape in shapes:
            return there
        expected = f"{min(dtypes) if len(dtypes) == 1 else 'numbers'} {list(shapes[0])}"
        self._findings.append(Finding(name, expected, _shown(there) if there is not None else "no such tensor"))
        return None


def _shown(tensor: PlacedTensor) -> str:
    return f"{tensor.stored.dtype} {list(tensor.stored.shape)}"
