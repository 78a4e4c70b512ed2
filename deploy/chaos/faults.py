"""How each fault is done.

A fault is a generator: it does its next part whenever the run has a moment, so that faults overlap as they do in life.
What must be true of the fault itself is checked here; what comes of it is watched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from kafka.errors import KafkaError

from deploy.broker import EmbeddedBroker
from deploy.chaos.fleet import Fleet, Worker
from deploy.chaos.plan import ChaosError, Fault, Kind
from deploy.chaos.watch import Seen, Watch, evict
from deploy.java import ending

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
    began_at: float = field(default_factory=time.monotonic)
    took_s: float | None = None
    _before: dict[int, int] | None = None

    def take(self, seen: Seen) -> bool:
        """Whether it is over, by what is seen. What was asked before the fault says nothing of it."""
        if seen.asked_at < self.began_at:
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
        while fault.slot in self._busy:  # one thing after another for a slot; those of others go on meanwhile
            yield
        self._busy.add(fault.slot)
        yield from parts(fault)
        self._busy.discard(fault.slot)

    def _hit(self, fault: Fault, partitions: frozenset[int]) -> None:
        self.note(f"{fault}" + (f" (partitions {', '.join(map(str, sorted(partitions)))})" if partitions else ""))
        if partitions:
            self.recoveries.append(Recovery(fault.kind, str(fault), partitions))

    def owned(self, worker: Worker) -> frozenset[int]:
        """The partitions that Kafka gave to a worker, as was last seen."""
        member = self.watch.seen.member(worker.slot, worker.url)
        return member.partitions if member else frozenset()

    def _kill(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._running(worker)
        partitions = self.owned(worker)
        self.fleet.kill(worker)
        self._hit(fault, partitions)
        if fault.seconds:
            life = worker.lives
            while worker.lives == life:
                yield
            yield from _wait(fault.seconds)
            self.fleet.kill(worker)

    def _term(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        self._hit(fault, self.owned(worker))
        yield from self.fleet.stop(worker)
        worker.wanted = True
        worker.start()
        self.fleet.restarts["SIGTERM"] += 1

    def _stop(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        partitions, life = self.owned(worker), worker.lives
        worker.signal(signal.SIGSTOP)
        self._hit(fault, partitions)
        yield from _wait(fault.seconds)
        worker.signal(signal.SIGCONT)
        yield from self._settled(worker)
        self.note(f"{worker.slot} is a member again, {'as it was' if worker.lives == life else 'after a restart'}")

    def _add(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.add(fault.slot)
        self.note(str(fault))
        yield from self._settled(worker)
        partitions = self.owned(worker)
        self.note(f"{worker.slot} has partitions {', '.join(map(str, sorted(partitions)))}")
        self.recoveries.append(Recovery(fault.kind, f"{worker.slot} added", partitions))
        while self.watch.seen.done < fault.until:
            yield
        partitions = self.owned(worker)
        yield from self.fleet.stop(worker)
        self.note(f"{worker.slot} is removed")
        self.recoveries.append(Recovery(fault.kind, f"{worker.slot} removed", partitions))

    def _twin(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        yield from self._settled(worker)
        self._hit(fault, self.owned(worker))
        older, life = self.fleet.replace(worker)
        deadline = time.monotonic() + TWIN_LIMIT_S
        while older.poll() is None and time.monotonic() < deadline:
            yield
        if older.poll() is None:
            self.failures.append(f"two processes ran as {worker.slot} for {TWIN_LIMIT_S:g} s ({worker.log_of(life)})")
            older.kill()
        else:
            self.note(f"the older {worker.slot} {ending(older.wait())}")
        yield from self._settled(worker)

    def _evict(self, fault: Fault) -> Iterator[None]:
        worker = self.fleet.workers[fault.slot]
        while True:
            yield from self._settled(worker)
            member = self.watch.seen.member(worker.slot, worker.url)
            with suppress(KafkaError):  # it went by itself, or the broker did: then when it is back
                if member and not self.outage.locked():
                    evict(self.watch.servers, self.watch.group, member)
                    break
            yield
        self._hit(fault, member.partitions)

    def _broker(self, fault: Fault) -> Iterator[None]:
        while not self.outage.acquire(blocking=False):
            yield
        try:
            if self.broker.pid:
                os.kill(self.broker.pid, signal.SIGKILL)
            self._hit(fault, frozenset(self.watch.seen.offsets))
            while self.broker.poll() is None:
                yield
            yield from _wait(fault.seconds)
            self.broker.start()
        finally:
            self.outage.release()

    def _running(self, worker: Worker) -> Iterator[None]:
        while not worker.running:
            yield

    def _settled(self, worker: Worker) -> Iterator[None]:
        """Until the worker has partitions, and Kafka knows."""
        since = time.monotonic()
        while not (worker.running and self.watch.seen.asked_at > since and self.owned(worker)):
            if time.monotonic() - since > SETTLE_LIMIT_S:
                raise ChaosError(f"{worker.slot} had no partitions for {SETTLE_LIMIT_S:g} s ({worker.log_file})")
            yield


def _wait(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
