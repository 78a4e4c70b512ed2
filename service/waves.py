"""A poll's moves in waves: at most one of a row in each, order within a row kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

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


def waves(turn: Int64s, most: int) -> Iterator[Int64s]:
    """The moves of turn 0, 1, 2 ... by their numbers; at most `most` in a wave.

    >>> [wave.tolist() for wave in waves(np.array([0, 1, 0, 2]), most=100)]
    [[0, 2], [1], [3]]
    """
    order = np.argsort(turn, kind="stable")
    for some in np.split(order, np.cumsum(np.bincount(turn))[:-1]) if len(turn) else ():
        for start in range(0, len(some), most):
            yield some[start : start + most]
