"""The engine: records in, forecasts and dead letters out, states moved on. No Kafka, no HTTP, no clock in here.

Follow `Engine.process` to see a record's way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

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
from service.bursts import Runs, pieces, runs
from service.errors import Reason, Rejected, ServiceError
from service.forecasts import Issued, Teller, quantile_key
from service.history import History
from service.metrics import BatchHistogram, Judged, Metrics
from service.partition import NOBODY, Bounds, Partition, Taken
from service.records import Limits, Observations, Outgoing, Record, dead_letter, part, read
from service.settings import Settings
from service.waves import latest, passes, turns, waves

if TYPE_CHECKING:
    from model.fused import FusedStep
    from model.fused import Stepped as FusedStepped

log = logging.getLogger(__name__)

FORECAST_NUMBERS_MAX = 40_000
"""Of up to 25 bytes each as JSON; Kafka takes records of 1 MiB by default."""
BRIDGE_CELLS = 1 << 14
"""Rows times steps of one batched step over a gap: bounds its memory."""
BURST_CELLS = 1 << 13
"""The same of a burst, whose forecasts are needed at every step."""
NARROW_ROWS = 16
"""Waves narrower than this, many of them, cost more than one burst."""
NARROW_WAVES = 4
NO_VALUES = np.empty((0, 0, 0))


@dataclass(frozen=True)
class Moves:
    """M observations that move their streams on, in order; and, as columns [M], how: see `Taken`."""

    seen: Observations
    row: Int64s
    line: Int64s
    slot: Int64s
    missing: Int64s
    afresh: NDArray[np.bool_]
    heard_ms: Int64s

    @classmethod
    def of(cls, seen: Observations, taken: Sequence[tuple[Int64s, Taken]]) -> Moves:
        """Those of all partitions: of each, the numbers of its observations and what they mean."""
        moving = [one.row != NOBODY for _, one in taken]
        at = np.concatenate([some[moves] for (some, _), moves in zip(taken, moving, strict=True)])
        columns = [
            np.concatenate([getattr(one, name)[moves] for (_, one), moves in zip(taken, moving, strict=True)])
            for name in ("row", "line", "slot", "missing", "afresh", "heard_ms")
        ]
        return cls(part(seen, at), *columns)

    @cached_property
    def latest(self) -> NDArray[np.bool_]:
        """Those after which their stream does not move again."""
        return latest(self.line)

    def passes(self, widest: int, most: int) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
        """All their steps, the missing ones before each too, in passes (see `waves.passes`). -> of each step the move
        that it is or leads to, and how many steps before that; where each wave of the pass ends.
        """
        move = np.repeat(np.arange(len(self.row)), self.missing + 1)
        before = np.repeat(np.cumsum(self.missing + 1) - 1, self.missing + 1) - np.arange(len(move))
        order = np.argsort(self.line, kind="stable")
        other = np.zeros(len(order), dtype=np.bool_)
        other[order[1:]] = np.diff(self.row[order]) != 0
        anew = (self.afresh | other)[move] & (before == self.missing[move])
        for some, ends in passes(self.line[move], anew, widest, most):
            yield move[some], before[some], ends

    def runs(self, some: Int64s) -> Iterator[Runs]:
        """Some of the moves, by rows."""
        columns = (self.row, self.line, self.slot, self.missing, self.afresh)
        for together in runs(*(column[some] for column in columns)):  # type: ignore[arg-type]
            yield replace(together, **{name: some[getattr(together, name)] for name in ("moves", "head", "last")})


@dataclass(frozen=True)
class Stepped:
    """What moves brought, by their numbers, as columns [n]: how many observations their streams had then; whether they
    were live; of the forecasts then issued the scale, the anomaly, and the values [n, H, Q] (NO_VALUES if nobody is
    told). scores [K, 5]: the sum of the measures of what was settled.
    """

    moves: Int64s
    count: Int64s
    live: NDArray[np.bool_]
    scale: NDArray[np.float64]
    anomaly: NDArray[np.float64]
    values: NDArray[np.float64]
    scores: NDArray[np.float64]

    def part(self, some: Int64s) -> Stepped:
        """Of some of the moves."""
        names = ("moves", "count", "live", "scale", "anomaly", "values")
        return replace(self, **{name: getattr(self, name)[some] for name in names})


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
        self.compiled = self._compile() if settings.compiled else None
        """The step of a wave, where numba is installed."""
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
        self.teller = Teller(bundle.model_id, self.config, compiled=settings.compiled)
        """Of all that is forecast, as HTTP tells it."""
        self.emitted = self._emitted(settings)

    def _compile(self) -> FusedStep | None:
        try:
            from model.fused import FusedStep
        except ImportError:
            log.warning("numba is not installed (the extra `fast`): streams are followed several times slower")
            return None
        return FusedStep(self.follower, self.arena.schema)

    def warm(self) -> None:
        """Have all compiled that is; the first time on a machine it takes some 20 s, and is then kept."""
        if self.compiled:
            log.info("compiling the step, if it was not yet")
            self.compiled.warm()
        zero, none = np.zeros(1, dtype=np.int64), np.zeros(1)
        values = np.zeros((1, self.config.horizon, len(self.config.quantiles)))
        self.emitted.encode(Issued([""], zero, zero, zero, zero > 0, none, none, none, values))

    def _emitted(self, settings: Settings) -> Teller:
        """What is written to the forecasts topic."""
        asked = settings.emit_quantiles, settings.emit_horizons, settings.emit_decimals
        try:
            return Teller(self.bundle.model_id, self.config, *asked, compiled=settings.compiled)
        except ValueError as error:
            raise ServiceError(f"setting emit_quantiles or emit_horizons: {error}") from error

    def partition(self, number: int) -> Partition:
        """A partition of the observations topic, without streams if it is new here."""
        if number not in self.partitions:
            self.partitions[number] = Partition(number, self.arena, self.config, Bounds.of(self.settings))
        return self.partitions[number]

    def process(self, records: Sequence[Record], crashed: Collection[tuple[int, int]] = ()) -> list[Outgoing]:
        """Take a poll's records; -> the forecast or dead letter of each that has one, a stream's in their order.

        crashed: partition and offset of records that ended the process before and are not to be looked at again.
        """
        return [outgoing for some in self.answers(records, crashed) for outgoing in some]

    def answers(
        self, records: Sequence[Record], crashed: Collection[tuple[int, int]] = ()
    ) -> Iterator[Sequence[Outgoing]]:
        """`process`, piece by piece, each as soon as it is there; all must be taken, or a rollback follow."""
        if crashed:
            ended = Rejected(Reason.CRASH, "the process ended each time it came to this record")
            suspects = [record for record in records if (record.partition, record.offset) in crashed]
            records = [record for record in records if (record.partition, record.offset) not in crashed]
            for record in suspects:
                self.partition(record.partition).crashed(record.offset)
            yield [self._reject(record, ended) for record in suspects]
        seen, rejected = read(records, self.limits)
        with self.lock:
            moves, refused = self._take(seen)
        yield [*(self._reject(record, error) for record, error in rejected), *refused]
        yield from self._advance(moves, told=True)
        self._settle()

    def replay(self, number: int, records: Sequence[Record], covered: Callable[[str], int]) -> None:
        """Move the streams of a partition as `process` did when it took these records, and say nothing.

        covered: the offset before which a stream's records are in its state already. The partition follows its journal.
        """
        partition = self.partition(number)
        deadly = partition.known_to_crash()  # not even to be parsed
        seen, _ = read([record for record in records if record.offset not in deadly], self.limits)
        seen = part(seen, np.flatnonzero(~self._holes(seen)))
        with self.lock:
            moves = Moves.of(seen, [(np.arange(len(seen.streams)), partition.take(seen, covered))])
        for _ in self._advance(moves, told=False):
            pass
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

    def watch(self, partitions: frozenset[int]) -> None:
        """Tell of the watched streams of these partitions what was last observed, and what had been forecast for it."""
        if not self.settings.watched_streams:
            return
        told = {}
        for stream in self.settings.watched_streams:
            if key := self.arena.last_heard(stream, partitions):
                row = self.arena.streams(key.partition)[stream]
                value, forecast = self.history.last(self.arena.tensors, row)
                told[stream] = value, dict(zip(self.history.keys, forecast.tolist(), strict=True))
        self.metrics.watched.told = told

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

    def _holes(self, seen: Observations) -> NDArray[np.bool_]:
        """Whose time is no slot of the grid; a tombstone's need not be one."""
        if self.config.grid is None:
            return np.zeros(len(seen.streams), dtype=np.bool_)
        return np.asarray((self.config.grid.slot_of(seen.ts_ms) == HOLE) & ~seen.ended)

    def _take(self, seen: Observations) -> tuple[Moves, list[Outgoing]]:
        """Who moves, and what becomes of the others."""
        holes, partitions = self._holes(seen), seen.partitions
        hole = Rejected(Reason.TIME, "the time falls into a hole of the model's grid")
        refused = [self._reject(seen.records[n], hole) for n in np.flatnonzero(holes).tolist()]
        taken: list[tuple[Int64s, Taken]] = []
        for number in np.unique(partitions).tolist():
            some = np.flatnonzero((partitions == number) & ~holes)
            one = self.partition(number).take(part(seen, some))
            refused += [self._reject(seen.records[int(some[n])], error) for n, error in one.refused.items()]
            taken.append((some, one))
        counted = self.metrics.observations
        counted["ended"].inc(int(seen.ended.sum()))
        for name in ("late", "duplicate"):
            counted[name].inc(int(sum(getattr(one, name).sum() for _, one in taken)))
        return Moves.of(seen, taken or [(np.arange(0), Taken.none(0))]), refused

    def _settle(self) -> None:
        with self.lock:
            for partition in self.partitions.values():
                partition.settle()

    def _advance(self, moves: Moves, *, told: bool) -> Iterator[Sequence[Outgoing]]:
        """Move rows on: by the compiled step in passes of many waves; else in waves, as long as those are wide, and
        what is left after that, run by run. -> the forecasts of each, if they are to be told.
        """
        for make in self._makings(moves, told=told):
            with timed(self.metrics.wave_seconds):
                with self.lock:
                    made = make()
                outgoing = [one for stepped in made for one in self._told(moves, stepped)] if told else ()
            yield outgoing

    def _makings(self, moves: Moves, *, told: bool) -> Iterator[Callable[[], Sequence[Stepped]]]:
        """The moves in portions, each of which is made in one go."""
        most = self.settings.max_wave_rows
        if self.compiled:
            for steps in moves.passes(min(self.compiled.widest, most), most):
                yield partial(self._pass, self.compiled, moves, *steps)
            return
        turn = turns(moves.line)
        wide = _wide(np.bincount(turn))
        early, late = np.flatnonzero(turn < wide), np.flatnonzero(turn >= wide)
        for wave in waves(turn[early], most):
            yield partial(self._wave, moves, early[wave])
        for together in moves.runs(late):
            yield partial(self._burst, moves, together, told=told)

    def _told(self, moves: Moves, stepped: Stepped) -> list[Outgoing]:
        """The forecasts after these moves, as records."""
        self._count(moves.seen.values[stepped.moves], stepped)
        if self.settings.emit == "latest":
            stepped = stepped.part(np.flatnonzero(moves.latest[stepped.moves]))
        values, topic = self.emitted.encode(self._issued(moves, stepped)), self.settings.forecasts_topic
        records = [moves.seen.records[n] for n in stepped.moves.tolist()]
        return [
            Outgoing(topic, record.partition, record.key, value, (), record.timestamp_ms)
            for record, value in zip(records, values, strict=True)
        ]

    def _issued(self, moves: Moves, stepped: Stepped) -> Issued:
        some, seen = stepped.moves, moves.seen
        return Issued(
            [seen.streams[n] for n in some.tolist()],
            seen.ts_ms[some],
            moves.slot[some],
            stepped.count,
            stepped.live,
            seen.values[some],
            stepped.anomaly,
            stepped.scale,
            stepped.values,
        )

    def _count(self, observed: NDArray[np.float64], stepped: Stepped) -> None:
        missing = int(np.isnan(observed).sum())
        self.metrics.observations["missing"].inc(missing)
        self.metrics.observations["observed"].inc(len(observed) - missing)
        self._judged.inc(stepped.scores.tolist())
        self.metrics.anomaly.observe(stepped.anomaly[~np.isnan(stepped.anomaly)])

    def _wave(self, moves: Moves, some: Int64s) -> list[Stepped]:
        """Bring rows up to the step before theirs, settle the open forecasts with what came, advance by one step, write
        the states back.
        """
        self.metrics.wave_rows.observe(len(some))
        row, slot, missing = moves.row[some], moves.slot[some], moves.missing[some]
        self._start_afresh(row[moves.afresh[some]])
        self._bridge(row, missing, slot - missing - 1)
        count = self.arena.column("count")[row] + 1
        here = (np.arange(len(some)), np.zeros(len(some), dtype=np.int64))
        stepped = self._step(moves, some, row, here, slot, 1, count, told=True)
        self._stand(row, moves, some, count)
        return [stepped]

    def _pass(self, step: FusedStep, moves: Moves, move: Int64s, before: Int64s, ends: Int64s) -> list[Stepped]:
        """The same of waves one after the other, by the compiled step, in place in the arena. Their steps are `before`
        steps before these moves, and are missing unless that is 0; ends: of each wave.
        """
        row, line, slot, seen = moves.row[move], moves.line[move], moves.slot[move] - before, moves.seen
        missing, head = before > 0, turns(line) == 0
        self.arena.save(torch.from_numpy(row[head]))
        self._start_afresh(row[head & moves.afresh[move]])
        values, covariates = seen.values[move], seen.covariates[move]
        values[missing] = covariates[missing] = np.nan
        columns = (row, values, grid.times_of(self.config, slot, seen.ts_ms[move]), covariates, ends)
        with timed(self.metrics.step_seconds):
            stepped = step.advance(self.arena.block, *map(torch.from_numpy, columns))
        self.metrics.wave_rows.observe(np.diff(ends, prepend=0))
        self.metrics.bridged.inc(int(missing.sum()))
        stood = self._stood(moves, move, np.flatnonzero(~missing), stepped)
        among = missing & latest(line)  # whose missing steps go on in the next pass
        self.arena.scatter(torch.from_numpy(row[among]), {"slot": torch.from_numpy(slot[among])})
        return [stood]

    def _stood(self, moves: Moves, move: Int64s, here: Int64s, stepped: FusedStepped) -> Stepped:
        """What the steps `here` brought, which are the moves themselves, written into their rows."""
        some, anomaly = move[here], stepped.anomaly.numpy()[here]
        row, line = moves.row[some], moves.line[some]
        count = self.arena.column("count")[row] + 1 + turns(line)
        steps, scale = stepped.steps.numpy()[here], stepped.scale.numpy()[here]
        opened = np.where(steps[:, None] > 1, stepped.opened.numpy()[here], np.nan)
        self._note(moves, some, row, count, opened, anomaly)
        last = latest(line)
        self._stand(row[last], moves, some[last], count[last])
        issued = stepped.issued.numpy()
        values = issued if len(here) == len(move) else issued[here]
        return Stepped(some, count, steps >= self.config.warmup, scale, anomaly, values, stepped.scores.numpy())

    def _burst(self, moves: Moves, together: Runs, *, told: bool) -> list[Stepped]:
        """Move rows through all the moves of their runs, T > 1 steps at a time."""
        self.metrics.bridged.inc(int(moves.missing[together.moves].sum()))
        rows = moves.row[together.head]
        at, stepped = np.zeros(len(rows), dtype=np.int64), []
        self._start_afresh(rows[moves.afresh[together.head]])
        count = self.arena.column("count")[rows]
        for whose, size in pieces(together.steps, BURST_CELLS):
            some, stream, step = together.window(whose, at[whose], size)
            counts = count[whose][stream] + turns(stream) + 1
            first_slot = together.first_slot[whose] + at[whose]
            stepped.append(self._step(moves, some, rows[whose], (stream, step), first_slot, size, counts, told))
            at[whose] += size
            count[whose] += np.bincount(stream, minlength=len(whose))
        self._stand(rows, moves, together.last, count)
        return stepped

    def _step(
        self,
        moves: Moves,
        some: Int64s,
        rows: Int64s,
        at: tuple[Int64s, Int64s],
        first_slot: Int64s,
        size: int,
        count: Int64s,
        told: bool,
    ) -> Stepped:
        """Advance each row by `size` steps from a slot on, write the states back. Of the moves, `some` fall there, on
        the streams and steps `at`; count: how many observations their streams had then. told: with the forecasts.
        """
        seen_ms, values = np.zeros((len(rows), size), dtype=np.int64), np.full((len(rows), size), np.nan)
        covariates = np.full((len(rows), size, len(self.config.covariates)), np.nan)
        seen_ms[at], values[at] = moves.seen.ts_ms[some], moves.seen.values[some]
        covariates[at] = moves.seen.covariates[some]
        slots = first_slot[:, None] + np.arange(size)
        block = self._block(values, grid.times_of(self.config, slots, seen_ms), covariates)
        index = torch.from_numpy(rows)
        state = self.arena.gather(index)
        with timed(self.metrics.step_seconds):
            followed = self.follower.advance(state, block)
        self.arena.scatter(index, followed.rows)
        steps = state["steps"].numpy()[at[0]] + at[1] + 1
        opened = np.where(steps[:, None] > 1, followed.opened.numpy()[at], np.nan)
        anomaly = followed.anomaly.numpy()[at]
        self._note(moves, some, rows[at[0]], count, opened, anomaly)
        return Stepped(
            some,
            count,
            steps >= self.config.warmup,
            followed.raw.scale.numpy()[at],
            anomaly,
            self.follower.calibrated(followed).values.numpy()[at] if told else NO_VALUES,
            followed.scores.sum((0, 1)).numpy(),
        )

    def _note(
        self,
        moves: Moves,
        some: Int64s,
        row: Int64s,
        count: Int64s,
        opened: NDArray[np.float64],
        anomaly: NDArray[np.float64],
    ) -> None:
        seen = moves.seen
        self.history.note(self.arena.columns, row, count, seen.ts_ms[some], seen.values[some], opened, anomaly)

    def _start_afresh(self, rows: Int64s) -> None:
        self.arena.reset(torch.from_numpy(rows))
        self.metrics.restarted.inc(len(rows))

    def _stand(self, rows: Int64s, moves: Moves, some: Int64s, count: Int64s) -> None:
        """Write when, and where among the others, streams were last heard."""
        columns = {
            "slot": moves.slot[some],
            "ts_ms": moves.seen.ts_ms[some],
            "offset": moves.seen.offsets[some],
            "heard_ms": moves.heard_ms[some],
            "count": count,
        }
        told = {name: torch.from_numpy(column) for name, column in columns.items()}
        self.arena.scatter(torch.from_numpy(rows), told)

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

    def _block(
        self, values: NDArray[np.float64], ts_ms: Int64s, covariates: NDArray[np.float64] | None = None
    ) -> Block:
        if covariates is None:
            covariates = np.full((*values.shape, len(self.config.covariates)), np.nan)
        return Block(torch.from_numpy(values), torch.from_numpy(ts_ms), torch.from_numpy(covariates))

    def describe(self, streams: Sequence[str], state: Rows, *, raw: bool = False) -> Iterator[dict[str, Any]]:
        """The forecasts that stand open in B states, as the forecasts topic and HTTP tell them; raw: uncalibrated."""
        last = torch.where(state["gap"] == 0, state["values"][:, -1], torch.nan)
        live = state["steps"] >= self.config.warmup
        columns = (state["ts_ms"], state["slot"], state["count"], live, last, self.follower.anomaly.score(state))
        values = self.follower.standing(state, raw=raw).values
        issued = Issued(streams, *(column.numpy() for column in (*columns, state["scale"], values)))
        return self.teller.describe(issued)


def _wide(widths: Int64s) -> int:
    """How many waves of these widths, falling, are to be made: after them come narrow ones only, and many."""
    wide = int((widths >= NARROW_ROWS).sum())
    return wide if len(widths) - wide >= NARROW_WAVES else len(widths)


@contextmanager
def timed(histogram: BatchHistogram) -> Iterator[None]:
    started = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - started)
