"""What can be seen of the live streams from outside: found, listed, opened up. All read copies; none moves a state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.cells import GATES
from model.config import ModelConfig
from model.standing import Arrays
from model.state import Rows
from service.arena import StreamKey
from service.engine import Engine
from service.errors import Refused

Fields = dict[str, Any]
Content = Fields | list[Fields]
Partitions = frozenset[int]


def find(engine: Engine, stream: str, partitions: Partitions | None = None) -> tuple[StreamKey, Rows]:
    """A stream and a copy of its state, [1, ...] each; where partitions share the id, the one last heard. Looked for in
    `partitions` only; None: in all that this worker has.

    Raises Refused (404) if it is not there.
    """
    with engine.lock:
        key = engine.arena.last_heard(stream, partitions)
        if key is None:
            raise Refused(404, "no stream of this id was heard")
        return key, _copy(engine, [key])


def find_row(engine: Engine, stream: str, partitions: Partitions | None = None) -> Arrays:
    """A copy of the same stream's state alone. Raises Refused (404) if it is not there."""
    with engine.lock:
        row = first_row(engine, stream, [partitions])
    if row is None:
        raise Refused(404, "no stream of this id was heard")
    return row


def first_row(engine: Engine, stream: str, looks: Iterable[Partitions | None]) -> Arrays | None:
    """The same from the first of `looks` that has such a stream; None if none has. The engine's lock is to be held."""
    for partitions in looks:
        if key := engine.arena.last_heard(stream, partitions):
            return engine.arena.row(engine.arena.streams(key.partition)[key.stream])
    return None


def _copy(engine: Engine, keys: list[StreamKey]) -> Rows:
    return engine.arena.gather(torch.tensor([engine.arena.find(key) for key in keys], dtype=torch.int64))


def listed(engine: Engine, streams: Sequence[str], partitions: Partitions) -> list[Fields]:
    """What a list says of each of these streams that is there."""
    with engine.lock:
        keys = [key for stream in streams if (key := engine.arena.last_heard(stream, partitions))]
        state = _copy(engine, keys)
    return summaries(engine, keys, state)


def summaries(engine: Engine, keys: list[StreamKey], state: Rows) -> list[Fields]:
    """What a list of streams says of each."""
    told = engine.describe([key.stream for key in keys], state)
    return [
        {
            "stream": key.stream,
            "partition": key.partition,
            **{name: fields[name] for name in ("ts", "count", "observed", "anomaly", "status")},
            "scores": scores,
        }
        for key, fields, scores in zip(keys, told, _scores(engine, state), strict=True)
    ]


def _scores(engine: Engine, state: Rows) -> Iterator[Fields]:
    """Of one step ahead, by horizon, and of all settled horizons together."""
    for by_horizon in state["scores"].numpy():
        told = [_measures(row) for row in by_horizon]
        names = map(str, engine.follower.horizons)
        yield {**told[0], "by_horizon": dict(zip(names, told, strict=True)), "total": _measures(by_horizon.sum(0))}


def _measures(sums: NDArray[np.float64]) -> Fields:
    scored, pinball, absolute_error, naive_error, hits = sums.tolist()
    return {
        "scored": scored,
        "mase": _ratio(absolute_error, naive_error),
        "pinball": _ratio(pinball, scored),
        "coverage": _ratio(hits, scored),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def inside(config: ModelConfig, key: StreamKey, state: Rows) -> Fields:
    """h, C and the gates of the last step by layer, and the units that the stream is seen in."""
    h, c, gates = (state[name][0].tolist() for name in ("h", "c", "gates"))
    weight = float(state["weight"])
    return {
        "stream": key.stream,
        "partition": key.partition,
        "ts": int(state["ts_ms"]),
        "steps": int(state["steps"]),
        "gap": int(state["gap"]),
        "level": float(state["value_sum"]) / weight if weight > 0 else None,
        "scale": float(state["scale"]),
        "layers": [
            {"h": h[n], "c": c[n], "gates": dict(zip(GATES[config.cell], gates[n], strict=True))} for n in range(len(h))
        ],
    }


def history(engine: Engine, key: StreamKey, state: Rows) -> Fields:
    """The recent observations, oldest first, each beside what had been forecast for it."""
    quantiles = engine.history.keys
    names = ("ts_ms", "value", "forecast", "anomaly")
    ts_ms, values, forecasts, anomaly = (state[f"history_{name}"][0].numpy() for name in names)
    return {
        "stream": key.stream,
        "partition": key.partition,
        "quantiles": quantiles,
        "observations": [
            {
                "ts": ts_ms[n],
                "value": None if np.isnan(values[n]) else values[n],
                "forecast": None if np.isnan(forecasts[n]).any() else dict(zip(quantiles, forecasts[n], strict=True)),
                "anomaly": None if np.isnan(anomaly[n]) else round(float(anomaly[n]), 3),
            }
            for n in engine.history.places(int(state["count"])).tolist()
        ],
    }


def curve(forecast: Fields) -> list[Fields]:
    """A forecast with its `timestamps`, as flat rows, one a step: what draws tables can draw it as it is. Names of
    columns have no dot, which such programs take for a path.
    """
    columns = {f"q{key.replace('.', '_')}": values.tolist() for key, values in forecast["quantiles"].items()}
    times_ms = forecast["timestamps"]
    steps = range(1, 1 + len(next(iter(columns.values()))))
    if times_ms is None:
        times_ms, times = [None for _ in steps], [None for _ in steps]
    else:
        times = np.datetime_as_string(np.array(times_ms, "M8[ms]"), timezone="UTC").tolist()
    rows = zip(steps, times_ms, times, *columns.values(), strict=True)
    return [dict(zip(("step", "ts", "time", *columns), row, strict=True)) for row in rows]


def model(engine: Engine) -> Fields:
    """The model that is served."""
    bundle, config = engine.bundle, engine.config
    names = ("step_ms", "season", "horizon", "quantiles", "covariates", "warmup", "context", "max_gap")
    return {
        "id": bundle.model_id,
        **{name: getattr(config, name) for name in names},
        "training": dict(bundle.training),
        "scores": {method: dict(measures) for method, measures in bundle.scores.items()},
    }
