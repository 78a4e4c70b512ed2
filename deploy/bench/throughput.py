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
    create_topics,
    emitted,
    forecast_values,
    forecasts,
    living,
    load,
    make_records,
    new_engine,
    process,
    transports,
    turn_until,
)
from deploy.bench.step import bare_step
from service.records import Record
from service.settings import Settings

UNIT = "records/s"
ENGINE = "engine alone, no Kafka"
STEP = "bare LSTM and head alone, all streams at once"
ONE_BY_ONE = "engine alone, a step a message"
STEPS = 300
"""Observations of each stream: of 100, a client that fetches ahead had most in memory before the clock ran."""


def probes(bench: Bench) -> Iterator[Probe]:
    """The worker by each transport, guarantee and output; the clients alone; the engine alone; the rivals."""
    config = bench.config
    records = make_records(bench.streams(), bench.steps(STEPS))
    defaults = bench.settings()
    outputs = emitted(new_engine(defaults).config)
    yield Probe("Kafka itself, until it is warm", partial(_warm, bench, defaults, records))
    for (output, emit), guarantee in product(outputs.items(), GUARANTEES):
        values = forecast_values(bench.settings(**emit), records[: bench.streams()])
        for client in dict.fromkeys((*transports(config), *CLIENTS)):
            told = f"{client}, {guarantee.replace('_', ' ')}, {output}"
            settings = partial(bench.settings, guarantee=guarantee, transport=client, **emit)
            limit = f"{told}: the client alone"
            yield _probe(limit, partial(_bare, bench, client, settings, records, values), role="limit")
            if client in transports(config):
                yield _probe(f"{told}: carousel", partial(_worker, bench, settings, records), limit=limit)
    yield _probe(STEP, partial(_bare_step, bench), role="limit")
    yield _probe(ENGINE, partial(_engine_alone, bench, records, defaults.max_poll_records), limit=STEP)
    yield _probe(ONE_BY_ONE, partial(_engine_alone, bench, records, 1), role="rival", limit=ENGINE)
    beside = f"{transports(config)[0]}, exactly once, {next(iter(outputs))}: carousel"
    for number, command in enumerate(config.against):
        yield against.probe(bench, command, number, records, beside)


def _probe(name: str, measure: Callable[[], float], **told: Any) -> Probe:
    return Probe(name, lambda: [Sample(name, measure(), UNIT, **told)])


def _bare(
    bench: Bench, client: str, settings: Callable[[], Settings], records: Sequence[Record], values: Sequence[bytes]
) -> float:
    own = settings()
    create_topics(own)
    bare = bare_client(client, Topics.of(own), Rhythm.of(own), values)
    try:
        bare.turn()  # connects, which is no part of the figure
        bare.pause()
        load(own, records)
        bare.resume()
        return steady(bare.turn, lambda: bare.passed, len(records), bench.config.seconds)
    finally:
        bare.close()


def _warm(bench: Bench, settings: Settings, records: Sequence[Record]) -> list[Sample]:
    """Else whoever is measured first is measured with a Kafka that is still being compiled."""
    values = forecast_values(settings, records[: bench.streams()])
    _bare(bench, CLIENTS[-1], lambda: bench.settings(guarantee="exactly_once"), records, values)
    return []


def _worker(bench: Bench, settings: Callable[[], Settings], records: Sequence[Record]) -> float:
    own = settings()
    with living(own) as worker:  # joining the group is no part of the figure, nor is loading the topic
        worker.transport.pause(range(own.partitions))
        load(own, records)
        worker.transport.resume(range(own.partitions))
        return steady(worker.turn, lambda: forecasts(worker), len(records), bench.config.seconds)


def steady(turn: Callable[[], None], passed: Callable[[], int], count: int, seconds: float) -> float:
    """Turn until all is passed on, or for so long. -> records a second."""
    marks = [(time.perf_counter(), 0)]
    while marks[-1][1] < count and marks[-1][0] - marks[0][0] < seconds:
        turn()
        if (now := passed()) > marks[-1][1]:
            marks.append((time.perf_counter(), now))
    return pace(marks)


def pace(marks: Sequence[tuple[float, int]]) -> float:
    """Records a second by when so many were passed on. The first batch has to wait for its fetch, and the last one for
    records that do not come: where there are enough between, they alone count.

    >>> pace([(0.0, 0), (1.0, 10), (2.0, 110), (3.0, 210), (9.0, 211)])
    100.0
    """
    some = marks[1:-1] if len(marks) > 3 else [marks[0], marks[-1]]
    return (some[-1][1] - some[0][1]) / (some[-1][0] - some[0][0])


def _bare_step(bench: Bench) -> float:
    return 1e6 / bare_step(new_engine(bench.settings()).bundle.forecaster, bench.streams())


def _engine_alone(bench: Bench, records: Sequence[Record], poll: int) -> float:
    """poll: how many records it is given at a time."""
    engine, passed = new_engine(bench.settings()), 0

    def turn() -> None:
        nonlocal passed
        polled = records[passed : passed + poll]
        process(engine, polled)
        engine.commit({record.partition: record.offset + 1 for record in polled})
        passed += len(polled)

    return steady(turn, lambda: passed, len(records), bench.config.seconds)


def profile(bench: Bench, path: Path) -> None:
    """One more run of the worker, of which a flame graph is written: so no figure is measured under the profiler."""
    settings = bench.settings(transport=transports(bench.config)[0])
    records = make_records(bench.streams(), bench.steps())
    with living(settings) as worker:
        worker.transport.pause(range(settings.partitions))
        load(settings, records)
        worker.transport.resume(range(settings.partitions))
        with flame.graph(path):
            turn_until(worker, len(records))
