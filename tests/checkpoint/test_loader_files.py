"""Which files loaders read, and which they take as weights."""

from __future__ import annotations

from typing import Any

import pytest

from int8convert.checkpoint.loaders.files import find_loader_files, is_inert
from int8convert.checkpoint.loaders.notes import vllm_weights
from int8convert.checkpoint.loaders.sentence_modules import MAX_MODULES
from int8convert.checkpoint.names import INDEX_NAME, is_loaded_as_weights
from int8convert.errors import SourceError


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "readme.MD", "docs/usage.md", "LICENSE", "LICENSE.txt", "License", "LICENSE-MIT", "NOTICE.txt"),
        *("llama_license.md", "image.png", "figures/Loss.JPG", "paper.pdf", "1_Pooling/readme.md"),
        *(".gitattributes", ".gitignore", ".DS_Store", ".git/config", ".cache/huggingface/download/config.json"),
    ],
)
def test_names_that_no_loader_reads(name: str) -> None:
    assert is_inert(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.model",
            "vocab.txt",
            "chat_template.jinja",
        ),
        *("LICENSE.safetensors", "license.py", "README.json", "notice.bin", "unknown", "1_Pooling/config.json"),
        *(".model", ".x.safetensors", "additional_chat_templates/.jinja", ".config.json", "../README.md", ""),
        *("README.md/config.json", "license_tokens.model", "licenses/vocab.txt"),
    ],
)
def test_every_other_name_counts_as_read(name: str) -> None:
    assert not is_inert(name)


class MadeUp:
    """A `Listing` of names and JSON values."""

    label = "someone/model"

    def __init__(self, files: dict[str, Any], is_remote: bool) -> None:
        self._files = files
        self.is_remote = is_remote
        self.root = {name for name in files if "/" not in name}

    def files_under(self, folder: str) -> list[str]:
        return [name for name in self._files if name.startswith(f"{folder}/")]

    def read(self, name: str) -> Any:
        return self._files[name]


def refusal(files: dict[str, Any], is_remote: bool = True) -> SourceError:
    with pytest.raises(SourceError) as caught:
        find_loader_files(MadeUp(files, is_remote))
    return caught.value


def test_adapter_on_the_hub_is_told_how_it_is_had() -> None:
    error = refusal({"adapter_config.json": {}, "adapter_model.safetensors": None})
    assert error.message == (
        "'someone/model' is a LoRA adapter and no model: it holds adapter_config.json and no weights of a model"
    )
    assert error.hint == (
        "fetch it by `hf download someone/model --local-dir DIR`, run `int8convert quantize MODEL OUT --lora "
        "'DIR'`; MODEL is the model it was trained on"
    )


def test_adapter_beside_weights_says_what_transformers_loads_in_each_place() -> None:
    files = {"adapter_config.json": {}, "model.safetensors": None}
    assert refusal(files).message.endswith("transformers loads the adapter and its base model in their place")
    assert refusal(files, is_remote=False).message.endswith("transformers adds that adapter to them")
    assert find_loader_files(MadeUp(files, True), ignores_adapter=True).weights == "model.safetensors"


@pytest.mark.parametrize("n", [100, 101])
def test_modules_are_bounded_in_number(n: int) -> None:
    modules = [{"path": f"{i}_Dense"} for i in range(n)]
    files = {"model.safetensors": None, "modules.json": modules, "7_Dense/config.json": {"in_features": 2}}
    if n > MAX_MODULES:
        assert refusal(files).message == "'modules.json' names 101 folders, expected at most 100"
    else:
        assert find_loader_files(MadeUp(files, True)).auxiliary_files == ("7_Dense/config.json", "modules.json")


@pytest.mark.parametrize("modules", [{}, ["x", 7, {"path": 3}, {}], [{"path": "."}, {"path": ""}]])
def test_modules_that_name_no_folder_are_carried_as_they_are(modules: Any) -> None:
    files = {"model.safetensors": None, "modules.json": modules, "1_Pooling/config.json": {}}
    assert find_loader_files(MadeUp(files, True)).auxiliary_files == ("modules.json",)


