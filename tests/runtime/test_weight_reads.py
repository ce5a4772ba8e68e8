"""Which modules' weights model code reads: the table, and the rule that derives it from the source of the classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from int8convert.runtime.weight_reads import CONDITIONS, ReadKind, modules_with_read_weights
from scripts.find_weight_reads import MODULE, find_conditions, find_rows, table
from scripts.reads_in_source import Read, is_reached, reads_in_source


def reads_of(module: nn.Module) -> dict[str, ReadKind]:
    """Path -> what the module's class, which is in this file, reads with the attributes that the module has."""
    reads = reads_in_source(Path(__file__).read_text())[type(module).__name__]
    return {".".join(read.path): read.kind for read in reads if is_reached(read, module)}


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


def test_only_weights_read_in_a_forward_pass_are_found() -> None:
    assert reads_of(Reads().eval()) == dict.fromkeys(("a", "pair.b"), ReadKind.VALUES)


def test_a_condition_on_the_module_itself_is_looked_up() -> None:
    assert reads_of(Reads(n_slices=2).eval()).keys() == {"a", "pair.b", "sliced", "unsliced"}


def test_a_training_branch_counts_for_a_model_in_training() -> None:
    assert "trained" in reads_of(Reads().train())


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
    assert reads_of(Casts().eval()) == {
        "cast": ReadKind.DTYPE,
        "alias": ReadKind.DTYPE,
        "table": ReadKind.FIRST_DTYPE,
        "blocks.*": ReadKind.DTYPE,
        "blocks.0": ReadKind.DTYPE,
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


def test_a_string_with_a_line_in_the_first_column_hides_no_read() -> None:
    source = (
        'class A(Module):\n    """\nclass B: of the text\n    """\n'
        "    def forward(self, x):\n        return x @ self.a.weight\n"
    )
    assert [read.path for read in reads_in_source(source)["A"]] == [("a",)]


def test_table_is_what_the_classes_of_the_installed_transformers_read() -> None:
    # A new transformers: ./scripts/find_weight_reads --write, and look at what is new in it.
    assert table(find_rows()) in MODULE.read_text()
    # Of Gemma 4's assistants it is the head, which stays 16-bit anyway.
    found = {name: conditions for name, conditions in find_conditions().items() if not name.startswith("Gemma4")}
    assert found == {name: {"self.pretraining_tp > 1 and self.slow_but_exact"} for name in CONDITIONS}


def test_paths_with_an_index_and_first_parameters_are_resolved() -> None:
    class EdgeTamVisionNeck(nn.Module):  # a row of the table
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])

    class Swinv2SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.continuous_position_bias_mlp = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    class Derived(Swinv2SelfAttention):
        pass

    model = nn.Sequential(EdgeTamVisionNeck(), Derived())
    assert modules_with_read_weights(model) == {
        "0.convs.0": ReadKind.DTYPE,
        "0.convs.1": ReadKind.DTYPE,
        "1.continuous_position_bias_mlp.0": ReadKind.FIRST_DTYPE,
    }


@pytest.mark.parametrize(("n", "is_exact", "expected"), [(1, True, 0), (2, False, 0), (2, True, 2)])
def test_bloom_reads_its_weights_only_where_it_splits_them(n: int, is_exact: bool, expected: int) -> None:
    config = transformers.BloomConfig(
        hidden_size=8, n_layer=1, n_head=2, vocab_size=10, pretraining_tp=n, slow_but_exact=is_exact
    )
    assert len(modules_with_read_weights(transformers.BloomModel(config))) == expected


def test_torchs_own_layers_count_unless_they_are_replaced_too() -> None:
    attention = nn.MultiheadAttention(4, 2, device="meta").eval()
    assert modules_with_read_weights(attention) == {"out_proj": ReadKind.VALUES}
    assert modules_with_read_weights(attention, reads_of_torch=False) == {}
