"""`carousel bench`: how fast the worker is, beside the limits of its parts, all measured in one run.

Absolute figures belong to the machine and its mood; the shares beside them are what to compare.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from rich.console import Console
from rich.table import Table

from deploy.broker import EmbeddedBroker
from model.bundle import Bundle, load_bundle, save_bundle
from model.config import ModelConfig
from model.features import Block
from model.grid import Grid
from model.network import Forecaster
from service.engine import Engine
from service.metrics import Metrics
from service.records import Record
from service.settings import Settings
from service.transport.kafka_python import KafkaPython
from service.transport.topics import prepare_topics
from service.worker import Worker

HOUR_MS = 3_600_000
START_MS = 1_700_006_400_000
PARTITIONS = 4
WORKER = "carousel: Kafka to Kafka, exactly once"
AT_LEAST_ONCE = "the same, at least once"
ONE_BY_ONE = 500
"""Records of the run that takes a step a message: enough to tell its rate."""


@dataclass(frozen=True)
class BenchConfig:
    """The load: each of `streams` gets `steps` observations."""

    streams: int = 1_000
    steps: int = 20
    threads: int = 1
    bootstrap_servers: str | None = None


@dataclass(frozen=True)
class Figure:
    """One measurement, in records a second."""

    what: str
    per_second: float


def run(config: BenchConfig, console: Console | None = None) -> list[Figure]:
    """Measure and print. Raises BrokerError or ServiceError where Kafka cannot be had."""
    console = console or Console(highlight=False)
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as directory, console.status("starting Apache Kafka …") as status:
        bundle = make_bundle(Path(directory))
        with servers_of(config) as servers:
            figures = []
            for what, measure in _measurements(config, bundle, Path(directory), servers):
                status.update(f"{what} …")
                figures.append(Figure(what, measure()))
    console.print(_table(config, figures))
    return figures


def _measurements(
    config: BenchConfig, bundle: Bundle, directory: Path, servers: str
) -> list[tuple[str, Callable[[], float]]]:
    records = make_records(config)

    def settings(**changed: Any) -> Settings:
        return own_settings(servers, directory, max_streams=config.streams, **changed)

    values = [o.value or b"" for o in Engine(bundle, settings(), Metrics()).process(records[: config.streams])]
    return [
        ("limit: the model's step alone, all streams at once", lambda: _step(config, bundle)),
        ("limit: kafka-python alone, the same bytes in and out", lambda: _client(settings(), records, values)),
        (WORKER, lambda: _worker(bundle, settings(), records)),
        (AT_LEAST_ONCE, lambda: _worker(bundle, settings(guarantee="at_least_once"), records)),
        ("engine alone: records in, records out, no Kafka", lambda: _engine_alone(bundle, settings(), records)),
        ("rival: a step a message, no Kafka", lambda: _one_by_one(bundle, settings(), records)),
    ]


def _table(config: BenchConfig, figures: list[Figure]) -> Table:
    worker = next(figure.per_second for figure in figures if figure.what == WORKER)
    table = Table("measured", "records/s", "beside the worker", title=_title(config), title_justify="left")
    for figure in figures:
        table.add_row(figure.what, f"{figure.per_second:,.0f}", f"{figure.per_second / worker:.2f} x")
    return table


def _title(config: BenchConfig) -> str:
    return f"{config.streams:,} streams x {config.steps} observations, LSTM 64 x 2, 24 x 9 quantiles, one process"


def own_settings(servers: str, model: Path, **changed: Any) -> Settings:
    """Settings with topics and a group of their own."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters", "state")}
    own = {"model": model, "bootstrap_servers": servers, "group_id": name, "partitions": PARTITIONS}
    return Settings.load(own | topics | changed)


def make_bundle(directory: Path) -> Bundle:
    """A model of the default size that was not trained: it is as fast."""
    torch.manual_seed(0)
    save_bundle(directory, Forecaster(ModelConfig(grid=Grid(HOUR_MS), season=24)), name="bench", training={}, scores={})
    return load_bundle(directory)


