"""Where finished shards go: they stay in OUT, or are published one by one and then removed from OUT.

`LocalDestination` is the plain case. `PublishedDestination` lets a model be converted that fits on no disk here: each
shard goes to a `ShardPublisher`, such as `int8convert.publish.shard_publisher`, and need not stay. On the disk are then
the shard that is converted, those that wait for a checksum of their source, and one that is being sent.

Both have the same methods. A conversion calls `find_finished`, `budget` and `begin` once, then `deliver` for each shard
and `complete` at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.manifest import ShardRecord
from int8convert.conversion.disk_budget import DiskBudget, shards_on_their_way, whole_output
from int8convert.conversion.output import OutputDirectory
from int8convert.errors import OutputError
from int8convert.planning.export_plan import ShardedPlan

_POLL_S = 0.2
"""Seconds between two looks at whether the conversion was abandoned."""


class ShardPublisher(Protocol):
    """The place that finished shards are sent to.

    Attributes:
        url: its address in a browser.
        commit: the commit of the complete checkpoint; None before.
        keeps_card: it has a model card that int8convert did not write and left as it is.
    """

    @property
    def url(self) -> str: ...

    @property
    def commit(self) -> str | None: ...

    @property
    def keeps_card(self) -> bool: ...

    def begin(self, request: Mapping[str, Any], overwrite: bool) -> dict[str, ShardRecord]:
        """Return file name -> record of the shards of this conversion that are there. Changes nothing.

        Raises:
            OutputError: something else is there, and `overwrite` is False.
            HubError: it cannot be reached.
        """

    def make(self) -> None:
        """Make the first change there, once all is checked."""

    def publish(self, record: ShardRecord, path: Path) -> None:
        """Send a finished shard and its record. The file is not needed afterwards."""

    def complete(self, out: Path) -> None:
        """Send the small files that make it a checkpoint, and check that every shard arrived.

        Raises:
            HubError: they do not arrive, or a shard has other bytes than it had here.
        """


class LocalDestination:
    """Finished shards stay in OUT."""

    keeps = True
    url: str | None = None

    def outcome(self) -> None:
        """Return None: there is no other place to report."""

    def find_finished(
        self, plan: ShardedPlan, done: dict[str, ShardRecord], output: OutputDirectory
    ) -> dict[str, ShardRecord]:
        """Return the records of the shards that need no conversion: `done`, those that are finished in OUT."""
        return done

    def budget(self, plan: ShardedPlan, done: Collection[str], n_free_bytes: int) -> DiskBudget:
        return whole_output(plan, n_free_bytes)

    def begin(self, output: OutputDirectory, done: Mapping[str, ShardRecord], n_shards: int) -> None:
        """Make the first write. All is checked."""
        output.begin(done, n_shards)

    def deliver(self, record: ShardRecord, path: Path, check_abandoned: Callable[[], None]) -> None:
        """Do nothing: the shard is where it belongs."""

    def complete(self, output: OutputDirectory) -> None:
        """Do nothing: the checkpoint is where it belongs."""

    def progress(self, kept: Collection[str], out: Path) -> str:
        """Return what is left for the same command to resume from, as a phrase; "" if nothing is."""
        return f"{_finished(len(kept))} kept{_resuming(len(kept))}" if kept else ""


class PublishedDestination:
    """Finished shards go to a publisher.

    Args:
        keeps: they stay in OUT, too. Otherwise OUT is removed at the end.
        max_disk_bytes: bytes of the disk that may be used; None takes what is free.
    """

    def __init__(self, publisher: ShardPublisher, keeps: bool = False, max_disk_bytes: int | None = None) -> None:
        self.publisher = publisher
        self.keeps = keeps
        self.max_disk_bytes = max_disk_bytes
        self._sent: dict[str, ShardRecord] = {}

    @property
    def url(self) -> str:
        return self.publisher.url

    def outcome(self) -> dict[str, Any]:
        """Return where the checkpoint is, as JSON values. See `ShardPublisher`."""
        return {"url": self.url, "commit": self.publisher.commit, "keeps_card": self.publisher.keeps_card}

    def find_finished(
        self, plan: ShardedPlan, done: dict[str, ShardRecord], output: OutputDirectory
    ) -> dict[str, ShardRecord]:
        """Return the records of the shards that need no conversion: those sent by an earlier run, and `done`.

        Raises:
            OutputError: OUT is a finished checkpoint that would be removed, or something else is there.
            HubError: the publisher cannot be reached.
        """
        if output.is_complete and not self.keeps and len(done) == len(plan.shards):
            raise OutputError(
                f"OUT '{output.path}' is a finished checkpoint, which would be removed once it is sent",
                "pass --keep, or send it by int8convert upload",
            )
        there = self.publisher.begin(output.request, output.overwrites)
        planned = {shard.file_name: shard.digest() for shard in plan.shards if shard.file_name in there}
        self._sent = {
            name: there[name]
            for name, digest in planned.items()
            if there[name].plan_sha256 == digest and (name in done or not self.keeps)
        }
        return done | self._sent

    def budget(self, plan: ShardedPlan, done: Collection[str], n_free_bytes: int) -> DiskBudget:
        """Return what the shards need that are on the disk at a time; see `disk_budget.shards_on_their_way`.

        Raises:
            DiskFullError: not even one shard at a time fits.
        """
        if self.keeps:
            return whole_output(plan, n_free_bytes)
        return shards_on_their_way(plan, done, n_free_bytes, self.max_disk_bytes)

    def begin(self, output: OutputDirectory, done: Mapping[str, ShardRecord], n_shards: int) -> None:
        """Make the first change there and in OUT, and send what an earlier run finished and did not send."""
        self.publisher.make()
        output.begin(done, n_shards)
        for name, record in done.items():
            path = output.path / name
            if name not in self._sent:
                self._send(record, path)
            elif not self.keeps:
                path.unlink(missing_ok=True)  # the earlier run was killed before it could, or kept it

    def deliver(self, record: ShardRecord, path: Path, check_abandoned: Callable[[], None]) -> None:
        """Send a shard, and remove it unless it stays.

        A file that is being sent cannot be called back. So it is sent by a thread that ends with the process, and
        Ctrl-C does not wait for it.

        Args:
            check_abandoned: raises once the conversion is abandoned.
        """
        sent: Future[None] = Future()

        def run() -> None:
            try:
                self._send(record, path)
            except BaseException as error:
                sent.set_exception(error)
            else:
                sent.set_result(None)

        check_abandoned()
        threading.Thread(target=run, daemon=True).start()
        while not wait([sent], _POLL_S).done:
            check_abandoned()
        sent.result()

    def _send(self, record: ShardRecord, path: Path) -> None:
        self.publisher.publish(record, path)
        self._sent[record.file_name] = record
        if not self.keeps:
            path.unlink()

    def complete(self, output: OutputDirectory) -> None:
        """Send the small files, and remove OUT unless it stays."""
        self.publisher.complete(output.path)
        if not self.keeps:
            output.discard()

    def progress(self, kept: Collection[str], out: Path) -> str:
        """Return what is left for the same command to resume from, as a phrase; "" if nothing is."""
        n_there, n_here = len(self._sent), len({*kept} - {*self._sent})
        there = [f"{_finished(n_there)} on the Hub"] if n_there else []
        here = [f"{_finished(n_here)} in {out}"] if n_here else []
        return " and ".join((*there, *here)) + _resuming(n_there + n_here) if there or here else ""


Destination = LocalDestination | PublishedDestination


def _finished(n: int) -> str:
    return "1 finished shard is" if n == 1 else f"{n} finished shards are"


def _resuming(n: int) -> str:
    return f": the same command resumes after {'it' if n == 1 else 'them'}"
