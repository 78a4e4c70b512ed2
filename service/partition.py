"""One partition's streams, as its records make them: who is followed, who may come, who is forgotten.

All of it is decided in the order of the records and by nothing but them, so that a replay decides the same. Where a
decision about one stream hangs on the others (there is no room; nobody heard of it for long), it is noted in the
partition's journal, since a replay from snapshots of different ages does not see all of them as they were.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from model.config import ModelConfig
from service.arena import Arena, StreamKey
from service.errors import Reason, Rejected
from service.grid import NO_SLOT
from service.records import Observation
from service.settings import Settings

CLOCK_STEPS = 100
"""A single observation takes a partition's clock on by this part of the idle limit at most: a stray time in the future
must not make all other streams look idle."""


class Decided(StrEnum):
    """What the journal tells."""

    FULL = "full"
    """From this record on, new streams are refused."""
    OPEN = "open"
    """From this record on, they are not."""
    FORGOTTEN = "forgotten"
    """Before this record, a stream was forgotten."""
    CRASHED = "crashed"
    """This record ended the process time and again: it moves no stream."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal. offset: of the record at which it was decided."""

    offset: int
    decided: Decided
    stream: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a partition stands between two records: what, beside the states, the next one's fate depends on.

    offset: of the next record. clock_ms: the event time that the partition has reached. full: new streams are refused.
    """

    offset: int
    clock_ms: int = NO_SLOT
    full: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """An observation that moves its stream on. afresh: the stream forgets all before it. heard_ms: what the partition's
    clock shows.
    """

    observation: Observation
    row: int
    slot: int
    afresh: bool
    heard_ms: int


@dataclass(frozen=True)
class Bounds:
    """What bounds a partition's state. idle_limit_ms: in event time; 0: none."""

    max_streams: int
    forget_when_full: bool
    idle_limit_ms: int

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        return cls(settings.max_streams, settings.when_full == "forget", int(settings.idle_limit_s * 1000))


