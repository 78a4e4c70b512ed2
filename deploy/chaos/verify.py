"""Is what came out what an undisturbed run makes of the same input? Nothing else counts as having survived."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from deploy.chaos.plan import Guarantee
from model.bundle import Bundle
from service import views
from service.engine import Engine
from service.errors import Refused
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.settings import Settings

TOLERANCE = 1e-4
"""Of a stream's scale. The same step in another company of streams sums its floats in another order. Measured: polled
record by record or thousands at once, forecasts differ by the last digit written at most; one observation lost moves
all later ones of its stream by some 0.1."""
ROUNDING = 1e-5
"""Of a stream's scale: forecasts are written in steps of at most that, so two that nearly agree may be one apart."""
ANOMALY_ROUNDING = 2e-3
"""The same of an anomaly score, which is written to three digits."""

Line = tuple[int, str]
"""A partition and a stream in it: what has an order."""
State = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Forecast:
    """A forecast, wanted or found. fields: all that the record says beside these two numbers, and its key.

    quantiles: float64[Q, H]. anomaly: NaN where the record has none. offset: of the observation it answers, if wanted;
    its own, if found. scale: the stream's.
    """

    fields: Mapping[str, Any]
    quantiles: NDArray[np.float64]
    anomaly: float
    offset: int
    scale: float = math.nan

    @property
    def place(self) -> tuple[int, int, int]:
        return self.fields["ts"], self.fields["slot"], self.fields["count"]

    @property
    def name(self) -> str:
        return f"{self.fields['stream']}'s forecast at ts {self.fields['ts']} (count {self.fields['count']})"


@dataclass(frozen=True)
class Letter:
    """A dead letter: of which record, why, and what it carries."""

    partition: int
    offset: int
    reason: str
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True)
class Undisturbed:
    """What is to be found. states: what HTTP says of each stream that is alive, its count added; ended: who is not."""

    forecasts: Mapping[Line, Sequence[Forecast]]
    letters: Counter[Letter]
    states: Mapping[str, State]
    ended: frozenset[str]


def undisturbed(bundle: Bundle, settings: Settings, records: Iterable[Record]) -> Undisturbed:
    """What one engine makes of the input, given each partition's records in their order."""
    engine = Engine(bundle, settings, Metrics())
    forecasts: dict[Line, list[Forecast]] = defaultdict(list)
    letters: Counter[Letter] = Counter()
    for chunk in _chunks(records):
        offset_of = {(record.partition, record.key): record.offset for record in chunk}
        for outgoing in _process(engine, chunk):
            if outgoing.topic == settings.dead_letters_topic:
                letters[_letter(outgoing)] += 1
            else:
                found = _forecast(outgoing, offset_of[outgoing.partition, outgoing.key])
                stream = found.fields["stream"]
                forecasts[outgoing.partition, stream].append(replace(found, scale=_scale(engine, stream)))
    states = {stream: state for _, stream in forecasts if (state := _state(engine, stream))}
    counts = {stream: line[-1].fields["count"] for (_, stream), line in forecasts.items()}
    told = {stream: {**state, "count": counts[stream]} for stream, state in states.items()}
    return Undisturbed(forecasts, letters, told, frozenset(stream for _, stream in forecasts) - set(states))


def _process(engine: Engine, chunk: Sequence[Record]) -> Sequence[Outgoing]:
    """All that is asked of the engine."""
    outgoing = engine.process(chunk)
    engine.commit({record.partition: record.offset + 1 for record in chunk})
    return outgoing


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Each partition's records in order, but only one of a stream at a time: so its state can be seen after each."""
    waiting: dict[int, deque[Record]] = defaultdict(deque)
    for record in records:
        waiting[record.partition].append(record)
    while any(waiting.values()):
        chunk = []
        for queue in waiting.values():
            keys: set[bytes | None] = set()
            while queue and queue[0].key not in keys and None not in keys and (queue[0].key or not keys):
                keys.add(queue[0].key)  # a record without a key may be anybody's: it goes alone
                chunk.append(queue.popleft())
        yield chunk


def _scale(engine: Engine, stream: str) -> float:
    return float(views.find(engine, stream)[1]["scale"])


def _state(engine: Engine, stream: str) -> State | None:
    try:
        return views.inside(engine.config, *views.find(engine, stream))
    except Refused:
        return None


def _forecast(record: Record | Outgoing, offset: int) -> Forecast:
    fields = orjson.loads(record.value or b"")
    quantiles = np.array(list(fields.pop("quantiles").values()))
    anomaly = fields.pop("anomaly")
    return Forecast({**fields, "key": record.key}, quantiles, math.nan if anomaly is None else anomaly, offset)


def _letter(record: Record | Outgoing) -> Letter:
    headers = {name: value or b"" for name, value in record.headers}
    offset, reason = int(headers["__streams.errors.offset"]), headers["carousel.errors.reason"].decode()
    return Letter(record.partition, offset, reason, record.key, record.value)


