"""Forecasts on request: from a live state, from a history alone, or what would be if a live stream went on so.

Nothing here moves a live stream: all work is on copies, outside the engine's lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from model.config import ModelConfig
from model.features import Block
from model.grid import Int64s
from model.standing import Arrays, Standing
from model.state import Rows
from service import grid
from service.engine import Engine
from service.errors import Refused, Rejected
from service.forecasts import Issued, quantile_key
from service.records import Limits, check_time, check_value, read_covariates, read_time
from service.schemas import GivenObservation, PredictRequest
from service.views import Fields, Partitions, find, find_row

AT_ONCE = 2
"""Histories computed at a time: the worker needs the machine too."""
PATIENCE_S = 10.0
NOTHING = np.array([np.nan])
"""What was observed, where nothing was."""
SLOTS_KEPT = 128
"""Whose times after them are kept."""


@dataclass(frozen=True)
class Given:
    """A history as columns. ts_ms [n] int64; values [n] float64; covariates [n, K] float64; NaN where missing."""

    ts_ms: Int64s
    values: NDArray[np.float64]
    covariates: NDArray[np.float64]


class Predictor:
    """Answers predict requests. May be used from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config, self.limits = engine, engine.config, engine.limits
        self.max_steps = engine.settings.max_history_steps
        self._standing = Standing(engine.follower, compiled=engine.compiled is not None)
        self._times = lru_cache(maxsize=SLOTS_KEPT)(self._times_after)
        self._times_json = lru_cache(maxsize=SLOTS_KEPT)(self._encode_times)
        self._turns = threading.BoundedSemaphore(AT_ONCE)

    def predict(self, request: PredictRequest, partitions: Partitions | None = None) -> Fields:
        """The fields of a forecast record, cut as asked for, with `timestamps`; a live stream is looked for in
        `partitions` only, unless None. Raises Refused.
        """
        if request.stream is None and request.history is None:
            raise Refused(422, "give a `stream`, a `history`, or both", ("body",))
        if request.stream is None and request.partition is not None:
            raise Refused(422, "a partition goes with a `stream`", ("body", "partition"))
        self._horizon(request), self._quantiles(request)  # first, as these are soonest refused
        if request.history is None:
            return self.cut(request, find_row(self.engine, request.stream or "", partitions))
        given = self._read(request.history)
        initial = self.engine.arena.schema.initial(1)
        state = find(self.engine, request.stream, partitions)[1] if request.stream else initial
        with self._turn():
            return self.cut(request, arrays_of(self._continue(state, given)))

    def cut(self, request: PredictRequest, state: Arrays) -> Fields:
        """The forecast that stands open in a state [1, ...], cut as asked for. Raises Refused for what the model has
        not.
        """
        horizon, quantiles = self._horizon(request), self._quantiles(request)
        fields = self.tell(request.stream, state, raw=request.raw)
        return {
            **fields,
            "quantiles": {key: values[:horizon] for key, values in fields["quantiles"].items() if key in quantiles},
            "timestamps": fields["timestamps"] and fields["timestamps"][:horizon],
        }

    def encode(self, request: PredictRequest, state: Arrays) -> bytes:
        """The same as JSON; most of it written at once, where `service.digits` can be had."""
        horizon, quantiles = self._horizon(request), self._quantiles(request)
        issued = self._issued(request.stream, state, raw=request.raw)
        chosen = [n for n, key in enumerate(self.engine.quantile_keys) if key in quantiles]
        text = self.engine.teller.encode_cut(issued, horizon, chosen, self._times_json(issued.slot.item(), horizon))
        return text or orjson.dumps(self.cut(request, state), option=orjson.OPT_SERIALIZE_NUMPY)

    def tell(self, stream: str | None, state: Arrays, *, raw: bool = False) -> Fields:
        """The forecast that stands open in a state [1, ...], with the time that each of its steps is for."""
        (fields,) = self.engine.teller.describe(self._issued(stream, state, raw=raw))
        return {**fields, "stream": stream, "timestamps": self._times(fields["slot"])}

    def _issued(self, stream: str | None, state: Arrays, *, raw: bool) -> Issued:
        live = state["steps"] >= self.config.warmup
        last = NOTHING if state["gap"].item() else state["values"][:, -1]
        heard = (state["ts_ms"], state["slot"], state["count"], live, last, self._standing.anomaly(state))
        return Issued([stream or ""], *heard, state["scale"], self._standing.values(state, raw=raw))

    def _times_after(self, slot: int) -> list[int] | None:
        """The times of the horizon's steps: the same for all streams that were last heard in the same slot."""
        grid = self.config.grid
        return grid.time_of(slot + np.arange(1, self.config.horizon + 1)).tolist() if grid else None

    def _encode_times(self, slot: int, horizon: int) -> bytes:
        times_ms = self._times(slot)
        return orjson.dumps(times_ms and times_ms[:horizon])

    def _horizon(self, request: PredictRequest) -> int:
        most = self.config.horizon
        if request.horizon is not None and request.horizon > most:
            raise Refused(422, f"the model forecasts {most} steps; ask for 1 to {most}", ("body", "horizon"))
        return request.horizon or most

    def _quantiles(self, request: PredictRequest) -> set[str]:
        known = self.engine.quantile_keys
        if request.quantiles is None:
            return set(known)
        wanted = set(map(quantile_key, request.quantiles))
        if not wanted <= set(known):
            raise Refused(422, f"the model has the quantiles {', '.join(known)}, and no others", ("body", "quantiles"))
        return wanted

    def _read(self, history: Sequence[GivenObservation]) -> Given:
        return read_history(history, self.limits, self.max_steps)

    def _continue(self, state: Rows, given: Given) -> Rows:
        """The state [1, ...] after the history, all of whose steps go at once."""
        last_slot, last_ts_ms = int(state["slot"]), int(state["ts_ms"])
        self._check_after(given, last_slot, last_ts_ms)
        placed = grid.place_in_turn(self.config, given.ts_ms, last_slot, last_ts_ms)
        check_holes(placed)
        chosen = np.flatnonzero(placed.fresh)
        restarts = np.flatnonzero(placed.afresh)
        if len(restarts):
            chosen = chosen[chosen >= restarts[-1]]
            state = self.engine.arena.schema.initial(1)
        begun = int(state["count"]) > 0
        slot = placed.slot[chosen]
        first = last_slot + 1 if begun else int(slot[0])
        return {
            **self.engine.follower.through(state, self._block(given, chosen, slot, first)),
            "slot": torch.from_numpy(slot[-1:]),
            "ts_ms": torch.from_numpy(given.ts_ms[chosen[-1:]]),
            "count": state["count"] + len(chosen),
        }

    def _check_after(self, given: Given, last_slot: int, last_ts_ms: int) -> None:
        """Raises Refused for an observation that is not after the live state's last one."""
        last = np.full(len(given.ts_ms), last_slot), np.full(len(given.ts_ms), last_ts_ms)
        placed = grid.place(self.config, given.ts_ms, *last)
        past = placed.late | placed.duplicate
        if past.any():
            detail = f"the stream's last observation was at {last_ts_ms}: a what-if goes on from the step after it"
            raise Refused(422, detail, ("body", "history", int(past.argmax()), "ts"))

    def _block(self, given: Given, chosen: Int64s, slot: Int64s, first: int) -> Block:
        return steps_of(given, self.config, chosen, slot, first, self.max_steps)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=PATIENCE_S):
            raise Refused(503, "too many histories are being computed; come again in a moment")
        try:
            yield
        finally:
            self._turns.release()


