"""Records a second, from a topic that is full: the worker Kafka to Kafka, beside its client alone; and its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from deploy.bench import against, flame
from deploy.bench.bare import CLIENTS, Rhythm, Topics, bare_client
from deploy.bench.figures import Probe, Sample
from deploy.bench.load import (
    GUARANTEES,
    Bench,
    emitted,
    forecast_values,
    living,
    load,
    make_records,
    new_engine,
    process,
    process_all,
    transports,
    turn_until,
)
from deploy.bench.step import bare_step
from service.engine import Engine
from service.records import Record
from service.settings import Settings

UNIT = "records/s"
ENGINE = "engine alone: records in, records out, no Kafka"
STEP = "bare LSTM and head alone, all streams at once"
ONE_BY_ONE = "a step a message, no Kafka"
ONE_BY_ONE_RECORDS = 500
"""Enough to tell its rate."""


def probes(bench: Bench) -> Iterator[Probe]:
    """The worker by each transport, guarantee and output; the clients alone; the engine alone; the rivals."""
    config = bench.config
    records = make_records(bench.streams(), config.steps)
    outputs = emitted(new_engine(bench.settings()).config)
    for (output, emit), guarantee in product(outputs.items(), GUARANTEES):
        values = forecast_values(bench.settings(**emit), records[: bench.streams()])
        for client in dict.fromkeys((*transports(config), *CLIENTS)):
            told = f"{client}, {guarantee.replace('_', ' ')}, {output}"
            settings = partial(bench.settings, guarantee=guarantee, transport=client, **emit)
            limit = f"{told}: the client alone"
            yield _probe(limit, partial(_bare, client, settings, records, values), role="limit")
            if client in transports(config):
                yield _probe(f"{told}: carousel", partial(_worker, settings, records), limit=limit)
    yield _probe(STEP, partial(_bare_step, bench), role="limit")
    yield _probe(ENGINE, partial(_engine_alone, bench.settings, records), limit=STEP)
    yield _probe(ONE_BY_ONE, partial(_one_by_one, bench.settings, records), role="rival", limit=ENGINE)
    beside = f"{transports(config)[0]}, exactly once, {next(iter(outputs))}: carousel"
    for number, command in enumerate(config.against):
        yield against.probe(bench, command, number, records, beside)


def _probe(name: str, measure: Callable[[], float], **told: Any) -> Probe:
    return Probe(name, lambda: [Sample(name, measure(), UNIT, **told)])


def _bare(client: str, settings: Callable[[], Settings], records: Sequence[Record], values: Sequence[bytes]) -> float:
    own = settings()
    load(own, records)
    bare = bare_client(client, Topics.of(own), Rhythm.of(own), values)
    try:
        return rate(len(records), lambda: _turn_bare(bare.turn, lambda: bare.passed, len(records)))
    finally:
        bare.close()


def _turn_bare(turn: Callable[[], None], passed: Callable[[], int], count: int) -> None:
    while passed() < count:
        turn()


def _worker(settings: Callable[[], Settings], records: Sequence[Record]) -> float:
    own = settings()
    with living(own) as worker:  # joining the group is no part of the figure, nor is loading the topic
        worker.transport.pause(range(own.partitions))
        load(own, records)
        worker.transport.resume(range(own.partitions))
        return rate(len(records), lambda: turn_until(worker, len(records)))


def _bare_step(bench: Bench) -> float:
    return 1e6 / bare_step(new_engine(bench.settings()).bundle.forecaster, bench.streams())


def _engine_alone(settings: Callable[[], Settings], records: Sequence[Record]) -> float:
    engine = new_engine(settings())
    return rate(len(records), lambda: process_all(engine, records))


def _one_by_one(settings: Callable[[], Settings], records: Sequence[Record]) -> float:
    engine, some = new_engine(settings()), records[:ONE_BY_ONE_RECORDS]
    return rate(len(some), lambda: _each(engine, some))


def _each(engine: Engine, records: Sequence[Record]) -> None:
    for record in records:
        process(engine, [record])


def profile(bench: Bench, path: Path) -> None:
    """One more run of the worker, of which a flame graph is written: so no figure is measured under the profiler."""
    settings = bench.settings(transport=transports(bench.config)[0])
    records = make_records(bench.streams(), bench.config.steps)
    with living(settings) as worker:
        worker.transport.pause(range(settings.partitions))
        load(settings, records)
        worker.transport.resume(range(settings.partitions))
        with flame.graph(path):
            turn_until(worker, len(records))


def rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)
