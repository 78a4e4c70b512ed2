"""What every measurement needs: a model of a given size, topics and a group of its own, records, a worker to turn."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

from deploy.bench.clients import open_sender
from deploy.bench.figures import BenchError
from deploy.chaos.bundle import HOUR_MS
from model.bundle import Bundle, load_bundle, save_bundle
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from service.engine import Engine
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport.contract import Transport
from service.transport.kafka_python import KafkaPython
from service.transport.topics import prepare_topics
from service.worker import Worker

START_MS = 1_700_006_400_000
PARTITIONS = 4
TRAINED: dict[str, Any] = {"grid": Grid(HOUR_MS), "season": 24, "rank": 6}
"""What `carousel train` makes of an hourly table."""
GUARANTEES = ("exactly_once", "at_least_once")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, and with what load. streams, steps: None: as many as suits the measurement.

    seconds: how long each is measured at a time, where it might go on for ever. rates: observations a second at which
    latency is measured. most_streams: how far growth goes.
    """

    what: tuple[str, ...] = ("throughput", "step")
    rounds: int = 3
    streams: int | None = None
    steps: int | None = None
    threads: int = 1
    rates: tuple[float, ...] = (300, 1_000)
    seconds: float = 5.0
    most_streams: int = 100_000
    bootstrap_servers: str | None = None
    transports: tuple[str, ...] = ("kafka-python",)
    model: Path | None = None
    against: tuple[str, ...] = ()
    out: Path | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class Bench:
    """One run: its Kafka, its model, and a directory that is gone when it ends. broker_pid: of the embedded Kafka."""

    config: BenchConfig
    servers: str
    directory: Path
    broker_pid: int | None = None
    tell: Callable[[str], None] = field(default=lambda _: None)
    """Says what is being done just now, to whoever waits."""

    @property
    def model(self) -> Path:
        """The bundle that is served: the one named, or one of the default size that was not trained, but is as slow."""
        return self.config.model or self.made("model")

    def made(self, name: str, **shape: Any) -> Path:
        """A bundle of another shape than the default."""
        directory = self.directory / name
        return directory if directory.exists() else make_bundle(directory, **shape)

    def settings(self, **changed: Any) -> Settings:
        """Settings with topics and a group of their own."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters", "state")}
        own: dict[str, Any] = {"bootstrap_servers": self.servers, "group_id": name, "partitions": PARTITIONS}
        own |= {"threads": self.config.threads, "max_streams": 10_000_000, "http_port": 0, "log_level": "warning"}
        given = {"model": self.model} | own | topics | changed
        return Settings.load({name: value for name, value in given.items() if name in Settings.model_fields})

    def streams(self, otherwise: int = 1_000) -> int:
        return self.config.streams or otherwise

    def steps(self, otherwise: int = 20) -> int:
        return self.config.steps or otherwise


def transports(config: BenchConfig) -> tuple[str, ...]:
    """Those to measure. Raises BenchError for one that this version does not have."""
    if "transport" not in Settings.model_fields and set(config.transports) != {"kafka-python"}:
        raise BenchError("--transport: this version's worker has kafka-python alone")
    return config.transports


def emitted(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What forecasts may hold, with the settings for it."""
    numbers = f"{config.horizon} x {len(config.quantiles)}"
    if "emit_quantiles" not in Settings.model_fields or 0.5 not in config.quantiles:
        return {numbers: {}}
    return {numbers: {}, f"{config.horizon} medians": {"emit_quantiles": [0.5]}}


def make_bundle(directory: Path, **shape: Any) -> Path:
    """A model that was not trained, yet has all that one has: its regression counts, its maps are small."""
    torch.manual_seed(0)
    forecaster = Forecaster(ModelConfig(**(TRAINED | shape)))
    torch.nn.init.normal_(forecaster.regression.maps, std=0.01)
    if forecaster.config.rank:
        forecaster.regression.share.fill_(0.4)
    save_bundle(directory, forecaster, name="bench", training={}, scores={})
    return directory


def observation(n: int, streams: int, partitions: int = PARTITIONS) -> tuple[int, bytes, bytes]:
    """The n-th observation, all streams in turn: its partition, key and value."""
    step, stream = divmod(n, streams)
    value = {"ts": START_MS + step * HOUR_MS, "value": 100.0 * (stream % 1_000) + step % 24}
    return stream % partitions, b"s%d" % stream, orjson.dumps(value)


def make_records(streams: int, steps: int) -> list[Record]:
    """Observations as the worker sees them, in the order of time."""
    return list(each_record(streams, range(streams * steps)))


def each_record(streams: int, numbers: Iterable[int]) -> Iterator[Record]:
    """These observations, one by one: of a million streams they are not to be held all at once."""
    for n in numbers:
        partition, key, value = observation(n, streams)
        yield Record("bench", partition, n, START_MS + 10**9, key, value)


def load(settings: Settings, records: Iterable[Record]) -> None:
    """Put the observations into a topic of their own."""
    create_topics(settings)
    with open_sender(settings.bootstrap_servers, linger_ms=5) as sender:
        for record in records:
            sender.send(settings.observations_topic, record.partition, record.key or b"", record.value or b"")


def create_topics(settings: Settings) -> None:
    """Topics for whoever is measured. The broker notes when a forecast was appended, the same way for everybody."""
    common = {"bootstrap_servers": settings.bootstrap_servers}
    admin = KafkaAdminClient(**common)
    try:
        if settings.forecasts_topic not in admin.list_topics():
            noted = {"message.timestamp.type": "LogAppendTime"}
            admin.create_topics([NewTopic(settings.forecasts_topic, settings.partitions, 1, topic_configs=noted)])
            admin.wait_for_topics([settings.forecasts_topic])
    finally:
        admin.close()
    prepare_topics(settings, common)


def new_engine(settings: Settings, bundle: Bundle | None = None) -> Engine:
    return Engine(bundle or load_bundle(settings.model), settings, Metrics())


def process(engine: Engine, records: Sequence[Record]) -> Sequence[Outgoing]:
    """One poll's records through the engine. Here alone the bench knows how the engine takes them."""
    return engine.process(records)


def forecast_values(settings: Settings, records: Sequence[Record]) -> list[bytes]:
    """What the worker would answer to these records."""
    return [outgoing.value or b"" for outgoing in process(new_engine(settings), records)]


def connect(settings: Settings) -> Transport:
    """A session with Kafka by the transport that is set."""
    if getattr(settings, "transport", "kafka-python") == "librdkafka":
        from importlib import import_module

        found: Transport = import_module("service.transport.librdkafka").Librdkafka(settings, "bench")
        return found
    return KafkaPython(settings, "bench")


@contextmanager
def living(settings: Settings, clock_s: Callable[[], float] = time.monotonic) -> Iterator[Worker]:
    """A worker that is ready, for the length of a block."""
    engine = new_engine(settings)
    engine.warm()
    worker = Worker(engine, lambda: connect(settings), settings, engine.metrics, lambda _: None, clock_s=clock_s)
    worker.begin_session()
    try:
        while not worker.ready:
            worker.turn()
        yield worker
    finally:
        worker.end_session()


def forecasts(worker: Worker) -> int:
    """How many this worker has delivered."""
    return int(worker.metrics.forecasts._value.get())


def turn_until(worker: Worker, count: int) -> None:
    """Turn the loop until it has delivered so many forecasts."""
    while forecasts(worker) < count:
        worker.turn()


def flags_of(settings: Settings) -> Mapping[str, Any]:
    """The settings that are not as by default."""
    return {name: getattr(settings, name) for name in settings.model_fields_set}
