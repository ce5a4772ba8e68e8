"""A map made before is used again for the same question, and for no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from int8convert.conversion.cost import BASE_BYTES, MODEL_MAP_BYTES, estimate
from int8convert.planning.model_map import cache
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.planning.model_map.process import ModelMapProcess, parse_worker_answer, worker_request
from int8convert.planning.model_map.worker import answer
from int8convert.planning.plan_checkpoint import plan
from int8convert.sources import open_source
from tests.conftest import InProcessWorker
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.tiny_models import edit_config, save_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_checkpoint("llama", tmp_path / "llama")


def remember(directory: Path, modules: ModuleFilter = ModuleFilter()) -> dict[str, Any]:  # noqa: B008
    """Put the map into the cache as a child that made it would have."""
    source = open_source(directory)
    before = torch.get_default_dtype()
    made = answer(worker_request(source, modules))
    torch.set_default_dtype(before)
    cache_of(directory, modules).write(made)
    return made


def cache_of(directory: Path, modules: ModuleFilter = ModuleFilter()) -> cache.ModelMapCache:  # noqa: B008
    source = open_source(directory)
    return cache.ModelMapCache(source.config, worker_request(source, modules))


def is_known(directory: Path, modules: ModuleFilter = ModuleFilter()) -> bool:  # noqa: B008
    return cache_of(directory, modules).read() is not None


def test_second_process_answers_without_starting_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(llama, of_another_version=1)  # so that no map ships with the package
    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", InProcessWorker)
    first = ModelMapProcess(open_source(llama), ModuleFilter()).result()
    edit_config(llama, of_another_version=2)
    unknown, known = plan(llama), plan(llama)
    assert unknown.took_child and not known.took_child
    costs, without = estimate(unknown, 1), estimate(known, 1)
    assert costs.peak_memory_bytes == BASE_BYTES + MODEL_MAP_BYTES > costs.work_memory_bytes
    assert without.peak_memory_bytes == without.work_memory_bytes == costs.work_memory_bytes
    edit_config(llama, of_another_version=1)

    def refuse(module: str) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", refuse)
    second = ModelMapProcess(open_source(llama), ModuleFilter())
    assert second.result() == first
    second.stop()


def test_map_survives_the_way_to_the_disk_and_back(llama: Path) -> None:
    made = remember(llama)
    read = cache_of(llama).read()
    assert read is not None
    assert parse_worker_answer(read, ModuleFilter()) == parse_worker_answer(made, ModuleFilter())


def test_other_patterns_config_tensors_or_versions_are_another_question(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(llama)
    assert is_known(llama)
    assert not is_known(llama, ModuleFilter(skip=("q_proj",)))
    assert not is_known(llama, ModuleFilter(only=("q_proj",)))
    assert not is_known(save_checkpoint("llama", tmp_path / "bf16", torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "version", lambda package: "0.0")
        assert not is_known(llama)
    edit_config(llama, tie_word_embeddings=True)
    assert not is_known(llama)


def test_other_code_is_another_question(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    shutil.copytree(cache._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_PACKAGE", package)
    remember(llama)
    for name in ("planning/plan", "conversion/pipeline", "errors"):
        (package / f"{name}.py").write_text("")
    assert is_known(llama)
    for name in cache.SHAPING_MODULES:
        before = (package / f"{name}.py").read_text()
        (package / f"{name}.py").write_text(f"{before}# ")
        assert not is_known(llama), name
        (package / f"{name}.py").write_text(before)
    assert is_known(llama)


def test_everything_the_child_is_asked_is_in_the_key(tmp_path: Path) -> None:
    """So code that shapes the request, as that of FP8 scales and of dtypes does, needs no place in the key."""
    directory = save_checkpoint("opt", tmp_path / "plain", torch.bfloat16)
    save_fp8(directory, tmp_path / "fp8", "block")
    for source in map(open_source, (directory, tmp_path / "fp8")):
        request = worker_request(source, ModuleFilter())
        known = cache.ModelMapCache(source.config, request)
        known.write({"tensors": {name: [] for name, *_ in request["tensors"]}})
        assert known.read() is not None
        for name in request.keys() - {"directory", "tensors"}:
            assert cache.ModelMapCache(source.config, request | {name: "another"}).read() is None, name
        (first, dtype, *rest), *others = request["tensors"]
        assert dtype == "BF16"  # also where the file has FP8 codes
        for other in ([first, "F8_E4M3", *rest], [first, dtype, [1], *rest[1:]], [first, dtype, rest[0], ["a"]]):
            changed = request | {"tensors": [other, *others]}
            assert cache.ModelMapCache(source.config, changed).read() is None, other


def test_modules_in_the_key_are_those_the_child_imports() -> None:
    code = (
        "import sys, int8convert.planning.model_map.worker\n"
        "print(*(name for name, module in sys.modules.items() if name.startswith('int8convert')"
        " and not hasattr(module, '__path__')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    names = {name.removeprefix("int8convert.").replace(".", "/") for name in found}
    failures = {"errors", "text", "checkpoint/library_errors"}  # a map that cannot be made is not kept
    outputs = {"checkpoint/names", "formats/scales"}  # names of files, and values of scales
    # Blocks of int8 checkpoints.
    blocks = {"formats/name_pattern", "formats/foreign_compressed_tensors", "formats/transforms"}
    assert names - failures - outputs - blocks == {*cache.SHAPING_MODULES}


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"tensors": []}', b'{"tensors": {"a": 1}}', b"\xff"])
def test_damaged_entry_is_none(damage: bytes, llama: Path, own_cache: Path) -> None:
    remember(llama)
    (entry,) = own_cache.rglob("*.json")
    entry.write_bytes(damage)
    assert not is_known(llama)


def test_folder_that_cannot_be_is_an_empty_cache(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(llama / "config.json"))
    remember(llama)
    assert not is_known(llama)


def test_name_rules_are_not_remembered(llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", InProcessWorker)
    edit_config(llama, architectures=["NovelForCausalLM"], model_type="novel")
    assert ModelMapProcess(open_source(llama), ModuleFilter()).result().model_class is None
    assert not list(own_cache.rglob("*.json"))


def test_oldest_maps_are_forgotten(
    llama: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_MAPS", 2)
    for pattern in ("q_proj", "k_proj", "v_proj"):
        remember(llama, ModuleFilter(skip=(pattern,)))
    assert len(list(own_cache.rglob("*.json"))) == 2
    assert is_known(llama, ModuleFilter(skip=("v_proj",))) and not is_known(llama, ModuleFilter(skip=("q_proj",)))


def test_user_without_a_home_has_no_cache_and_gets_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user without an entry in /etc/passwd; '~' would be a folder in the working directory."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    monkeypatch.chdir(tmp_path)
    assert cache.cache_folder() is None
    found = cache_of(save_checkpoint("opt", tmp_path / "source"))
    found.write({"tensors": {}})
    assert found.read() is None
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