def arrays_of(state: Rows) -> Arrays:
    return {name: tensor.numpy() for name, tensor in state.items()}


def read_history(history: Sequence[GivenObservation], limits: Limits, max_steps: int) -> Given:
    """A history as columns. Raises Refused, naming the field, where it does not hold what the worker takes."""
    if len(history) > max_steps:
        raise Refused(422, f"at most {max_steps} observations (max_history_steps)", ("body", "history"))
    ts_ms, values, covariates = [], [], []
    field = "ts"
    try:
        for observation in history:
            field = "ts"
            ts_ms.append(check_time(read_time(observation.ts), limits))
            field, value = "value", observation.value
            values.append(math.nan if value is None else check_value(value, limits.max_abs_value))
            field = "covariates"
            covariates.append(read_covariates(observation.covariates, limits))
    except Rejected as error:
        raise Refused(422, str(error), ("body", "history", len(covariates), field)) from error
    known = np.array(covariates, dtype=float).reshape(len(history), len(limits.covariates))
    return Given(np.array(ts_ms, dtype=np.int64), np.array(values, dtype=float), known)


def check_holes(placed: grid.Placed) -> None:
    """Raises Refused for the first observation of a history whose time is no slot of the grid."""
    if placed.hole.any():
        at = int(placed.hole.argmax())
        raise Refused(422, "the time falls into a hole of the model's grid", ("body", "history", at, "ts"))


def steps_of(given: Given, config: ModelConfig, chosen: Int64s, slot: Int64s, first: int, max_steps: int) -> Block:
    """The steps `first` ... the last slot, NaN where the observations `chosen`, at `slot`, have none."""
    steps = int(slot[-1]) - first + 1
    if steps > max_steps:
        detail = f"{steps} steps with its gaps filled; at most {max_steps} (max_history_steps)"
        raise Refused(422, detail, ("body", "history"))
    values = np.full((1, steps), np.nan)
    covariates = np.full((1, steps, len(config.covariates)), np.nan)
    values[0, slot - first] = given.values[chosen]
    covariates[0, slot - first] = given.covariates[chosen]
    times = grid.times_of(config, np.arange(first, first + steps), given.ts_ms[chosen])  # no clock: no gaps
    return Block(torch.from_numpy(values), torch.from_numpy(times[None]), torch.from_numpy(covariates))
