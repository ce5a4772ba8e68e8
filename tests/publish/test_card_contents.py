"""What a card takes from manifest and verify.json: every option, every number, whatever it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from int8convert.inspection import inspect
from int8convert.publish.card import plain
from tests.publish.test_card import as_from_the_hub, card_of, edit_manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def edit_verify(out: Path, **changes: object) -> None:
    path = out / "int8convert" / "verify.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_command_to_reproduce_has_every_option(out: Path) -> None:
    """Of an output in shards of at most 100 KB."""
    as_from_the_hub(out)
    request = json.loads((out / "int8convert" / "manifest.json").read_text())["conversion"]
    request["options"] |= {"only": ["*.fc1"], "on_nonfinite": "keep", "lora": {"files": {}}}
    edit_manifest(out, conversion=request)

    command = "OUT --revision " + "c" * 40
    command += " --only '*.fc1' --on-nonfinite keep --max-shard-size 100000 --lora ADAPTER\n"
    assert command in card_of(out)


def test_licence_with_a_name_of_its_own_is_inherited_whole(out: Path) -> None:
    card = {"license": "other", "license_name": "opt", "license_link": "LICENSE.md", "language": "en"}
    edit_manifest(out, source_card=card)
    data = yaml.safe_load(card_of(out).split("---\n")[1])
    assert {key: data.get(key) for key in card} == card


def test_every_number_of_verify_is_where_it_belongs(verified: Path) -> None:
    report = json.loads((verified / "int8convert" / "verify.json").read_text())
    run = report["fidelity"][0] | {"perplexity": math.inf, "delta_nll": 0.25, "delta_nll_interval": [-0.5, 1.0]}
    task = {"task": "piqa", "metric": "acc", "n_samples": 1838, "reference": 0.75, "int8": 0.5, "p_value": 0.01}
    exact = report["exact"] | {"n_int8_weights": 12345, "n_different_codes": 67}
    edit_verify(verified, fidelity=[run], tasks=[task], exact=exact)

    card = card_of(verified)

    assert "12,345 int8 matrices were compared with the source: 67 codes differ" in card
    assert "| inf | +0.25000 | -0.50000 to +1.00000 | " in card
    assert "| piqa | acc | 1,838 | 0.7500 | 0.5000 | 0.0100 |" in card
    results = ModelCard(card).data.eval_results
    assert results is not None
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in results}
    assert found.pop(("piqa", "acc")) == 0.5
    assert {metric for _, metric in found} == {"reference_perplexity", "mean_kl", "same_top1"}


def test_shares_of_what_is_not_int8_are_those_of_the_headers(out: Path) -> None:
    found = inspect(out)
    kept = [group for group in found.groups if group.dtype != "I8" and not group.is_scale]
    card = card_of(out)
    rows = card.partition("| why |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert sum(int(row[1].replace(",", "")) for row in cells) == sum(group.n_tensors for group in kept)
    assert {row[0] for row in cells} == {group.reason for group in kept}


def test_long_words_of_strangers_are_cut() -> None:
    assert len(plain("x" * 100_000)) == 300
