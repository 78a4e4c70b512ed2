"""The engine: records in, forecasts and dead letters out, states moved on. No Kafka, no HTTP, no clock in here.

Follow `Engine.process` to see a record's way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle
from model.features import Block
from model.grid import Int64s
from model.network import Forecast
from model.scoring import LiveScores
from model.state import Rows, Schema
from service import grid
from service.arena import Arena, Full, StreamKey
from service.errors import Reason, Rejected, ServiceError
from service.history import History
from service.metrics import BatchHistogram, Metrics
from service.records import (
    Limits,
    Observation,
    Outgoing,
    Record,
    dead_letter,
    encode_forecast,
    parse,
    quantile_key,
    rounded,
)
from service.settings import Settings
from service.waves import waves

FORECAST_NUMBERS_MAX = 40_000
"""Of up to 25 bytes each as JSON; Kafka takes records of 1 MiB by default."""
BRIDGE_CELLS = 1 << 16
"""Rows times steps of one batched step over a gap: bounds its memory."""


@dataclass(frozen=True)
class Moves:
    """Observations of a wave that move their streams on, as columns. rows: their places in the arena."""

    observations: Sequence[Observation]
    rows: Int64s
    slot: Int64s
    ts_ms: Int64s
    values: NDArray[np.float64]
    covariates: NDArray[np.float64]


class Engine:
    """The streams of one worker, and the model that follows them.

    `lock` is held while states move; take it to read them from another thread. Raises ServiceError for a model whose
    forecasts Kafka could not carry.
    """

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics) -> None:
        self.bundle, self.config, self.forecaster = bundle, bundle.config, bundle.forecaster
        self.settings, self.metrics = settings, metrics
        if self.config.horizon * len(self.config.quantiles) > FORECAST_NUMBERS_MAX:
            raise ServiceError(
                f"{bundle.model_id} forecasts {self.config.horizon} x {len(self.config.quantiles)} numbers, more than"
                f" fit into a Kafka record: train with a shorter horizon or fewer quantiles"
            )
        self.scores = LiveScores(self.config)
        self.history = History(self.config, settings.history_steps)
        schema = Schema((*grid.SCHEMA, *self.forecaster.schema, *self.scores.schema, *self.history.schema))
        self.arena = Arena(schema, settings.max_streams)
        self.limits = Limits(
            covariates=self.config.covariates,
            max_record_bytes=settings.max_record_bytes,
            max_abs_value=settings.max_abs_value,
            earliest_ts_ms=settings.earliest_ts_ms,
            max_ahead_ms=int(settings.max_ahead_s * 1000),
        )
        self.lock = threading.Lock()
        metrics.streams.set_function(lambda: len(self.arena))
        metrics.state_bytes.set_function(lambda: self.arena.state_bytes)
        level = f"{self.config.quantiles[-1] - self.config.quantiles[0]:.6g}"
        self._scored, self._hits = metrics.scored.labels(level), metrics.hits.labels(level)
        self.quantile_keys = [quantile_key(quantile) for quantile in self.config.quantiles]

    def process(self, records: Sequence[Record]) -> list[Outgoing]:
        """Take a poll's records; -> the forecast or dead letter of each that has one, a stream's in their order."""
        outgoing: list[Outgoing] = []
        observations: list[Observation] = []
        for record in records:
            try:
                observations.append(parse(record, self.limits))
            except Rejected as error:
                outgoing.append(self._reject(record, error))
        for wave in waves(observations, self.settings.max_wave_rows):
            with self.lock, timed(self.metrics.wave_seconds):
                outgoing += self._wave(wave)
        return outgoing

    def forget_partitions(self, partitions: Iterable[int]) -> None:
        """Drop the streams of partitions that this worker no longer has."""
        with self.lock:
            for partition in partitions:
                self.arena.forget_partition(partition)

    def _reject(self, record: Record, error: Rejected) -> Outgoing:
        self.metrics.observations["rejected"].inc()
        self.metrics.rejected[error.reason].inc()
        return dead_letter(record, error, self.settings.dead_letters_topic)

    def _wave(self, wave: Sequence[Observation]) -> list[Outgoing]:
        """At most one observation a stream: place, settle, advance, encode."""
        ended = [_key(observation) for observation in wave if observation.ended]
        if ended:
            self.arena.forget(ended)
            self.metrics.observations["ended"].inc(len(ended))
        moves, outgoing = self._place([observation for observation in wave if not observation.ended])
        if not moves.observations:
            return outgoing
        self.metrics.wave_rows.observe(len(moves.rows))
        state = self._step(moves)
        keys = [observation.stream for observation in moves.observations]
        for observation, fields in zip(moves.observations, self.describe(keys, state), strict=True):
            record = observation.record
            value = encode_forecast(fields)
            outgoing.append(
                Outgoing(
                    self.settings.forecasts_topic,
                    record.partition,
                    record.key,
                    value,
                    cause_ms=record.timestamp_ms,
                )
            )
        return outgoing

    def _place(self, wave: Sequence[Observation]) -> tuple[Moves, list[Outgoing]]:
        """Sort out what moves no stream; give the others their rows, reset or brought up to the step before."""
        rows = np.array([self._find(observation) for observation in wave], dtype=np.int64)
        ts_ms = np.array([observation.ts_ms for observation in wave], dtype=np.int64)
        known = rows >= 0
        last_slot = np.where(known, self.arena.column("slot")[rows], grid.NO_SLOT)
        placed = grid.place(self.config, ts_ms, last_slot, self.arena.column("ts_ms")[rows])
        self.metrics.observations["late"].inc(int(placed.late.sum()))
        self.metrics.observations["duplicate"].inc(int(placed.duplicate.sum()))
        outgoing = [
            self._reject(wave[n].record, Rejected(Reason.TIME, "the time falls into a hole of the model's grid"))
            for n in np.flatnonzero(placed.hole).tolist()
        ]
        fresh = placed.fresh.copy()
        for n in np.flatnonzero(fresh & ~known).tolist():
            try:
                rows[n] = self.arena.row(_key(wave[n]))
            except Full:
                fresh[n] = False
                most = self.settings.max_streams
                error = Rejected(Reason.LIMIT, f"the worker holds {most} streams already, its limit (max_streams)")
                outgoing.append(self._reject(wave[n].record, error))
        self._restart(rows[fresh & placed.afresh])
        self._bridge(rows[fresh], placed.missing[fresh], last_slot[fresh])
        chosen = [wave[n] for n in np.flatnonzero(fresh).tolist()]
        covariates = np.array([observation.covariates for observation in chosen], dtype=float)
        return Moves(
            chosen,
            rows[fresh],
            placed.slot[fresh],
            ts_ms[fresh],
            np.array([observation.value for observation in chosen], dtype=float),
            covariates.reshape(len(chosen), len(self.config.covariates)),
        ), outgoing

    def _find(self, observation: Observation) -> int:
        row = self.arena.find(_key(observation))
        return -1 if row is None else row

    def _restart(self, rows: Int64s) -> None:
        if len(rows):
            self.arena.reset(rows)
            self.metrics.restarted.inc(len(rows))

    def _bridge(self, rows: Int64s, missing: Int64s, last_slot: Int64s) -> None:
        """Advance rows over their missing steps. Gaps of any mixture of lengths go together in blocks of 2^n steps,
        so that a wave takes a handful of steps however many streams in it have gaps.
        """
        self.metrics.bridged.inc(int(missing.sum()))
        at = last_slot.copy()
        size = 1 << int(missing.max(initial=0)).bit_length() >> 1
        while size:
            some = np.flatnonzero(missing & size)
            for start in range(0, len(some), max(1, BRIDGE_CELLS // size)):
                part = some[start : start + max(1, BRIDGE_CELLS // size)]
                slots = at[part, None] + 1 + np.arange(size)
                block = self._block(np.full(slots.shape, np.nan), grid.times_of(self.config, slots, slots))
                index = torch.from_numpy(rows[part])
                _, after = self.forecaster.advance(self.arena.gather(index), block, last=1)
                self.arena.scatter(index, after)
            at[some] += size
            size >>= 1

    def _block(
        self, values: NDArray[np.float64], ts_ms: Int64s, covariates: NDArray[np.float64] | None = None
    ) -> Block:
        if covariates is None:
            covariates = np.full((*values.shape, len(self.config.covariates)), np.nan)
        return Block(torch.from_numpy(values), torch.from_numpy(ts_ms), torch.from_numpy(covariates))

    def _step(self, moves: Moves) -> Rows:
        """Settle the open forecasts with what came, advance by one step, write the states back. -> the new states."""
        index = torch.from_numpy(moves.rows)
        state = self.arena.gather(index)
        values, ts_ms = torch.from_numpy(moves.values), torch.from_numpy(moves.ts_ms)
        settled = self.scores.settle(state, values)
        self._scored.inc(int(settled.scored.sum()))
        self._hits.inc(int(settled.hit.sum()))
        times = grid.times_of(self.config, moves.slot, moves.ts_ms)
        with timed(self.metrics.step_seconds):
            _, after = self.forecaster.advance(
                state, self._block(moves.values[:, None], times[:, None], moves.covariates[:, None])
            )
        after |= settled.rows | self.history.append(state, values, ts_ms)
        after |= {
            "slot": torch.from_numpy(moves.slot),
            "ts_ms": ts_ms,
            "count": state["count"] + 1,
        }
        self.arena.scatter(index, after)
        missing = int(np.isnan(moves.values).sum())
        self.metrics.observations["missing"].inc(missing)
        self.metrics.observations["observed"].inc(len(moves.values) - missing)
        return after

    def describe(self, streams: Sequence[str], state: Rows) -> Iterator[dict[str, Any]]:
        """The forecasts that stand open in B states, as the forecasts topic and HTTP tell them."""
        values = Forecast(state["base"], state["scale"], state["offsets"]).values.numpy()
        by_quantile = np.ascontiguousarray(rounded(values, state["scale"].numpy()).transpose(0, 2, 1))
        last, gap = state["values"][:, -1].tolist(), state["gap"].tolist()
        slot, ts_ms, count, steps = (state[name].tolist() for name in ("slot", "ts_ms", "count", "steps"))
        for n, stream in enumerate(streams):
            yield {
                "stream": stream,
                "ts": ts_ms[n],
                "slot": slot[n],
                "step_ms": self.config.step_ms,
                "model": self.bundle.model_id,
                "count": count[n],
                "observed": last[n] if gap[n] == 0 else None,
                "quantiles": dict(zip(self.quantile_keys, by_quantile[n], strict=True)),
                "status": "live" if steps[n] >= self.config.warmup else "warming",
            }


def _key(observation: Observation) -> StreamKey:
    return StreamKey(observation.record.partition, observation.stream)


@contextmanager
def timed(histogram: BatchHistogram) -> Iterator[None]:
    started = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - started)
