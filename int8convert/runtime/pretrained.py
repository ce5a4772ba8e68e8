"""Loads the config, tokenizer and model of an untrusted checkpoint in transformers; the only place that does.

1. config.json is read within bounds. Entries that make transformers fetch code or kernels are refused.
2. transformers loads. It runs code of the checkpoint only where the user trusts it. It cannot prompt, read stdin or
   print to stdout.
3. Its exceptions become errors of two lines (`int8convert.checkpoint.library_errors`).

The cost of the tokenizer's regular expressions is bounded elsewhere, see `int8convert.runtime.text.tokenizer_process`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import transformers

from int8convert.checkpoint.json_file import MAX_INDEX_BYTES, read_json_object
from int8convert.checkpoint.json_file import read_config as read_bounded_config
from int8convert.checkpoint.library_errors import RUNS_NO_CODE, library_errors
from int8convert.checkpoint.names import ADAPTER_CONFIG, CONFIG_NAME, INDEX_NAME, check_files, find_file, shard_name
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.checkpoint.utf8_path import utf8_path
from int8convert.errors import RemoteCodeError, SourceError
from int8convert.runtime.build_bounds import bounded_build, check_layer_counts
from int8convert.text import quoted
from int8convert.transformers_internals import cached_file, not_waiting_for_consent

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
_ATTENTION = ("eager", "sdpa", "flex_attention")
"""Attention implementations in torch itself. Other names lead to packages, or to kernels fetched from the Hub."""

_CODE_KEYS = ("fusion_config", "kernel_config", "distributed_config")
"""Entries of config.json by which transformers changes its own classes or fetches code."""


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `from_pretrained`'s options that locate files."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def locate_file(path: str, name: str, **hub: Any) -> Path | None:
    """Return a file of a checkpoint, which is a directory or a repository; None if it has no file of that name.

    Raises:
        SourceError: the repository cannot be reached, or the name is not that of a regular file of the checkpoint.
    """
    if os.path.isdir(path):
        return find_file(Path(path) / (hub.get("subfolder") or ""), name)
    with library_errors(f"'{path}' is no directory, and no repository within reach", _NAME_ONE):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


_NAME_ONE = "give the directory that int8convert quantize wrote, or the id of a repository"


def read_config(
    path: str, hint: str = _NAME_ONE, code_hint: str = RUNS_NO_CODE, trust_remote_code: bool = False, **hub: Any
) -> Any:
    """Return the transformers config of a checkpoint.

    Args:
        hint: hint where it cannot be read. code_hint: hint where it needs code that may not run.
        trust_remote_code: the checkpoint's own code may run.
        hub: see `hub_options`.

    Raises:
        SourceError: there is no such checkpoint, its config cannot be read, or one of its files is not regular.
        RemoteCodeError: its classes are code in the checkpoint.
    """
    is_there = os.path.isdir(path)
    if is_there:
        check_files(Path(path))
    what = f"'{path}' cannot be read as a checkpoint" if is_there else f"'{path}' is no directory, and no repository"
    file = locate_file(path, CONFIG_NAME, **hub)
    if file is None and is_there:
        raise SourceError(f"'{path}' holds no {CONFIG_NAME}", hint)
    stated = {} if file is None else read_bounded_config(file)
    refuse_code(stated)
    check_layer_counts(stated)
    if stated.get("auto_map") and not trust_remote_code:
        model_type = stated.get("model_type")
        if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
            raise RemoteCodeError(
                f"the model of '{path}' is code in the checkpoint (auto_map in config.json)", code_hint
            )
    with library_errors(what if is_there else f"{what} within reach", hint, code_hint), asking_nobody():
        return transformers.AutoConfig.from_pretrained(utf8_path(path), trust_remote_code=trust_remote_code, **hub)


def refuse_code(stated: Any) -> None:
    """Refuse entries of config.json that make transformers fetch kernels or change its own classes."""
    if isinstance(stated, list):
        for each in stated:
            refuse_code(each)
    if not isinstance(stated, dict):
        return
    for name, value in stated.items():
        is_choice = name.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation")
        choices = value.values() if isinstance(value, dict) else [value]
        foreign = next((each for each in choices if isinstance(each, str) and set("/:") & set(each)), None)
        if (is_choice and foreign is not None) or (name in _CODE_KEYS and value):
            shown = f"{quoted(name)} = {quoted(foreign)}" if foreign is not None else quoted(name)
            raise SourceError(
                f"config.json names code from elsewhere to run the model with: {shown}",
                "remove that entry from config.json, if you trust the rest",
            )
        refuse_code(value)


def attention_options(stated: Any) -> dict[str, Any]:
    """Return attention arguments for `from_pretrained`: {}, or automatic choice where config.json names a package."""
    chosen = getattr(stated, "_attn_implementation", None)
    return {} if chosen is None or chosen in _ATTENTION else {"attn_implementation": None}


def model_class(config: Any) -> Any:
    """Return the class the weights were saved from, or AutoModelForCausalLM if transformers does not have it."""
    names = config.architectures if isinstance(config.architectures, list) else []
    name = names[0] if names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModelForCausalLM


def load_model(
    path: str,
    config: Any,
    *,
    hint: str = "write or fetch the checkpoint again",
    code_hint: str = RUNS_NO_CODE,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Return a checkpoint's model, and its missing and unexpected weights, by `from_pretrained`.

    Raises:
        SourceError: transformers cannot load it, or would load an adapter with it.
        RemoteCodeError: it needs code of the checkpoint.
        CorruptFileError: the model of config.json is larger than what its weight files could fill.
    """
    if locate_file(path, ADAPTER_CONFIG, **hub_options(options)) is not None:
        raise SourceError(
            f"'{path}' holds {ADAPTER_CONFIG}: transformers would add that adapter to the weights",
            f"remove {ADAPTER_CONFIG}; PEFT can add an adapter to the model that is loaded then",
        )
    n_tensors, n_elements = _stored(path)
    every = {**attention_options(config), **options}
    boundary = library_errors(f"'{path}' cannot be loaded", hint, code_hint)
    with boundary, asking_nobody(), bounded_build(n_tensors, n_elements):
        return model_class(config).from_pretrained(
            utf8_path(path), config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **every
        )


