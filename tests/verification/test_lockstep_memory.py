"""A checkpoint of which a quarter fits in memory is measured, within what was said before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tools.outlier_models import convert
from tests.tools.tiny_models import save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

MEASURE = """
import dataclasses, json, resource, sys, torch, transformers
from pathlib import Path
from int8convert.errors import Int8ConvertError
from int8convert.runtime import memory
from int8convert.verification.fidelity.level import measure_fidelity
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.options import Execution

transformers.logging.disable_progress_bar()
small, large, small_int8, large_int8, allowed = sys.argv[1:]
windows = TokenWindows(torch.arange(3, 51).view(2, 24), "numbers", "", 48)
measure_fidelity(small, small_int8, windows, Execution(stream=True))  # compiles what is compiled when it is first used
status = Path("/proc/self/status")
before = memory._read_kilobytes(status)
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + int(allowed),) * 2)
steps = []
(report,) = measure_fidelity(large, large_int8, windows, on_event=steps.append)
try:
    measure_fidelity(large, large_int8, windows, Execution(stream=False))
    fits = True
except (MemoryError, Int8ConvertError):
    fits = False
print(json.dumps({**dataclasses.asdict(report), "planned": steps[0].peak_memory_bytes, "fits": fits}))
"""


def save_large(directory: Path) -> Path:
    """A Llama of 22 layers and 400 MB in float16."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=22,
        num_attention_heads=8,
        dtype="float16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    noise = torch.randn(3072 * 768).half() / 32
    filled = {
        name: noise[: p.numel()].view(p.shape).roll(i, 0) if p.dim() > 1 else torch.ones(p.shape, dtype=torch.float16)
        for i, (name, p) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(filled, assign=True)
    model.save_pretrained(directory)
    return directory


def test_model_four_times_the_memory_is_measured_within_what_was_said(tmp_path: Path) -> None:
    sources = save_checkpoint("llama", tmp_path / "small"), save_large(tmp_path / "large")
    outs = [convert(source, tmp_path / f"{source.name}-int8") for source in sources]
    n_bytes = sum(path.stat().st_size for path in sources[1].glob("*.safetensors"))
    assert n_bytes > 390_000_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (*sources, *outs)), str(n_bytes // 4)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    assert report["streamed"]
    assert not report["fits"]
    assert len(report["layer_errors"]) == 22
    assert report["peak_memory_bytes"] <= report["planned"]
    assert 0 < report["delta_nll_interval"][1] < 0.1
