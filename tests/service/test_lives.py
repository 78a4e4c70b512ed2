"""Whatever ends a worker's life, and how often: its forecasts and states are those of one that was left in peace."""

from __future__ import annotations

import itertools
import json
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from model.bundle import Bundle, load_bundle
from model.grid import Grid
from service import snapshots
from service.engine import Engine
from service.metrics import Metrics
from service.records import Outgoing
from service.settings import Settings
from service.worker import Worker
from tests.served import HOUR_MS, START_MS, random_bundle
from tests.service.memory import Killed, Log, MemoryTransport

TOPIC = "carousel.observations"
PARTITIONS = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle")
    shape = {"season": 4, "horizon": 3, "hidden_size": 4, "layers": 1, "max_gap": 30}
    return load_bundle(random_bundle(directory, grid=Grid(HOUR_MS), **shape))


def records(random: Random, count: int, streams: int) -> list[Outgoing]:
    """Observations of streams that come and go, with gaps, late and doubled ones, tombstones and garbage."""
    mixed = []
    for n in range(count):
        stream = f"s{random.randrange(1 + streams * (n + 1) // count)}".encode()
        hour = n // 4 + random.choice([0] * 8 + [-1, 2, 40])
        value: bytes | None = json.dumps({"ts": START_MS + hour * HOUR_MS, "value": random.gauss(5, 2)}).encode()
        if random.random() < 0.15:
            value = None
        elif random.random() < 0.03:
            value = random.choice([b"garbage", b"{}", b'{"value": NaN}'])
        mixed.append(Outgoing(TOPIC, random.randrange(PARTITIONS), stream, value))
    return mixed


def in_peace(bundle: Bundle, settings: Settings, log: Log) -> tuple[list[Outgoing], Engine]:
    engine = Engine(bundle, settings, Metrics())
    outgoing = []
    for partition in range(PARTITIONS):
        for record in log.records[TOPIC, partition]:
            outgoing += engine.process([record])
            engine.commit({partition: record.offset + 1})
    return outgoing, engine


def in_torment(bundle: Bundle, settings: Settings, log: Log, seed: int, **odds: float) -> tuple[Engine, int]:
    """Lives of workers, one after the other, until all input is done with. -> the last one's engine, their number."""
    exactly = settings.guarantee == "exactly_once"
    for life in range(400):
        engine = Engine(bundle, settings, Metrics())
        transport = MemoryTransport(log, TOPIC, exactly, seed + life, **(odds if life < 200 else {}))
        ticks = itertools.count()
        worker = Worker(
            engine,
            lambda transport=transport: transport,  # type: ignore[misc]
            settings,
            engine.metrics,
            lambda _: None,
            clock_s=lambda ticks=ticks: next(ticks) / 10,  # type: ignore[misc]
        )
        worker.begin_session()
        try:
            for _ in range(3_000):
                worker.turn()
                if worker.live and all(worker._offsets.get(p) == len(log.records[TOPIC, p]) for p in range(PARTITIONS)):
                    return engine, life + 1
        except Killed:
            continue
        raise AssertionError("the worker does not come to the end of its input")
    raise AssertionError("too many lives")


def told(outgoing: list[Any], topic: str, partition: int) -> list[tuple[bytes | None, bytes | None]]:
    return [(o.key, o.value) for o in outgoing if (o.topic, o.partition) == (topic, partition)]


def same_forecasts(one: bytes, other: bytes) -> bool:
    first, second = json.loads(one), json.loads(other)
    numbers = [np.array(list(forecast.pop("quantiles").values())) for forecast in (first, second)]
    return first == second and np.allclose(*numbers, atol=1e-3)


def by_key(pairs: list[tuple[bytes | None, bytes | None]]) -> dict[bytes | None, list[bytes | None]]:
    kept: dict[bytes | None, list[bytes | None]] = {}
    for key, value in pairs:
        kept.setdefault(key, []).append(value)
    return kept


def assert_same_states(one: Engine, other: Engine) -> None:
    for partition in range(PARTITIONS):
        left, right = one.arena.streams(partition), other.arena.streams(partition)
        assert list(left) == list(right), "the same streams, in the order in which they were last heard"
        a = one.arena.gather(torch.tensor(list(left.values()), dtype=torch.int64))
        b = other.arena.gather(torch.tensor(list(right.values()), dtype=torch.int64))
        for name, tensor in a.items():
            torch.testing.assert_close(tensor, b[name], atol=1e-3, rtol=1e-4, equal_nan=True, msg=name)
        mine, its = one.partition(partition).mark, other.partition(partition).mark
        assert mine == its


BOUNDS = {
    "no bound that matters": {},
    "refusing": {"max_streams": 3, "when_full": "refuse"},
    "forgetting the least heard": {"max_streams": 3, "when_full": "forget"},
    "forgetting the idle": {"idle_limit_s": 20 * 3600.0},
    "both": {"max_streams": 5, "when_full": "forget", "idle_limit_s": 20 * 3600.0},
}


def settings_of(**changed: Any) -> Settings:
    """Snapshots so far apart that most of a life is replayed by the next."""
    quick = {
        "max_poll_records": 20,
        "commit_interval_ms": 0,
        "snapshot_interval_s": 10.0,
        "crash_restarts": 1_000_000,
    }
    return Settings.load({"model": "unused"} | quick | changed)


def torment(bundle: Bundle, settings: Settings, seed: int, rows_a_bucket: int, kill: float) -> tuple[Log, Engine]:
    """The log of many lives, and the engine of the last."""
    log = Log(PARTITIONS)
    for record in records(Random(seed), 300, 12):
        log.write(record)
    row_bytes = Engine(bundle, settings, Metrics()).arena.schema.row_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "SNAPSHOT_BYTES", rows_a_bucket * row_bytes)
        engine, _ = in_torment(bundle, settings, log, seed, kill=kill, abort=0.1)
    return log, engine


@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_exactly_once_the_record_of_many_lives_is_that_of_one(
    bundle: Bundle, bounds: dict[str, Any], seed: int
) -> None:
    settings = settings_of(**bounds)
    log, engine = torment(bundle, settings, seed, rows_a_bucket=1 + seed % 3, kill=0.1)
    expected, peaceful = in_peace(bundle, settings, log)
    for partition in range(PARTITIONS):
        for topic in (settings.forecasts_topic, settings.dead_letters_topic):
            got = by_key(told(log.records[topic, partition], topic, partition))
            wanted = by_key(told(expected, topic, partition))
            assert {key: len(values) for key, values in got.items()} == {k: len(v) for k, v in wanted.items()}
            if topic == settings.forecasts_topic:
                for key, values in wanted.items():
                    assert all(map(same_forecasts, values, got[key]))  # type: ignore[arg-type]
    assert_same_states(peaceful, engine)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_at_least_once_nothing_is_missing_and_what_comes_twice_is_the_same(
    bundle: Bundle, bounds: dict[str, Any]
) -> None:
    settings = settings_of(guarantee="at_least_once", **bounds)
    log, engine = torment(bundle, settings, seed=3, rows_a_bucket=1, kill=0.01)
    expected, peaceful = in_peace(bundle, settings, log)
    topic = settings.forecasts_topic
    for partition in range(PARTITIONS):
        got = told(log.records[topic, partition], topic, partition)
        for key, value in told(expected, topic, partition):
            assert any(key == its and same_forecasts(value, other) for its, other in got)  # type: ignore[arg-type]
        assert len(got) >= len(told(expected, topic, partition))
    assert_same_states(peaceful, engine)
