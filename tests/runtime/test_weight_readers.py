"""Which modules' weights a model's own code reads, told from the source of its classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from int8convert.runtime.weight_readers import Read, ReadKind, modules_with_read_weights, reads_in_source
from scripts.find_weight_reads import find_rows, markdown

DOCUMENT = Path(__file__).parents[2] / "docs/weight-reads.md"


class Reads(nn.Module):
    """Reads `a` and `pair.b` in a forward pass; asks the others for facts, or reads them elsewhere."""

    def __init__(self, n_slices: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(_is_quantized=True)
        self.n_slices = n_slices
        for name in ("a", "set_up", "asked", "trained", "sliced", "unsliced", "hacked", "called"):
            setattr(self, name, nn.Linear(2, 2, device="meta"))
        self.pair = nn.ModuleDict({"b": nn.Linear(2, 2, device="meta")})

    def _init_weights(self) -> None:
        self.set_up.weight.data.zero_()

    def forward(self, x: torch.Tensor, is_long: bool) -> Any:
        x = x.to(self.asked.weight.device)
        if isinstance(self.asked.weight, torch.Tensor) and hasattr(self.asked.weight, "SCB"):
            x = self.called(x)
        if self.training and is_long:
            return x @ self.trained.weight
        if self.n_slices > 1:
            return x @ self.sliced.weight[: self.n_slices]
        if hasattr(self.config, "_is_quantized"):  # noqa: SIM108, both forms are met with
            x = self.hacked(x)
        else:
            x = x @ self.hacked.weight
        x = x @ self.unsliced.weight if self.n_slices > 1 else x
        return x @ self.a.weight + self.pair.b.weight if is_long else x


class Inherits(Reads):
    def unrelated(self) -> None:
        pass


def model(**arguments: int) -> nn.Module:
    return nn.Sequential(Inherits(**arguments)).eval()


def test_only_weights_read_in_a_forward_pass_are_found() -> None:
    assert modules_with_read_weights(model()) == dict.fromkeys(("0.a", "0.pair.b"), ReadKind.VALUES)


def test_a_condition_on_the_module_itself_is_looked_up() -> None:
    assert modules_with_read_weights(model(n_slices=2)).keys() == {"0.a", "0.pair.b", "0.sliced", "0.unsliced"}


def test_a_training_branch_counts_for_a_model_in_training() -> None:
    assert "0.trained" in modules_with_read_weights(model().train())


def test_a_class_without_source_is_no_obstacle() -> None:
    made = type("Made", (Reads,), {})
    assert modules_with_read_weights(made()).keys() >= {"a", "pair.b"}


class Casts(nn.Module):
    """Casts to the dtypes of `cast`, `alias`, `blocks` and the first of `table`; guards or compares the others."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("cast", "alias", "t5", "gemma4", "compared", "listed"):
            setattr(self, name, nn.Linear(2, 2, device="meta"))
        self.table = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
        self.blocks = nn.ModuleList([nn.Linear(2, 2, device="meta") for _ in range(3)])
        self.norm = nn.LayerNorm(2, device="meta")

    def forward(self, x: torch.Tensor, i: int) -> Any:
        x = self.cast(x.to(self.cast.weight.dtype))
        target_dtype = self.alias.weight.dtype
        x = self.alias(x.to(dtype=target_dtype))
        x = self.table(x.to(next(self.table.parameters()).dtype))
        x = self.blocks[i](x.to(self.blocks[i].weight.dtype))
        if (
            isinstance(self.t5.weight, torch.Tensor)
            and x.dtype != self.t5.weight.dtype
            and self.t5.weight.dtype != torch.int8
        ):
            x = x.to(self.t5.weight.dtype)
        if (dtype := self.gemma4.weight.dtype).is_floating_point:
            x = x.to(dtype)
        if self.listed.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.listed.weight.dtype)
        if self.compared.weight.dtype == torch.float32:
            x = x.float()
        return self.norm(x.to(self.norm.weight.dtype))

    def get_features(self, x: torch.Tensor) -> Any:
        return self.get_dtype()

    def get_dtype(self) -> torch.dtype:
        return self.blocks[0].weight.dtype


def test_a_cast_to_the_dtype_of_a_weight_is_found_unless_it_is_guarded_against_int8() -> None:
    assert modules_with_read_weights(Casts().eval()) == {
        "cast": ReadKind.DTYPE,
        "alias": ReadKind.DTYPE,
        "table.0": ReadKind.FIRST_DTYPE,
        **dict.fromkeys(("blocks.0", "blocks.1", "blocks.2"), ReadKind.DTYPE),
        "norm": ReadKind.DTYPE,  # true of the code; a norm never becomes int8
    }


GETTER = """
try:
    class Late(Module):
        def get_features(self, x):
            return x.to(self.a[0].weight.dtype).shape
        def use(self, other):
            return {use}
except ImportError:
    pass
"""


@pytest.mark.parametrize(("use", "n"), [("other.get_features(1)", 1), ("other.features(1)", 0)])
def test_a_getter_counts_where_its_file_calls_it(use: str, n: int) -> None:
    assert reads_in_source(GETTER.format(use=use)) == {"Late": [Read(("a", "0"), ReadKind.DTYPE, ())] * n}


def test_a_read_within_an_expression_of_which_only_a_fact_is_asked_is_found() -> None:
    source = (
        "class A(Module):\n    def forward(self, x):\n        return (x @ self.a.weight).shape, self.b.weight.shape"
    )
    assert [read.path for read in reads_in_source(source)["A"]] == [("a",)]


def test_torchs_own_layers_count_unless_they_are_replaced_too() -> None:
    attention = nn.MultiheadAttention(4, 2, device="meta").eval()
    assert modules_with_read_weights(attention) == {"out_proj": ReadKind.VALUES}
    assert modules_with_read_weights(attention, reads_of_torch=False) == {}


def test_document_lists_what_the_installed_transformers_reads() -> None:
    # A new transformers: ./scripts/find_weight_reads --write docs/weight-reads.md, and look at what is new in it.
    listed = DOCUMENT.read_text().partition("|---|")[2]
    assert markdown(find_rows()).partition("|---|")[2] == listed
