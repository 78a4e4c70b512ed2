"""Who is here: lists of a worker's streams, in the orders that people ask for, and at a price that does not grow with
those who ask.

To bring 100,000 streams into an order takes 0.1 s. So their ids are sorted when streams have come or gone, and not for
each request; and where they are many, all of this at most once a second.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from model.grid import Int64s
from model.scoring import MEASURES
from service import views
from service.engine import Engine
from service.errors import Refused
from service.schemas import Order, Page
from service.views import Fields, Partitions

MANY = 10_000
"""Streams from which on a list may be older than the request for it."""
FRESH_S = 1.0
QUERIES_KEPT = 32

RANKS: dict[Order, Callable[[Fields], float | None]] = {
    "anomaly": lambda told: told["anomaly"],
    "error": lambda told: told["scores"]["mase"],
    "heard": lambda told: told["ts"],
}
"""What an order looks at: the largest comes first, whoever has none last."""


def first(streams: Iterable[Fields], order: Order) -> list[Fields]:
    """What is listed of streams, in an order; equals by their ids.

    >>> told = [{"stream": "a", "ts": 1}, {"stream": "c", "ts": 2}, {"stream": "b", "ts": 2}]
    >>> [each["stream"] for each in first(told, "heard")]
    ['b', 'c', 'a']
    """
    by_id = sorted(streams, key=lambda told: str(told["stream"]))
    if order == "id":
        return by_id
    rank = RANKS[order]
    return sorted(by_id, key=lambda told: -np.inf if (value := rank(told)) is None else value, reverse=True)


class Roster:
    """Lists the streams of one engine. May be used from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._making = threading.Lock()
        self._roll: Roll | None = None

    def page(self, asked: Page, partitions: Partitions) -> Fields:
        """At most `limit` of the streams of `partitions` that match. Raises Refused."""
        if asked.after and asked.order != "id":
            raise Refused(422, "only the order `id` has further pages", ("query", "after"))
        if asked.stream is not None:
            chosen = self._one(asked, partitions)
            total = len(chosen)
        else:
            roll = self._roll_of(partitions)
            matching = roll.matching(asked.q)
            chosen, total = roll.chosen(asked, matching), len(matching)
        streams = views.listed(self._engine, chosen[: asked.limit], partitions)
        return {
            "streams": first(streams, asked.order),
            "total": total,
            "next": chosen[asked.limit - 1] if asked.order == "id" and len(chosen) > asked.limit else None,
        }

    def _one(self, asked: Page, partitions: Partitions) -> list[str]:
        """The stream that is named, if it is there: without looking at any other."""
        stream = str(asked.stream)
        with self._engine.lock:
            here = any(key.partition in partitions for key in self._engine.arena.keys_of(stream))
        return [stream] if here and asked.q in stream and stream > asked.after else []

    def _roll_of(self, partitions: Partitions) -> Roll:
        with self._making:  # whoever comes meanwhile finds it made
            roll = self._roll
            if roll is None or roll.partitions != partitions or roll.outdated(self._engine.arena.changes):
                roll = self._roll = Roll(self._engine, partitions)
            return roll


class Roll:
    """The streams of some partitions at one moment, by their ids."""

    def __init__(self, engine: Engine, partitions: Partitions) -> None:
        arena = engine.arena
        self.engine, self.partitions, self.made_at = engine, partitions, time.monotonic()
        with engine.lock:
            self.changes, heard_ms = arena.changes, arena.column("ts_ms")
            rows: dict[str, int] = {}
            for partition in sorted(partitions):
                streams = arena.streams(partition)
                both = rows.keys() & streams.keys()
                newer = {one: rows[one] for one in both if heard_ms[rows[one]] > heard_ms[streams[one]]}
                rows |= streams
                rows |= newer
        self.streams = sorted(rows)
        self.rows = np.fromiter(map(rows.__getitem__, self.streams), np.int64, len(rows))
        self.matching = lru_cache(maxsize=QUERIES_KEPT)(self._matching)
        self._orders: dict[Order, tuple[float, Int64s]] = {}

    def outdated(self, changes: int) -> bool:
        """Whether others are here by now."""
        return self.changes != changes and self._may_be_anew(self.made_at)

    def chosen(self, asked: Page, matching: Int64s) -> list[str]:
        """Of the streams at the places `matching`, those that are listed; one more if there are more."""
        if asked.order == "id":
            start = int(np.searchsorted(matching, bisect_right(self.streams, asked.after)))
            return self._named(matching[start : start + asked.limit + 1])
        placed = self._placed(asked.order)
        if len(matching) < len(placed):
            wanted = np.zeros(len(placed), dtype=np.bool_)
            wanted[matching] = True
            placed = placed[wanted[placed]]
        return self._named(placed[: asked.limit])

    def _named(self, places: Int64s) -> list[str]:
        return [self.streams[place] for place in places.tolist()]

    def _matching(self, text: str) -> Int64s:
        """The places of the ids that contain a text, in order."""
        if not text:
            return np.arange(len(self.streams))
        return np.array([place for place, stream in enumerate(self.streams) if text in stream], dtype=np.int64)

    def _placed(self, order: Order) -> Int64s:
        """All places, those first that come first in this order."""
        now = time.monotonic()
        made_at, placed = self._orders.get(order, (-np.inf, self.rows))
        if self._may_be_anew(made_at):
            placed = np.argsort(-self._values(order), kind="stable")  # NaN comes last
            self._orders[order] = now, placed
        return placed

    def _may_be_anew(self, made_at: float) -> bool:
        return len(self.streams) < MANY or time.monotonic() - made_at > FRESH_S

    def _values(self, order: Order) -> NDArray[np.float64]:
        """What the order looks at, of each stream [n]; NaN where there is nothing. Read while streams move on: who
        comes a place too early harms nobody, and what is told of those listed is read anew.
        """
        tensors, rows = self.engine.arena.tensors, torch.from_numpy(self.rows)
        if order == "heard":
            return tensors["ts_ms"][rows].double().numpy()
        if order == "anomaly":
            state = {name: tensors[name][rows] for name in ("steps", "gap", "surprise")}
            return self.engine.follower.anomaly.score(state).numpy()
        one_ahead = tensors["scores"][rows, 0]
        error, naive = (one_ahead[:, MEASURES.index(name)] for name in ("absolute_error", "naive_error"))
        return torch.where(naive > 0, error / naive, torch.nan).numpy()
