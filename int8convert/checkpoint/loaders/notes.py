"""Notes on a source's files that other loaders read, or that are not converted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from int8convert.checkpoint.loaders.config import is_versioned_config
from int8convert.checkpoint.loaders.listing import Listing
from int8convert.checkpoint.names import ADAPTER_CONFIG, CONFIG_NAME, INDEX_NAME, is_loaded_as_weights
from int8convert.text import quoted


def vllm_weights(root: Collection[str]) -> tuple[str, ...]:
    """Return the weight files, or the index, that vLLM reads from a root; () where names do not decide.

    With params.json, these are the files of Mistral's own format. Otherwise, they are those that the index names, even
    beside a model.safetensors; without an index, all `*.safetensors`. vLLM ignores `transformers_weights` and adapters.

    Source: vLLM 0.32, `DefaultModelLoader._prepare_weights`, `filter_duplicate_safetensors_files`, `get_config`.
    """
    safetensors = sorted(name for name in root if name.endswith(".safetensors"))
    consolidated = [name for name in safetensors if name.startswith("consolidated")]
    if consolidated and "params.json" in root:
        return tuple(consolidated)
    if safetensors:
        return (INDEX_NAME,) if INDEX_NAME in root else tuple(safetensors)
    return ()


def find_notes(listing: Listing, config_name: str | None, config: Mapping[str, Any], weights: str) -> Iterator[str]:
    """Yield notes on what is left out of the output, and on what vLLM would load from the source.

    Args:
        config_name, config: the config that transformers reads; None and {} if there is none.
        weights: the weight file or the index that transformers loads.
    """
    if config_name not in (None, CONFIG_NAME):
        yield (
            f"{quoted(str(config_name))} is the config that is converted: transformers {version('transformers')} reads "
            f"it in place of '{CONFIG_NAME}'"
        )
    elif "configuration_files" in config:
        yield f"configuration_files is left out of '{CONFIG_NAME}': transformers {version('transformers')} reads none"
    if config.get("transformers_weights") is not None:
        yield f"transformers_weights is left out of '{CONFIG_NAME}': the weights it names are converted"
    configs = sorted(name for name in listing.root if is_versioned_config(name) and name != config_name)
    if configs:
        yield f"left out, because transformers reads {quoted(config_name or CONFIG_NAME)}: {_listed(configs)}"
    taken = vllm_weights(listing.root)
    if taken and taken != (weights,):
        yield f"transformers' choice of weight files is converted; vLLM would load from this source: {_listed(taken)}"


def note_aside(root: Iterable[str], taken: Collection[str]) -> Iterator[str]:
    """Yield a note on weights that are not converted, because transformers loads others.

    Args:
        taken: the files that are converted; first the weight file or the index.
    """
    aside = sorted(name for name in root if is_loaded_as_weights(name) and name not in taken and name != ADAPTER_CONFIG)
    if aside:
        yield f"not converted, because transformers loads {quoted(next(iter(taken)))}: {_listed(aside)}"


def note_adapter(is_remote: bool, is_merged: bool) -> str:
    """Return a note on an adapter beside the weights.

    Args:
        is_remote: the checkpoint is a repository on the Hub.
        is_merged: the adapter is merged into the weights.
    """
    if is_merged:
        return f"'{ADAPTER_CONFIG}' is left out: its adapter is merged"
    if is_remote:
        return (
            "the adapter beside the weights is left out: where peft is installed, transformers loads it, on its own "
            "base model, in place of these weights; to merge it, fetch the repository, and pass --lora DIR"
        )
    return (
        "the adapter beside the weights is left out: where peft is installed, transformers adds it to them; "
        "the same directory given as --lora merges it"
    )


def note_large(names: Iterable[str]) -> Iterator[str]:
    """Yield a note on each auxiliary file that is too large to be copied."""
    return (f"{quoted(name)} is not copied: it is too large to belong to a checkpoint" for name in names)


def _listed(names: Collection[str]) -> str:
    first = [quoted(name) for name in list(names)[:3]]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{', '.join(first)}{more}"
