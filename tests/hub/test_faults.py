"""Whatever goes wrong once on the way, at whatever place: the output is the undisturbed run's, byte by byte.

And only the shard that was on its way is fetched again.

Each test breaks one conversion after the other at places drawn from seeds; `--slow` draws 25 of them. One kind at one
place is not mended but reported: wrong bytes in what was read as a shard's header, which the Hub has no hash for, show
only when the whole shard has come by; its test is in `test_wrong_bytes`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from int8convert.errors import CorruptFileError, Int8ConvertError
from tests.tools.hub_conversions import READERS, begin_anew, convert, looks_complete
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

pytestmark = pytest.mark.usefixtures("quick_waits", "map_in_process")

TIMEOUT_S = 1.0
"""Of silence; the tests count what came twice, so a busy machine must not be taken for a silent server."""

SECONDS = {FaultKind.STALL: 2.5 * TIMEOUT_S, FaultKind.RESTART: 0.15}
"""A stall is longer than the client listens. Retry-After is 0: `test_retry_after` has another one."""

SEEDS = [pytest.param(range(2), id="few"), pytest.param(range(2, 27), id="many", marks=pytest.mark.slow)]

N_SHARDS = 3
N_HEADER_REQUESTS = 2 * N_SHARDS
"""Of a `.bin` shard the first block is read, and the last one."""

FILE_KINDS = [kind for kind in FaultKind if kind is not FaultKind.RANGE_IGNORED]
API_KINDS = [kind for kind in FILE_KINDS if kind is not FaultKind.URL_EXPIRED]


@dataclass(frozen=True)
class Undisturbed:
    """A conversion of `NAME` without faults."""

    hub: Hub
    client_cache: Path
    outs: Path
    files: dict[str, bytes]
    n_hub_requests: int
    shards: dict[str, int]
    """Path in the store -> bytes, in order."""
    sent: Counter[str]
    """Path in the store -> bytes that came from there, of header and shard."""


@pytest.fixture
def undisturbed(hub: Hub, connect: Connect, client_cache: Path, tmp_path: Path) -> Undisturbed:
    hub.add_repo(NAME, opt_66b(tmp_path / "model", N_SHARDS))
    connect(hub, timeout_s=TIMEOUT_S)
    files = convert(NAME, tmp_path / "undisturbed", "stream")
    n_hub_requests = len(hub.log.requests(origin=Origin.HUB))
    whole = [request for request in hub.log.requests("GET", origin=Origin.STORAGE) if request.range is None]
    shards = {request.path: request.sent_bytes for request in whole}
    assert len(shards) == len(whole) == N_SHARDS
    return Undisturbed(hub, client_cache, tmp_path / "outs", files, n_hub_requests, shards, sent_by_path(hub))


def sent_by_path(hub: Hub) -> Counter[str]:
    """Bytes that the store sent."""
    sent: Counter[str] = Counter()
    for request in hub.log.requests(origin=Origin.STORAGE):
        sent[request.path] += request.sent_bytes
    return sent


def assert_only_the_shard_in_flight_came_twice(run: Undisturbed, kind: FaultKind) -> None:
    """The one that was broken, once more at most; those behind it, too, where it shows at its end alone."""
    broken = run.hub.faults.fired[-1].path
    paths = list(run.shards)
    behind = paths[paths.index(broken) + 1 :] if kind is FaultKind.WRONG_BYTES else []
    for path, n_bytes in sent_by_path(run.hub).items():
        again = n_bytes - run.sent[path]
        most = run.shards[path] if path in (broken, *behind) else 0
        assert again <= most, f"{again} bytes of shard {paths.index(path) + 1} came twice"


def disturbed(run: Undisturbed, seeds: range) -> Iterator[tuple[int, random.Random, Path]]:
    """For each seed a Hub without faults, what draws from the seed, and an OUT; afterwards a fault must have been."""
    for seed in seeds:
        begin_anew(run.hub, run.client_cache)
        n_before = len(run.hub.faults.fired)
        yield seed, random.Random(seed), run.outs / str(seed)
        assert len(run.hub.faults.fired) > n_before, f"seed {seed}: no fault has happened"


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FILE_KINDS)
def test_fault_in_a_shard_changes_nothing(undisturbed: Undisturbed, kind: FaultKind, reader: str, seeds: range) -> None:
    for seed, draw, out in disturbed(undisturbed, seeds):
        nth = N_HEADER_REQUESTS + draw.randint(1, N_SHARDS)
        undisturbed.hub.faults.add(kind, origin=Origin.STORAGE, nth=nth, seconds=SECONDS.get(kind, 0), seed=seed)
        assert convert(NAME, out, reader) == undisturbed.files, f"seed {seed}"
        assert_only_the_shard_in_flight_came_twice(undisturbed, kind)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", [kind for kind in FaultKind if kind is not FaultKind.WRONG_BYTES])
def test_fault_in_a_header_changes_nothing(undisturbed: Undisturbed, kind: FaultKind, seeds: range) -> None:
    for seed, draw, out in disturbed(undisturbed, seeds):
        nth = draw.randint(1, N_HEADER_REQUESTS)
        undisturbed.hub.faults.add(kind, origin=Origin.STORAGE, nth=nth, seconds=SECONDS.get(kind, 0), seed=seed)
        assert convert(NAME, out, READERS[seed % 2]) == undisturbed.files, f"seed {seed}"


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", API_KINDS)
def test_fault_in_an_answer_of_the_hub_changes_nothing(undisturbed: Undisturbed, kind: FaultKind, seeds: range) -> None:
    """The look-up, the list of files, the small files, and the redirections to the store."""
    for seed, draw, out in disturbed(undisturbed, seeds):
        method, most = None, undisturbed.n_hub_requests
        if kind in (FaultKind.WRONG_BYTES, FaultKind.TRUNCATED):
            method, most = "GET", 5  # those with a body: look-up, list, and three small files
        nth = draw.randint(1, most)
        undisturbed.hub.faults.add(
            kind, method=method, origin=Origin.HUB, nth=nth, seconds=SECONDS.get(kind, 0), seed=seed
        )
        assert convert(NAME, out, READERS[seed % 2]) == undisturbed.files, f"seed {seed}"


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("reader", READERS)
def test_range_ignored_where_a_shard_is_resumed_changes_nothing(
    undisturbed: Undisturbed, reader: str, seeds: range
) -> None:
    for seed, draw, out in disturbed(undisturbed, seeds):
        nth = N_HEADER_REQUESTS + draw.randint(1, N_SHARDS)
        undisturbed.hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=nth, seed=seed)
        undisturbed.hub.faults.add(FaultKind.RANGE_IGNORED, origin=Origin.STORAGE, nth=N_HEADER_REQUESTS + 1)
        assert convert(NAME, out, reader) == undisturbed.files, f"seed {seed}"
        if reader == "stream":  # the client, which has written nothing yet, begins anew
            fired = [fault.kind for fault in undisturbed.hub.faults.fired[-2:]]
            assert fired == [FaultKind.CUT, FaultKind.RANGE_IGNORED], f"seed {seed}"


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("reader", READERS)
def test_many_faults_in_one_conversion_change_nothing_or_end_in_an_error_after_which_it_goes_on(
    undisturbed: Undisturbed, reader: str, seeds: range
) -> None:
    for seed, draw, out in disturbed(undisturbed, seeds):
        for i, kind in enumerate(draw.sample(list(FaultKind), 5)):
            # In time before one another's retries; the last ones may meet a conversion that is through.
            nth = draw.randint(1, N_HEADER_REQUESTS + N_SHARDS)
            undisturbed.hub.faults.add(
                kind, origin=Origin.STORAGE, nth=nth, seconds=SECONDS.get(kind, 0), seed=100 * seed + i
            )
        try:
            assert convert(NAME, out, reader) == undisturbed.files, f"seed {seed}"
        except Int8ConvertError as error:
            assert isinstance(error, CorruptFileError), f"seed {seed}: {error}"  # a header came with wrong bytes
            assert not looks_complete(out)
            undisturbed.hub.await_restart()
            undisturbed.hub.faults.clear()
            assert convert(NAME, out, reader) == undisturbed.files, f"seed {seed}"
