"""Taking up a partition: the latest snapshot of each bucket, then the input from there, up to the committed offset.

Step by step, so that the worker's other partitions go on meanwhile. What is found is held against what was noted beside
the committed offset: a state is as it was, or the worker stops and says why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from service.engine import Engine
from service.errors import DisconnectedError, LostStateError
from service.partition import Entry, Mark
from service.snapshots import Bucket, Keeper, Note, Snapshot, decode_journal, decode_snapshot, digest_of
from service.transport.contract import Offset, Transport

log = logging.getLogger(__name__)

TOLD_EVERY_S = 5.0
PENDING_S = 30.0
"""Kafka ends a dead worker's transaction within its time-out and 10 s."""
SNAPSHOTS_AT_ONCE = 32
"""Decoded, or loaded, in one step."""


Steps = Iterator[None]


@dataclass
class Found:
    """What the state topic holds of a partition."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    """By the bits of their buckets."""
    journal: list[Entry] = field(default_factory=list)
    journals: list[tuple[bytes, int]] = field(default_factory=list)
    """The journal's records by key, with their last entries' offsets."""


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
        values = yield from self._values()
        try:
            yield from self._take_up(committed, values)
        except LostStateError as error:
            if self.settings.on_lost_state == "stop":
                remedy = f"to let the streams of partition {self.number} begin afresh: --on-lost-state restart_streams"
                raise LostStateError(f"{error}; {remedy}") from error
            log.error("%s; the streams of partition %d begin afresh", error, self.number)  # noqa: TRY400 - foreseen
            self.engine.forget_partitions([self.number])
            self.keeper, self.note = Keeper(self.number, self.engine, self.transport.partitions), None
            self.keeper.stale = list(values)
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

    def _values(self) -> Generator[None, None, dict[bytes, bytes]]:
        """The latest value of each key of this partition on the state topic."""
        bounds = self.transport.bounds(self.settings.state_topic, self.number)
        values: dict[bytes, bytes] = {}
        for records in self.transport.read(self.settings.state_topic, self.number, bounds.first, bounds.end):
            for record in records:
                if record.key is None or not record.key.startswith(self.keeper.key("")):
                    continue
                if record.value is None:
                    values.pop(record.key, None)
                else:
                    values[record.key] = record.value
            yield
        return values

    def _take_up(self, committed: Offset | None, values: Mapping[bytes, bytes]) -> Steps:
        if committed is None:
            yield from self._check_new(values)
            self._begin(None)
            return
        note = Note.decode(committed.note)
        found = yield from self._found(values)
        self._check(committed.offset, note, found)
        self.note, self.offset = note, committed.offset
        yield from self._load(found, note)
        yield from self._replay(found.journal, note)

    def _found(self, values: Mapping[bytes, bytes]) -> Generator[None, None, Found]:
        found = Found()
        for n, (key, value) in enumerate(values.items()):
            if n % SNAPSHOTS_AT_ONCE == 0:
                yield
            name = key.removeprefix(self.keeper.key("")).decode()
            if name.startswith("journal/"):
                entries = decode_journal(value)
                found.journal += entries
                found.journals.append((key, max(entry.offset for entry in entries)))
            else:
                found.snapshots[name] = decode_snapshot(self.engine, self.number, name, value)
        return found

    def _check_new(self, values: Mapping[bytes, bytes]) -> Steps:
        """The group has no offset here: then there must be no states, and the partition not new among old ones."""
        if values:
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

    def _load(self, found: Found, note: Note) -> Steps:
        now_s = self._clock_s()
        buckets: dict[str, Bucket] = {}
        for n, (bits, snapshot) in enumerate(disjoint(found.snapshots)):
            if n % SNAPSHOTS_AT_ONCE == 0:
                yield
            bucket = buckets[bits] = Bucket(bits, set(), -1, now_s)
            bucket.written_s -= bucket.phase * self.settings.snapshot_interval_s
            if snapshot:
                bucket.streams, bucket.offset = set(snapshot.streams), snapshot.offset
                with self.engine.lock:
                    self.engine.arena.load(self.number, snapshot.streams, snapshot.rows)
            if snapshot and bits not in found.snapshots:  # a half of one whose other half alone was written
                bucket.dirty, bucket.written_s = note.replay, -math.inf
                self.keeper.stale.append(self.keeper.key(snapshot.bits))
        self.keeper.buckets = buckets
        self.keeper.journals = found.journals
        self.keeper.digest = digest_of(buckets.values())

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
