"""Reads from a checkpoint's generation_config.json where a text ends, which is all that `generate` uses of it.

transformers has some eighty entries there, of which many change which token is chosen (`sequence_bias`,
`repetition_penalty`), load code, or end in an error. So the settings are rebuilt, and three token ids and the stop
strings are taken over, each checked. Ids outside the vocabulary, which no model can write, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from int8convert.checkpoint.json_file import MAX_CONFIG_BYTES, read_json_object
from int8convert.errors import CorruptFileError
from int8convert.runtime.pretrained import locate_file
from int8convert.text import quoted

GENERATION_CONFIG_NAME = "generation_config.json"
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 100, 1000
"""Most stop strings, and most characters of one."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Where texts begin and end, by the checkpoint.

    Attributes:
        bos_token_id: None where the model has none.
        eos_token_ids: each ends a text; empty if a text has no end.
        decoder_start_token_id: of an encoder-decoder model.
        stop_strings: each ends a text, too.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()


def read_ending(path: str, config: Any) -> Ending:
    """Return where a checkpoint's texts end, from generation_config.json or else its model config.

    Raises:
        CorruptFileError: an entry has the wrong type.
        SourceError: the file cannot be read.
    """
    file = locate_file(path, GENERATION_CONFIG_NAME)
    stated: Mapping[str, Any]
    if file is None:
        text = config.get_text_config(decoder=True)
        stated = {name: _first(getattr(each, name, None) for each in (config, text)) for name in _IDS}
    else:
        stated = read_json_object(file, MAX_CONFIG_BYTES)
    n_words = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    ids = {name: _token_ids(stated.get(name), name, n_words) for name in _IDS}
    return Ending(
        _first(ids["bos_token_id"]),
        ids["eos_token_id"],
        _first(ids["decoder_start_token_id"]),
        _stop_strings(stated.get("stop_strings")),
    )


_IDS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _token_ids(value: Any, name: str, n_words: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise CorruptFileError(
            f"{quoted(name)} of {GENERATION_CONFIG_NAME} or config.json is {_shown(value)}, expected token ids",
            "write the file again as the model's own tokenizer has it",
        )
    most = n_words if type(n_words) is int else 1 << 31
    return tuple(each for each in ids if 0 <= each < most)


def _stop_strings(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    is_list = isinstance(found, list) and len(found) <= MAX_STOP_STRINGS
    if not is_list or not all(isinstance(each, str) and 0 < len(each) <= MAX_STOP_LENGTH for each in found):
        raise CorruptFileError(
            f"'stop_strings' of {GENERATION_CONFIG_NAME} is {_shown(value)}, expected up to {MAX_STOP_STRINGS} texts",
            "correct that entry, or remove it",
        )
    return tuple(found)


def _shown(value: Any) -> str:
    return quoted(repr(value)[:200], 60)[1:-1]


def generation_config(ending: Ending, pad_token_id: int | None, sampling: Mapping[str, Any]) -> GenerationConfig:
    """Return settings that depend on these arguments only."""
    return GenerationConfig(
        bos_token_id=ending.bos_token_id,
        eos_token_id=list(ending.eos_token_ids) or None,
        pad_token_id=pad_token_id,
        decoder_start_token_id=ending.decoder_start_token_id,
        **sampling,
    )


@dataclass(eq=False)
class StopAtStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends each text of a batch as soon as it holds a stop string.

    Attributes:
        n_before: tokens of each row before the new ones.
        n_kept: row -> its new tokens up to the stop string, for rows that reached one.
    """

    decode: Callable[[list[int]], str]
    n_before: int
    stop_strings: tuple[str, ...]
    n_kept: dict[int, int] = field(default_factory=dict)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, self.n_before :].tolist()
        for row, ids in enumerate(new):
            if row not in self.n_kept and any(stop in self.decode(ids) for stop in self.stop_strings):
                self.n_kept[row] = len(ids)
        return torch.tensor([row in self.n_kept for row in range(len(new))], device=input_ids.device)
