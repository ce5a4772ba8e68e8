"""What each way to round inputs is worth on two injections of outliers, of which none is undone by all.

In what norms return, the outliers are at every token in the same few columns. In the product of a gated MLP they are at
some tokens, and other values there are large, too. So what wins by much on one need not win on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import int8convert
from int8convert.outliers.damage import estimate_damage
from int8convert.outliers.find import find_outliers
from int8convert.outliers.keep import choose_kept
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.models import load_model
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import read_windows
from int8convert.verification.fidelity.level import measure_fidelity
from int8convert.verification.options import Execution
from scripts.outlier_injection import inject_product_outliers
from tests.conftest import in_this_process
from tests.tools.language_models import SENTENCES, build_tokenizer
from tests.tools.outlier_models import convert, gated_model, outlier_model, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

INJECTED: dict[str, Callable[[Any], Any]] = {"norms": outlier_model, "product": gated_model}
MODES = (*OutlierMode, "weight-only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and an int8 checkpoint with stored columns for each injection, and the text they were calibrated on."""
    folder = tmp_path_factory.mktemp("injections")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 12), encoding="utf-8")
    tokenizer = build_tokenizer()
    for name, make in INJECTED.items():
        source = save(make(tokenizer), folder / name, tokenizer)
        with in_this_process():
            out = convert(source, folder / f"{name}-int8")
            found = find_outliers(source, Text(folder / "text.txt", n_sequences=4, length=40), device="cpu")
            int8convert.store_outliers(source, out, found.static_set, {})
    return folder


@pytest.fixture(scope="module")
def divergence(folder: Path) -> dict[str, dict[str, float]]:
    """Injection -> mode -> mean KL divergence."""
    windows = read_windows(folder / "text.txt", build_tokenizer(), 6, 40)
    found = {}
    for name in INJECTED:
        reports = measure_fidelity(folder / name, folder / f"{name}-int8", windows, Execution("cpu", modes=MODES))
        found[name] = {report.mode: report.mean_kl for report in reports}
    return found


def test_product_gets_outliers_and_the_function_stays() -> None:
    tokenizer, ids = build_tokenizer(), torch.arange(3, 63)[None]
    plain, injected = gated_model(tokenizer, 1.0), gated_model(tokenizer)
    channels = set(inject_product_outliers(gated_model(tokenizer), 1.0, 3))
    seen: list[torch.Tensor] = []
    for layer in injected.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0].abs()))
    with torch.no_grad():
        torch.testing.assert_close(injected(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    for x in seen:
        share = (x >= 6).double().mean(0)
        assert set(share.topk(3).indices.tolist()) == channels
        assert all(0.3 < float(share[k]) < 0.99 for k in channels), "at some tokens and not at others"


def test_stored_columns_win_on_both_by_very_different_factors(divergence: dict[str, dict[str, float]]) -> None:
    norms, product = divergence["norms"], divergence["product"]
    assert norms["static+guard"] < norms["dynamic"] / 50
    assert product["dynamic"] / 8 < product["static+guard"] < product["dynamic"] / 3
    for found in (norms, product):
        assert found["weight-only"] < found["static+guard"] <= 1.01 * found["static"] < found["dynamic"]


def test_outlier_columns_from_the_codes_win_on_the_product_alone(divergence: dict[str, dict[str, float]]) -> None:
    """The scaled features of the norms stand for weights that the codes hold badly, because they are small."""
    norms, product = divergence["norms"], divergence["product"]
    assert norms["none"] / 2 < norms["dynamic"] < norms["none"]
    assert product["dynamic"] < product["none"] / 8


def test_blocks_win_where_a_row_has_several_and_less_than_outlier_columns(
    divergence: dict[str, dict[str, float]],
) -> None:
    norms, product = divergence["norms"], divergence["product"]
    assert norms["blocks"] == pytest.approx(norms["none"], rel=1e-3), "a row of 64 features is one block"
    assert 3 * product["dynamic"] < product["blocks"] < product["none"] / 2
    assert product["static+blocks"] <= 1.01 * product["static+guard"]
    assert product["dynamic+blocks"] <= 1.01 * product["dynamic"]


@pytest.mark.parametrize(
    ("name", "kinds"), [("norms", {"q_proj", "k_proj", "v_proj", "fc1"}), ("product", {"down_proj"})]
)
def test_damage_of_one_scale_a_token_is_where_the_outliers_are(name: str, kinds: set[str], folder: Path) -> None:
    model = load_model(folder / name, "cpu")
    layers = {name: model.get_submodule(name) for name in modules_to_replace(model)}
    damage = estimate_damage(model, layers, read_windows(folder / "text.txt", build_tokenizer(), 4, 40).ids)
    whole = sum(layer.inputs_by_token for layer in damage)
    there = [layer for layer in damage if layer.module_name.rpartition(".")[2] in kinds]
    assert sum(layer.inputs_by_token for layer in there) > 0.95 * whole
    n_weights = sum(layer.n_weights for layer in damage)
    kept = choose_kept(damage, 0.3 * n_weights, "inputs_by_token")
    assert kept and kept[0] in there
    assert sum(layer.cost("inputs_by_rule") for layer in damage) < sum(
        layer.cost("inputs_by_token") for layer in damage
    )
