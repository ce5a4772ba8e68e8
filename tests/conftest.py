"""What tests of every folder share."""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

# Before anything imports transformers: tests use no network, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has a core. Threads beside it would spin on the cores of the others; commands under test inherit this.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
import typer.main
from hypothesis import settings

from cuda_kernels.cpu import objects
from cuda_kernels.cuda.launch import unavailable
from int8convert.checkpoint.source import CheckpointSource
from int8convert.planning.model_map.model_map import ModelMap, ModuleFilter
from int8convert.planning.model_map.process import parse_worker_answer, worker_request
from int8convert.runtime.worker_process import decode_failure, encode_failure
from int8convert.verification.checks import Check
from int8convert.verification.exact.trial_run import TrialRun, not_tried, read_answer

# Tests never time: a machine with other work is slow, and not wrong.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts background jobs with SIGINT ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


# A command line is built from its functions' signatures by every call, which takes longer than most commands here.
typer.main.get_command = functools.cache(typer.main.get_command)

_NUMBERS = itertools.count()

MAP_PROCESS = "int8convert.planning.pending_plan.ModelMapProcess"
TRIAL_PROCESS = "int8convert.verification.exact.level.TrialRun"
"""What runs in a process of its own, where it is named."""


class InProcessMap:
    """`ModelMapProcess` without the process: the same request, worker and answer, minus seconds of start-up.

    Answers are remembered, as the cache of maps does: most tests convert one of a few models. Not where the checkpoint
    has code, whose tests see whether it runs. A test that changes what shapes a map lays an empty dict over `answers`.
    """

    answers: ClassVar[dict[str, str]] = {}
    starts_child = False

    def __init__(self, source: CheckpointSource, modules: ModuleFilter) -> None:
        self._source, self._modules = source, modules

    def result(self) -> ModelMap:
        request = worker_request(self._source, self._modules)
        if self._modules.trusts_code or "auto_map" in self._source.config:
            return parse_worker_answer(self._ask(request), self._modules)
        key = json.dumps([request | {"directory": ""}, self._source.config])
        if key not in self.answers:
            self.answers[key] = json.dumps(self._ask(request))
        return parse_worker_answer(json.loads(self.answers[key]), self._modules)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        from int8convert.planning.model_map.worker import answer

        before = torch.get_default_dtype()
        try:
            return answer(request)
        finally:
            torch.set_default_dtype(before)

    def stop(self) -> None:
        pass


class InProcessWorker:
    """`Worker` without the process: the same request, answer and failures."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._request: Any = None

    def send(self, request: Any) -> None:
        self._request = request

    def result(self, request: Any = None, limit_s: float | None = None) -> Any:
        request = self._request if request is None else request
        before = torch.get_default_dtype()
        try:
            return json.loads(json.dumps(import_module(self._module).answer(json.loads(json.dumps(request)))))
        except Exception as error:
            raise decode_failure(encode_failure(error), status=1) from None
        finally:
            torch.set_default_dtype(before)

    def stop(self) -> None:
        pass


class InProcessTrial(TrialRun):
    """`TrialRun` without the process."""

    def _start(self) -> Any:
        return None

    def result(self) -> tuple[Check, list[str]]:
        from int8convert.verification.exact.trial_run_worker import answer

        before = torch.get_default_dtype()
        try:
            return read_answer(answer(self._request))
        except Exception as error:  # as the child's end would be told
            return read_answer(not_tried(str(error)))
        finally:
            torch.set_default_dtype(before)


NOT_FAST = (
    *("scenarios", "tools/ptx", "tools/hub_server", "cli", "publish", "test_layering"),
    *("verification/test_lockstep", "verification/test_memory", "verification/test_trial_run"),
    *("calibration/test_run", "calibration/test_memory", "calibration/test_interrupted"),
    *("hub/test_killed", "hub/test_access", "hub/test_faults", "hub/test_permanent_faults", "hub/test_identical"),
    *("hub/test_reader", "hub/test_proxy", "hub/test_forward"),
    *("kernels/test_cuda_", "kernels/test_intrinsics", "kernels/test_row_quantize_cuda", "kernels/test_stub_driver"),
    *("planning/test_loading_parity", "planning/test_model_map", "planning/test_old_names"),
    *("planning/test_remote_code", "runtime/test_weight_reads", "checkpoint/test_loader_parity"),
)
"""Starts of the paths that --fast leaves out: commands in processes, kills, fuzzing, sweeps over PTX and families."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--fast", action="store_true", help="run the tests of single modules alone: see NOT_FAST")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    path = collection_path.relative_to(Path(__file__).parent) if config.getoption("--fast") else Path()
    return True if str(path).startswith(NOT_FAST) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        kept = [item for item in items if not re.search(r"[\[-]ptx\b", item.name)]
        config.hook.pytest_deselected(items=[*{*items} - {*kept}])
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where kernels do, and `slow` ones when asked for; else they are skipped, aloud."""
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes; --slow runs it")
    if item.get_closest_marker("gpu") and (reason := unavailable()):
        pytest.skip(f"no CUDA kernels here: {reason}")


@contextmanager
def in_this_process() -> Iterator[None]:
    """As the two fixtures below, for fixtures whose scope is wider than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MAP_PROCESS, InProcessMap)
        patch.setattr(TRIAL_PROCESS, InProcessTrial)
        yield


