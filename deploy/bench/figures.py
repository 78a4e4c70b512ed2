"""What is measured, and what comes of it: samples of each round, and the figure that several rounds make."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from model.errors import CarouselError

Role = Literal["limit", "carousel", "rival"]


class BenchError(CarouselError):
    """Something cannot be measured; the message says why, and what to do."""


@dataclass(frozen=True)
class Sample:
    """What one round measured. limit: the name of the figure that it stands beside; note: what else is to be known.

    axis, at: of a measurement that is repeated as work grows, what grows, and how far.
    """

    name: str
    value: float
    unit: str
    role: Role = "carousel"
    limit: str = ""
    note: str = ""
    axis: str = ""
    at: float = 0


@dataclass(frozen=True)
class Figure:
    """What all rounds measured: their median, from low to high. beside: the median of its ratio to its limit, each
    taken within a round, as the machine's mood varies; None where it has no limit.
    """

    what: str
    name: str
    value: float
    unit: str
    role: Role
    low: float
    high: float
    rounds: int
    limit: str
    beside: float | None
    note: str
    axis: str
    at: float


@dataclass(frozen=True)
class Probe:
    """One thing to measure, once a round. measure: gives its samples."""

    title: str
    measure: Callable[[], Iterable[Sample]]


class Taken:
    """The samples of all rounds, in the order in which they were first taken."""

    def __init__(self) -> None:
        self._samples: defaultdict[tuple[str, str], dict[int, Sample]] = defaultdict(dict)

    def add(self, what: str, number: int, sample: Sample) -> None:
        """Keep a sample of the measurement `what` and the round `number`."""
        self._samples[what, sample.name][number] = sample

    def figures(self) -> list[Figure]:
        """
        >>> taken = Taken()
        >>> for number, (own, limit) in enumerate([(50, 100), (30, 40), (80, 80)]):
        ...     taken.add("x", number, Sample("limit", limit, "records/s", "limit"))
        ...     taken.add("x", number, Sample("own", own, "records/s", limit="limit"))
        >>> [(figure.value, figure.low, figure.high, figure.beside) for figure in taken.figures()]
        [(80, 40, 100, None), (50, 30, 80, 0.75)]
        """
        return [self._figure(what, samples) for (what, _), samples in self._samples.items()]

    def _figure(self, what: str, samples: dict[int, Sample]) -> Figure:
        last = list(samples.values())[-1]
        values = [sample.value for sample in samples.values()]
        limits = self._samples.get((what, last.limit), {})
        ratios = [sample.value / limits[n].value for n, sample in samples.items() if n in limits and limits[n].value]
        return Figure(
            what,
            last.name,
            statistics.median(values),
            last.unit,
            last.role,
            min(values),
            max(values),
            len(values),
            last.limit,
            statistics.median(ratios) if ratios else None,
            last.note,
            last.axis,
            last.at,
        )
