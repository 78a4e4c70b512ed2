"""Taking up a partition: the latest snapshot of each bucket, then the input from there, up to the committed offset.

Step by step, so that the worker's other partitions go on meanwhile. What is found is held against what was noted beside
the committed offset: a state is as it was, or the worker stops and says why. Before that is known the states are in the
arena already, each from when it was read: beside it there is no room for a second copy of them all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from service.arena import StreamKey
from service.engine import Engine
from service.errors import DisconnectedError, LostStateError
from service.partition import Entry, Mark
from service.snapshots import Bucket, Keeper, Note, Snapshot, decode_journal, digest_of
from service.transport.contract import Offset, Transport

log = logging.getLogger(__name__)

TOLD_EVERY_S = 5.0
PENDING_S = 30.0
"""Kafka ends a dead worker's transaction within its time-out and 10 s."""
BUCKETS_AT_ONCE = 1_000
"""Looked at in one step."""


Steps = Iterator[None]


@dataclass
class Found:
    """What the state topic holds of a partition: of each key the latest."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    """By the bits of their buckets."""
    unfit: dict[str, str] = field(default_factory=dict)
    """What is wrong with those that are none."""
    journals: dict[str, bytes] = field(default_factory=dict)
    """The journal's records."""

    @property
    def names(self) -> list[str]:
        """What their keys end with."""
        return [*self.snapshots, *self.unfit, *self.journals]

    def drop(self, name: str) -> None:
        """There is a later one, or a tombstone."""
        for kind in (self.snapshots, self.unfit, self.journals):
            kind.pop(name, None)


