"""Generates text from an int8 checkpoint: chat template, sampling, streaming, and figures of time and memory.

On a GPU the cache has a fixed size, so transformers compiles the decoding step into one CUDA graph. A step of a large
model is hundreds of layers, and launching them one by one from Python takes longer than running them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from int8convert.errors import PromptError, SourceError
from int8convert.runtime.load import load, read_int8_config
from int8convert.runtime.models import choose_device
from int8convert.runtime.pretrained import model_errors
from int8convert.runtime.text.generation_settings import StopAtStrings, generation_config, read_ending
from int8convert.runtime.text.prompts import encode
from int8convert.runtime.text.tokenizer_process import TokenizerProcess


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Generated texts, and their cost.

    Attributes:
        texts: the continuation of each prompt.
        is_complete: whether each text ended by itself before `max_new_tokens`.
        max_new_tokens: most new tokens of each prompt: those asked for, or those the model has positions for.
        n_prompt_tokens, n_new_tokens: totals over all prompts.
        load_s: seconds to load the model.
        first_token_s: seconds from the prompts to the first new token of each.
        decode_tokens_per_s: rate of new tokens after the first ones, over all prompts; 0 if there were none.
        peak_memory_bytes: peak of the device; on the CPU, of the process.
        device: the device it ran on.
    """

    texts: tuple[str, ...]
    is_complete: tuple[bool, ...]
    max_new_tokens: int
    n_prompt_tokens: int
    n_new_tokens: int
    load_s: float
    first_token_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_p: tokens are drawn from the likeliest ones that make up this probability.
        top_k: tokens are drawn from at most so many of the likeliest; 0 sets no limit.
        seed: seed of the draws; None chooses a new one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return transformers' settings. They are None for a greedy choice, for which it would warn of values."""
        is_drawn = self.temperature > 0
        values = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": is_drawn, **{name: value if is_drawn else None for name, value in values.items()}}


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records the time of the first new tokens, and passes the text on as it grows."""

    def __init__(self, tokenizer: TokenizerProcess, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._n_puts = 0
        self._ids: list[int] = []
        self._shown = ""
        self.first_token_at = 0.0
        self.is_in_callback = False

    def put(self, value: torch.Tensor) -> None:
        self._n_puts += 1
        if self._n_puts == 1:  # the prompt
            return
        if self._n_puts == 2:
            self.first_token_at = time.perf_counter()
        if self._on_text is not None:
            self._ids += value.reshape(-1).tolist()
            text = self._tokenizer.decode(self._ids)
            # Half of a character is held back, and what changes text that is shown already.
            if text.startswith(self._shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._pass_on(text)

    def end(self) -> None:
        if self._on_text is not None:
            self._pass_on(self._tokenizer.decode(self._ids))

    def _pass_on(self, text: str) -> None:
        n_same = next((i for i, pair in enumerate(zip(text, self._shown, strict=False)) if len(set(pair)) > 1), None)
        new = text[len(self._shown) if n_same is None else n_same :]
        if new and self._on_text is not None:
            self.is_in_callback = True
            self._on_text(new)
            self.is_in_callback = False
        self._shown = text


def generate(
    path_or_repo: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    chat: bool | None = None,
    system: str | None = None,
    outliers: str | None = None,
    device: str = "auto",
    int8_head: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> GenerationReport:
    """Continue prompts with an int8 checkpoint, all in one batch.

    Of the checkpoint's generation_config.json only `eos_token_id`, `bos_token_id`, `decoder_start_token_id` and
    `stop_strings` are used. No code of the checkpoint runs.

    Args:
        path_or_repo: the checkpoint.
        prompts: at least one.
        max_new_tokens: for each prompt; fewer where the model has no positions left.
        sampling: how tokens are chosen.
        chat: put prompts into the model's chat template; None does so where it has one.
        system: the system message of the chat.
        outliers, int8_head: see `int8convert.load`.
        device: "auto", "cpu" or "cuda[:n]".
        on_text: called with each piece of new text; for a single prompt.

    Raises:
        SourceError: the checkpoint cannot be loaded or run, has no tokenizer, or its model writes no text.
        RemoteCodeError: the checkpoint needs code of its own.
        PromptError: a prompt is empty or too long, or there is no chat template for it.
        DeviceError: the device is not available.
        ValueError: there are no prompts, or several and `on_text`; or the device is of another kind.
    """
    if isinstance(prompts, str) or not prompts or (on_text is not None and len(prompts) > 1):
        raise ValueError("prompts must be a list with at least one prompt, and exactly one if on_text is given")
    began = time.perf_counter()
    used = choose_device(device)
    path = os.fspath(path_or_repo)
    config = read_int8_config(path)
    ending = read_ending(path, config)
    with TokenizerProcess(path) as tokenizer:
        inputs = encode(tokenizer, prompts, chat, system)
        settings = generation_config(ending, tokenizer.pad_token_id, sampling.settings())
        model = load(path, device_map={"": used}, outliers=outliers, int8_head=int8_head, generation_config=settings)
        n_prompt = inputs["input_ids"].shape[1]
        settings.max_new_tokens = _room(model, n_prompt, max_new_tokens, path)
        settings.cache_implementation = "static" if used.startswith("cuda") else None
        _check_known(model, inputs["input_ids"], path)
        load_s = time.perf_counter() - began
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        clock = _Clock(tokenizer, on_text)
        first_new = 1 if model.config.is_encoder_decoder else n_prompt
        stop = StopAtStrings(tokenizer.decode, first_new, ending.stop_strings)
        began = time.perf_counter()
        ids = _run(model, {name: rows.to(used) for name, rows in inputs.items()}, settings, stop, clock)
        ended = time.perf_counter()
        new = [
            _until_end(row[: stop.n_kept.get(i)], ending.eos_token_ids, i in stop.n_kept)
            for i, row in enumerate(ids[:, first_new:].tolist())
        ]
        texts = tuple(tokenizer.decode(row) for row, _ in new)
    n_later = sum(len(row) - 1 for row, _ in new)
    return GenerationReport(
        texts=texts,
        is_complete=tuple(is_complete for _, is_complete in new),
        max_new_tokens=settings.max_new_tokens,
        n_prompt_tokens=int(inputs["attention_mask"].sum()),
        n_new_tokens=n_later + len(new),
        load_s=load_s,
        first_token_s=clock.first_token_at - began,
        decode_tokens_per_s=n_later / (ended - clock.first_token_at),
        peak_memory_bytes=_peak_memory_bytes(used),
        device=used,
    )


def _run(
    model: Any, inputs: dict[str, torch.Tensor], settings: GenerationConfig, stop: StopAtStrings, clock: _Clock
) -> torch.Tensor:
    """Return token ids [prompts, tokens]: prompts and continuations; of an encoder-decoder model the decoder's."""
    stops = StoppingCriteriaList([stop] if stop.stop_strings else [])
    try:
        with model_errors(model):
            ids: torch.Tensor = model.generate(
                **inputs, generation_config=settings, stopping_criteria=stops, streamer=clock
            )
            return ids
    except SourceError as error:
        if clock.is_in_callback and error.__cause__ is not None:
            raise error.__cause__ from None  # the caller's own, and none of the model's
        raise


