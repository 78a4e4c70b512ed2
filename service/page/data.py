"""What the page shows: of a stream what goes into its charts, and its insides; of the worker how it fares."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.grid import Int64s
from service import views
from service.engine import Engine
from service.metrics import BatchHistogram, Metrics
from service.owners import Pulse
from service.predict import Predictor, arrays_of
from service.views import Fields, Partitions

COLUMNS = 60
"""Steps that a heat map shows."""
ODD = 2.0
"""Anomaly from which on an observation is marked: one in a hundred."""
SAMPLES = 10
SAMPLE_S = 1.0
SILENCE_S = 5.0
"""After so long without a look the worker's pace is counted anew."""

SIGNED = frozenset({"candidate", "cell", "hidden"})
"""Heat maps of what lies between -1 and 1; the others lie between 0 and 1."""
MAP_SAYS = {
    "lstm": {
        "forget": ("f", "forget gate", "What is kept of C. Strong: the unit remembers; faint: it lets go."),
        "input": ("i", "input gate", "How much of the candidate is written into C."),
        "candidate": ("g", "candidate", "What would be written: a rise, or a fall."),
        "output": ("o", "output gate", "How much of the cell is revealed."),
        "cell": (
            "C",
            "cell state",
            "The carousel, f · C + i · g: what was written and not yet forgotten, as tanh C.",
        ),
        "hidden": ("h", "hidden state", "What is revealed, o · tanh C: from it the forecast is made."),
    },
    "gru": {
        "reset": ("r", "reset gate", "How much of the last h the candidate sees."),
        "update": ("z", "update gate", "What is kept of h; as much as is not kept is written anew."),
        "candidate": ("n", "candidate", "What would be written: a rise, or a fall."),
        "hidden": ("h", "hidden state", "The carousel itself: from it the forecast is made."),
    },
    "rnn": {"hidden": ("h", "hidden state", "Written anew at every step: what it remembers must pass through tanh.")},
}
"""Of each cell the heat maps: symbol, name, and what one sees there."""


def maps_of(cell: str) -> Sequence[str]:
    """The names of a cell's heat maps."""
    return list(MAP_SAYS[cell])


def quantile_columns(config: ModelConfig) -> list[str]:
    """The names of the fan's columns, from the lowest quantile to the highest."""
    return [f"q{k}" for k in range(len(config.quantiles))]


def look(engine: Engine, predictor: Predictor, stream: str, inside: bool, partitions: Partitions) -> Fields:
    """All that the page shows of a stream, from one copy of its state; with its `layers` only where one looks `inside`.

    Raises Refused (404) if it is not there.
    """
    key, state = views.find(engine, stream, partitions)
    (summary,) = views.summaries(engine, [key], state)
    return {
        **summary,
        "forecast": predictor.tell(stream, arrays_of(state)),
        "observations": views.history(engine, key, state)["observations"],
        "layers": views.inside(engine.config, key, state)["layers"] if inside else [],
    }


