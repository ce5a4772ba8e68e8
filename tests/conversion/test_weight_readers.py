"""Which modules' weights a model's own code reads, told from the source of its classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from int8convert.conversion.weight_readers import modules_with_read_weights


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
        x = x.to(self.asked.weight.dtype)
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
    assert modules_with_read_weights(model()) == {"0.a", "0.pair.b"}


def test_a_condition_on_the_module_itself_is_looked_up() -> None:
    assert modules_with_read_weights(model(n_slices=2)) == {"0.a", "0.pair.b", "0.sliced", "0.unsliced"}


def test_a_training_branch_counts_for_a_model_in_training() -> None:
    assert "0.trained" in modules_with_read_weights(model().train())


def test_a_class_without_source_is_no_obstacle() -> None:
    made = type("Made", (Reads,), {})
    assert modules_with_read_weights(made()) >= {"a", "pair.b"}
