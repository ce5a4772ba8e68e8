"""Conversion with `--device`: the same bytes by way of the CUDA path, whose launches the PTX interpreter executes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import int8convert
from cuda_kernels import reference
from cuda_kernels.cuda import launch
from cuda_kernels.cuda.launch import CudaError, Launch
from int8convert.checkpoint import rows
from int8convert.conversion import cost, gpu
from int8convert.conversion.device import choose_device
from int8convert.conversion.gpu import CudaScratch, CudaStream
from int8convert.errors import DeviceError, NonFiniteWeightError
from tests.cli.conftest import Run, run  # noqa: F401
from tests.conversion.test_quantize import convert
from tests.kernels.cuda_backends import interpret
from tests.tools.calibrations import save_calibration, save_source
from tests.tools.ptx import Memory
from tests.tools.tiny_models import file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


class InterpretedStream(CudaStream):
    """A stream whose device is the PTX interpreter: what is copied is copied at once, what is launched is executed."""

    made: list[InterpretedStream] = []  # noqa: RUF012
    fail_after = 1 << 30

    def __init__(self, name: str) -> None:
        self._torch = torch
        self.name, self.kept_bytes = name, 4096
        self._is_free = threading.Lock()
        self.n_launches = self.n_waits = 0
        self._memory, self._addresses = Memory(), dict[int, int]()
        self.made.append(self)

    def __enter__(self) -> InterpretedStream:
        assert self._is_free.acquire(blocking=False), "two threads at one stream"
        return self

    def __exit__(self, *_error: Any) -> None:
        self._is_free.release()

    def pinned(self, n_bytes: int) -> torch.Tensor:
        return torch.full((n_bytes,), 0xAA, dtype=torch.uint8)

    empty = pinned

    def address(self, tensor: torch.Tensor) -> int:
        if tensor.data_ptr() not in self._addresses:
            self._addresses[tensor.data_ptr()] = self._memory.place(tensor.numpy())
        return self._addresses[tensor.data_ptr()]

    def run(self, launches: Any) -> None:
        if self.n_launches == self.fail_after:
            raise CudaError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
        self.n_launches += 1
        planned: list[Launch] = list(launches)
        interpret(planned, self._memory)

    def wait(self) -> None:
        self.n_waits += 1


@pytest.fixture
def interpreted_gpu(monkeypatch: pytest.MonkeyPatch) -> type[InterpretedStream]:
    """A machine with one CUDA device, which is the interpreter."""

    class Stream(InterpretedStream):
        made: list[InterpretedStream] = []  # noqa: RUF012

    monkeypatch.setattr(gpu, "CudaStream", Stream)
    monkeypatch.setattr(launch, "unavailable", lambda device: None if not device.index else "there is one")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Stream


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_bytes_are_those_of_the_cpu(name: str, interpreted_gpu: type[InterpretedStream], tmp_path: Path) -> None:
    """Weights, scales and the manifest with its sums; gpt2's are stored transposed."""
    source = save_checkpoint(name, tmp_path / "source", max_shard_size="60KB")
    convert(source, tmp_path / "cpu", device="cpu", workers=1)
    report = convert(source, tmp_path / "cuda", device="cuda", workers=3)
    assert file_bytes(tmp_path / "cuda") == file_bytes(tmp_path / "cpu")
    assert report.device == "cuda:0"
    assert len(interpreted_gpu.made) == 3
    quantized = sum(tensor.dtype == torch.int8 for tensor in read_tensors(tmp_path / "cuda").values())
    assert sum(stream.n_launches for stream in interpreted_gpu.made) >= quantized > 0
    assert all(stream.n_launches == stream.n_waits for stream in interpreted_gpu.made)


