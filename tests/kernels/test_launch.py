"""Kernels on their way to the driver: packing, caching, errors, without a GPU; streams and graphs with one."""

from __future__ import annotations

import ctypes
import enum
import struct
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda

from cuda_kernels.cuda import launch, ptx_cache
from cuda_kernels.cuda.driver import Arguments, CudaError, Function
from cuda_kernels.cuda.launch import Kernel, Launch, unavailable

types = cuda.types
I32 = types.CPointer(types.int32)


def add(x, n, y):  # type: ignore[no-untyped-def]
    i = np.uint32(cuda.blockIdx.x) * np.uint32(cuda.blockDim.x) + np.uint32(cuda.threadIdx.x)
    if i < n:
        x[i] += y


def kernel() -> Kernel:
    return Kernel(add, (I32, types.uint32, types.int32), 128)


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class RecordingDriver:
    """As much of `cuda.bindings.driver` as loading and launching ask for; says yes and writes down what it was told."""

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared", CU_FUNC_ATTRIBUTE_NUM_REGS="registers"
    )

    def __init__(self, fields: tuple[Any, ...] = ()) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = False
        self._fields = fields

    def cuModuleLoadData(self, image: bytes) -> tuple[Result, str]:
        self.calls.append(("load", image))
        return Result.CUDA_SUCCESS, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Result, str]:
        self.calls.append(("get", module, name))
        return Result.CUDA_SUCCESS, "function"

    def cuFuncGetAttribute(self, *asked: str) -> tuple[Result, int]:
        self.calls.append(("ask", *asked))
        return Result.CUDA_SUCCESS, 32

    def cuFuncSetAttribute(self, *told: Any) -> tuple[Result]:
        self.calls.append(("attribute", *told))
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, *told: Any) -> tuple[Result]:
        *rest, pointers, extra = told
        addresses = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        values = tuple(each.from_address(addresses[k]).value for k, each in enumerate(self._fields))
        self.calls.append(("launch", *rest, values, extra))
        return (Result.CUDA_ERROR_INVALID_VALUE if self.fails else Result.CUDA_SUCCESS,)


