"""Exactly once, end to end: a genuine Kafka, genuine workers, and what happens to them. See also `carousel chaos`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from kafka import KafkaProducer

from service.transport import CLIENTS
from tests.served import Served, observation, random_bundle, serving, until

HOURS = 60
DEADLY = """
import os, signal, sys
import service.engine
from carousel import main
read = service.engine.read
def deadly(records, limits):
    if any(record.value and b'"value": 666' in record.value for record in records):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(records, limits)
service.engine.read = deadly
sys.argv[0] = "carousel"
main()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(params=CLIENTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hours(first: int, stop: int, streams: int = 8) -> list[tuple[bytes | None, bytes | None]]:
    return [(b"s%d" % n, observation(hour, hour % 7 + n)) for hour in range(first, stop) for n in range(streams)]


def told(served: Served, count: int) -> dict[str, list[tuple[int, Any]]]:
    """What was forecast for each stream, in order: how many observations it had, and its medians."""
    forecasts: dict[str, list[tuple[int, Any]]] = {}
    for record in served.read(served.forecasts, count):
        forecast = json.loads(record.value)
        forecasts.setdefault(forecast["stream"], []).append((forecast["count"], forecast["quantiles"]["0.5"]))
    return forecasts


def test_a_worker_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    bundle: Path, bootstrap_servers: str, tmp_path: Path, transport: str
) -> None:
    quick = {"transport": transport, "slot": "w0", "snapshot_interval_s": 0.5, "commit_interval_ms": 50}
    with serving(bundle, bootstrap_servers, tmp_path) as peaceful:
        peaceful.produce(hours(0, HOURS))
        expected = told(peaceful, 8 * HOURS)
    with serving(bundle, bootstrap_servers, tmp_path, **quick) as served:
        for first in range(0, HOURS, HOURS // 2):
            served.produce(hours(first, first + HOURS // 2))
            told(served, 8 * first + 40)
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
            served.start()
        got = told(served, 8 * HOURS)
        assert {stream: [n for n, _ in said] for stream, said in got.items()} == {
            stream: list(range(1, HOURS + 1)) for stream in expected
        }
        for stream, said in expected.items():
            for (_, one), (_, other) in zip(said, got[stream], strict=True):
                assert one == pytest.approx(other, abs=1e-3)
        assert served.metrics()["carousel_state_restore_duration_seconds_count"] == 4, "of its partitions"
        assert served.stop() == 0


def test_of_two_processes_with_one_slot_the_older_ends_and_says_so_even_if_nothing_comes(
    bundle: Path, bootstrap_servers: str, tmp_path: Path, transport: str
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, transport=transport, slot="w0") as older:
        newer = Served(older.servers, older.settings, tmp_path / "newer.log")
        newer.start()
        try:
            until("the end of the older one", lambda: older.process.poll() is not None)
            assert older.process.returncode == 1
            assert "another worker has taken slot 'w0'" in older.log_file.read_text().splitlines()[-1]
            newer.produce(hours(0, 3))
            assert {stream: [n for n, _ in said] for stream, said in told(newer, 24).items()} == {
                f"s{n}": [1, 2, 3] for n in range(8)
            }
            assert newer.stop() == 0
        finally:
            if newer.process.poll() is None:
                newer.process.kill()


class NotUtf8(str):
    """The name of a header as no well-behaved producer writes it."""

    __slots__ = ()

    def encode(self, *_: Any, **__: Any) -> bytes:
        return b"\xff\xfe"


def test_a_record_whose_header_no_client_can_read_stops_nothing(
    bundle: Path, bootstrap_servers: str, tmp_path: Path, transport: str
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, transport=transport, partitions=1) as served:
        producer = KafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=200)  # all in one batch
        for hour in range(3):
            headers = [(NotUtf8("x"), b"1"), ("y", b"2")] if hour == 1 else []
            producer.send(served.observations, observation(hour, 1.0), key=b"a", headers=headers)
        producer.close()
        assert [json.loads(r.value)["count"] for r in served.read(served.forecasts, 2)] == [1, 2]
        (letter,) = served.read(served.dead_letters, 1)
        headers = dict(letter.headers)
        assert headers["carousel.errors.reason"] == b"undecodable"
        assert (letter.key, letter.value) == (b"a", observation(1, 1.0))
        assert headers.get("y") == (b"2" if transport == "kafka-python" else None), "of one, all headers are kept"
        assert served.metrics()['carousel_records_rejected_total{reason="undecodable"}'] == 1


def test_a_record_that_kills_the_process_each_time_becomes_a_dead_letter_after_some_restarts(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(
        bundle, bootstrap_servers, tmp_path, partitions=1, slot="w0", crash_restarts=3, commit_interval_ms=10
    ) as served:
        served.stop()
        served.program = [sys.executable, "-c", DEADLY]
        served.produce([*hours(0, 5), (b"s0", observation(5, 666.0)), *hours(5, 8)])
        lives = 0
        while True:
            lives += 1
            assert lives < 20, served.log_file.read_text()
            served.start(wait=False)
            until("its end, or the dead letter", lambda: served.process.poll() is not None or letters(served))
            if served.process.poll() is None:
                break
            assert served.process.returncode == -signal.SIGKILL
        (letter,) = served.read(served.dead_letters, 1)
        assert dict(letter.headers)["carousel.errors.reason"] == b"crash"
        assert json.loads(letter.value)["value"] == 666.0
        assert [n for n, _ in told(served, 8 * 8)["s0"]] == list(range(1, 9))
        assert served.stop() == 0


def letters(served: Served) -> bool:
    try:
        return served.metrics().get('carousel_records_rejected_total{reason="crash"}') == 1
    except httpx.TransportError:
        return False
