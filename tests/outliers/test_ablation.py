"""Ablation: taking away what carries the predictions hurts, taking away as much of something else does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from int8convert.errors import SourceError
from int8convert.outliers.ablation import ablate, zeroing
from tests.tools.outlier_models import SCALED, SHIFTED, outlier_model


def states(model: Any) -> dict[str, nn.Module]:
    """The layers that read the hidden state."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features == 64 and "head" not in n
    }


def spoken(model: Any) -> torch.Tensor:
    """Text of the model's own, [4, 40], so that it predicts it well."""
    torch.manual_seed(0)
    ids: torch.Tensor = model.generate(
        torch.randint(3, 300, (4, 2)),
        max_new_tokens=38,
        min_new_tokens=38,
        do_sample=True,
        temperature=0.7,
        pad_token_id=0,
    )
    return ids


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return outlier_model(tokenizer, scaled={})


def test_without_its_outlier_features_a_model_predicts_worse_and_without_others_it_does_not(model: Any) -> None:
    ids = spoken(model)
    untouched, outliers, random = ablate(model, states(model), ids, sorted(SHIFTED))
    assert (untouched.name, outliers.name, random.name) == ("none", "outliers", "random")
    assert outliers.perplexity > 3 * untouched.perplexity
    assert random.perplexity < 1.5 * untouched.perplexity
    assert outliers.columns == (7, 50) and len(random.columns) == 2 and not set(random.columns) & {7, 50}


def test_untouched_run_is_the_model_itself(model: Any) -> None:
    ids = spoken(model)
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    (untouched, *_) = ablate(model, states(model), ids, [1])
    assert untouched.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert untouched.top1_probability == pytest.approx(float(log_probs.exp().amax(-1).mean()), rel=1e-4)


def test_features_that_are_only_scaled_matter_no_more_than_others(tokenizer: Any) -> None:
    """Scaling is undone in the weights, so a dimension carries what it carried before: magnitude is not importance."""
    plain, scaled = outlier_model(tokenizer, {}, {}), outlier_model(tokenizer, {}, SCALED)
    ids = spoken(plain)
    before, after = (ablate(m, states(m), ids, sorted(SCALED))[1] for m in (plain, scaled))
    assert after.perplexity == pytest.approx(before.perplexity, rel=1e-3)


def test_columns_are_zero_for_these_layers_alone_and_only_as_long_as_it_lasts(model: Any) -> None:
    layers = states(model)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), zeroing(layers, [7, 50]):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda m, i, name=name: seen.__setitem__(name, i[0]))
        model(torch.arange(3, 23)[None])
    is_zero = {name: bool((x[..., [7, 50]] == 0).all()) for name, x in seen.items()}
    assert {name for name, zero in is_zero.items() if zero} >= set(layers)
    assert not is_zero["lm_head"] and all(
        bool((seen[name][..., 8] != 0).all()) for name in layers if "out_proj" not in name
    )
    assert all(len(module._forward_pre_hooks) == 1 for module in layers.values())


def test_hooks_are_gone_after_an_error(model: Any) -> None:
    layers = states(model)
    with pytest.raises(SourceError, match="OPTForCausalLM cannot be run: IndexError"):
        ablate(model, layers, torch.tensor([[9999, 1]]), [1])
    assert all(len(module._forward_pre_hooks) == 0 for module in layers.values())


def test_random_features_are_the_same_each_time_and_others_with_another_seed(model: Any) -> None:
    ids = torch.arange(3, 13)[None]
    drawn = [ablate(model, states(model), ids, [1, 2, 3], seed=seed)[2].columns for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
