"""A table is played: when each row is due, what its record is, and how the play ends, well or badly."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import NewTopic
from rich.console import Console

from deploy.replay import CHUNK, IN_FLIGHT_MAX, Clock, ReplayConfig, ReplayError, encode, play, replay, run, schedule
from training.table import Columns, Observed

HOUR = 3_600_000


def observed(unique_id: str, hours: list[int]) -> Observed:
    """Observed at these hours; the values are the hours."""
    return Observed(
        unique_id, np.array(hours, dtype=np.int64) * HOUR, np.array(hours, float), np.empty((len(hours), 0))
    )


def config(**options: object) -> ReplayConfig:
    return ReplayConfig(**{"bootstrap_servers": "localhost:1", "speed": 3600.0, **options})  # type: ignore[arg-type]


@dataclass
class FakeTime:
    """A clock that waiting moves on; `at` calls a function once, when the time has come."""

    now_s: float = 1_000.0
    stop_at_s: float = float("inf")

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        assert seconds > 0
        self.now_s += max(seconds, 1e-6)
        if self.now_s >= self.stop_at_s:
            stop.set()
        return stop.is_set()

    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, lambda: self.now_s + 5e8, self.wait)


@dataclass
class FakeSender:
    """Keeps what it is given, and when."""

    time: FakeTime
    records: list[tuple[float, str, float, int]] = field(default_factory=list)
    flushed: int = 0
    lost_after: int = 1_000_000

    def send(self, key: bytes, value: bytes, timestamp_ms: int) -> None:
        self.records.append((self.time.now_s - 1_000, key.decode(), orjson.loads(value)["value"], timestamp_ms))

    def check(self) -> None:
        if len(self.records) >= self.lost_after:
            raise ReplayError("lost")

    def flush(self) -> None:
        self.flushed += 1


class TestSchedule:
    def test_rows_of_all_series_come_in_order_of_time(self) -> None:
        plan = schedule([observed("b", [0, 2, 3]), observed("a", [0, 1, 2])], config())
        assert plan.due_s.tolist() == [0, 0, 1, 2, 2, 3]
        assert list(zip(plan.series.tolist(), plan.row.tolist(), strict=True)) == [
            (0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (0, 2),
        ]  # fmt: skip

    def test_rows_of_the_same_time_come_in_the_order_of_their_series(self) -> None:
        plan = schedule([observed(str(k), [0, 1, 2]) for k in range(200)], config())
        assert plan.series.tolist() == 3 * list(range(200))

    def test_aligned_series_begin_at_once_though_years_lie_between_them(self) -> None:
        old, new = observed("old", [0, 1]), observed("new", [90_000, 90_001])
        assert schedule([old, new], config()).due_s.tolist() == [0, 1, 90_000, 90_001]
        assert schedule([old, new], config(align=True)).due_s.tolist() == [0, 0, 1, 1]

    def test_only_the_last_rows_and_the_clock_begins_with_them(self) -> None:
        plan = schedule([observed("a", [0, 1, 2, 3]), observed("b", [3])], config(last=2))
        assert plan.due_s.tolist() == [0, 1, 1]
        assert plan.series.tolist() == [0, 0, 1]
        assert plan.row.tolist() == [2, 3, 0]

    def test_without_a_speed_all_is_due_at_once_and_still_in_order_of_time(self) -> None:
        plan = schedule([observed("a", [0, 2]), observed("b", [1, 3])], config(speed=0))
        assert plan.due_s.tolist() == [0, 0, 0, 0]
        assert plan.series.tolist() == [0, 1, 0, 1]

    def test_nothing_to_play(self) -> None:
        assert len(schedule([], config())) == 0
        assert len(schedule([observed("a", [])], config(align=True))) == 0
        assert schedule([observed("a", []), observed("b", [7])], config(align=True)).series.tolist() == [1]

    @given(
        hours=st.lists(st.lists(st.integers(0, 500), unique=True, max_size=20).map(sorted), max_size=4),
        last=st.none() | st.integers(1, 5),
        align=st.booleans(),
        speed=st.sampled_from([0.0, 1.0, 3600.0]),
    )
    def test_each_row_once_each_series_in_its_order(
        self, hours: list[list[int]], last: int | None, align: bool, speed: float
    ) -> None:
        series = [observed(str(k), each) for k, each in enumerate(hours)]
        plan = schedule(series, config(last=last, align=align, speed=speed))
        assert np.all(np.diff(plan.due_s) >= 0)
        for k, each in enumerate(hours):
            rows = list(range(len(each)))[-last if last else None :]
            assert plan.row[plan.series == k].tolist() == rows

    @pytest.mark.parametrize("wrong", [{"speed": -1}, {"speed": float("nan")}, {"last": 0}, {"limit_s": 0}])
    def test_options_that_make_no_sense(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ReplayError):
            config(**wrong)


class TestRecord:
    def test_value_is_json_as_the_topic_wants_it(self) -> None:
        row = Observed("a", np.array([1_704_067_200_000]), np.array([1.5]), np.array([[2.0, np.nan]]))
        assert orjson.loads(encode(row, 0)) == {"ts": 1_704_067_200_000, "value": 1.5}
        assert orjson.loads(encode(row, 0, ("temp", "wind")))["covariates"] == {"temp": 2.0}

    def test_a_missing_value_is_null(self) -> None:
        assert encode(Observed("a", np.array([1]), np.array([np.nan]), np.empty((1, 0))), 0) == b'{"ts":1,"value":null}'


class TestPlay:
    def test_each_row_is_sent_when_it_is_due_with_the_wall_clock_as_its_timestamp(self) -> None:
        now = FakeTime()
        sender = FakeSender(now)
        series = [observed("b", [0, 2]), observed("a", [1, 2])]
        assert play(series, schedule(series, config()), config(), sender, clock=now.clock()) == 4
        assert [(round(at, 3), key, value) for at, key, value, _ in sender.records] == [
            (0, "b", 0), (1, "a", 1), (2, "b", 2), (2, "a", 2),
        ]  # fmt: skip
        assert [timestamp_ms for *_, timestamp_ms in sender.records] == pytest.approx(
            [(5e8 + 1_000 + at) * 1_000 for at, *_ in sender.records], abs=2
        )
        assert sender.flushed == 1

    def test_stop_ends_a_wait_flushes_and_counts(self) -> None:
        now = FakeTime(stop_at_s=1_005)
        sender = FakeSender(now)
        series = [observed("a", [0, 1, 100])]
        assert play(series, schedule(series, config()), config(), sender, clock=now.clock()) == 2
        assert now.now_s < 1_010
        assert sender.flushed == 1

    def test_a_limit_ends_the_play(self) -> None:
        now = FakeTime()
        series = [observed("a", list(range(100)))]
        limited = config(limit_s=2.5)
        assert play(series, schedule(series, limited), limited, FakeSender(now), clock=now.clock()) == 3
        assert now.now_s == pytest.approx(1_002.5)

    def test_progress_is_told_once_a_chunk_and_stop_is_heeded_between_chunks(self) -> None:
        now, stop, told = FakeTime(), threading.Event(), list[int]()

        def on_sent(count: int) -> None:
            told.append(count)
            if len(told) == 2:
                stop.set()

        series, fast = [observed("a", list(range(5 * CHUNK)))], config(speed=0)
        assert play(series, schedule(series, fast), fast, FakeSender(now), on_sent, stop, now.clock()) == 2 * CHUNK
        assert told == [CHUNK, 2 * CHUNK]

    def test_a_record_lost_is_noticed_while_waiting_for_the_next(self) -> None:
        now = FakeTime()
        series = [observed("a", [0, 1_000])]
        with pytest.raises(ReplayError):
            play(series, schedule(series, config()), config(), FakeSender(now, lost_after=1), clock=now.clock())
        assert now.now_s < 1_010


def test_an_unreachable_broker_is_one_line_within_ten_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    started_s = time.monotonic()
    with pytest.raises(ReplayError) as caught:
        replay([observed("a", [0])], config(bootstrap_servers=address))
    assert time.monotonic() - started_s < 12
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def topic(bootstrap_servers: str) -> str:
    name = f"replay-{uuid.uuid4().hex[:8]}"
    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
    admin.create_topics([NewTopic(name, 2, 1)])
    admin.close()
    return name


def consume(bootstrap_servers: str, topic: str) -> dict[str, list[tuple[int, dict[str, object]]]]:
    """All that is in the topic: by key, each record's timestamp and value in order."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap_servers, consumer_timeout_ms=20_000)
    partitions = [TopicPartition(topic, p) for p in (0, 1)]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    found: dict[str, list[tuple[int, dict[str, object]]]] = {}
    left = sum(consumer.end_offsets(partitions).values())
    while left:
        for records in consumer.poll(1_000).values():
            for record in records:
                found.setdefault(record.key.decode(), []).append((record.timestamp, orjson.loads(record.value)))
                left -= 1
    consumer.close()
    return found


