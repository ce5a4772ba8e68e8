"""Our answer to which files transformers takes, against that of transformers itself, on generated checkpoints.

Its functions are called unmodified, in the order of `from_pretrained`: adapters, config, weights. Nothing is loaded, so
the files are empty but for the JSON among them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig
from transformers.distributed.checkpoint import get_distributed_checkpoint_dir
from transformers.integrations.peft import maybe_load_adapters
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from int8convert.checkpoint.json_file import read_json_object
from int8convert.checkpoint.loaders.files import EXTRA_WEIGHTS, find_loader_files
from int8convert.checkpoint.loaders.listing import DirectoryListing, Listing
from int8convert.errors import SourceError
from int8convert.hub.open_repository import RepositoryListing
from int8convert.hub.repository import find_repository
from tests.tools.hub_server.fixtures import connect, hub  # noqa: F401, fixtures
from tests.tools.hub_server.hub import Hub

N_CASES = 600
N_HUB_CASES = 24

SHARDS = {
    "safetensors": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "bin": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
}
OTHER_SHARDS = ("weights-1.safetensors", "weights-2.safetensors")
VERSIONS = ("3.0.0", "4.0.0", "5.20.0", "5.100.0", "10.0.0", "99.0.0")


def index_of(*shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(shards)}})


def make_files(chance: random.Random) -> dict[str, str]:
    """The files of one checkpoint: each feature is there by chance, whatever the others are."""

    def one_in(n: int) -> bool:
        return chance.randrange(n) == 0

    files: dict[str, str] = {}
    config: dict[str, Any] = {"model_type": "llama"}
    if one_in(2):
        files["model.safetensors"] = ""
    if one_in(2):  # an index, stale in one case of two
        files["model.safetensors.index.json"] = index_of(*SHARDS["safetensors"])
        files |= dict.fromkeys(SHARDS["safetensors"] if one_in(2) else (), "")
    if one_in(3):
        files["pytorch_model.bin"] = ""
    if one_in(3):
        files["pytorch_model.bin.index.json"] = index_of(*SHARDS["bin"])
        files |= dict.fromkeys(SHARDS["bin"], "")
    if one_in(4):
        files |= {"model.fp16.safetensors": "", "pytorch_model.fp16.bin": ""}
        files["model.safetensors.index.fp16.json"] = index_of("model.fp16-00001-of-00001.safetensors")
    if one_in(4):
        files |= {"consolidated.safetensors": "", "params.json": "{}", "original/model.safetensors": ""}
    if one_in(4):
        files |= {"sub/config.json": "{}", "sub/model.safetensors": "", "model.gguf": "", "tf_model.h5": ""}
    if one_in(12):
        files["shard-00001-model-00001-of-00002.safetensors"] = ""
    if one_in(12):
        files |= {"adapter_config.json": json.dumps({"base_model_name_or_path": "a/b"}), "adapter_model.bin": ""}
    if one_in(4):
        config["transformers_weights"] = chance.choice(
            [
                *("own.safetensors", "own.safetensors.index.json", "gone.safetensors", "sub/model.safetensors", None),
                *("model.safetensors", "pytorch_model.bin", "../out.safetensors", "model.safetensors.index.json"),
            ]
        )
        files |= {"own.safetensors": "", "own.safetensors.index.json": index_of(*OTHER_SHARDS)}
        files |= dict.fromkeys(OTHER_SHARDS, "")
    if one_in(3):
        named = [f"config.{found}.json" for found in VERSIONS if one_in(3)] + ["config.json"] * one_in(2)
        for name in named[:-1] if one_in(8) else named:
            other = {"model_type": "llama", "hidden_size": len(files), "transformers_weights": None}
            if one_in(3):
                other["transformers_weights"] = "own.safetensors"
            files[name] = json.dumps(other)
        chance.shuffle(named)
        config["configuration_files"] = named
    if not one_in(20):
        files["config.json"] = json.dumps(config)
    return files


@dataclass(frozen=True)
class Taken:
    """What a loader takes.

    weights: the names of the weight files; config: the entries.
    """

    config: dict[str, Any]
    weights: list[str]


def taken_by_transformers(place: str) -> Taken:
    """What transformers takes from a directory or a repository; raises what it raises."""
    adapter, base, _ = maybe_load_adapters(place, {})
    assert adapter is None, f"it loads an adapter, and {base}"
    distributed = get_distributed_checkpoint_dir(place, "", None, None)
    assert distributed is None, "it loads every safetensors file"
    config, _ = PretrainedConfig.get_config_dict(place)
    files, _ = _get_resolved_checkpoint_files(
        place, None, None, None, None, False, PretrainedConfig.from_dict(config).__dict__.get("transformers_weights")
    )
    assert files is not None
    for file in files:
        assert os.path.isfile(file), f"{file} is not there"
    config.pop("_commit_hash", None)
    return Taken(config, [os.path.basename(file) for file in files])


def taken_by_us(listing: Listing, read_index: Callable[[str], dict[str, Any]]) -> Taken:
    """The same by our rule; raises a SourceError."""
    files = find_loader_files(listing)
    if not files.is_indexed:
        return Taken(files.config, [files.weights])
    names = sorted(set(read_index(files.weights)["weight_map"].values()))
    for name in names:
        if name not in listing.root:
            raise SourceError(f"{name} is not there", "")
    return Taken(files.config, names)


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def is_refused_by_choice(files: dict[str, str]) -> bool:
    """What transformers loads and we refuse, each with its reason: weights in a folder."""
    return "sub/model.safetensors" in files.get("config.json", "") or any(
        "sub/model.safetensors" in content for name, content in files.items() if name.startswith("config.")
    )


def compare(expected: Callable[[], Taken], ours: Callable[[], Taken], files: dict[str, str]) -> bool:
    """Whether both take the same files; False if both refuse. Anything else fails."""
    try:
        right = expected()
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        with pytest.raises(SourceError):
            found = ours()
            print("transformers:", repr(error), "we:", found)
        return False
    if is_refused_by_choice(files):
        return False
    assert ours() == right
    return True


@pytest.mark.parametrize("seed", range(6))
def test_directory_is_resolved_as_transformers_resolves_it(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    n_taken = 0
    for i in range(N_CASES // 6):
        files = make_files(chance)
        directory = write(tmp_path / str(i), files)
        n_taken += compare(
            lambda directory=directory: taken_by_transformers(str(directory)),
            lambda directory=directory: taken_by_us(
                DirectoryListing(directory, "it"), lambda name: read_json_object(directory / name)
            ),
            files,
        )
    assert n_taken > N_CASES / 6 / 3, "most were refused, which compares little"


def test_repository_is_resolved_as_transformers_resolves_it(hub: Hub, connect: Any, tmp_path: Path) -> None:  # noqa: F811
    connect(hub)
    chance = random.Random(0)
    n_taken = 0
    for i in range(N_HUB_CASES):
        files = make_files(chance)
        files.pop("shard-00001-model-00001-of-00002.safetensors", None)  # of which transformers takes no notice there
        name = f"someone/case-{i}"
        hub.add_repo(name, {path: content.encode() for path, content in files.items()})

        def ours(name: str = name, i: int = i) -> Taken:
            listing = RepositoryListing(find_repository(name), name, tmp_path / "cache")
            return taken_by_us(listing, lambda index: dict(listing.read(index)))

        n_taken += compare(lambda name=name: taken_by_transformers(name), ours, files)
    assert n_taken > N_HUB_CASES / 4


def test_classes_that_load_further_files_are_known() -> None:
    found = {name: CONFIG_MAPPING[name].extra_files for name in CONFIG_MAPPING if CONFIG_MAPPING[name].extra_files}
    assert found == dict(EXTRA_WEIGHTS)