@contextmanager
def servers_of(config: BenchConfig) -> Iterator[str]:
    """The Kafka to measure with."""
    if config.bootstrap_servers:
        yield config.bootstrap_servers
    else:
        with EmbeddedBroker() as broker:
            yield broker.bootstrap_servers


def make_records(config: BenchConfig) -> list[Record]:
    """The load in the order of time."""
    return [
        Record(
            "bench",
            stream % PARTITIONS,
            step,
            START_MS + 10**9,
            b"s%d" % stream,
            orjson.dumps({"ts": START_MS + step * HOUR_MS, "value": 100.0 * stream + step % 24}),
        )
        for step in range(config.steps)
        for stream in range(config.streams)
    ]


def _step(config: BenchConfig, bundle: Bundle) -> float:
    forecaster = bundle.forecaster
    state = forecaster.initial_state(config.streams)
    shape = (config.streams, 1)
    values, covariates = torch.full(shape, 1.0, dtype=torch.float64), torch.zeros(*shape, 0, dtype=torch.float64)

    def steps() -> None:
        nonlocal state
        for n in range(config.steps):
            _, state = forecaster.advance(state, Block(values, torch.full(shape, START_MS + n * HOUR_MS), covariates))

    steps()  # once to warm up
    return _rate(config.streams * config.steps, steps)


def _client(settings: Settings, records: list[Record], values: list[bytes]) -> float:
    """Consume the observations, produce records as large as the forecasts: no more than the client must do."""
    load(settings, records)
    servers = settings.bootstrap_servers
    consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", max_poll_records=5_000)
    consumer.assign([TopicPartition(settings.observations_topic, p) for p in range(PARTITIONS)])
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=5, batch_size=262_144)

    def through() -> None:
        seen = 0
        while seen < len(records):
            for tp, batch in consumer.poll(100).items():
                for record in batch:
                    value = values[seen % len(values)]
                    producer.send(settings.forecasts_topic, value, key=record.key, partition=tp.partition)
                    seen += 1
            producer.flush()

    rate = _rate(len(records), through)
    consumer.close()
    producer.close()
    return rate


def _worker(bundle: Bundle, settings: Settings, records: list[Record]) -> float:
    with living(bundle, settings) as worker:  # joining the group is no part of the figure, nor is loading the topic
        worker.transport.pause(range(PARTITIONS))
        load(settings, records)
        worker.transport.resume(range(PARTITIONS))
        return _rate(len(records), lambda: turn_until(worker, len(records)))


@contextmanager
def living(bundle: Bundle, settings: Settings) -> Iterator[Worker]:
    """A worker that is ready, for the length of a block."""
    metrics = Metrics()
    engine = Engine(bundle, settings, metrics)
    worker = Worker(engine, lambda: KafkaPython(settings, "bench"), settings, metrics, lambda _: None)
    worker.begin_session()
    try:
        while not worker.ready:
            worker.turn()
        yield worker
    finally:
        worker.end_session()


def turn_until(worker: Worker, forecasts: int) -> None:
    """Turn the loop until so many forecasts were delivered, by this worker in all."""
    while worker.metrics.forecasts._value.get() < forecasts:
        worker.turn()


def _engine_alone(bundle: Bundle, settings: Settings, records: list[Record]) -> float:
    engine = Engine(bundle, settings, Metrics())
    polls = [records[n : n + settings.max_poll_records] for n in range(0, len(records), settings.max_poll_records)]
    return _rate(len(records), lambda: [engine.process(poll) for poll in polls])


def _one_by_one(bundle: Bundle, settings: Settings, records: list[Record]) -> float:
    engine = Engine(bundle, settings, Metrics())
    return _rate(ONE_BY_ONE, lambda: [engine.process([record]) for record in records[:ONE_BY_ONE]])


def load(settings: Settings, records: list[Record]) -> None:
    """Put the observations into a topic of their own."""
    prepare_topics(settings, {"bootstrap_servers": settings.bootstrap_servers})
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers, linger_ms=5, batch_size=262_144)
    for record in records:
        producer.send(settings.observations_topic, record.value, key=record.key, partition=record.partition)
    producer.flush()
    producer.close()


def _rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)
