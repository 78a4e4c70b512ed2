"""The worker's loop, where neither a genuine Kafka nor many lives are needed to see what it does."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from model.bundle import Bundle, load_bundle
from model.grid import Grid
from service import interpreter
from service.engine import Engine
from service.metrics import Metrics
from service.records import Outgoing
from service.settings import Settings
from service.worker import Worker
from tests.served import HOUR_MS, START_MS, random_bundle
from tests.service.memory import Log, MemoryTransport

TOPIC, FORECASTS = "carousel.observations", "carousel.forecasts"
STREAMS, STEPS, WAVE_ROWS = 12, 10, 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory: Path = tmp_path_factory.mktemp("bundle")
    shape = {"season": 4, "horizon": 3, "hidden_size": 4, "layers": 1}
    return load_bundle(random_bundle(directory, grid=Grid(HOUR_MS), **shape))


class Attentive(MemoryTransport):
    """Notes how many observations were taken in whenever forecasts are sent."""

    engine: Engine

    def __init__(self, log: Log) -> None:
        super().__init__(log, TOPIC)
        self.taken: list[int] = []

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        if outgoing:
            self.taken.append(int(self.engine.arena.column("count")[:STREAMS].sum()))
        super().send(outgoing)


def followed(bundle: Bundle, clock_s: Callable[[], float]) -> Attentive:
    """What a worker did that was given a few observations of each stream, a step at a time."""
    log = Log(1)
    transport = Attentive(log)
    settings = Settings.load({"model": "unused", "max_wave_rows": WAVE_ROWS, "commit_interval_ms": 0})
    engine = transport.engine = Engine(bundle, settings, Metrics())
    worker = Worker(engine, lambda: transport, settings, engine.metrics, lambda _: None, clock_s=clock_s)
    worker.begin_session()
    for step in range(STEPS):
        for n in range(STREAMS):
            value = b'{"ts": %d, "value": %d}' % (START_MS + step * HOUR_MS, n)
            log.write(Outgoing(TOPIC, 0, b"s%d" % n, value))
        while len(log.records[FORECASTS, 0]) < (step + 1) * STREAMS:
            worker.turn()
    return transport


def test_forecasts_go_to_kafka_while_others_are_still_computed(bundle: Bundle) -> None:
    a_moment_later = itertools.count()
    taken = followed(bundle, lambda: next(a_moment_later) / 1_000).taken
    assert len(taken) > STEPS
    assert taken == sorted(set(taken)), "each wave went before the next was taken in"


def test_no_transaction_is_open_while_a_batch_is_computed_that_would_outlast_it(bundle: Bundle) -> None:
    a_minute_later = itertools.count(step=60)
    assert followed(bundle, lambda: next(a_minute_later)).taken == []


def test_python_is_told_that_batches_are_small(bundle: Bundle) -> None:
    """Else what few leave behind is looked for all at once, and felt (tests/service/test_interpreter.py)."""
    threshold = gc.get_threshold()
    interpreter.prepare()
    try:
        followed(bundle, itertools.count().__next__)
        assert gc.get_threshold()[0] == interpreter.YOUNG_LEAST
    finally:
        gc.set_threshold(*threshold)
