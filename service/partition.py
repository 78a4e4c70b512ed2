"""One partition's streams, as its records make them: who is followed, who may come, who is forgotten.

All of it is decided in the order of the records and by nothing but them, so that a replay decides the same. Where a
decision about one stream hangs on the others (there is no room; nobody heard of it for long), it is noted in the
partition's journal, since a replay from snapshots of different ages does not see all of them as they were.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

from model.config import ModelConfig
from model.grid import Int64s
from service import grid
from service.arena import Arena, StreamKey
from service.errors import Reason, Rejected
from service.grid import NO_SLOT, Bools
from service.records import Observations
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


NOBODY = -1
"""The row of an observation that moves no stream."""


@dataclass(frozen=True)
class Taken:
    """What n observations mean for their streams, as columns [n], in order.

    row: the stream's in the arena, NOBODY where the observation moves none. line: a number of the stream, also where it
    ended and began again, in another row. slot: where on the grid it falls; missing:
    steps since the last one, to be made up first. afresh: the stream forgets all before it. heard_ms: what the
    partition's clock shows. late, duplicate: why it moves none. refused: by number, what there is no room for.
    """

    row: Int64s
    line: Int64s
    slot: Int64s
    missing: Int64s
    afresh: Bools
    heard_ms: Int64s
    late: Bools
    duplicate: Bools
    refused: dict[int, Rejected]

    @classmethod
    def none(cls, count: int) -> Taken:
        """Nothing of so many, yet."""
        line, slot, missing, heard_ms = (np.zeros(count, dtype=np.int64) for _ in range(4))
        afresh, late, duplicate = (np.zeros(count, dtype=np.bool_) for _ in range(3))
        return cls(np.full(count, NOBODY), line, slot, missing, afresh, heard_ms, late, duplicate, {})


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
        self._held = arena.open(number)
        self._slots, self._times_ms, self._heard_ms = map(arena.column, ("slot", "ts_ms", "heard_ms"))
        self._ordered = bounds.idle_limit_ms > 0 or bounds.forget_when_full
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
        """Of some rows, the slot and the time of the last observation, and the clock when it came."""
        self._lines: dict[int, int] = {}
        """Of rows of streams that ended and began again, the row that each stream had at first."""
        self._ended: dict[str, int] = {}
        """The first rows of streams that ended."""

    def replay(self, told: Iterable[Entry] | None) -> None:
        """Decide nothing from now on, but follow this journal; None: decide again."""
        self._told = None if told is None else deque(told)

    @property
    def replaying(self) -> bool:
        return self._told is not None

    def known_to_crash(self) -> set[int]:
        """In a replay, the offsets at which the process ended time and again."""
        return {entry.offset for entry in self._told or () if entry.decided is Decided.CRASHED}

    def crashed(self, offset: int) -> None:
        """Note that this record is not to be looked at, ever."""
        self.journal.append(Entry(offset, Decided.CRASHED))

    def end(self, stream: str) -> None:
        """End a stream, if there is one."""
        self.touched.add(stream)
        if (row := self._held.get(stream)) is not None:
            self._ended[stream] = self._lines.get(row, row)
            self.arena.forget(StreamKey(self.number, stream))

    def take(self, seen: Observations, covered: Callable[[str], int] | None = None) -> Taken:
        """What observations of this partition, none in a hole of the grid, mean for their streams.

        covered: in a replay, the offset before which a stream's records are in its state already.
        """
        taken, clock_ms, first = Taken.none(len(seen.streams)), self._clock(seen), 0
        taken.heard_ms[:] = clock_ms
        if (
            covered
            or self._deadline_ms() < math.inf
            or seen.ended.any()
            or NOBODY in (rows := [self._held.get(stream, NOBODY) for stream in seen.streams])
        ):
            first = self._take_each(taken, seen, clock_ms, covered)
        else:
            taken.row[:] = rows
        self._place(taken, seen, first, len(seen.streams))
        taken.line[:] = taken.row
        for row, line in self._lines.items():
            taken.line[taken.row == row] = line
        self.clock_ms = clock_ms[-1] if clock_ms else self.clock_ms
        return taken

    def _take_each(
        self, taken: Taken, seen: Observations, clock_ms: Sequence[int], covered: Callable[[str], int] | None
    ) -> int:
        """Find their rows one by one, as streams may come and go. Who is the oldest hangs on which observations were
        late; that is looked at for many at a time, and whenever it matters. -> the first that was not looked at so.
        """
        first, unsettled = 0, set[str]()

        def settle(stream: str, upto: int) -> None:
            nonlocal first
            if stream in unsettled:
                self._place(taken, seen, first, upto)
                self._remember(taken, seen, first, upto)
                first = upto
                unsettled.clear()

        offsets, ended, deadline_ms = seen.offsets.tolist(), seen.ended.tolist(), self._deadline_ms()
        for n, (stream, offset, now_ms) in enumerate(zip(seen.streams, offsets, clock_ms, strict=True)):
            if covered:
                self._follow(offset, covered)
                if covered(stream) > offset:
                    continue
            if ended[n]:
                self.end(stream)
                deadline_ms = self._deadline_ms()
                continue
            while now_ms > deadline_ms:
                settle(self._oldest, n)
                deadline_ms = self._deadline_ms()
                if now_ms > deadline_ms:
                    self._forget(self._oldest, offset, "idle")
                    deadline_ms = self._deadline_ms()
            row = self._held.get(stream)
            if row is None:
                try:
                    row = self._enter(stream, offset, partial(settle, upto=n))
                except Rejected as error:
                    taken.refused[n] = error
                    continue
                deadline_ms = self._deadline_ms()
            taken.row[n] = row
            if self._ordered:
                unsettled.add(stream)
        return first

    def _clock(self, seen: Observations) -> list[int]:
        """What the partition's clock shows at each observation, having seen its time."""
        limit_ms = self.bounds.idle_limit_ms
        ts_ms = np.where(seen.ended, NO_SLOT, seen.ts_ms)  # a tombstone's time says nothing
        if not limit_ms:
            return list(np.maximum.accumulate(np.append(self.clock_ms, ts_ms))[1:].tolist())
        most_ms, clock_ms, shown = max(1, limit_ms // CLOCK_STEPS), self.clock_ms, []
        for time_ms in ts_ms.tolist():
            if clock_ms == NO_SLOT:
                clock_ms = time_ms
            clock_ms += min(max(time_ms - clock_ms, 0), most_ms)
            shown.append(clock_ms)
        return shown

    def _follow(self, offset: int, covered: Callable[[str], int]) -> None:
        """In a replay, do what the journal tells up to the record at `offset`."""
        while self._told and self._told[0].offset <= offset:
            entry = self._told.popleft()
            if entry.decided in (Decided.FULL, Decided.OPEN):
                self.full = entry.decided is Decided.FULL
            if entry.decided is Decided.FORGOTTEN and covered(entry.stream) <= entry.offset:
                self.end(entry.stream)

    def _place(self, taken: Taken, seen: Observations, start: int, stop: int) -> None:
        """Where the observations start ... stop - 1 that have rows fall, each after those before it."""
        some = start + np.flatnonzero(taken.row[start:stop] != NOBODY)
        rows = taken.row[some]
        last_slot, last_ts_ms = self._slots[rows], self._times_ms[rows]
        if self._places:
            for n, row in enumerate(rows.tolist()):
                last_slot[n], last_ts_ms[n], _ = self._places.get(row, (last_slot[n], last_ts_ms[n], 0))
        placed = grid.place_in_turn(self.config, seen.ts_ms[some], last_slot, last_ts_ms, rows)
        taken.slot[some], taken.missing[some], taken.afresh[some] = placed.slot, placed.missing, placed.afresh
        taken.late[some], taken.duplicate[some] = placed.late, placed.duplicate
        taken.row[some[~placed.fresh]] = NOBODY
        heard = [seen.streams[n] for n in some[placed.fresh].tolist()]
        last_row = dict(zip(heard, rows[placed.fresh].tolist(), strict=True))
        self.touched.update(last_row)
        for stream in reversed(dict.fromkeys(reversed(heard))):  # in the order in which each was heard last
            if self._held.get(stream) == last_row[stream]:  # it may have ended since
                self._held.move_to_end(stream)

    def _remember(self, taken: Taken, seen: Observations, start: int, stop: int) -> None:
        """Where streams stand whose moves were given out, but not made yet."""
        for n in range(start, stop):
            if (row := int(taken.row[n])) != NOBODY:
                self._places[row] = int(taken.slot[n]), int(seen.ts_ms[n]), int(taken.heard_ms[n])

    @property
    def _oldest(self) -> str:
        """The stream that was not heard for longest."""
        return next(iter(self._held))

    def _deadline_ms(self) -> float:
        """When the oldest stream will have been idle for too long."""
        if not self.bounds.idle_limit_ms or self._told is not None or not self._held:
            return math.inf
        row = self._held[self._oldest]
        heard_ms = self._places[row][2] if row in self._places else int(self._heard_ms[row])
        return heard_ms + self.bounds.idle_limit_ms

    def _enter(self, stream: str, offset: int, settle: Callable[[str], None]) -> int:
        """A row for a new stream. Raises Rejected. settle: called before a stream is looked at for being the oldest."""
        if self._told is None:
            full = len(self._held) >= self.bounds.max_streams
            if full and self.bounds.forget_when_full:
                settle(self._oldest)
                self._forget(self._oldest, offset, "full")
                full = False
            if full != self.full:
                self.full = full
                self.journal.append(Entry(offset, Decided.FULL if full else Decided.OPEN))
        if self.full:
            most = self.bounds.max_streams
            raise Rejected(Reason.LIMIT, f"partition {self.number} has {most} streams, the most that are followed")
        row = self.arena.add(StreamKey(self.number, stream))
        if stream in self._ended:
            self._lines[row] = self._ended[stream]
        return row

    def _forget(self, stream: str, offset: int, reason: str) -> None:
        self.end(stream)
        self.forgotten[reason] += 1
        self.journal.append(Entry(offset, Decided.FORGOTTEN, stream))
