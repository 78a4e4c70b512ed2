"""An engine with streams in it and its API on a real socket: no Kafka needed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.bundle import Bundle
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from service.api import EXAMPLE_STREAM, EXAMPLE_TS_MS, create_app
from service.engine import Engine
from service.events import EventHub
from service.metrics import Metrics
from service.owners import Owners
from service.records import Outgoing, Record
from service.server import HttpServer
from service.settings import Settings
from service.transport.contract import Described
from service.transport.group import KafkaPythonGroup

HOUR_MS = 3_600_000
CONFIG = ModelConfig(
    grid=Grid(step_ms=HOUR_MS), season=6, horizon=8, quantiles=(0.1, 0.5, 0.9), hidden_size=12, max_gap=40
)
SEEN = 60
"""Observations of each stream; the last one stands an hour before the API's examples."""
PARTITIONS = 4
STREAMS = (EXAMPLE_STREAM, "sensor-2", "site 7/temperature")


@dataclasses.dataclass
class StubWorker:
    """The facts about a worker that the API asks for."""

    unready: str = ""
    alive: bool = True
    live: frozenset[int] = frozenset(range(PARTITIONS))


@dataclasses.dataclass
class StubGroup:
    """What Kafka would say of the group. described: None while Kafka is away; asked: how often it was asked."""

    described: Described | None
    asked: int = 0

    def describe(self) -> Described | None:
        self.asked += 1
        return self.described

    candidates = KafkaPythonGroup.candidates

    def close(self) -> None:
        pass


def random_bundle(config: ModelConfig) -> Bundle:
    """A model with small random weights: it forecasts badly, and depends on all that it should."""
    torch.manual_seed(7)
    forecaster = Forecaster(config).eval().requires_grad_(False)
    torch.nn.init.normal_(forecaster.shortcut.weight, std=0.02)
    return Bundle(forecaster, "random", "0" * 64, {"table": "none"}, {"carousel": {"mase": 1.0, "wql": math.nan}})


def value_at(n: int, stream: str = EXAMPLE_STREAM) -> float:
    """The n-th value of a stream: a season, a trend, and something of its own."""
    return round(50 + 10 * math.sin(2 * math.pi * n / 6) + 0.1 * n + len(stream) + n * 7919 % 13 / 13, 3)


def time_at(n: int) -> int:
    return EXAMPLE_TS_MS + (n - SEEN) * HOUR_MS


def record(stream: str, ts_ms: int, value: float | None, partition: int = 0) -> Record:
    body = json.dumps({"ts": ts_ms, "value": value}).encode()
    return Record("carousel.observations", partition, 0, ts_ms, stream.encode(), body)


def history(first: int, stop: int, stream: str = EXAMPLE_STREAM) -> list[dict[str, Any]]:
    """The observations first ... stop - 1 of a stream, as a request gives them."""
    return [{"ts": time_at(n), "value": value_at(n, stream)} for n in range(first, stop)]


@dataclasses.dataclass
class Running:
    """An API that listens, and what stands behind it. published: all that the engine has put out."""

    engine: Engine
    worker: StubWorker
    group: StubGroup
    owners: Owners
    metrics: Metrics
    hub: EventHub
    server: HttpServer
    client: httpx.Client
    published: list[Outgoing]

    def feed(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Let the engine process records and publish what comes out, as the worker does. -> the forecasts."""
        outgoing = self.engine.process(records)
        self.published += outgoing
        self.hub.publish(outgoing)
        return [json.loads(o.value) for o in outgoing if o.topic == self.hub.topic]

    def predict(self, body: object) -> httpx.Response:
        return self.client.post("/v1/predict", json=body)

    def state(self, stream: str) -> dict[str, torch.Tensor]:
        (key,) = self.engine.arena.keys_of(stream)
        return self.engine.arena.gather(torch.tensor([self.engine.arena.find(key)]))


def run(config: ModelConfig, **settings: Any) -> Iterator[Running]:
    chosen = Settings(model=Path("unused"), http_port=0, **settings)
    metrics, worker = Metrics(), StubWorker()
    engine, hub = Engine(random_bundle(config), chosen, metrics), EventHub(chosen.forecasts_topic, metrics)
    server = HttpServer(chosen)
    group = StubGroup(Described(PARTITIONS, dict.fromkeys(range(PARTITIONS), server.url), stable=True))
    owners = Owners(engine, worker, group, server.url, metrics)
    try:
        server.start(create_app(engine, worker, chosen, metrics, hub, owners), on_stop=hub.close)
        with httpx.Client(base_url=server.url, timeout=20) as client:
            yield Running(engine, worker, group, owners, metrics, hub, server, client, [])
    finally:
        server.stop()
        owners.close()


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    """The API over an engine that has heard `SEEN` hours of `STREAMS`; tests of a module share it."""
    for running in run(CONFIG, max_body_bytes=50_000, max_history_steps=300):
        for n in range(SEEN):
            running.feed([record(stream, time_at(n), value_at(n, stream)) for stream in STREAMS])
        yield running


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts an API of a test's own: `start(config, **settings)`."""
    running: list[Iterator[Running]] = []

    def started(config: ModelConfig = CONFIG, **settings: Any) -> Running:
        running.append(run(config, **settings))
        return next(running[-1])

    yield started
    for each in running:
        next(each, None)
