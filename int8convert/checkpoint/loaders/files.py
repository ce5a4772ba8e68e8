"""Finds the files of a checkpoint that loaders read, by one rule for directories and for repositories on the Hub.

transformers' `from_pretrained`, given a checkpoint and no further argument, reads:

1. The config: config.json, or a file that `configuration_files` in it lists. That is the `config.VERSION.json` with the
   highest version that is not above transformers' own.
2. The weights: the file, or the index of shards, that the config names as `transformers_weights`. Otherwise, the first
   of `WEIGHTS` that exists: safetensors before `.bin`, and a single file before an index. The classes of
   `EXTRA_WEIGHTS` read further files, which is refused here.
3. An adapter: where peft is installed and adapter_config.json is beside the weights, it is added to them. From the
   Hub, the adapter's base model is loaded in place of the weights. So the same files load differently without peft. A
   conversion takes the weights alone and says so; commands that load a model refuse the checkpoint.
4. Every safetensors file of a distributed checkpoint. That is a local directory with a name such as
   `shard-00001-model-00001-of-00001.safetensors`.

It never reads variants (`model.fp16.safetensors`), GGUF files, other formats, or weights in folders.
sentence-transformers reads the folders that modules.json names. vLLM differs, see `loaders.notes`.

Source: transformers 5.24, `_get_resolved_checkpoint_files`, `PreTrainedConfig.get_config_dict`, `maybe_load_adapters`,
`is_sharded_checkpoint`. A test asks transformers itself about generated directories.

Costs one pass over the names of the root. Files are opened only by the listing's `read`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from int8convert.checkpoint.loaders.config import check_nested, find_config, is_versioned_config
from int8convert.checkpoint.loaders.listing import Listing
from int8convert.checkpoint.loaders.notes import find_notes
from int8convert.checkpoint.loaders.sentence_modules import inner_model, module_folders
from int8convert.checkpoint.names import (
    ADAPTER_CONFIG,
    CONFIG_NAME,
    INDEX_NAME,
    OWN_FOLDER,
    PICKLE_INDEX_NAME,
    TEMPLATES_FOLDER,
    is_weight_file,
)
from int8convert.errors import CorruptFileError, SourceError
from int8convert.text import quoted

WEIGHTS = ("model.safetensors", INDEX_NAME, "pytorch_model.bin", PICKLE_INDEX_NAME)
"""Weight files and indices in the order in which transformers looks for them."""

EXTRA_WEIGHTS: Mapping[str, tuple[str, ...]] = {"jev": ("head.safetensors", "readout.safetensors")}
"""model_type -> files that transformers loads beside the weights. From `extra_files` of its config classes."""

CODE_FOLDER = "custom_generate"

_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_VARIANT = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(?P<variant>[^.]+)\.(safetensors|bin)")

_NOT_AUXILIARY = frozenset(
    {
        *(CONFIG_NAME, ADAPTER_CONFIG, "README.md", OWN_FOLDER),
        *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
    }
)
"""Names that are never copied. The source's model card describes the source, and so do the files that tell how it is
quantized. A file cannot have our folder's name."""

_TEXT_SUFFIXES = (".md", ".rst", ".html", ".pdf")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".ico", ".tif", ".tiff")
_INERT_STEMS = frozenset({"readme", "license", "licence", "notice", "copying", "copyright", "authors", "changelog"})
_LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".py", ".txt")
"""Endings that loaders look for among all files of a folder: `*.model` finds `.model`, too."""


@dataclass(frozen=True, slots=True)
class LoaderFiles:
    """The files that transformers reads from a checkpoint.

    Attributes:
        config_name: the file of the config; None if there is none.
        config: its entries; {} if there is none.
        weights: the weight file, or the index of shards.
        auxiliary_files: paths, with `/`, of small files that belong beside the converted weights.
        notes: messages on files that are not converted.
    """

    config_name: str | None
    config: dict[str, Any] = field(repr=False)
    weights: str
    auxiliary_files: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def is_indexed(self) -> bool:
        """Whether `weights` is an index."""
        return self.weights.endswith(".index.json")

    @property
    def suffix(self) -> str:
        """The ending of the weight files."""
        return ".safetensors" if ".safetensors" in self.weights else ".bin"


def find_loader_files(listing: Listing, ignores_adapter: bool = False) -> LoaderFiles:
    """Find the files that transformers reads from a checkpoint.

    Args:
        ignores_adapter: do not refuse an adapter beside the weights.

    Raises:
        SourceError: there are no weights, or loaders read something that cannot be converted.
        CorruptFileError: config.json cannot be read, or names files that are not there.
    """
    config_name, config = find_config(listing)
    _check_distributed(listing)
    weights = _weights(listing, config)
    if ADAPTER_CONFIG in listing.root and not ignores_adapter:
        raise _adapter_beside(listing)
    modules = module_folders(listing)
    _check_extra_weights(listing, config)
    return LoaderFiles(
        config_name=config_name,
        config=config,
        weights=weights,
        auxiliary_files=tuple(sorted(_auxiliary_files(listing, modules))),
        notes=tuple(find_notes(listing, config_name, config, weights)),
    )


