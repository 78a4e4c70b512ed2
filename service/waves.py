"""A poll's moves in waves: at most one of a stream in each, order within a stream kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from service.arena import StreamKey
from service.partition import Move


def waves(moves: Iterable[Move], most: int) -> Iterator[Sequence[Move]]:
    """The n-th move of every stream, for n = 1, 2, ...; at most `most` in a wave.

    >>> from service.records import Observation, Record
    >>> def move(id, slot): return Move(Observation(Record("t", 0, 0, 0, None, None), id, 0, 0.0), 0, slot, False, 0)
    >>> polled = [move("a", 1), move("a", 2), move("b", 1), move("a", 3)]
    >>> [[(m.observation.stream, m.slot) for m in wave] for wave in waves(polled, most=100)]
    [[('a', 1), ('b', 1)], [('a', 2)], [('a', 3)]]
    """
    layers: list[list[Move]] = []
    depth: defaultdict[StreamKey, int] = defaultdict(int)
    for move in moves:
        key = StreamKey(move.observation.record.partition, move.observation.stream)
        if depth[key] == len(layers):
            layers.append([])
        layers[depth[key]].append(move)
        depth[key] += 1
    for layer in layers:
        for start in range(0, len(layer), most):
            yield layer[start : start + most]
