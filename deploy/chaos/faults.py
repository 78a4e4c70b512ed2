"""How each fault is done.

A fault is a generator: it does its next part whenever the run has a moment, so that faults overlap as they do in life.
What must be true of the fault itself is checked here; what comes of it is watched.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kafka.errors import KafkaError

from deploy.broker import EmbeddedBroker
from deploy.chaos.fleet import Fleet, Worker
from deploy.chaos.plan import ChaosError, Fault, Kind
from deploy.chaos.watch import Seen, Watch, evict

SETTLE_LIMIT_S = 90.0
"""In which a worker must have its partitions, however badly the machine is doing."""
TWIN_LIMIT_S = 45.0
"""In which the older of two processes with one slot must stop."""


@dataclass
class Recovery:
    """From a fault to the next committed progress of all the partitions that it hit."""

    kind: Kind
    what: str
    partitions: frozenset[int]
    began_at: float
    hit_at: float = field(default_factory=time.monotonic)
    """When nothing done before the fault could be committed any more."""
    took_s: float | None = None
    _before: dict[int, int] | None = None

    def take(self, seen: Seen) -> bool:
        """Whether it is over, by what is seen. What Kafka was asked before says nothing."""
        if seen.asked_at < self.hit_at:
            return False
        if self._before is None:
            self._before = {p: seen.offsets.get(p, 0) for p in self.partitions}
        elif all(seen.offsets.get(p, 0) > before for p, before in self._before.items()):
            self.took_s = time.monotonic() - self.began_at
        return self.took_s is not None


class Faults:
    """Does them to workers and broker. `recoveries`: all that were begun; `failures`: what no fault must lead to."""

    def __init__(self, fleet: Fleet, broker: EmbeddedBroker, watch: Watch, note: Callable[[str], None]) -> None:
        self.fleet, self.broker, self.watch, self.note = fleet, broker, watch, note
        self.outage = threading.Lock()
        """Held while the broker is away."""
        self.recoveries: list[Recovery] = []
        self.failures: list[str] = []
        self._busy: set[str] = set()
        self._due: list[Fault] = []

    @property
    def overdue_at(self) -> float:
        """The progress at which the first fault was due that is not done yet; infinite if there is none."""
        return min((fault.at for fault in self._due), default=math.inf)

    def begin(self, fault: Fault) -> Iterator[None]:
        """The fault, to be taken part by part until it is over."""
        parts = {
            Kind.KILL: self._kill,
            Kind.TERM: self._term,
            Kind.STOP: self._stop,
            Kind.ADD: self._add,
            Kind.TWIN: self._twin,
            Kind.EVICT: self._evict,
            Kind.BROKER: self._broker,
        }[fault.kind]
        # One thing after another for a slot; those of others go on meanwhile. Of twins, whoever reaches a broker that
        # is back counts as the younger: so Kafka stays while there are two.
        held = {fault.slot, ""} if fault.kind is Kind.TWIN else {fault.slot}
        self._due.append(fault)
        while held & self._busy:
            yield
        self._busy |= held
        yield from parts(fault)
        self._busy -= held

    def _tell(self, fault: Fault, partitions: frozenset[int]) -> float:
        """Say what is being done. -> when."""
        self._due.remove(fault)
        self.note(f"{fault}{_of(partitions)}")
        return time.monotonic()

    def _hit(self, fault: Fault, partitions: frozenset[int], began_at: float, what: str = "") -> None:
        """From now on progress is recovery."""
        if partitions:
            self.recoveries.append(Recovery(fault.kind, what or str(fault), partitions, began_at))

    def owned(self, worker: Worker) -> frozenset[int]:
        """The partitions that Kafka gave to a worker, as was last seen."""
        member = self.watch.seen.member(worker.slot, worker.life.url)
        return member.partitions if member else frozenset()

    def _kill(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        while not (life := worker.life).serving:  # what only begins has nothing to lose
            yield
        partitions = self.owned(worker)
        life.kill()
        self._hit(fault, partitions, self._tell(fault, partitions))
        if fault.seconds:
            while worker.life is life or not worker.life.url:
                yield
            yield from _wait(fault.seconds)
            worker.life.kill()

    def _term(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        partitions = self.owned(worker)
        began_at = self._tell(fault, partitions)
        yield from self.fleet.stop(worker)
        self._hit(fault, partitions, began_at)
        self.fleet.restart(worker, "SIGTERM")

    def _stop(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        partitions, life = self.owned(worker), worker.life
        life.signal(signal.SIGSTOP)
        self._hit(fault, partitions, self._tell(fault, partitions))
        yield from _wait(fault.seconds)
        life.signal(signal.SIGCONT)
        yield from self._settled(worker)
        self.note(f"{worker.slot} is a member again, {'in the same life' if worker.life is life else 'in a new life'}")

    def _add(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.add(fault.slot)
        began_at = self._tell(fault, frozenset())
        yield from self._settled(worker)
        self._hit(fault, self.owned(worker), began_at)
        while self.watch.seen.done < fault.until:
            yield
        yield from self._settled(worker)
        partitions, began_at = self.owned(worker), time.monotonic()
        yield from self.fleet.stop(worker)
        self.note(f"{worker.slot} is removed{_of(partitions)}")
        self._hit(fault, partitions, began_at, f"{worker.slot} is removed")

    def _twin(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        partitions = self.owned(worker)
        began_at = self._tell(fault, partitions)
        self._due.append(fault)  # the load must not be over before there was something that the older could not commit
        older = self.fleet.replace(worker)
        deadline = began_at + TWIN_LIMIT_S
        while older.status is None and time.monotonic() < deadline:
            yield
        self._due.remove(fault)
        self._hit(fault, partitions, began_at)
        if older.status is None:
            self.failures.append(f"two processes ran as {worker.slot} for {TWIN_LIMIT_S:g} s ({older.log_file})")
            older.abort()
        else:
            self.fleet.judge(worker, older, "is replaced")
        yield from self._settled(worker)

    def _evict(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        while True:
            yield from self._settled(worker)
            member = self.watch.seen.member(worker.slot, worker.life.url)
            with suppress(KafkaError):  # it went by itself, or the broker did: then when it is back
                if member and not self.outage.locked():
                    evict(self.watch.servers, self.watch.group, member)
                    break
            yield
        self._hit(fault, member.partitions, self._tell(fault, member.partitions))

    def _broker(self, fault: Fault) -> Iterator[None]:
        while not self.outage.acquire(blocking=False):
            yield
        try:
            if self.broker.pid:
                os.kill(self.broker.pid, signal.SIGKILL)
            partitions = frozenset(self.watch.seen.offsets)
            began_at = self._tell(fault, partitions)
            while self.broker.poll() is None:
                yield
            yield from _wait(fault.seconds)
            yield from self.broker.starting()
        finally:
            self.outage.release()
        self.note(f"the broker is back after {time.monotonic() - began_at:.1f} s")
        self._hit(fault, partitions, began_at)

    def _settled(self, worker: Worker) -> Iterator[None]:
        """Until the worker has partitions, and it and Kafka both say so.

        Raises ChaosError if that takes too long.
        """
        since = time.monotonic()
        while not (self.watch.seen.asked_at > since and self.owned(worker) and worker.life.ready()):
            if time.monotonic() - since > SETTLE_LIMIT_S:
                raise ChaosError(f"{worker.slot} had no partitions for {SETTLE_LIMIT_S:g} s ({worker.life.log_file})")
            yield


def _of(partitions: frozenset[int]) -> str:
    return f" (partitions {', '.join(map(str, sorted(partitions)))})" if partitions else ""


def advance(parts: Sequence[Iterator[None]]) -> list[Iterator[None]]:
    """Let each do its next part. -> those that are not over."""
    over = object()
    return [each for each in parts if next(each, over) is not over]


def _wait(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
