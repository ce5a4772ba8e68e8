"""Turns prompts into token ids by the checkpoint's tokenizer and chat template, with padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from int8convert.errors import PromptError
from int8convert.runtime.text.tokenizer_process import TokenizerProcess


def encode(
    tokenizer: TokenizerProcess, prompts: Sequence[str], chat: bool | None, system: str | None
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of a batch, int64 [prompts, tokens], padded on the left.

    Args:
        chat: use the chat template; None uses it where there is one.

    Raises:
        PromptError: there is no chat template, it refuses the messages, or a prompt has no tokens.
        SourceError: the tokenizer fails.
    """
    is_chat = tokenizer.has_template if chat is None else chat
    if is_chat:
        texts = _render(tokenizer, prompts, system)
        encoded = tokenizer(texts, padding=True, add_special_tokens=False)
    elif system is not None:
        raise PromptError(
            "a system message needs a chat, and " + ("chat is off" if chat is False else _NO_TEMPLATE),
            "leave --system out, and put its text before the prompt",
        )
    else:
        encoded = tokenizer(prompts, padding=True)
    inputs = {name: torch.tensor(rows, dtype=torch.long) for name, rows in encoded.items()}
    if not bool(inputs["attention_mask"].any(1).all()):
        raise PromptError("a prompt is empty, and this tokenizer begins no text by itself", "give at least one word")
    return inputs


_NO_TEMPLATE = "the tokenizer has no chat template"


def _render(tokenizer: TokenizerProcess, prompts: Sequence[str], system: str | None) -> list[str]:
    if not tokenizer.has_template:
        raise PromptError(_NO_TEMPLATE, "leave --chat out to give the model the bare prompt")
    first = [{"role": "system", "content": system}] if system is not None else []
    hint = "leave --system out" if system is not None else "--no-chat gives the model the bare prompt"
    return tokenizer.render([[*first, {"role": "user", "content": prompt}] for prompt in prompts], hint)