PTX = ".visible .entry some_kernel(.param .u64 a)"
C_TYPE = {"Q": ctypes.c_uint64, "q": ctypes.c_int64, "I": ctypes.c_uint32, "i": ctypes.c_int32, "f": ctypes.c_float}
VALUES = {
    "Q": st.integers(0, 2**64 - 1),
    "q": st.integers(-(2**63), 2**63 - 1),
    "I": st.integers(0, 2**32 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "f": st.floats(width=32, allow_nan=False),
}
a_field = st.sampled_from(sorted(VALUES)).flatmap(lambda field: st.tuples(st.just(field), VALUES[field]))


@given(st.lists(a_field, max_size=20))
def test_the_driver_finds_every_argument_as_it_was_given(arguments: list[tuple[str, Any]]) -> None:
    fields, values = "".join(field for field, _ in arguments), tuple(value for _, value in arguments)
    recording = RecordingDriver(tuple(C_TYPE[field] for field in fields))
    Function(recording, PTX, 128, Arguments(fields)).launch((5, 6, 7), 0, values, 99)
    assert recording.calls[-1] == ("launch", "function", 5, 6, 7, 128, 1, 1, 0, 99, values, 0)


def test_arguments_lie_where_c_aligns_them() -> None:
    packed = Arguments("IQf")
    addresses = ctypes.cast(packed.pack((1, 2, 3.0)), ctypes.POINTER(ctypes.c_void_p))
    assert [addresses[k] - addresses[0] for k in range(3)] == [0, 8, 16]


def test_threads_do_not_share_the_room_for_arguments() -> None:
    packed, addresses = Arguments("Q"), []
    thread = threading.Thread(target=lambda: addresses.append(packed.pack((1,))))
    thread.start()
    thread.join()
    assert packed.pack((2,)) != addresses[0]


@pytest.mark.parametrize("args", [(1,), (1, 2, 3), (-1, 2), (1, 2**32)])
def test_arguments_that_do_not_fit_are_refused(args: tuple[int, ...]) -> None:
    with pytest.raises(struct.error):
        Arguments("QI").pack(args)


def test_more_shared_memory_is_asked_for_once() -> None:
    recording = RecordingDriver()
    function = Function(recording, PTX, 32, Arguments(""))
    for shared_bytes in (0, 100_000, 50_000, 100_000, 100_001):
        function.launch((1, 1, 1), shared_bytes, (), 0)
    asked = [call[1:] for call in recording.calls if call[0] == "attribute"]
    assert asked == [("function", "dynamic shared", 100_000), ("function", "dynamic shared", 100_001)]


def test_driver_gets_the_entry_of_the_ptx_and_a_terminated_string() -> None:
    recording = RecordingDriver()
    Function(recording, PTX, 32, Arguments("Q"))
    assert recording.calls[:2] == [("load", PTX.encode() + b"\0"), ("get", "module", b"some_kernel")]
    assert recording.calls[2:] == [("ask", "registers", "function")]  # so that a lazy driver has it


def test_refusal_of_the_driver_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = RecordingDriver()
    recording.fails = True
    bindings = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(bindings, "cuGetErrorString", lambda _error: (0, b"invalid argument"))
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE: invalid argument"):
        Function(recording, PTX, 32, Arguments("")).launch((1, 1, 1), 0, (), 0)


@pytest.mark.usefixtures("empty_cache")
def test_kernel_is_loaded_once_on_each_device_and_compiled_once_for_each_capability() -> None:
    one, recording = kernel(), RecordingDriver()
    compiled: list[tuple[int, int]] = []
    one._compile = lambda cc: compiled.append(cc) or f"{PTX} // {cc}"  # type: ignore[func-returns-value, method-assign]
    places = [(0, (8, 0)), (1, (8, 0)), (2, (9, 0))]
    devices: list[Any] = [SimpleNamespace(index=index, capability=cc, driver=recording) for index, cc in places]
    functions = [one.loaded(device) for device in (*devices, *devices)]
    assert functions[:3] == functions[3:] and len(set(functions)) == 3
    assert [call[0] for call in recording.calls] == ["load", "get", "ask"] * 3
    assert compiled == [(8, 0), (9, 0)]


def test_signature_decides_how_arguments_are_packed() -> None:
    signature = (I32, types.uint32, types.int32, types.uint64, types.int64, types.float32)
    packed = Kernel(add, signature, 128).arguments
    packed.pack((2**64 - 1, 2**32 - 1, -(2**31), 2**64 - 1, -(2**63), 0.5))


def never(_cc: tuple[int, int]) -> str:
    raise AssertionError("compiled though it was there")


@pytest.mark.usefixtures("empty_cache")
def test_ptx_made_before_is_not_made_again() -> None:
    first, second = kernel(), kernel()
    text = first.ptx((9, 0))
    assert ".visible .entry" in text and ".maxntid 128" in text
    second._compile = never  # type: ignore[method-assign]
    assert second.ptx((9, 0)) == text


@pytest.mark.usefixtures("empty_cache")
def test_whatever_decides_the_ptx_is_in_its_key() -> None:
    def with_constant(constant: object) -> Any:
        return lambda x: constant

    def calling(constant: int) -> Any:
        helper = cuda.jit(device=True, inline="always")(with_constant(constant))
        return lambda x: helper(x)

    asked = [
        (with_constant(1), "a"),
        (with_constant(2), "a"),
        (with_constant((1, np.float32(2), types.int32)), "a"),
        (with_constant((1, np.float32(3), types.int32)), "a"),
        (with_constant((1, np.float32(2), types.int64)), "a"),
        (with_constant(1), "b"),
        (with_constant(1), (types.int32, 128)),
        (calling(1), "a"),
        (calling(2), "a"),
        (lambda x: x + 1, "a"),
        (lambda x: x + 2, "a"),
        (lambda x: x - 1, "a"),
    ]
    for text in ("first", "second"):
        made = [
            ptx_cache.remembered(f, settings, lambda i=i, text=text: f"{text} {i}")
            for i, (f, settings) in enumerate(asked)
        ]
        assert made == [f"first {i}" for i in range(len(asked))]


@pytest.mark.usefixtures("empty_cache")
def test_functions_inside_are_known_by_their_code_and_not_by_their_address() -> None:
    def compiled_anew(constant: int) -> Any:
        names: dict[str, Any] = {}
        exec(f"def outer(x):\n    def inner(y):\n        return y + {constant}\n    return inner(x)", names)
        return names["outer"]

    for constant, text in ((1, "first"), (2, "second")):
        assert ptx_cache.remembered(compiled_anew(constant), "", lambda text=text: text) == text
        assert ptx_cache.remembered(compiled_anew(constant), "", lambda: "again") == text


@pytest.mark.usefixtures("empty_cache")
def test_what_cannot_be_told_apart_is_not_remembered() -> None:
    unknown = SimpleNamespace()
    for text in ("first", "second"):
        assert ptx_cache.remembered(lambda x: unknown, "", lambda text=text: text) == text


@pytest.mark.usefixtures("empty_cache")
def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_cache, "MAX_FILES", 3)
    for i in range(6):
        ptx_cache.remembered(add, i, lambda: "text")
        assert len(list(ptx_cache.cache_folder().iterdir())) == min(i + 1, 3)
    assert ptx_cache.remembered(add, 5, lambda: "again") == "text"