@pytest.fixture
def map_in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conversions in this test make their model map in this process."""
    monkeypatch.setattr(MAP_PROCESS, InProcessMap)
    yield


@pytest.fixture
def rotation_in_process(map_in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this test make their model map in this process, and find their rotation and smoothing there."""
    monkeypatch.setattr("int8convert.planning.folding.folding.Worker", InProcessWorker)


@pytest.fixture(autouse=True)
def trial_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifications run their tokens in this process; a child would take seconds to start, each time."""
    monkeypatch.setattr(TRIAL_PROCESS, InProcessTrial)


@pytest.fixture(scope="session")
def shared_ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PTX that tests compiled: of all workers, and where pytest keeps a cache, of all runs. Never the user's folder."""
    if hasattr(request.config, "cache"):
        return request.config.cache.mkdir("ptx")
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ptx"


@pytest.fixture(scope="session", autouse=True)
def each_kernel_compiled_by_one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker waits for a CPU kernel that another compiles: it would take the cores' time, seconds, again."""
    compile_kernel = objects._compile

    def compile_or_wait(key: str, path: Path | None, *kernel: Any) -> int:
        if path is None:
            return compile_kernel(key, path, *kernel)
        with (tmp_path_factory.getbasetemp().parent / f"{path.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = objects._read(path, key)
            return (found and objects._load(*found)) or compile_kernel(key, path, *kernel)

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(objects, "_compile", compile_or_wait)
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, shared_ptx: Path) -> Path:
    """Each test's own cache folder, with a link to the shared PTX: a kernel costs a second to compile again."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_NUMBERS))
    folder.mkdir(parents=True)
    shared_ptx.mkdir(exist_ok=True)
    (folder / "cuda_kernels").symlink_to(shared_ptx)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def link_maps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts the model maps of all tests and workers into a cache folder, for commands in processes of their own."""
    base = tmp_path_factory.getbasetemp()
    maps = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "model_maps"
    maps.mkdir(exist_ok=True)

    def link(cache: Path) -> None:
        (cache / "int8convert").mkdir(parents=True)
        (cache / "int8convert" / "model_maps").symlink_to(maps)

    return link


@pytest.fixture
def shared_maps(own_cache: Path, link_maps: Callable[[Path], None]) -> None:
    """Commands remember the maps that other tests made."""
    link_maps(own_cache)


@pytest.fixture
def no_maps(shared_maps: None, own_cache: Path) -> None:
    """No model is known yet, for tests of what happens while its map is made."""
    (own_cache / "int8convert" / "model_maps").unlink()


@pytest.fixture
def empty_cache(own_cache: Path) -> Path:
    """No PTX either, for tests of its cache."""
    (own_cache / "cuda_kernels").unlink()
    return own_cache