class TestOnKafka:
    def test_records_arrive_once_in_order_with_the_time_of_sending(self, bootstrap_servers: str, topic: str) -> None:
        count = IN_FLIGHT_MAX + 1_000  # more than may be on their way at once
        series = [observed("a", list(range(count))), observed("Köln 7", [5, 6])]
        before_ms = time.time() * 1_000
        assert replay(series, ReplayConfig(bootstrap_servers, topic, speed=0)) == count + 2
        found = consume(bootstrap_servers, topic)
        assert [value for _, value in found["a"]] == [{"ts": k * HOUR, "value": k} for k in range(count)]
        assert [value["ts"] for _, value in found["Köln 7"]] == [5 * HOUR, 6 * HOUR]
        stamps = [stamp for stamp, _ in found["a"]]
        assert before_ms - 1 <= min(stamps) <= max(stamps) <= time.time() * 1_000

    def test_a_missing_topic_is_named_and_not_created(self, bootstrap_servers: str) -> None:
        with pytest.raises(ReplayError, match=r"no topic 'nowhere'; `carousel serve` creates it"):
            replay([observed("a", [0])], ReplayConfig(bootstrap_servers, "nowhere"))
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        assert "nowhere" not in admin.list_topics()
        admin.close()

    def test_a_record_that_the_broker_refuses_is_an_error(self, bootstrap_servers: str) -> None:
        small = f"small-{uuid.uuid4().hex[:8]}"
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        admin.create_topics([NewTopic(small, 2, 1, topic_configs={"max.message.bytes": "100"})])
        admin.close()
        with pytest.raises(ReplayError, match="did not take all records"):
            replay([observed("a" * 200, [0])], ReplayConfig(bootstrap_servers, small, speed=0))

    def test_ctrl_c_ends_the_command_in_order(self, bootstrap_servers: str, topic: str, tmp_path: Path) -> None:
        path = tmp_path / "load.csv"
        path.write_text("unique_id,ds,y,temp\na,2024-01-01 00:00,1,7\na,2024-01-01 01:00,2,8\n")
        handler = signal.getsignal(signal.SIGINT)
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
        said = StringIO()
        assert (
            run(
                path,
                Columns(covariates=("temp",)),
                ReplayConfig(bootstrap_servers, topic),
                Console(file=said, width=200),
            )
            == 1
        )
        assert said.getvalue() == f"sent 1 of 2 records of 1 series to {topic} (interrupted)\n"
        assert signal.getsignal(signal.SIGINT) is handler
        ((_, value),) = consume(bootstrap_servers, topic)["a"]
        assert value == {"ts": 1_704_067_200_000, "value": 1, "covariates": {"temp": 7}}