def model_errors(model: Any) -> AbstractContextManager[None]:
    """Context for calls of a checkpoint's model. Exceptions become SourceErrors, see `library_errors`."""
    return library_errors(
        f"{type(model).__name__} cannot be run",
        "its config.json does not describe the model of its weights; write or fetch the checkpoint again",
    )


def _stored(path: str) -> tuple[int, int] | tuple[None, None]:
    """Return the numbers of tensors and elements in local safetensors files; None without files of the usual names."""
    directory = Path(path)
    single = shard_name(0, 1)
    names = [single]
    if (directory / INDEX_NAME).is_file() and not (directory / single).is_file():
        weight_map = read_json_object(directory / INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    files = [directory / name for name in names]
    if not files or not all(file.is_file() for file in files):
        return None, None
    tensors = [tensor for file in files for tensor in read_safetensors_header(file)]
    return len(tensors), sum(tensor.n_elements for tensor in tensors)


def read_tokenizer(
    path: str,
    code_hint: str = RUNS_NO_CODE,
    trust_remote_code: bool = False,
    label: str = "",
    is_as_stated: bool = False,
) -> Any:
    """Return the tokenizer of a checkpoint. It pads to the left, so that new tokens follow a prompt's last one.

    Args:
        is_as_stated: keep the checkpoint's padding, or none.

    Raises:
        SourceError: there is no tokenizer that transformers can read.
        RemoteCodeError: its class is code in the checkpoint.
    """
    what = f"'{label or path}' has no tokenizer that transformers can read"
    hint = "copy the files of the source's tokenizer into it"
    if os.path.isdir(path):
        check_files(Path(path))
    with library_errors(what, hint, code_hint), asking_nobody():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            utf8_path(path), trust_remote_code=trust_remote_code, **({} if is_as_stated else {"padding_side": "left"})
        )
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer")
        if tokenizer.pad_token_id is None and not is_as_stated:
            # Any will do: no token looks at padding.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer


@contextmanager
def asking_nobody() -> Iterator[None]:
    """Context in which transformers cannot prompt, read stdin or write to stdout.

    transformers prompts if `trust_remote_code` is unset, and for sub-models even if it is set.
    """
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with redirect_stdout(sys.stderr), not_waiting_for_consent():
            yield
    finally:
        sys.stdin = stdin