class Partition:
    """The streams of one partition; their rows are in the arena. Changes stand from `stand` on."""

    def __init__(self, number: int, arena: Arena, config: ModelConfig, bounds: Bounds) -> None:
        self.number, self.arena, self.config, self.bounds = number, arena, config, bounds
        self.stand(Mark(0))
        self._told: deque[Entry] | None = None

    def stand(self, mark: Mark) -> None:
        """All up to this mark is settled: after a commit, a rollback, or a restore."""
        self.mark = mark
        """Where the partition stood at the last commit."""
        self.clock_ms, self.full = mark.clock_ms, mark.full
        self.journal: list[Entry] = []
        """What was decided since."""
        self.touched: set[str] = set()
        """Streams that came, went or moved since."""
        self.forgotten: Counter[str] = Counter()
        """How many streams were forgotten since, by reason: `full`, `idle`."""
        self.settle()

    def next(self, offset: int) -> Mark:
        """Where the partition stands before the record at `offset`, once all before it were taken."""
        return Mark(offset, self.clock_ms, self.full)

    def settle(self) -> None:
        """The moves that were given out have been made: rows tell their streams' places again."""
        self._places: dict[int, tuple[int, int, int]] = {}
        self._slots, self._times_ms = self.arena.column("slot"), self.arena.column("ts_ms")
        self._heard_ms = self.arena.column("heard_ms")

    def replay(self, told: Iterable[Entry] | None) -> None:
        """Decide nothing from now on, but follow this journal; None: decide again."""
        self._told = None if told is None else deque(told)

    @property
    def replaying(self) -> bool:
        return self._told is not None

    def known_to_crash(self) -> set[int]:
        """In a replay, the offsets at which the process ended time and again."""
        return {entry.offset for entry in self._told or () if entry.decided is Decided.CRASHED}

    def decided_before(self, offset: int) -> Iterator[Entry]:
        """In a replay, what the journal tells up to the record at `offset`. What concerns all streams is done here."""
        while self._told and self._told[0].offset <= offset:
            entry = self._told.popleft()
            if entry.decided in (Decided.FULL, Decided.OPEN):
                self.full = entry.decided is Decided.FULL
            yield entry

    def tick(self, ts_ms: int, offset: int) -> None:
        """Let the partition's clock see the time of the observation at `offset`, and forget who was idle for long."""
        if self.clock_ms == NO_SLOT:
            self.clock_ms = ts_ms
        limit_ms = self.bounds.idle_limit_ms
        most_ms = max(1, limit_ms // CLOCK_STEPS) if limit_ms else ts_ms - self.clock_ms
        self.clock_ms += min(max(ts_ms - self.clock_ms, 0), max(most_ms, 0))
        if limit_ms and self._told is None:
            self._forget_idle(offset)

    def crashed(self, offset: int) -> None:
        """Note that this record is not to be looked at, ever."""
        self.journal.append(Entry(offset, Decided.CRASHED))

    def end(self, stream: str) -> None:
        """End a stream, if there is one."""
        self.touched.add(stream)
        self.arena.forget(StreamKey(self.number, stream))

    def take(self, observation: Observation, slot: int) -> Move | str:
        """What an observation at a slot of the grid means: a move, or `late` or `duplicate`.

        Without a clock, `slot` is not looked at. Raises Rejected if the stream is new and there is no room.
        """
        key = StreamKey(self.number, observation.stream)
        row = self.arena.find(key)
        if row is None:
            row = self._enter(key, observation.record.offset)
            slot, afresh = (slot if self.config.grid else 0), False
        else:
            last_slot, last_ts_ms, _ = self._place(row)
            if self.config.grid is None:  # each observation is the next step, as long as time does not run back
                slot = last_slot + (observation.ts_ms > last_ts_ms) - (observation.ts_ms < last_ts_ms)
            if slot <= last_slot:
                return "late" if slot < last_slot else "duplicate"
            afresh = slot - last_slot - 1 > self.config.max_gap
            self.arena.heard(key)
        self._places[row] = slot, observation.ts_ms, self.clock_ms
        self.touched.add(observation.stream)
        return Move(observation, row, slot, afresh, self.clock_ms)

    def _place(self, row: int) -> tuple[int, int, int]:
        """The slot and the time of a stream's last observation, and the clock when it came."""
        return self._places.get(row) or (int(self._slots[row]), int(self._times_ms[row]), int(self._heard_ms[row]))

    def _enter(self, key: StreamKey, offset: int) -> int:
        """A row for a new stream. Raises Rejected."""
        if self._told is None:
            full = len(self.arena.streams(self.number)) >= self.bounds.max_streams
            if full and self.bounds.forget_when_full:
                self._forget(next(iter(self.arena.streams(self.number))), offset, "full")
                full = False
            if full != self.full:
                self.full = full
                self.journal.append(Entry(offset, Decided.FULL if full else Decided.OPEN))
        if self.full:
            most = self.bounds.max_streams
            raise Rejected(Reason.LIMIT, f"partition {self.number} has {most} streams, the most that are followed")
        row = self.arena.add(key)
        if row >= len(self._slots):  # the arena grew
            self._slots, self._times_ms = self.arena.column("slot"), self.arena.column("ts_ms")
            self._heard_ms = self.arena.column("heard_ms")
        return row

    def _forget_idle(self, offset: int) -> None:
        """The clock only runs forward, so whoever is idle stands before all who are not."""
        streams = self.arena.streams(self.number)
        while streams:
            stream, row = next(iter(streams.items()))
            if self.clock_ms - self._place(row)[2] <= self.bounds.idle_limit_ms:
                return
            self._forget(stream, offset, "idle")

    def _forget(self, stream: str, offset: int, reason: str) -> None:
        self.end(stream)
        self.forgotten[reason] += 1
        self.journal.append(Entry(offset, Decided.FORGOTTEN, stream))
