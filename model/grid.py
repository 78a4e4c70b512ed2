"""Time as a grid of slots, and back.

A model has a step (say one hour). An observation belongs to the slot nearest to its time, so that a sensor whose
clock jitters by less than half a step stays on the grid. A grid may have regular holes (nights, weekends): they
are no slots at all, so that the step after Friday's last hour is Monday's first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

HOLE = np.iinfo(np.int64).min
"""The slot of a time that falls into a regular hole of its grid."""


@dataclass(frozen=True)
class Grid:
    """Slots `step_ms` apart; of each `period` of them only those in `phases` exist.

    >>> hours = Grid(step_ms=3_600_000)
    >>> hours.slot_of(np.array([0, 3_600_000, 3_600_000 * 2 + 90_000]))
    array([0, 1, 2])

    Monday to Friday, as exchange rates have them (the epoch's day 0 was a Thursday):

    >>> weekdays = Grid(step_ms=86_400_000, period=7, phases=(0, 1, 4, 5, 6))
    >>> friday, saturday, monday = 86_400_000 * np.array([1, 2, 4])
    >>> weekdays.slot_of(np.array([friday, monday]))
    array([1, 2])
    >>> weekdays.slot_of(np.array([saturday]))[0] == HOLE
    np.True_
    >>> weekdays.time_of(np.array([1, 2])) == np.array([friday, monday])
    array([ True,  True])
    """

    step_ms: int
    offset_ms: int = 0
    period: int = 1
    phases: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.step_ms < 1:
            raise ValueError(f"step_ms must be at least 1, not {self.step_ms}")
        if not self.phases or list(self.phases) != sorted(set(self.phases)):
            raise ValueError("phases must be an increasing list of at least one slot")
        if self.phases[0] < 0 or self.phases[-1] >= self.period:
            raise ValueError(f"phases must lie in 0 ... {self.period - 1}, not {self.phases}")

    def slot_of(self, ts_ms: Int64s) -> Int64s:
        """The slot nearest to each time (epoch ms, any shape), or `HOLE`."""
        tick = (ts_ms - self.offset_ms + self.step_ms // 2) // self.step_ms
        if self.period == 1:
            return np.asarray(tick, dtype=np.int64)
        turn, phase = np.divmod(tick, self.period)
        rank = np.full(self.period, -1, dtype=np.int64)
        rank[list(self.phases)] = np.arange(len(self.phases))
        return np.where(rank[phase] < 0, HOLE, turn * len(self.phases) + rank[phase])

    def time_of(self, slot: Int64s) -> Int64s:
        """The time (epoch ms) at which each slot stands."""
        turn, rank = np.divmod(slot, len(self.phases))
        tick = turn * self.period + np.asarray(self.phases, dtype=np.int64)[rank]
        return np.asarray(self.offset_ms + tick * self.step_ms, dtype=np.int64)
