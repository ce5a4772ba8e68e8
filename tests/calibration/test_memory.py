"""A model of which a quarter fits in memory, in float32, is calibrated within what was said before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tools.tiny_models import save_checkpoint
from tests.verification.test_lockstep_memory import save_large

CALIBRATE = """
import json, resource, sys, torch, transformers
from pathlib import Path
from int8convert.calibration.calibrate import _layers
from int8convert.calibration.folder import begin_folder
from int8convert.calibration.run import RunOptions, Task, read_inputs
from int8convert.errors import Int8ConvertError
from int8convert.runtime import memory
from int8convert.runtime.models import load_model
from int8convert.runtime.text.windows import TokenWindows

transformers.logging.disable_progress_bar()
small, large, folder, allowed = sys.argv[1:]
windows = TokenWindows(torch.arange(4, 124).view(4, 30), "numbers", "", 120)
begin_folder(Path(folder))

def run(path, on_event):
    prepare = lambda model: Task(_layers(model), windows, n_held_out=1)
    return read_inputs(path, prepare, RunOptions(6.0, "cpu", moments=Path(folder), on_event=on_event))

run(small, lambda event: None)
before = memory._read_kilobytes(Path("/proc/self/status"))
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + int(allowed),) * 2)
memory.start_peak()
events = []
readings = run(large, events.append)
peak = memory.peak_bytes()
try:
    load_model(large, "cpu")
    fits = True
except (MemoryError, Int8ConvertError):
    fits = False
found = {"peak": peak, "planned": events[0].peak_memory_bytes, "fits": fits, "streamed": readings.streamed}
print(json.dumps({**found, "inputs": len(readings.recorder.inputs), "steps": len(events) - 1}))
"""


def test_model_that_does_not_fit_is_calibrated_within_what_was_said(tmp_path: Path) -> None:
    small, large = save_checkpoint("llama", tmp_path / "small"), save_large(tmp_path / "large")
    n_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", CALIBRATE, *map(str, (small, large, tmp_path / "cal", n_bytes // 2))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    assert report["streamed"] and not report["fits"]
    assert (report["steps"], report["inputs"]) == (22, 22 * 4)
    assert report["peak"] <= report["planned"]
    for path in (tmp_path / "cal" / "moments").iterdir():
        path.unlink()
