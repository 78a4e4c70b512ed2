"""Many observations of one stream at a time, where nobody waits for the forecasts between: T > 1 steps in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from model.grid import Int64s
from service.partition import Move

STEPS_MAX = 1_024
"""In one block: bounds its memory."""


class Run:
    """The moves of one row, in order, from its last slot on; only the first of them may begin afresh."""

    def __init__(self, moves: Sequence[Move], last_slot: int | None) -> None:
        """last_slot: None where the row has none, or begins afresh."""
        self.moves, self.last = moves, moves[-1]
        self.first_slot = moves[0].slot if last_slot is None else last_slot + 1
        self.steps = self.last.slot - self.first_slot + 1
        self.at: Int64s = np.array([move.slot - self.first_slot for move in moves], dtype=np.int64)
        """The steps that have observations; the others are missing."""

    def window(self, start: int, stop: int) -> tuple[Int64s, Sequence[Move]]:
        """The observations of the steps start ... stop - 1: where in it they are, and which."""
        low, high = np.searchsorted(self.at, (start, stop))
        return self.at[low:high] - start, self.moves[low:high]


def runs(moves: Iterable[Move]) -> Iterator[list[list[Move]]]:
    """The moves by rows; a row's next run, where it begins afresh, comes in the next list.

    >>> from service.records import Observation, Record
    >>> def move(row, slot, afresh=False):
    ...     return Move(Observation(Record("t", 0, 0, 0, None, None), "", 0, 0.0), row, slot, afresh, 0)
    >>> taken = [move(1, 1), move(2, 1), move(1, 2), move(1, 99, afresh=True)]
    >>> [[[m.slot for m in run] for run in together] for together in runs(taken)]
    [[[1, 2], [1]], [[99]]]
    """
    by_row: dict[int, list[list[Move]]] = {}
    for move in moves:
        segments = by_row.setdefault(move.row, [[]])
        if move.afresh and segments[-1]:
            segments.append([])
        segments[-1].append(move)
    for n in range(max(map(len, by_row.values()), default=0)):
        yield [segments[n] for segments in by_row.values() if n < len(segments)]


def pieces(steps: Int64s, cells_max: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Cut runs of these many steps into blocks of as many steps each: of 2^n, so that there are few of them.

    -> which runs, and the number of their next steps; at most `cells_max` runs times steps in a block.

    >>> [(some.tolist(), size) for some, size in pieces(np.array([5, 1, 4]), cells_max=100)]
    [([0, 2], 4), ([0, 1], 1)]
    """
    left = steps.copy()
    size = min(STEPS_MAX, 1 << int(left.max(initial=0)).bit_length() >> 1)
    while size:
        some = np.flatnonzero(left >= size)
        most = max(1, cells_max // size)
        for start in range(0, len(some), most):
            yield some[start : start + most], size
        left[some] -= size
        if not len(some):
            size >>= 1
