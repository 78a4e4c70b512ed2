"""The engine: records in, forecasts and dead letters out, states moved on. No Kafka, no HTTP, no clock in here.

Follow `Engine.process` to see a record's way.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle
from model.features import Block
from model.follow import Follower
from model.grid import HOLE, Int64s
from model.state import Rows, Schema
from service import grid
from service.arena import Arena
from service.bursts import Run, pieces, runs
from service.errors import Reason, Rejected, ServiceError
from service.history import History
from service.metrics import BatchHistogram, Judged, Metrics
from service.partition import Bounds, Decided, Move, Partition
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
BRIDGE_CELLS = 1 << 14
"""Rows times steps of one batched step over a gap: bounds its memory."""
BURST_CELLS = 1 << 13
"""The same of a burst, whose forecasts are needed at every step."""


class Engine:
    """The streams of one worker, and the model that follows them. What was processed stands once it is committed.

    `lock` is held while states move; take it to read them from another thread. Raises ServiceError for a model whose
    forecasts Kafka could not carry.
    """

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.settings, self.metrics = settings, metrics
        if self.config.horizon * len(self.config.quantiles) > FORECAST_NUMBERS_MAX:
            raise ServiceError(
                f"{bundle.model_id} forecasts {self.config.horizon} x {len(self.config.quantiles)} numbers, more than"
                f" fit into a Kafka record: train with a shorter horizon or fewer quantiles"
            )
        self.follower = Follower(bundle.forecaster, calibrate=settings.intervals == "calibrated")
        self.history = History(self.config, settings.history_steps)
        self.arena = Arena(Schema((*grid.SCHEMA, *self.follower.schema, *self.history.schema)))
        self.partitions: dict[int, Partition] = {}
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
        self._judged = Judged(metrics, self.config.quantiles, self.follower.horizons)
        self.quantile_keys = [quantile_key(quantile) for quantile in self.config.quantiles]

    def partition(self, number: int) -> Partition:
        """A partition of the observations topic, without streams if it is new here."""
        if number not in self.partitions:
            self.partitions[number] = Partition(number, self.arena, self.config, Bounds.of(self.settings))
        return self.partitions[number]

    def process(self, records: Sequence[Record], crashed: Collection[tuple[int, int]] = ()) -> list[Outgoing]:
        """Take a poll's records; -> the forecast or dead letter of each that has one, a stream's in their order.

        crashed: partition and offset of records that ended the process before and are not to be looked at again.
        """
        outgoing: list[Outgoing] = []
        observations: list[Observation] = []
        for record in records:
            if (record.partition, record.offset) in crashed:
                self.partition(record.partition).crashed(record.offset)
                ended = Rejected(Reason.CRASH, "the process ended each time it came to this record")
                outgoing.append(self._reject(record, ended))
                continue
            try:
                observations.append(parse(record, self.limits))
            except Rejected as error:
                outgoing.append(self._reject(record, error))
        with self.lock:
            moves, refused = self._take(observations)
        outgoing += refused
        for wave in waves(moves, self.settings.max_wave_rows):
            with self.lock, timed(self.metrics.wave_seconds):
                outgoing += self._encode(wave, self._advance(wave))
        self._settle()
        return outgoing

    def replay(self, number: int, records: Sequence[Record], covered: Callable[[str], int]) -> None:
        """Move the streams of a partition as `process` did when it took these records, and say nothing.

        covered: the offset before which a stream's records are in its state already. The partition follows its journal.
        """
        partition = self.partition(number)
        with self.lock:
            moves = list(self._retake(partition, records, covered))
        for together in runs(moves):
            with self.lock:
                self._burst(together)
        with self.lock:
            partition.settle()
            self.arena.commit()

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Let what was processed stand. offsets: by partition, that of the next record."""
        with self.lock:
            self.arena.commit()
            for number, offset in offsets.items():
                partition = self.partition(number)
                for reason, count in partition.forgotten.items():
                    self.metrics.evicted[reason].inc(count)
                partition.stand(partition.next(offset))

    def rollback(self) -> None:
        """Undo what was processed since the last commit."""
        with self.lock:
            self.arena.rollback()
            for partition in self.partitions.values():
                if not partition.replaying:  # a replay is in no transaction
                    partition.stand(partition.mark)

    def forget_partitions(self, partitions: Iterable[int]) -> None:
        """Drop the streams of partitions that this worker no longer has; between transactions."""
        with self.lock:
            for partition in partitions:
                self.partitions.pop(partition, None)
                self.arena.forget_partition(partition)

    def _reject(self, record: Record, error: Rejected) -> Outgoing:
        self.metrics.observations["rejected"].inc()
        self.metrics.rejected[error.reason].inc()
        return dead_letter(record, error, self.settings.dead_letters_topic)

    def _slots(self, observations: Sequence[Observation]) -> list[int]:
        ts_ms = np.array([observation.ts_ms for observation in observations], dtype=np.int64)
        slots = self.config.grid.slot_of(ts_ms) if self.config.grid else np.zeros_like(ts_ms)
        return list(map(int, slots))

    def _take(self, observations: Sequence[Observation]) -> tuple[list[Move], list[Outgoing]]:
        """In the order of the records: who moves, and what becomes of the others."""
        moves: list[Move] = []
        refused: list[Outgoing] = []
        counts: Counter[str] = Counter()
        for observation, slot in zip(observations, self._slots(observations), strict=True):
            partition, record = self.partition(observation.record.partition), observation.record
            if observation.ended:
                partition.end(observation.stream)
                counts["ended"] += 1
                continue
            if slot == HOLE:
                hole = Rejected(Reason.TIME, "the time falls into a hole of the model's grid")
                refused.append(self._reject(record, hole))
                continue
            partition.tick(observation.ts_ms, record.offset)
            try:
                taken = partition.take(observation, slot)
            except Rejected as error:
                refused.append(self._reject(record, error))
            else:
                if isinstance(taken, str):
                    counts[taken] += 1
                else:
                    moves.append(taken)
        for outcome, count in counts.items():
            self.metrics.observations[outcome].inc(count)
        return moves, refused

    def _retake(self, partition: Partition, records: Sequence[Record], covered: Callable[[str], int]) -> Iterator[Move]:
        """The moves that `_take` gave for these records when they first came."""
        observations: dict[int, Observation] = {}
        deadly = partition.known_to_crash()  # not even to be parsed
        for record in records:
            if record.offset not in deadly:
                with suppress(Rejected):
                    observations[record.offset] = parse(record, self.limits)
        slots = dict(zip(observations, self._slots(list(observations.values())), strict=True))
        for record in records:
            for entry in partition.decided_before(record.offset):
                if entry.decided is Decided.FORGOTTEN and covered(entry.stream) <= entry.offset:
                    partition.end(entry.stream)
            if record.offset not in observations:
                continue
            observation, slot = observations[record.offset], slots[record.offset]
            known = covered(observation.stream) > record.offset
            if observation.ended:
                if not known:
                    partition.end(observation.stream)
                continue
            if slot == HOLE:
                continue
            partition.tick(observation.ts_ms, record.offset)
            if not known:
                with suppress(Rejected):
                    taken = partition.take(observation, slot)
                    if isinstance(taken, Move):
                        yield taken

    def _settle(self) -> None:
        with self.lock:
            for partition in self.partitions.values():
                partition.settle()

    def _encode(self, wave: Sequence[Move], state: Rows) -> Iterator[Outgoing]:
        """The forecasts that a wave's new states hold, as records."""
        streams = [move.observation.stream for move in wave]
        for move, fields in zip(wave, self.describe(streams, state), strict=True):
            record = move.observation.record
            value = encode_forecast(fields)
            yield Outgoing(
                self.settings.forecasts_topic, record.partition, record.key, value, cause_ms=record.timestamp_ms
            )

    def _advance(self, wave: Sequence[Move]) -> Rows:
        """Bring rows up to the step before theirs, settle the open forecasts with what came, advance by one step, write
        the states back. -> the new states.
        """
        self.metrics.wave_rows.observe(len(wave))
        rows = np.array([move.row for move in wave], dtype=np.int64)
        slot = np.array([move.slot for move in wave], dtype=np.int64)
        afresh = np.array([move.afresh for move in wave], dtype=np.bool_)
        self.arena.reset(torch.from_numpy(rows[afresh]))
        self.metrics.restarted.inc(int(afresh.sum()))
        last_slot = self.arena.column("slot")[rows]
        missing = np.where(last_slot == grid.NO_SLOT, 0, slot - last_slot - 1)
        self._bridge(rows, missing, last_slot)
        return self._step(wave, rows, slot)

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
                self.arena.scatter(index, self.follower.through(self.arena.gather(index), block))
            at[some] += size
            size >>= 1

    def _burst(self, together: Sequence[Sequence[Move]]) -> None:
        """Move rows through all their moves, T > 1 steps at a time; nobody asks for the forecasts between."""
        rows = np.array([moves[0].row for moves in together], dtype=np.int64)
        self.arena.reset(torch.from_numpy(rows[[moves[0].afresh for moves in together]]))
        slots = self.arena.column("slot")[rows].tolist()
        taken = [
            Run(moves, None if slot == grid.NO_SLOT else slot) for moves, slot in zip(together, slots, strict=True)
        ]
        at = np.zeros(len(taken), dtype=np.int64)
        for some, size in pieces(np.array([run.steps for run in taken], dtype=np.int64), BURST_CELLS):
            self._burst_block(rows[some], [taken[n] for n in some], at[some], size)
            at[some] += size
        index, last = torch.from_numpy(rows), [run.last for run in taken]
        counts = self.arena.gather(index)["count"] + torch.tensor([len(run.moves) for run in taken])
        self.arena.scatter(index, {**self._placed(last), "count": counts})

    def _burst_block(self, rows: Int64s, taken: Sequence[Run], at: Int64s, size: int) -> None:
        """Move each row through the next `size` steps of its run, from step `at` on."""
        values = np.full((len(rows), size), np.nan)
        covariates = np.full((len(rows), size, len(self.config.covariates)), np.nan)
        seen_ms = np.zeros((len(rows), size), dtype=np.int64)
        seen = np.zeros((len(rows), size), dtype=np.bool_)
        for n, run in enumerate(taken):
            where, moves = run.window(int(at[n]), int(at[n]) + size)
            values[n, where] = [move.observation.value for move in moves]
            seen_ms[n, where] = [move.observation.ts_ms for move in moves]
            seen[n, where] = True
            if self.config.covariates and moves:
                covariates[n, where] = [move.observation.covariates for move in moves]
        slots = (np.array([run.first_slot for run in taken]) + at)[:, None] + np.arange(size)
        index = torch.from_numpy(rows)
        state = self.arena.gather(index)
        block = self._block(values, grid.times_of(self.config, slots, seen_ms), covariates)
        followed = self.follower.advance(state, block)
        times, there = torch.from_numpy(seen_ms), torch.from_numpy(seen)
        history = self.history.append(state, block.values, times, there, followed)
        self.arena.scatter(index, followed.rows | history)

    def _placed(self, moves: Sequence[Move]) -> Rows:
        """The rows that tell of streams when, and where among the others, they were last heard."""
        return {
            "slot": torch.tensor([move.slot for move in moves]),
            "ts_ms": torch.tensor([move.observation.ts_ms for move in moves]),
            "offset": torch.tensor([move.observation.record.offset for move in moves]),
            "heard_ms": torch.tensor([move.heard_ms for move in moves]),
        }

    def _block(
        self, values: NDArray[np.float64], ts_ms: Int64s, covariates: NDArray[np.float64] | None = None
    ) -> Block:
        if covariates is None:
            covariates = np.full((*values.shape, len(self.config.covariates)), np.nan)
        return Block(torch.from_numpy(values), torch.from_numpy(ts_ms), torch.from_numpy(covariates))

    def _step(self, wave: Sequence[Move], rows: Int64s, slot: Int64s) -> Rows:
        index = torch.from_numpy(rows)
        state = self.arena.gather(index)
        observed = np.array([move.observation.value for move in wave], dtype=np.float64)
        seen_ms = np.array([move.observation.ts_ms for move in wave], dtype=np.int64)
        covariates = np.array([move.observation.covariates for move in wave], dtype=np.float64)
        times = grid.times_of(self.config, slot, seen_ms)
        block = self._block(observed[:, None], times[:, None], covariates.reshape(len(wave), 1, -1))
        with timed(self.metrics.step_seconds):
            followed = self.follower.advance(state, block)
        seen = torch.ones_like(block.ts_ms, dtype=torch.bool)
        history = self.history.append(state, block.values, torch.from_numpy(seen_ms)[:, None], seen, followed)
        after = followed.rows | history | self._placed(wave) | {"count": state["count"] + 1}
        self.arena.scatter(index, after)
        missing = int(np.isnan(observed).sum())
        self.metrics.observations["missing"].inc(missing)
        self.metrics.observations["observed"].inc(len(wave) - missing)
        self._judged.inc(followed.scores.sum((0, 1)).tolist())
        self.metrics.anomaly.observe(followed.anomaly[~followed.anomaly.isnan()].numpy())
        return after

    def describe(self, streams: Sequence[str], state: Rows, *, raw: bool = False) -> Iterator[dict[str, Any]]:
        """The forecasts that stand open in B states, as the forecasts topic and HTTP tell them; raw: uncalibrated."""
        values = self.follower.standing(state, raw=raw).values.numpy()
        by_quantile = np.ascontiguousarray(rounded(values, state["scale"].numpy()).transpose(0, 2, 1))
        last, gap = state["values"][:, -1].tolist(), state["gap"].tolist()
        slot, ts_ms, count, steps = (state[name].tolist() for name in ("slot", "ts_ms", "count", "steps"))
        anomaly = self.follower.anomaly.score(state).tolist()
        for n, stream in enumerate(streams):
            yield {
                "stream": stream,
                "ts": ts_ms[n],
                "slot": slot[n],
                "step_ms": self.config.step_ms,
                "model": self.bundle.model_id,
                "count": count[n],
                "observed": last[n] if gap[n] == 0 else None,
                "anomaly": None if math.isnan(anomaly[n]) else round(anomaly[n], 3),
                "quantiles": dict(zip(self.quantile_keys, by_quantile[n], strict=True)),
                "status": "live" if steps[n] >= self.config.warmup else "warming",
            }


@contextmanager
def timed(histogram: BatchHistogram) -> Iterator[None]:
    started = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - started)
