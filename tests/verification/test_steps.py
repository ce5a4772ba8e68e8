"""The estimate of the time that is left, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from int8convert.events import Event, MeasurementStep
from int8convert.runtime.steps import Steps
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.fidelity import in_memory, lockstep
from int8convert.verification.fidelity.level import measure_fidelity
from int8convert.verification.options import Execution
from tests.tools.outlier_models import convert
from tests.verification.test_lockstep import GROUPED, save_source

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Clock:
    """Seconds that pass only by `sleep`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def estimates(work: Sequence[float], warm_up: float, seconds: Sequence[float]) -> list[tuple[int, float]]:
    clock, events = Clock(), list[Event]()
    steps = Steps(work, events.append, clock)
    with steps.warming_up():
        clock.sleep(warm_up)
    for each in seconds:
        clock.sleep(each)
        steps.done("window")
    return [(e.n_done, pytest.approx(e.remaining_s)) for e in events if isinstance(e, MeasurementStep)]


def test_estimate_is_the_time_so_far_for_the_work_that_is_left() -> None:
    assert estimates([1, 1, 1, 1], 0.0, [2, 4, 3, 1]) == [(1, 6), (2, 6), (3, 3), (4, 0)]
    assert estimates([1, 1, 10], 0.0, [2, 4, 3]) == [(1, 22), (2, 30), (3, 0)]
    assert estimates([1], 9.0, [2]) == [(1, 0)]


def test_warm_up_is_not_counted() -> None:
    assert estimates([1, 1, 1], 50.0, [2, 2, 2]) == [(1, 4), (2, 2), (3, 0)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("vocabulary", [128, 4096])
def test_first_estimate_is_within_a_factor_of_two_of_what_comes(
    stream: bool, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for each million products of a weight and a token, and a minute for what happens first."""
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 3, "vocab_size": vocabulary})
    source = save_source(lambda: transformers.LlamaForCausalLM(config), tmp_path / "source")
    out = convert(source, tmp_path / "int8")
    clock, n_runs = Clock(), 0
    linear = torch.nn.Linear.forward

    def slow(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        nonlocal n_runs
        clock.sleep(60.0 if n_runs < 3 else layer.weight.numel() * input[..., 0].numel() / 1e6)
        n_runs += 1
        return linear(layer, input)

    monkeypatch.setattr(torch.nn.Linear, "forward", slow)
    for module in (in_memory, lockstep):
        monkeypatch.setattr(module, "Steps", lambda work, sink: Steps(work, sink, clock))
    ids = torch.randint(3, 128, (6, 10), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[float, float]] = []

    def receive(event: Event) -> None:
        if isinstance(event, MeasurementStep):
            seen.append((clock.now, event.remaining_s))

    measure_fidelity(source, out, TokenWindows(ids, "random", "", 100), Execution("cpu", stream), on_event=receive)
    first, last = seen[0], seen[-1]
    took = last[0] - first[0]
    assert len(seen) == (4 if stream else 6) and last[1] == 0
    assert took > 0 and 0.5 < first[1] / took < 2
