"""Text from an int8 checkpoint: chat template, sampling, streaming, and what it took.

On a GPU the cache is of a fixed size, by which transformers compiles the decoding step into one CUDA graph: a step of a
large model is hundreds of layers, and launching them one by one from Python takes longer than running them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from int8convert.errors import DeviceError, SourceError
from int8convert.runtime.load import load


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What came out, and what it took.

    Attributes:
        texts: what follows each prompt.
        n_prompt_tokens, n_new_tokens: of all prompts together.
        load_s: seconds until the model was there.
        first_token_s: seconds from the prompts to the first token of each.
        decode_tokens_per_s: new tokens after the first ones, of all prompts together; 0 if there were none.
        peak_memory_bytes: of the device; on the CPU, of the process.
        device: where it ran.
    """

    texts: tuple[str, ...]
    n_prompt_tokens: int
    n_new_tokens: int
    load_s: float
    first_token_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the first new tokens come, and passes the text on as it grows."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._n_puts = 0
        self._ids: list[int] = []
        self._shown = 0
        self.first_token_at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._n_puts += 1
        if self._n_puts == 1:  # the prompt
            return
        if self._n_puts == 2:
            self.first_token_at = time.perf_counter()
        if self._on_text is not None:
            self._ids += value.reshape(-1).tolist()
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
                self._on_text(text[self._shown :])
                self._shown = len(text)

    def end(self) -> None:
        pass


def generate(
    path_or_repo: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    outliers: str | None = None,
    device: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> GenerationReport:
    """Let an int8 checkpoint continue prompts, all in one batch.

    Args:
        path_or_repo: the checkpoint.
        prompts: at least one.
        max_new_tokens: for each prompt.
        temperature: 0 takes the likeliest token, always.
        top_p, top_k: of a token's alternatives only those are drawn from that make up this probability, or this many
            if it is not 0.
        seed: of the drawing; None draws anew each time.
        chat: send prompts through the model's chat template; None does where it has one.
        system: the system message of the chat.
        outliers: see `int8convert.load`.
        device: "auto", "cpu" or "cuda[:n]".
        on_text: told the text as it comes; for a single prompt.

    Raises:
        Int8ConvertError: the checkpoint cannot be loaded, or has no tokenizer.
        ValueError: no prompts, or several and `on_text`.
    """
    if not prompts or (on_text is not None and len(prompts) > 1):
        raise ValueError("one prompt at least, and only one where its text is to be passed on as it comes")
    began = time.perf_counter()
    used = _device(device)
    tokenizer = _tokenizer(path_or_repo)
    model = load(path_or_repo, device_map={"": used}, outliers=outliers)
    load_s = time.perf_counter() - began
    inputs = _encode(tokenizer, prompts, chat, system).to(used)
    if seed is not None:
        torch.manual_seed(seed)
    clock = _Clock(tokenizer, on_text)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    began = time.perf_counter()
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **{**{"temperature": None, "top_p": None, "top_k": None}, **sampling},
        pad_token_id=tokenizer.pad_token_id,
        streamer=clock,
        **({"cache_implementation": "static"} if used.startswith("cuda") else {}),
    )
    ended = time.perf_counter()
    new = ids[:, inputs["input_ids"].shape[1] :] if not model.config.is_encoder_decoder else ids[:, 1:]
    n_new = int((new != tokenizer.pad_token_id).sum())
    n_later = max(0, n_new - len(prompts))
    return GenerationReport(
        texts=tuple(tokenizer.batch_decode(new, skip_special_tokens=True)),
        n_prompt_tokens=int(inputs["attention_mask"].sum()),
        n_new_tokens=n_new,
        load_s=load_s,
        first_token_s=clock.first_token_at - began,
        decode_tokens_per_s=n_later / (ended - clock.first_token_at) if n_later else 0.0,
        peak_memory_bytes=_peak_memory_bytes(used),
        device=used,
    )


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"--device {device}: torch finds no usable GPU here", "pass --device cpu, or leave it out")
    return device


def _tokenizer(path_or_repo: str | os.PathLike[str]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(path_or_repo), padding_side="left")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"'{os.fspath(path_or_repo)}' has no tokenizer that transformers can read: {str(error).splitlines()[0]}",
            "copy the files of the source's tokenizer into it",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _encode(tokenizer: Any, prompts: Sequence[str], chat: bool | None, system: str | None) -> Any:
    if chat is False or (chat is None and not tokenizer.chat_template):
        return tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise SourceError("the tokenizer has no chat template", "leave --chat out to give the model the bare prompt")
    first = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template(
        [[*first, {"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )


def _peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