def test_cache_that_cannot_be_written_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ptx_cache.remembered(add, "", lambda: "made") == "made"


def test_missing_packages_are_named_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _name: None)
    assert "int8convert[cuda13]" in (unavailable() or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_machine_without_a_device_says_so() -> None:
    assert unavailable() in (f"torch {torch.__version__} is built without CUDA", "torch sees no CUDA device")


def test_what_torch_warns_of_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nPlease update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert unavailable() == "torch sees no CUDA device: CUDA initialization: the driver is too old"


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one H200, as far as `unavailable` asks."""
    machine = SimpleNamespace(capability=(9, 0), driver=13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: machine.capability)
    bindings = pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(bindings.driver, "cuDriverGetVersion", lambda: (Result.CUDA_SUCCESS, machine.driver))
    monkeypatch.setattr(bindings.nvrtc, "nvrtcVersion", lambda: (Result.CUDA_SUCCESS, 13, 0))
    return machine


def test_usable_device_has_no_reason(pretended_device: SimpleNamespace) -> None:
    assert unavailable() is None and unavailable(torch.device("cuda")) is None
    pretended_device.driver = 13020
    assert unavailable(torch.device("cuda:0")) is None


def test_device_that_does_not_exist_is_counted(pretended_device: SimpleNamespace) -> None:
    assert unavailable(torch.device("cuda:3")) == "torch sees 1 CUDA device, and cuda:3 is not among them"


def test_old_devices_and_drivers_are_told_apart(pretended_device: SimpleNamespace) -> None:
    pretended_device.driver = 12080
    assert unavailable() == "the driver is for CUDA 12.8, older than the toolkit here, 13.0"
    pretended_device.capability = (7, 0)
    assert unavailable() == "compute capability 7.0 is older than 7.5"


def test_importing_the_door_loads_nothing_heavy() -> None:
    code = (
        "import sys, cuda_kernels.cuda.launch\n"
        "print(sorted({'torch', 'numba', 'numpy', 'llvmlite', 'cuda'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run_add(x: torch.Tensor, y: int, one: Kernel) -> None:
    launch.run([Launch(one, (-(-x.numel() // 128), 1, 1), 0, (x.data_ptr(), x.numel(), y))], x.device)


@pytest.mark.gpu
def test_launch_runs_on_torch_s_current_stream() -> None:
    x, stream = torch.zeros(1000, dtype=torch.int32, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(5)
        run_add(x, 7, kernel())
        x *= 2
    stream.synchronize()
    assert (x == 24).all()


@pytest.mark.gpu
def test_launch_is_captured_in_a_graph_and_replayed() -> None:
    x, one = torch.zeros(1000, dtype=torch.int32, device="cuda"), kernel()
    launch.load([one], x.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_add(x, 3, one)
        run_add(x, 4, one)
    assert (x == 0).all()
    for _ in range(5):
        graph.replay()
    assert (x == 35).all()


@pytest.mark.gpu
def test_thread_that_never_used_cuda_can_launch() -> None:
    x, one = torch.zeros(1000, dtype=torch.int32, device="cuda"), kernel()
    thread = threading.Thread(target=run_add, args=(x, 9, one))
    thread.start()
    thread.join()
    assert (x == 9).all()


@pytest.mark.gpu
def test_every_device_runs_what_it_is_given() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    one = kernel()
    for index in (0, 1, 0):
        x = torch.zeros(1000, dtype=torch.int32, device=f"cuda:{index}")
        run_add(x, 1 + index, one)
        assert (x == 1 + index).all() and torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_impossible_launch_is_an_error_and_the_next_one_runs() -> None:
    x, one = torch.zeros(1000, dtype=torch.int32, device="cuda"), kernel()
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        launch.run([Launch(one, (1, 1, 1), 1 << 30, (x.data_ptr(), 1000, 1))], x.device)
    run_add(x, 2, one)
    assert (x == 2).all()
