"""A log in memory behind the transport's contract, for what needs more lives than a genuine Kafka has time for.

It keeps the contract's promises to the letter and no better: at least once, a life may end between any two writes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random

from service.errors import AbortedError
from service.records import Outgoing, Record
from service.transport.contract import Bounds, Offset, Polled


class Killed(Exception):
    """The end of a life, at a moment of the log's choosing."""


class Log:
    """What outlives a worker: records by topic and partition, and the group's offsets."""

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self.records: defaultdict[tuple[str, int], list[Record]] = defaultdict(list)
        self.first: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.offsets: dict[int, Offset] = {}

    def write(self, outgoing: Outgoing) -> None:
        records = self.records[outgoing.topic, outgoing.partition]
        records.append(
            Record(outgoing.topic, outgoing.partition, len(records), -1, outgoing.key, outgoing.value, outgoing.headers)
        )


class MemoryTransport:
    """A session with a `Log`. kill, abort: the chances that a commit ends this life, or is aborted."""

    stable = True

    def __init__(
        self, log: Log, topic: str, exactly: bool = True, seed: int = 0, kill: float = 0.0, abort: float = 0.0
    ) -> None:
        self.log, self.topic, self.exactly = log, topic, exactly
        self.random, self.kill, self.abort = Random(seed), kill, abort
        self.position: dict[int, int] = {}
        self.sent: list[Outgoing] = []
        self.assigned = frozenset(range(log.partitions))

    @property
    def partitions(self) -> int:
        return self.log.partitions

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        assigned, self.assigned = self.assigned, frozenset()
        records: list[Record] = []
        for partition, position in self.position.items():
            some = self.log.records[self.topic, partition][position : position + self.random.randint(0, max_records)]
            records += some
            self.position[partition] += len(some)
        return Polled(records, assigned)

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        if self.exactly:
            self.sent += outgoing
        else:
            self._write(outgoing)

    def commit(self, before: Sequence[Outgoing], offsets: Mapping[int, Offset], after: Sequence[Outgoing]) -> None:
        sent, self.sent = self.sent, []
        if self.random.random() < self.abort:
            raise AbortedError("by chance")
        self._may_die()
        self._write([*sent, *before])
        self.log.offsets |= offsets
        for outgoing in after:
            self._may_die(not self.exactly)
            self.log.write(outgoing)
        self._may_die()

    def _write(self, outgoing: Sequence[Outgoing]) -> None:
        for each in outgoing:
            self.log.write(each)
            self._may_die(not self.exactly)

    def _may_die(self, here: bool = True) -> None:
        if here and self.random.random() < self.kill:
            raise Killed

    def committed(self, partition: int) -> Offset | None:
        if self.random.random() < 0.1:
            raise TimeoutError
        return self.log.offsets.get(partition)

    def bounds(self, topic: str, partition: int) -> Bounds:
        return Bounds(self.log.first[topic, partition], len(self.log.records[topic, partition]))

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        while first < end:
            until = min(end, first + self.random.randint(0, 20))
            yield self.log.records[topic, partition][first:until]
            first = until

    def start(self, partition: int, offset: int) -> None:
        self.position[partition] = offset

    def rewind(self, offsets: Mapping[int, int]) -> None:
        self.position |= offsets

    def pause(self, partitions: Iterable[int]) -> None: ...

    def resume(self, partitions: Iterable[int]) -> None: ...

    def lag(self) -> Mapping[int, int] | None:
        return {}

    def close(self) -> None: ...