def _weights(listing: Listing, config: Mapping[str, Any]) -> str:
    check_nested(config)
    explicit = config.get("transformers_weights")
    if explicit is None:
        found = next((name for name in WEIGHTS if name in listing.root), None)
        if found is None:
            raise _no_weights(listing)
        return found
    if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors.index.json")):
        shown = quoted(explicit) if isinstance(explicit, str) else f"a {type(explicit).__name__}"
        raise CorruptFileError(
            f"transformers_weights in '{CONFIG_NAME}' is {shown}, expected a safetensors file or its index",
            f"fetch {CONFIG_NAME} again, or remove that entry",
        )
    if "/" in explicit or not explicit.isprintable():
        raise SourceError(
            f"'{CONFIG_NAME}' has transformers load the weights {quoted(explicit)}, which are not beside it",
            f"move them beside {CONFIG_NAME}, and name them there without a folder",
        )
    if explicit not in listing.root:
        raise CorruptFileError(
            f"'{CONFIG_NAME}' has transformers load the weights {quoted(explicit)}, which are not there",
            f"fetch them, or remove transformers_weights from {CONFIG_NAME}",
        )
    return explicit


def _no_weights(listing: Listing) -> SourceError:
    """Return the error for a checkpoint from which transformers would load nothing."""
    label = quoted(listing.label, 200)
    if ADAPTER_CONFIG in listing.root:
        where = "DIR" if listing.is_remote else listing.label
        fetch = f"fetch it by `hf download {listing.label} --local-dir DIR`, " if listing.is_remote else ""
        return SourceError(
            f"{label} is a LoRA adapter and no model: it holds {ADAPTER_CONFIG} and no weights of a model",
            f"{fetch}run `int8convert quantize MODEL OUT --lora {quoted(where, 200)}`; MODEL is the model it was "
            f"trained on",
        )
    inner = inner_model(listing)
    if inner is not None:
        return SourceError(
            f"{label} holds no weights: those of this sentence encoder are in its folder {quoted(inner)}",
            "give that folder; files beside it are then not copied",
        )
    names = sorted(listing.root)
    variant = next((found for found in map(_VARIANT.fullmatch, names) if found), None)
    hint = "give the directory that holds the weight files"
    if listing.is_remote:
        hint = "name a repository with a transformers checkpoint"
    if variant is not None:
        hint = f"rename {quoted(variant[0])}, which loaders take only if asked for the variant {quoted(variant[3])}"
    return SourceError(
        f"{label} holds no weights: expected model.safetensors, pytorch_model.bin or an index of "
        f"shards, found {', '.join(quoted(name, 40) for name in names[:5]) or 'nothing'}"
        f"{', ...' if len(names) > 5 else ''}",
        hint,
    )


def _check_distributed(listing: Listing) -> None:
    name = min(filter(_DISTRIBUTED.fullmatch, listing.root), default=None)
    if name is not None:
        raise SourceError(
            f"{quoted(name)} is a part of a distributed checkpoint: because of its name, transformers loads every "
            "safetensors file of a directory",
            "save the model again without distributed_checkpoint, or remove the parts",
        )


def _check_extra_weights(listing: Listing, config: Mapping[str, Any]) -> None:
    model_type = str(config.get("model_type"))
    name = next((name for name in EXTRA_WEIGHTS.get(model_type, ()) if name in listing.root), None)
    if name is not None:
        raise SourceError(
            f"transformers loads '{name}' on top of the other weights of a '{model_type}' model",
            "save the model again with save_pretrained, which writes one set of weights",
        )


def _adapter_beside(listing: Listing) -> SourceError:
    does = "loads the adapter and its base model in their place" if listing.is_remote else "adds that adapter to them"
    return SourceError(
        f"{quoted(listing.label, 200)} holds {ADAPTER_CONFIG} beside its weights: where peft is installed, "
        f"transformers {does}",
        f"name a checkpoint without {ADAPTER_CONFIG}: remove it, or merge the adapter by quantize --lora",
    )


def _auxiliary_files(listing: Listing, modules: Iterable[str]) -> set[str]:
    """Return tokenizer, templates, licence, code, and modules of a sentence encoder with their small weights."""
    found = {name for name in listing.root if is_auxiliary(name)}
    for folder in (TEMPLATES_FOLDER, CODE_FOLDER, *modules):
        found.update(name for name in listing.files_under(folder) if not name.rpartition("/")[2].startswith("."))
    return found


def is_auxiliary(name: str) -> bool:
    """Return whether a file of the root belongs beside the converted weights, too.

    Excludes files that send a loader to other files, weights, and hidden files, which may be private.
    """
    return not (name in _NOT_AUXILIARY or name.startswith(".") or is_versioned_config(name) or is_weight_file(name))


def is_auxiliary_folder(name: str) -> bool:
    """Return whether the files of a folder of the root may be auxiliary files, by the folder's name."""
    return name in (TEMPLATES_FOLDER, CODE_FOLDER) or fnmatchcase(name, "[0-9]_*")


def is_inert(name: str) -> bool:
    """Return whether no loader reads a file of a checkpoint: texts about it, pictures, hidden files.

    The list is short on purpose: every other name counts as read. Upper and lower case are the same.

    Args:
        name: the file's path in the checkpoint, with `/`.
    """
    *folders, file_name = name.lower().split("/")
    if not file_name or ".." in folders:
        return False
    if any(folder.startswith(".") and folder != "." for folder in folders):
        return True
    if file_name.startswith("."):
        return not file_name.endswith(_LOADED_SUFFIXES)
    if file_name.endswith((*_TEXT_SUFFIXES, *_PICTURE_SUFFIXES)):
        return True
    stem, _, suffix = file_name.partition(".")
    return stem.split("-")[0] in _INERT_STEMS and suffix in ("", "txt")
