"""Prompts to token ids: the checkpoint's tokenizer, its chat template, and padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from int8convert.errors import PromptError, SourceError


def read_tokenizer(path_or_repo: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, which pads to the left: what follows a prompt follows its last token.

    Raises:
        SourceError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(path_or_repo), padding_side="left")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"'{os.fspath(path_or_repo)}' has no tokenizer that transformers can read: {str(error).splitlines()[0]}",
            "copy the files of the source's tokenizer into it",
        ) from error
    if tokenizer.pad_token_id is None:
        # Any will do: no token looks at padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool | None, system: str | None) -> Any:
    """Token ids and attention mask of a batch.

    Args:
        chat: through the chat template; None where there is one.
        system: the system message of the chat.

    Raises:
        PromptError: there is no chat template, it refuses the messages, or a prompt has no tokens.
    """
    is_chat = bool(tokenizer.chat_template) if chat is None else chat
    if is_chat:
        inputs = _encode_chat(tokenizer, prompts, system)
    elif system is not None:
        raise PromptError(
            "a system message needs a chat, and " + ("chat is off" if chat is False else _NO_TEMPLATE),
            "leave --system out, and put its text before the prompt",
        )
    else:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    if not bool(inputs["attention_mask"].any(1).all()):
        raise PromptError("a prompt is empty, and this tokenizer begins no text by itself", "give at least one word")
    return inputs


_NO_TEMPLATE = "the tokenizer has no chat template"


def _encode_chat(tokenizer: Any, prompts: Sequence[str], system: str | None) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise PromptError(_NO_TEMPLATE, "leave --chat out to give the model the bare prompt")
    first = [{"role": "system", "content": system}] if system is not None else []
    try:
        return tokenizer.apply_chat_template(
            [[*first, {"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
            tokenizer_kwargs={"return_token_type_ids": False},
        )
    except (TemplateError, ValueError) as error:
        hint = "leave --system out" if system is not None else "--no-chat gives the model the bare prompt"
        raise PromptError(f"the chat template refuses the messages: {error}", hint) from error
