"""Many observations of one stream at a time: T > 1 steps in one go, where single steps would be many and narrow, and no
compiled step takes them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.grid import Int64s
from service.waves import turns

STEPS_MAX = 1_024
"""In one block: bounds its memory."""


@dataclass(frozen=True)
class Runs:
    """R runs of moves: a run's are of one row and in order, and only the first of them may begin afresh.

    moves [M]: the moves by their numbers; run [M]: whose they are; step [M]: where in their run they stand. head, last
    [R]: each run's first and last move. first_slot, steps [R]: where it begins, and how long it is: the steps between
    are missing.
    """

    moves: Int64s
    run: Int64s
    step: Int64s
    head: Int64s
    last: Int64s
    first_slot: Int64s
    steps: Int64s

    def window(self, some: Int64s, start: Int64s, size: int) -> tuple[Int64s, Int64s, Int64s]:
        """The moves in `size` steps of the runs `some`, from step start [len(some)] on. -> the moves; whose they are,
        by number in `some`, and at which of the steps.
        """
        number = np.full(len(self.steps), -1)
        number[some] = np.arange(len(some))
        whose = number[self.run]
        step = self.step - start[whose]
        within = np.flatnonzero((whose >= 0) & (step >= 0) & (step < size))
        return self.moves[within], whose[within], step[within]


def runs(row: Int64s, line: Int64s, slot: Int64s, missing: Int64s, afresh: NDArray[np.bool_]) -> Iterator[Runs]:
    """The moves [M] of rows to slots, each after so many missing steps, as runs; the next run of the same line, where
    it begins afresh or in another row, comes with the next ones.

    >>> columns = np.array([[1, 2, 1, 1], [1, 2, 1, 1], [1, 1, 3, 99], [0, 0, 1, 0]])
    >>> found = runs(*columns, afresh=np.array([0, 0, 0, 1]) > 0)
    >>> [(each.moves.tolist(), each.first_slot.tolist(), each.steps.tolist()) for each in found]
    [([0, 2, 1], [1, 1], [3, 1]), ([3], [99], [1])]
    """
    order = np.argsort(line, kind="stable")
    heads = np.flatnonzero(np.append(True, np.diff(row[order]) != 0) | afresh[order]) if len(row) else order
    turn = turns(line[order[heads]])
    ends = np.append(heads[1:], len(order))
    for n in range(int(turn.max(initial=-1)) + 1):
        some = np.flatnonzero(turn == n)
        lengths = ends[some] - heads[some]
        run = np.repeat(np.arange(len(some)), lengths)
        moves = order[np.concatenate([np.arange(heads[k], ends[k]) for k in some])]
        head, last = order[heads[some]], order[ends[some] - 1]
        first_slot = slot[head] - missing[head]
        yield Runs(moves, run, slot[moves] - first_slot[run], head, last, first_slot, slot[last] - first_slot + 1)


def pieces(steps: Int64s, cells_max: int) -> Iterator[tuple[Int64s, int]]:
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