def _room(model: Any, n_prompt_tokens: int, max_new_tokens: int, path: str) -> int:
    """Return the number of tokens that may follow: those asked for, or those the model has positions for."""
    if not model.can_generate():
        raise SourceError(
            f"'{path}' is a {type(model).__name__}, which writes no text",
            "use int8convert.load to run the model itself",
        )
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(n_positions, int) or n_positions <= 0:
        return max_new_tokens
    room = n_positions if model.config.is_encoder_decoder else n_positions - n_prompt_tokens
    if room <= 0 or n_prompt_tokens > n_positions:
        raise PromptError(
            f"a prompt of {n_prompt_tokens:,} tokens leaves no room: the model has {n_positions:,} positions",
            "shorten it",
        )
    return min(max_new_tokens, room)


def _until_end(ids: list[int], ends: tuple[int, ...], is_stopped: bool) -> tuple[list[int], bool]:
    """Return a row of new tokens up to its end, without padding, and whether it has an end."""
    n = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    return ids[:n], is_stopped or n is not None


def _check_known(model: Any, ids: torch.Tensor, path: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    n_words = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= n_words:
        raise SourceError(
            f"the tokenizer of '{path}' makes token {int(ids.max()):,} of a prompt, and the model knows {n_words:,}",
            "its tokenizer is another model's; copy the files of its own",
        )


def _peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
