"""Which request a fault meets, and where; and that the server hides no fault of its own."""

from __future__ import annotations

import random
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

WEIGHTS = random.Random(8).randbytes(500_000)


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.add_repo("org/model", {"model.safetensors": WEIGHTS})
    return hub


def test_nth_request_is_the_one_broken(model: Hub, connect: Connect) -> None:
    api = connect(model)
    model.faults.add(FaultKind.UNAVAILABLE, path="/api/models/", nth=2, times=2)

    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(api.model_info("org/model").id)
        except HfHubHTTPError as error:
            outcomes.append(str(error.response.status_code))
    assert outcomes == ["org/model", "503", "503", "org/model"]
    assert [fired.kind for fired in model.faults.fired] == [FaultKind.UNAVAILABLE] * 2


def test_random_place_follows_from_its_seed(model: Hub) -> None:
    """20 seeds: the request of 3 and the byte of the body, drawn the same way twice and differently by seed."""
    places = [[broken_place(model, seed) for _ in range(2)] for seed in range(20)]

    assert all(first == again for first, again in places)
    assert len({first for first, _ in places}) == 20
    assert {nth for (nth, _), _ in places} == {0, 1, 2}
    assert all(0 <= after < len(WEIGHTS) for (_, after), _ in places)


def broken_place(hub: Hub, seed: int) -> tuple[int, int]:
    """Which of three downloads of the object is cut, and after how many bytes."""
    path = f"/objects/{hub.repo('org/model').find('main').tree['model.safetensors'].sha256}"
    hub.log.clear()
    hub.faults.add(FaultKind.CUT, path="objects", nth=None, among=3, seed=seed)
    with httpx2.Client() as client:
        for _ in range(3):
            try:
                answer = client.get(hub.state.urls.sign(hub.state.endpoint(Origin.STORAGE), path))
                assert answer.content == WEIGHTS
            except httpx2.RemoteProtocolError:
                pass
    hub.faults.clear()
    requests = hub.log.requests(origin=Origin.STORAGE)
    ((nth, broken),) = [(nth, request) for nth, request in enumerate(requests) if request.fault]
    return nth, broken.sent_bytes


def test_errors_of_the_server_itself_fail_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="JSONDecodeError"), Hub(tmp_path) as hub:
        httpx2.post(f"{hub.endpoint}/api/repos/create", content=b"{", headers={"Authorization": f"Bearer {hub.token}"})