def forecasts_differ(wanted: Undisturbed, records: Iterable[Record], guarantee: Guarantee) -> Iterator[str]:
    """Where the forecasts topic is not what it ought to be; one line for each stream."""
    found: dict[Line, list[Forecast]] = defaultdict(list)
    for record in records:
        forecast = _forecast(record, record.offset)
        found[record.partition, forecast.fields["stream"]].append(forecast)
    for line in sorted(wanted.forecasts.keys() | found.keys()):
        if told := _forecasts_differ(wanted.forecasts.get(line, ()), found[line], guarantee):
            yield f"forecasts, partition {line[0]}, {told}"


def _forecasts_differ(wanted: Sequence[Forecast], found: Sequence[Forecast], guarantee: Guarantee) -> str:
    """The first difference of a stream's forecasts from those wanted; "" if there is none."""
    wanted_at, found_at = (Counter(forecast.place for forecast in each) for each in (wanted, found))
    for want in wanted:
        if found_at[want.place] < (wanted_at[want.place] if guarantee == "exactly_once" else 1):
            return f"{want.name}, of the observation at offset {want.offset}, is lost"
    for got in reversed(found):
        if got.place not in wanted_at:
            return f"offset {got.offset}: {got.name} ought not to be"
        if found_at[got.place] > wanted_at[got.place] and guarantee == "exactly_once":
            return f"offset {got.offset}: {got.name} is doubled"
    if guarantee == "exactly_once":
        return next(filter(None, map(_changed, wanted, found)), "")
    by_place = {want.place: want for want in wanted}
    return next(filter(None, (_changed(by_place[got.place], got) for got in found)), "")


def _changed(want: Forecast, got: Forecast) -> str:
    if want.place != got.place:
        return f"offset {got.offset}: {got.name} is out of order"
    for name, value in want.fields.items():
        if got.fields.get(name) != value:
            return f"offset {got.offset}: {got.name} has {name} {got.fields.get(name)!r}, not {value!r}"
    if not np.isclose(got.anomaly, want.anomaly, rtol=0, atol=ANOMALY_ROUNDING, equal_nan=True):
        return f"offset {got.offset}: {got.name} has anomaly {got.anomaly}, not {want.anomaly}"
    limit = (TOLERANCE + ROUNDING) * want.scale
    error = (
        float(np.abs(got.quantiles - want.quantiles).max()) if got.quantiles.shape == want.quantiles.shape else math.inf
    )
    if not error <= limit:
        return f"offset {got.offset}: {got.name} is off by {error / want.scale:.2g} of the stream's scale"
    return ""


def letters_differ(wanted: Undisturbed, records: Iterable[Record], guarantee: Guarantee) -> Iterator[str]:
    """Where the dead letters are not what they ought to be."""
    found = Counter(_letter(record) for record in records)
    for letter in sorted((wanted.letters - found).keys(), key=_order):
        yield f"dead letters, {_name(letter)} is lost"
    for letter in sorted((found - wanted.letters).keys(), key=_order):
        if letter not in wanted.letters:
            yield f"dead letters, {_name(letter)} ought not to be, or not so"
        elif guarantee == "exactly_once":
            yield f"dead letters, {_name(letter)} is doubled"


def _order(letter: Letter) -> tuple[int, int]:
    return letter.partition, letter.offset


def _name(letter: Letter) -> str:
    return f"partition {letter.partition}, source offset {letter.offset}: the one for {letter.reason}"


def states_differ(wanted: Undisturbed, answers: Mapping[str, Sequence[State]]) -> Iterator[str]:
    """Where the final states, as workers tell them, are not what they ought to be.

    answers: what those workers said of a stream that know it; more than one may.
    """
    for stream, state in sorted(wanted.states.items()):
        if not answers.get(stream):
            yield f"states, {stream}: no worker knows it"
        for answer in answers.get(stream, ()):
            yield from _state_differs(stream, state, answer)
    for stream in sorted(wanted.ended):
        if answers.get(stream):
            yield f"states, {stream}: it ended, and a worker still knows it"


def _state_differs(stream: str, want: State, got: State) -> Iterator[str]:
    for name in ("partition", "ts", "steps", "gap", "count"):
        if got.get(name) != want[name]:
            yield f"states, {stream}: {name} is {got.get(name)!r}, not {want[name]!r}"
            return
    for name in ("level", "scale"):
        if not _near(want[name], got[name], want["scale"]):
            yield f"states, {stream}: {name} is {got[name]!r}, not {want[name]!r}"
    for n, (layer, other) in enumerate(zip(want["layers"], got["layers"], strict=True)):
        for name in ("h", "c"):
            size = max(1.0, float(np.abs(layer[name]).max()))
            if not _near(layer[name], other[name], size):
                error = float(np.abs(np.subtract(layer[name], other[name])).max())
                yield f"states, {stream}: {name} of layer {n} is off by {error:.2g}"


def _near(want: Any, got: Any, size: float) -> bool:
    if want is None or got is None:
        return want is got
    return bool(np.allclose(got, want, rtol=0, atol=TOLERANCE * size))