def columns_of(seen: Fields, config: ModelConfig) -> dict[str, dict[str, list[Any]]]:
    """The columns of the forecast chart's sources. None: nothing is drawn there.

    Time is epoch milliseconds; without a clock, steps from the last observation.
    """
    observations, forecast = seen["observations"], seen["forecast"]
    clock = config.grid is not None
    times = [each["ts"] for each in observations] if clock else list(range(1 - len(observations), 1))
    gaps = _gaps(config, times)
    past: dict[str, list[Any]] = {name: [] for name in ("time", "value", "low", "middle", "high")}
    for n, (at, each) in enumerate(zip(times, observations, strict=True)):
        if n in gaps:
            _append(past, time=(times[n - 1] + at) // 2)
        kept = list((each["forecast"] or {}).values())
        quantiles = {"low": kept[0], "middle": kept[len(kept) // 2], "high": kept[-1]} if kept else {}
        _append(past, time=at, value=each["value"], **quantiles)
    odd = [(at, each) for at, each in zip(times, observations, strict=True) if (each["anomaly"] or 0) >= ODD]
    now = seen["ts"] if clock else 0
    return {
        "past": past,
        "fan": _fan(seen, config, now),
        "odd": {
            "time": [at for at, _ in odd],
            "value": [each["value"] for _, each in odd],
            "anomaly": [each["anomaly"] for _, each in odd],
        },
        "now": {"time": [now], "value": [forecast["observed"]]},
    }


def _gaps(config: ModelConfig, times_ms: Sequence[int]) -> set[int]:
    """The places of the observations before which steps are missing."""
    if config.grid is None:
        return set()
    slots: Int64s = config.grid.slot_of(np.array(times_ms, dtype=np.int64))
    return set((1 + np.flatnonzero(np.diff(slots) > 1)).tolist())


def _append(columns: dict[str, list[Any]], **values: Any) -> None:
    for name, column in columns.items():
        column.append(values.get(name))


def _fan(seen: Fields, config: ModelConfig, now: int) -> dict[str, list[Any]]:
    """The open forecast; it opens from what was observed last."""
    forecast = seen["forecast"]
    ahead = forecast["timestamps"] or list(range(1, config.horizon + 1))
    origin = [] if forecast["observed"] is None else [(now, forecast["observed"])]
    quantiles = zip(quantile_columns(config), forecast["quantiles"].values(), strict=True)
    return {
        "time": [at for at, _ in origin] + ahead,
        **{name: [value for _, value in origin] + values for name, values in quantiles},
    }


def column_of(seen: Fields, cell: str) -> Fields:
    """The newest column of each heat map, by layer: a number a unit."""
    return {
        f"{name}-{n}": [round(value, 3) for value in _values(layer, name)]
        for n, layer in enumerate(seen["layers"])
        for name in maps_of(cell)
    }


def _values(layer: Mapping[str, Any], name: str) -> Sequence[float]:
    if name == "cell":
        return [math.tanh(value) for value in layer["c"]]
    return layer["h"] if name == "hidden" else layer["gates"][name]  # type: ignore[no-any-return]


def doings(layer: Mapping[str, Any], cell: str) -> str:
    """What a layer did at the last step, in a sentence."""
    mean = {name: f"{sum(values) / len(values):.0%}" for name, values in layer["gates"].items()}
    if cell == "lstm":
        return (
            f"At this step the layer keeps {mean['forget']} of its cell, writes {mean['input']} of the candidate, and"
            f" reveals {mean['output']} (means over its {len(layer['h'])} units)."
        )
    if cell == "gru":
        return (
            f"At this step the layer keeps {mean['update']} of h, and lets its candidate see {mean['reset']} of it"
            f" (means over its {len(layer['h'])} units)."
        )
    return f"A plain recurrent cell has no gates: all {len(layer['h'])} units are written anew at this step."


@dataclass(frozen=True)
class Sample:
    """What a worker had done by a moment."""

    at_s: float
    forecasts: float
    latencies: Int64s


class Vitals:
    """How a worker fares, over the last ten seconds in which somebody looked. May be used from any thread."""

    def __init__(self, worker: Pulse, metrics: Metrics) -> None:
        self._worker, self._metrics = worker, metrics
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._lock = threading.Lock()

    def told(self) -> Fields:
        """As of now; what is None is not known yet, or there was nothing of it."""
        with self._lock:
            self._sample()
            first, last = self._samples[0], self._samples[-1]
        seconds, latency = last.at_s - first.at_s, self._metrics.end_to_end_seconds
        passed = last.latencies - first.latencies
        return {
            "unready": self._worker.unready,
            "streams": int(_sum(self._metrics.streams)),
            "lag": int(_sum(self._metrics.lag)),
            "per_second": (last.forecasts - first.forecasts) / seconds if seconds > 0 else None,
            "p50_s": quantile(latency, passed, 0.5),
            "p99_s": quantile(latency, passed, 0.99),
        }

    def _sample(self) -> None:
        now = time.monotonic()
        if self._samples and now - self._samples[-1].at_s < SAMPLE_S:
            return
        if self._samples and now - self._samples[-1].at_s > SILENCE_S:
            self._samples.clear()
        latencies = self._metrics.end_to_end_seconds.counts
        self._samples.append(Sample(now, _sum(self._metrics.forecasts), latencies))


def _sum(metric: Any) -> float:
    """Of all of a metric's labels."""
    return float(
        sum(each.value for family in metric.collect() for each in family.samples if not each.name.endswith("_created"))
    )


def quantile(histogram: BatchHistogram, counts: Int64s, share: float) -> float | None:
    """A quantile from the counts of a histogram's buckets, linear within one, as Prometheus has it."""
    below = np.concatenate(([0], np.cumsum(counts)))
    if not below[-1]:
        return None
    bounds = np.concatenate(([0.0], histogram.bounds[:-1], histogram.bounds[-2:-1]))
    return float(np.interp(share * below[-1], below, bounds))