def test_calibrated_rounding_is_the_same_behind_the_device(
    interpreted_gpu: type[InterpretedStream], tmp_path: Path
) -> None:
    """Scales come from the device, and codes of accepted rows from the CPU."""
    source = save_source("opt", tmp_path / "source")
    options = {"round": "calibrated", "calibration": save_calibration(source, tmp_path / "cal"), "workers": 1}
    for device in ("cpu", "cuda"):
        report = convert(source, tmp_path / device, device=device, **options)
        assert report.rounding is not None and report.rounding.n_accepted_rows > 0
    assert file_bytes(tmp_path / "cuda") == file_bytes(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_takes_the_device(dtype: torch.dtype, interpreted_gpu: type[InterpretedStream]) -> None:
    rows = scratch_of(interpreted_gpu)
    weight = (torch.randn(7, 264, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    integer, bits = {2: (torch.int16, np.int16), 4: (torch.int32, np.uint32)}[dtype.itemsize]
    array = weight.view(integer).numpy().view(np.uint16 if dtype == torch.float16 else bits)
    assert_quantizes(rows, array, weight.float().numpy())


def scratch_of(stream: Callable[[str], CudaStream]) -> CudaScratch:
    return CudaScratch("cuda:0", stream("cuda:0"))


def assert_quantizes(scratch: CudaScratch, bits: np.ndarray, values: np.ndarray) -> None:
    codes = scratch.codes(bits.size).reshape(bits.shape)
    codes[:] = -128
    absmax, (signal, noise) = np.full(len(bits), np.nan, np.float32), np.full((2, len(bits)), np.nan)
    scratch.row_quantize(bits, codes, absmax, signal, noise)
    expected = reference.row_quantize(values)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(absmax, expected.absmax)
    np.testing.assert_allclose(signal, expected.signal, rtol=1e-4)
    np.testing.assert_allclose(noise, expected.noise, rtol=1e-4, atol=1e-6 * bits.shape[1])


@pytest.mark.parametrize("shape", [(1, 2056), (350, 8), (0, 64), (3, 0)])
def test_buffers_grow_for_what_does_not_fit(
    shape: tuple[int, int], interpreted_gpu: type[InterpretedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row longer than a block of 4 KiB, more rows than sums have room for, and nothing at all."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(gpu, "BLOCK_BYTES", 4096)
    scratch = scratch_of(interpreted_gpu)
    for n_rows, n_columns in ((3, 64), shape, (3, 64)):
        values = np.random.default_rng(n_columns).standard_normal((n_rows, n_columns)).astype(np.float16)
        assert_quantizes(scratch, values.view(np.uint16), values.astype(np.float32))


def test_failing_device_is_an_error_and_the_cpu_resumes_behind_it(
    interpreted_gpu: type[InterpretedStream], tmp_path: Path
) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    interpreted_gpu.fail_after = 9
    with pytest.raises(DeviceError, match="cuda:0 failed: CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        convert(source, tmp_path / "out", device="cuda", workers=1)
    assert "--device cpu" in caught.value.hint and "finished shards are kept" in caught.value.state
    convert(source, tmp_path / "out", device="cpu")
    convert(source, tmp_path / "undisturbed", device="cpu")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


def test_weights_that_are_not_finite_are_found_as_on_the_cpu(
    interpreted_gpu: type[InterpretedStream], tmp_path: Path
) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    weights = read_tensors(source)
    weights["model.decoder.layers.1.fc1.weight"][5, 3] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, source / "model.safetensors", {"format": "pt"})
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(NonFiniteWeightError, match="holds NaN at row 5, column 3") as caught:
            convert(source, tmp_path / device, device=device, workers=1)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_device_out_of_memory_is_told_before_anything_is_written(
    interpreted_gpu: type[InterpretedStream], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def out_of_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nand so on")

    monkeypatch.setattr(interpreted_gpu, "empty", out_of_memory)
    source = save_checkpoint("opt", tmp_path / "source")
    with pytest.raises(DeviceError, match=r"cuda:0 failed: CUDA out of memory. Tried to allocate 2.00 MiB\.$"):
        convert(source, tmp_path / "out", device="cuda")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_auto_is_the_cpu_for_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.conversion.device._NVIDIA", tmp_path)
    source = save_checkpoint("opt", tmp_path / "source")
    assert convert(source, tmp_path / "out").device == "cpu"
    assert choose_device("auto").reason and not choose_device("cpu").reason


def test_auto_says_once_what_it_chose_and_who_chooses_is_told_nothing(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("int8convert.conversion.device._NVIDIA", tmp_path)
    source = save_checkpoint("opt", tmp_path / "source")
    _, out, err = run("quantize", source, tmp_path / "auto")
    assert err.count("quantizing on cpu: ") == 1 and " on cpu, " in out
    for i, option in enumerate((["--device", "cpu"], ["--json"])):
        _, _, err = run("quantize", source, tmp_path / f"{i}", *option)
        assert "quantizing on" not in err


def test_missing_device_is_an_error_with_its_reason_and_nothing_is_written(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    monkeypatch.setattr(launch, "unavailable", lambda _device: "the GPU is on holiday")
    monkeypatch.setenv("INT8CONVERT_DEVICE", "cuda:1")
    for arguments in ([tmp_path / "out"], ["--dry-run"]):
        code, out, err = run("quantize", source, *arguments)
        assert (code, out) == (1, "")
        assert err.splitlines()[0] == "error: --device cuda:1 cannot be used: the GPU is on holiday"
    assert not (tmp_path / "out").exists()


def test_estimate_measures_the_device_asked_for(
    interpreted_gpu: type[InterpretedStream],
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cost, "_PROBE_SHAPE", (8, 1024))
    source = save_checkpoint("opt", tmp_path / "source")
    costs = [json.loads(run("quantize", source, "--dry-run", "--json", "--device", d)[1]) for d in ("cpu", "cuda:0")]
    assert [each["device"] for each in costs] == ["cpu", "cuda:0"]
    assert interpreted_gpu.made[0].n_launches == 5
    assert costs[1]["kernel_s"] > costs[0]["kernel_s"] > 0
    assert "and cuda:0, copies included" in run("quantize", source, "--dry-run", "--device", "cuda:0")[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_bytes_of_the_gpu_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", max_shard_size="60KB")
    convert(source, tmp_path / "cpu", device="cpu")
    convert(source, tmp_path / "cuda", device="cuda", workers=3)
    assert file_bytes(tmp_path / "cuda") == file_bytes(tmp_path / "cpu")


@pytest.mark.gpu
def test_blocks_are_read_into_pinned_memory() -> None:
    scratch = CudaScratch("cuda", CudaStream("cuda"))
    assert torch.from_numpy(scratch.source(100)).is_pinned() and torch.from_numpy(scratch.codes(100)).is_pinned()
    values = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float16)
    assert_quantizes(scratch, values.view(np.uint16), values.astype(np.float32))


@pytest.mark.gpu
def test_api_takes_the_device(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    report = int8convert.quantize(source, tmp_path / "out", device="cuda:0", on_event=lambda _event: None)
    assert report.device == "cuda:0"
