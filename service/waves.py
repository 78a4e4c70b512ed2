"""A poll's moves in waves: at most one of a row in each, order within a row kept. Or in passes, of many waves each,
where one call takes the same streams through all of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.grid import Int64s


def turns(rows: Int64s) -> Int64s:
    """Of each of these rows [M], how often it stood before.

    >>> turns(np.array([7, 7, 3, 7])).tolist()
    [0, 1, 0, 2]
    """
    order = np.argsort(rows, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(rows[order]) != 0)) if len(rows) else order
    counts = np.diff(np.append(first, len(rows)))
    turn = np.empty(len(rows), dtype=np.int64)
    turn[order] = np.arange(len(rows)) - np.repeat(first, counts)
    return turn


def latest(rows: Int64s) -> NDArray[np.bool_]:
    """Of each of these rows [M], whether it does not stand again.

    >>> latest(np.array([7, 7, 3, 7])).tolist()
    [False, False, True, True]
    """
    return np.asarray(turns(rows[::-1])[::-1] == 0)


def waves(turn: Int64s, most: int) -> Iterator[Int64s]:
    """The moves of turn 0, 1, 2 ... by their numbers; at most `most` in a wave.

    >>> [wave.tolist() for wave in waves(np.array([0, 1, 0, 2]), most=100)]
    [[0, 2], [1], [3]]
    """
    order = np.argsort(turn, kind="stable")
    for some in np.split(order, np.cumsum(np.bincount(turn))[:-1]) if len(turn) else ():
        for start in range(0, len(some), most):
            yield some[start : start + most]


def passes(line: Int64s, anew: NDArray[np.bool_], widest: int, most: int) -> Iterator[tuple[Int64s, Int64s]]:
    """The moves of these lines [M], in passes of at most `most`: by their numbers, and where each of its waves ends.

    A wave has at most `widest` moves, one of a line, and a line's come in their order. One that is `anew` is the first
    of its line in its pass. The same lines go through one wave after the other, so that their states are at hand; those
    with few moves first, so that nobody waits for who has many.

    >>> line, anew = np.array([7, 3, 7, 7, 3, 5]), np.array([0, 0, 0, 1, 0, 0]) > 0
    >>> [(moves.tolist(), ends.tolist()) for moves, ends in passes(line, anew, widest=2, most=4)]
    [([5, 0, 2, 1], [2, 3, 4]), ([4], [1]), ([3], [1])]
    """
    leg = _legs(line, anew)
    for number in range(int(leg.max(initial=-1)) + 1):
        some = np.flatnonzero(leg == number)
        _, first, whose, counts = np.unique(line[some], return_index=True, return_inverse=True, return_counts=True)
        rank = np.empty(len(counts), dtype=np.int64)
        rank[np.lexsort((first, counts))] = np.arange(len(counts))
        place, turn = rank[whose], turns(whose)
        order = np.lexsort((place, turn, place // widest))
        wave = np.stack((place // widest, turn))[:, order]
        ends = np.append(np.flatnonzero(np.diff(wave).any(axis=0)) + 1, len(some))
        start = 0
        while start < len(some):
            within = ends[(ends > start) & (ends <= start + most)]
            yield some[order[start : within[-1]]], within - start
            start = within[-1]


def _legs(line: Int64s, anew: NDArray[np.bool_]) -> Int64s:
    """Of each move, how many of its line are anew after that line's first and up to it."""
    order = np.argsort(line, kind="stable")
    first = np.append(True, np.diff(line[order]) != 0)[: len(line)]
    passed = np.cumsum(anew[order] & ~first)
    leg = np.empty(len(line), dtype=np.int64)
    leg[order] = passed - np.maximum.accumulate(np.where(first, passed, 0))
    return leg
