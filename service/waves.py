"""A poll's observations in waves: at most one observation of a stream in each, order within a stream kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from service.arena import StreamKey
from service.records import Observation


def waves(observations: Iterable[Observation], most: int) -> Iterator[Sequence[Observation]]:
    """The n-th observation of every stream, for n = 1, 2, ...; at most `most` in a wave.

    >>> from service.records import Record
    >>> def seen(stream, ts_ms): return Observation(Record("t", 0, 0, 0, None, None), stream, ts_ms, 0.0)
    >>> polled = [seen("a", 1), seen("a", 2), seen("b", 1), seen("a", 3)]
    >>> [[(o.stream, o.ts_ms) for o in wave] for wave in waves(polled, most=100)]
    [[('a', 1), ('b', 1)], [('a', 2)], [('a', 3)]]
    """
    layers: list[list[Observation]] = []
    depth: defaultdict[StreamKey, int] = defaultdict(int)
    for observation in observations:
        key = StreamKey(observation.record.partition, observation.stream)
        if depth[key] == len(layers):
            layers.append([])
        layers[depth[key]].append(observation)
        depth[key] += 1
    for layer in layers:
        for start in range(0, len(layer), most):
            yield layer[start : start + most]