@pytest.mark.parametrize(
    ("root", "taken"),
    [
        (("model.safetensors",), ("model.safetensors",)),
        (("model.safetensors", "own.safetensors"), ("model.safetensors", "own.safetensors")),
        (("model.safetensors", "own.safetensors", INDEX_NAME), (INDEX_NAME,)),
        (("consolidated.safetensors", "model.safetensors"), ("consolidated.safetensors", "model.safetensors")),
        (("consolidated.safetensors", "params.json", "model.safetensors"), ("consolidated.safetensors",)),
        (("pytorch_model.bin",), ()),
    ],
)
def test_weights_that_vllm_takes(root: tuple[str, ...], taken: tuple[str, ...]) -> None:
    assert vllm_weights(root) == taken


@pytest.mark.parametrize(
    ("name", "is_loaded"),
    [
        *((name, True) for name in ("model.safetensors", "x.safetensors", INDEX_NAME, "own.safetensors.index.json")),
        *((name, True) for name in ("pytorch_model.bin", "pytorch_model-1.bin", "pytorch_model.bin.index.json")),
        *((name, True) for name in ("adapter_config.json", "adapter_model.safetensors")),
        *((name, False) for name in ("training_args.bin", "sub/model.safetensors", "config.json", "model.gguf")),
    ],
)
def test_files_that_would_be_loaded_in_place_of_an_output(name: str, is_loaded: bool) -> None:
    assert is_loaded_as_weights(name) is is_loaded


SPELLINGS = ["0_Transformer", "./0_Transformer", "0_Transformer/.", "0_Transformer//", ".//0_Transformer/./"]


@pytest.mark.parametrize("path", SPELLINGS)
def test_inner_model_is_refused_however_its_folder_is_spelled(path: str) -> None:
    files = {
        "model.safetensors": None,
        "modules.json": [{"path": path}],
        "0_Transformer/config.json": {"model_type": "bert"},
        "0_Transformer/model.safetensors": None,
    }
    assert "the model in '0_Transformer'" in refusal(files).message


@pytest.mark.parametrize("path", ["2_Dense", "./2_Dense", "2_Dense/.", "./2_Dense//"])
def test_folder_of_a_module_is_carried_however_it_is_spelled(path: str) -> None:
    files = {"model.safetensors": None, "modules.json": [{"path": path}], "2_Dense/model.safetensors": None}
    assert find_loader_files(MadeUp(files, True)).auxiliary_files == ("2_Dense/model.safetensors", "modules.json")


def routed(folder: str, structure: Any, **inner: Any) -> dict[str, Any]:
    within = f"{folder}/" if folder else ""
    modules = {"model.safetensors": None, "modules.json": [{"path": f"./{folder}"}]}
    files = {f"{within}router_config.json": {"structure": structure}}
    return {**modules, **files, **{f"{within}query_0/{name}": value for name, value in inner.items()}}


@pytest.mark.parametrize("folder", ["", "0_Router"])
def test_modules_of_a_router_are_carried(folder: str) -> None:
    files = routed(folder, {"query": ["./query_0"], "document": [""]}, weights=None)
    assert set(find_loader_files(MadeUp(files, True)).auxiliary_files) == files.keys() - {"model.safetensors"}


@pytest.mark.parametrize("folder", ["", "0_Router"])
def test_inner_model_of_a_router_is_refused(folder: str) -> None:
    files = routed(folder, {"query": ["query_0"]}, **{"config.json": {"model_type": "bert"}})
    assert "query_0'" in refusal(files).message


def test_router_that_leads_outside_is_refused() -> None:
    assert "outside the checkpoint" in refusal(routed("", {"query": ["../x"]})).message


@pytest.mark.parametrize("structure", [7, {"a": 3}, {"a": [None, {}]}])
def test_router_of_other_types_leads_nowhere(structure: Any) -> None:
    assert "modules.json" in find_loader_files(MadeUp(routed("0_Router", structure), True)).auxiliary_files
