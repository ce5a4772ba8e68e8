"""At temperature 0 `generate` writes the likeliest tokens, whatever a stranger's generation config holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.errors import CorruptFileError, SourceError
from int8convert.runtime.pretrained import read_config
from int8convert.runtime.text.generation_settings import Ending, generation_config, read_ending
from tests.scenarios.strangers.makers import change, write

PROMPT = [39, 40]
FIELDS = sorted(vars(transformers.GenerationConfig()))
TAKEN = ("eos_token_id", "bos_token_id", "decoder_start_token_id", "stop_strings")

HOSTILE: dict[str, Any] = {
    **{name: 3.0 for name in FIELDS if name not in TAKEN},
    **{"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "num_beam_groups": 3, "diversity_penalty": 1.0},
    **{"sequence_bias": [[[9], 50.0]], "bad_words_ids": [[7]], "suppress_tokens": [8, 9], "min_new_tokens": 4},
    **{"begin_suppress_tokens": [8, 9], "forced_bos_token_id": 11, "forced_eos_token_id": 12, "max_length": 3},
    **{"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "guidance_scale": 3.0, "penalty_alpha": 0.6, "top_k": 3},
    **{
        "max_new_tokens": 1,
        "max_time": 1e-9,
        "return_dict_in_generate": True,
        "output_scores": True,
        "use_cache": False,
    },
    **{"cache_implementation": "paged", "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "dola_layers": "low"},
    **{"exponential_decay_length_penalty": [1, 2.0], "watermarking_config": {"bias": 50.0}, "temperature": 9.0},
    **{
        "token_healing": True,
        "force_words_ids": [[9]],
        "constraints": ["x"],
        "custom_generate": "a/b",
        "pad_token_id": 9,
    },
}


def likeliest(out: Path, n: int) -> list[int]:
    """The argmax of plain forward passes, one token after the other, up to an end of text."""
    model, ids = int8convert.load(out), list(PROMPT)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def expected(out: Path) -> list[int]:
    found = likeliest(out, 6)
    assert len(set(found)) == 6 and min(found) > 2  # no token of these ends a text
    return found


def test_every_field_is_hostile() -> None:
    assert {*HOSTILE, *TAKEN} >= set(FIELDS) and len(FIELDS) > 70


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_all_of_them_together_change_nothing(file: str, out: Path, expected: list[int]) -> None:
    change(out / file, **{name: value for name, value in HOSTILE.items() if file != "config.json" or value != 3.0})
    report = int8convert.generate(out, ["w39 w40"], max_new_tokens=6)
    assert report.texts == (words(expected),) and report.n_new_tokens == 6


@pytest.mark.parametrize(
    "name", ["sequence_bias", "guidance_scale", "min_new_tokens", "repetition_penalty", "max_time", "num_beams"]
)
def test_one_alone_changes_nothing(name: str, out: Path, expected: list[int]) -> None:
    change(out / "generation_config.json", **{name: HOSTILE[name]})
    assert int8convert.generate(out, ["w39 w40"], max_new_tokens=6).texts == (words(expected),)


@pytest.mark.parametrize("name", sorted({*HOSTILE, *FIELDS} - set(TAKEN)))
def test_settings_are_the_same_whatever_a_field_holds(name: str, out: Path) -> None:
    """The fast form of the above, for each field that transformers has."""
    config = read_config(str(out))
    plain = generation_config(read_ending(str(out), config), 2, {"do_sample": False}).to_dict()
    for value in (HOSTILE.get(name, 3.0), "x", [[1]], None, 10**30, {"a": 1}):
        change(out / "generation_config.json", **{name: value})
        assert generation_config(read_ending(str(out), config), 2, {"do_sample": False}).to_dict() == plain


def test_end_of_text_is_the_checkpoints(out: Path, expected: list[int]) -> None:
    third = expected[2]
    n = expected.index(third) + 1
    for value in (third, [127, third], [10**9, -1, third]):
        change(out / "generation_config.json", eos_token_id=value)
        report = int8convert.generate(out, ["w39 w40"], max_new_tokens=6)
        assert report.texts == (words(expected[:n]),) and report.is_complete == (True,)


def test_end_of_text_is_config_jsons_where_nothing_else_names_one(out: Path, expected: list[int]) -> None:
    (out / "generation_config.json").unlink()
    change(out / "config.json", eos_token_id=expected[0])
    assert int8convert.generate(out, ["w39 w40"], max_new_tokens=6).texts == (words(expected[:1]),)


@pytest.mark.parametrize("as_list", [True, False])
def test_stop_strings_end_a_text(as_list: bool, out: Path, expected: list[int]) -> None:
    stop = words(expected[1:3])
    change(out / "generation_config.json", stop_strings=[stop, "never"] if as_list else stop)
    report = int8convert.generate(out, ["w39 w40", "w39 w40"], max_new_tokens=6, outliers="none")
    alone = int8convert.generate(out, ["w39 w40"], max_new_tokens=6, outliers="none")
    assert alone.texts[0].endswith(stop) and alone.is_complete == (True,) and alone.n_new_tokens == 3
    assert report.texts == alone.texts * 2 and report.n_new_tokens == 6


def test_rows_of_a_batch_stop_each_for_itself(out: Path, expected: list[int]) -> None:
    plain = int8convert.generate(out, ["w39 w40", "w9 w10"], max_new_tokens=6, outliers="none")
    change(out / "generation_config.json", stop_strings=[words(expected[:2])])
    report = int8convert.generate(out, ["w39 w40", "w9 w10"], max_new_tokens=6, outliers="none")
    assert report.texts == (words(expected[:2]), plain.texts[1]) and report.is_complete == (True, False)


@pytest.mark.parametrize(
    "entries",
    [
        *({"eos_token_id": value} for value in ("x", [1, "x"], [[1]], {"a": 1}, 1.5, True)),
        *({"bos_token_id": value} for value in ("x", {"a": 1})),
        *({"stop_strings": value} for value in (7, [7], [""], ["x" * 1001], ["x"] * 101, {"a": "b"})),
    ],
    ids=str,
)
def test_end_of_another_type_is_refused(entries: dict[str, Any], out: Path) -> None:
    change(out / "generation_config.json", **entries)
    with pytest.raises(CorruptFileError, match=r"generation_config\.json"):
        int8convert.generate(out, ["w5"], max_new_tokens=1)


@pytest.mark.parametrize("content", ["[]", "7", "{", '{"eos_token_id": 2, "eos_token_id": 3}', "[" * 10**5])
def test_generation_config_that_is_no_object_is_refused(content: str, out: Path) -> None:
    write(out / "generation_config.json", content)
    with pytest.raises(SourceError, match=r"generation_config\.json"):
        int8convert.generate(out, ["w5"], max_new_tokens=1)


def test_ids_outside_the_vocabulary_are_left_out(out: Path) -> None:
    change(out / "generation_config.json", eos_token_id=[-1, 127, 128, 10**30], bos_token_id=10**30)
    assert read_ending(str(out), read_config(str(out))) == Ending(None, (127,))


def test_load_keeps_the_checkpoints_generation_config(out: Path) -> None:
    """Who calls the model's own generate gets what transformers would do."""
    change(out / "generation_config.json", repetition_penalty=1.5, eos_token_id=[2, 7])
    stated = json.loads((out / "generation_config.json").read_text())
    found = int8convert.load(out).generation_config
    assert (found.repetition_penalty, found.eos_token_id) == (1.5, [2, 7]) and stated["repetition_penalty"] == 1.5


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_goes_by_either_name(name: str, out: Path) -> None:
    asked: dict[str, Any] = {name: torch.float32}
    assert int8convert.load(out, **asked).model.embed_tokens.weight.dtype == torch.float32
    assert int8convert.load(out).model.embed_tokens.weight.dtype == torch.float16


def test_two_dtypes_are_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="two names of one thing"):
        int8convert.load(out, dtype=torch.float32, torch_dtype=torch.float16)
    both = int8convert.load(out, dtype=torch.float32, torch_dtype=torch.float32)
    assert both.model.embed_tokens.weight.dtype == torch.float32