class Restore:
    """The restoration of one partition: iterate over `steps` to their end. Then `keeper` goes on from `offset`."""

    def __init__(self, number: int, transport: Transport, engine: Engine, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self.number, self.transport, self.engine, self.settings = number, transport, engine, engine.settings
        self.keeper = Keeper(number, engine, transport.partitions)
        self.offset = 0
        self.note: Note | None = None
        """What was told beside the committed offset; None where nothing was, or it counts no more."""
        self.progress = 0.0
        """The part of the replay that is done."""

    def steps(self) -> Steps:
        """Each takes a moment. Raises LostStateError where the state that belongs to the offset cannot be had and the
        settings do not accept that.
        """
        started_s = self._clock_s()
        committed = yield from self._committed(self.number)
        found = yield from self._find()
        try:
            yield from self._take_up(committed, found)
        except LostStateError as error:
            if self.settings.on_lost_state == "stop":
                remedy = f"to let the streams of partition {self.number} begin afresh: --on-lost-state restart_streams"
                raise LostStateError(f"{error}; {remedy}") from error
            log.error("%s; the streams of partition %d begin afresh", error, self.number)  # noqa: TRY400 - foreseen
            self.engine.forget_partitions([self.number])
            self.keeper, self.note = Keeper(self.number, self.engine, self.transport.partitions), None
            self.keeper.stale = [self.keeper.key(name) for name in found.names]
            self._begin(committed)
        held, took_s = len(self.engine.arena.streams(self.number)), self._clock_s() - started_s
        log.info("partition %d: %d streams as of offset %d, in %.1f s", self.number, held, self.offset, took_s)

    def _committed(self, number: int) -> Generator[None, None, Offset | None]:
        until = self._clock_s() + self.settings.transaction_timeout_ms / 1000 + PENDING_S
        while True:
            try:
                return self.transport.committed(number)
            except TimeoutError as error:  # a transaction with offsets of this partition is not ended yet
                if self._clock_s() > until:
                    raise DisconnectedError(f"where partition {number} stands did not settle in time") from error
                yield

    def _find(self) -> Generator[None, None, Found]:
        """What there is of this partition; the states go into the arena."""
        bounds = self.transport.bounds(self.settings.state_topic, self.number)
        found, own = Found(), self.keeper.key("")
        for records in self.transport.read(self.settings.state_topic, self.number, bounds.first, bounds.end):
            for record in records:
                if record.key is not None and record.key.startswith(own):
                    name = record.key.removeprefix(own).decode()
                    found.drop(name)
                    if record.value is not None:
                        self._keep(found, name, record.value)
            yield
        return found

    def _keep(self, found: Found, name: str, value: bytes) -> None:
        if name.startswith("journal/"):
            found.journals[name] = value
            return
        try:
            found.snapshots[name], states = self.keeper.decode(name, value)
        except LostStateError as error:  # which does not matter, if there is a later one
            found.unfit[name] = str(error)
        else:
            with self.engine.lock:
                self.engine.arena.load(self.number, found.snapshots[name].streams, states)

    def _take_up(self, committed: Offset | None, found: Found) -> Steps:
        if committed is None:
            yield from self._check_new(found)
            self._begin(None)
            return
        note = Note.decode(committed.note)
        self._check(committed.offset, note, found)
        self.note, self.offset = note, committed.offset
        yield from self._adopt(found, note)
        yield from self._replay(self._journal(found), note)

    def _journal(self, found: Found) -> list[Entry]:
        journal = []
        for name, value in found.journals.items():
            entries = decode_journal(value)
            journal += entries
            self.keeper.journals.append((self.keeper.key(name), max(entry.offset for entry in entries)))
        return journal

    def _check_new(self, found: Found) -> Steps:
        """The group has no offset here: then there must be no states, and the partition not new among old ones."""
        if found.names:
            raise LostStateError(
                f"{self.settings.state_topic} has states of partition {self.number}, but group"
                f" {self.settings.group_id} has no committed offset for it: it has expired, or the group was deleted"
            )
        first = yield from self._committed(0)
        if first and first.note:
            self._check_partitions(Note.decode(first.note))

    def _check_partitions(self, note: Note) -> None:
        now = self.transport.partitions
        if note.partitions != now and self.settings.on_lost_state == "stop":
            raise LostStateError(
                f"{self.settings.observations_topic} had {note.partitions} partitions and has {now} now:"
                " keys have moved away from their states"
            )

    def _check(self, offset: int, note: Note, found: Found) -> None:
        """Raises LostStateError, naming what is wrong, unless all that is needed is there and belongs together."""
        for told in found.unfit.values():
            raise LostStateError(told)
        self._check_partitions(note)
        topic, states = self.settings.observations_topic, self.settings.state_topic
        here = f"partition {self.number} of {topic}"
        bounds = self.transport.bounds(topic, self.number)
        if offset > bounds.end:
            raise LostStateError(f"{here} ends at {bounds.end}, before the committed offset {offset}: it was truncated")
        if offset < bounds.first:
            raise LostStateError(
                f"{here} begins at {bounds.first}: the input from the committed offset {offset} is gone"
            )
        served = self.engine.bundle.model_id
        if note.model != served:
            raise LostStateError(f"the states of partition {self.number} are of model {note.model}, served is {served}")
        ahead = [snapshot for snapshot in found.snapshots.values() if snapshot.offset > offset]
        if ahead:
            raise LostStateError(
                f"a state of partition {self.number} on {states} stands at offset {ahead[0].offset}, ahead of the"
                f" committed offset {offset}: was that set back by hand?"
            )
        digest = digest_of(found.snapshots.values())
        count = len(found.snapshots)
        if count < note.snapshots or (note.digest and (count, f"{digest:016x}") != (note.snapshots, note.digest)):
            raise LostStateError(
                f"{states} does not hold the {note.snapshots} snapshots of partition {self.number} that were written:"
                f" {count} are there, or others; was the topic deleted, or written to by others?"
            )
        if note.replay.offset < min(bounds.first, offset):
            raise LostStateError(
                f"{here} begins at {bounds.first}, but the states need it from {note.replay.offset} on: keep it longer"
                " than snapshot_interval_s"
            )

    def _adopt(self, found: Found, note: Note) -> Steps:
        """Go on from these snapshots."""
        now_s = self._clock_s()
        buckets: list[Bucket] = []
        for n, (bits, snapshot) in enumerate(disjoint(found.snapshots)):
            if n % BUCKETS_AT_ONCE == 0:
                yield
            bucket = Bucket(bits)
            bucket.due_s = now_s + (1 - bucket.phase) * self.settings.snapshot_interval_s
            if snapshot:
                bucket.streams, bucket.offset = dict.fromkeys(snapshot.streams), snapshot.offset
            if snapshot and bits not in found.snapshots:  # a half of one whose other half alone was written
                bucket.dirty, bucket.due_s = note.replay, -math.inf
                self.keeper.stale.append(self.keeper.key(snapshot.bits))
            buckets.append(bucket)
        self.keeper.adopt(buckets)
        self._forget_others()

    def _forget_others(self) -> None:
        """Streams that were in a snapshot once, and ended before the latest."""
        arena = self.engine.arena
        gone = [stream for stream in arena.streams(self.number) if stream not in self.keeper.homes]
        with self.engine.lock:
            for stream in gone:
                arena.forget(StreamKey(self.number, stream))
            arena.commit()

    def _replay(self, journal: Iterable[Entry], note: Note) -> Steps:
        partition = self.engine.partition(self.number)
        partition.stand(note.replay)
        told = [entry for entry in dict.fromkeys(journal) if note.replay.offset <= entry.offset < self.offset]
        partition.replay(sorted(told, key=lambda entry: entry.offset))
        first, length = note.replay.offset, self.offset - note.replay.offset
        told_s = self._clock_s()
        for records in self.transport.read(self.settings.observations_topic, self.number, first, self.offset):
            if records:
                self.engine.replay(self.number, records, self.keeper.covered)
                self.progress = (records[-1].offset + 1 - first) / length
            if self._clock_s() - told_s > TOLD_EVERY_S:
                told_s = self._clock_s()
                log.info("partition %d: replaying, %.0f%% of %d records", self.number, 100 * self.progress, length)
            yield
        self.keeper.touch(partition.touched, note.replay, self._clock_s())
        partition.replay(None)
        with self.engine.lock:
            self.engine.arena.sort(self.number)
            partition.stand(note.mark)

    def _begin(self, committed: Offset | None) -> None:
        """Without states: at the committed offset if it is still there, else where the settings say."""
        bounds = self.transport.bounds(self.settings.observations_topic, self.number)
        start = bounds.first if self.settings.start == "earliest" else bounds.end
        self.offset = min(max(committed.offset, bounds.first), bounds.end) if committed else start
        self.engine.partition(self.number).stand(Mark(self.offset))


def disjoint(snapshots: Mapping[str, Snapshot]) -> Iterator[tuple[str, Snapshot | None]]:
    """Buckets that cover all streams without overlapping, each with its snapshot, if any.

    They are so on the topic already, except where a worker that promised less than exactly once died between the two
    halves of a bucket that it split: then the half that is missing comes from the whole.
    """
    split = {bits[:length] for bits in snapshots for length in range(len(bits))}

    def below(bits: str, above: Snapshot | None) -> Iterator[tuple[str, Snapshot | None]]:
        own = snapshots.get(bits) or above
        if bits not in split:
            yield bits, own
            return
        for half in (bits + "0", bits + "1"):
            yield from below(half, own.part(half) if own and half not in snapshots else None)

    return below("", None)
