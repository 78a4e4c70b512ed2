"""Where states cannot be had as they were, the worker stops and says why, or starts streams afresh if told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from model.bundle import Bundle, load_bundle
from service import engine as engine_module
from service.engine import Engine
from service.errors import LostStateError, Rejected
from service.metrics import Metrics
from service.records import Limits, Observations, Outgoing, Record, read
from service.settings import Settings
from service.transport.contract import Offset
from service.worker import Worker
from tests.served import observation, random_bundle, until
from tests.service.memory import Killed, Log, MemoryTransport

TOPIC, STATES, FORECASTS = "carousel.observations", "carousel.state", "carousel.forecasts"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(random_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def log(bundle: Bundle) -> Log:
    """The log after a life that took 30 hours of four streams; half of its input is not in its snapshots."""
    log = Log(2)
    for hours in (range(10), range(10, 20)):
        produce(log, hours)
        live(bundle, log, snapshot_interval_s=0.05)
    produce(log, range(20, 30))
    live(bundle, log)
    return log


def produce(log: Log, hours: range) -> None:
    for hour in hours:
        for n in range(4):
            log.write(Outgoing(TOPIC, n % 2, b"s%d" % n, observation(hour, float(hour % 5 + n))))


def live(bundle: Bundle, log: Log, **changed: Any) -> Worker:
    """The life of a worker, until all input is done with, and some turns more."""
    worker = worker_of(Engine, bundle, MemoryTransport(log, TOPIC), **changed)
    more = 5
    for _ in range(300):
        worker.turn()
        ends = {p: len(log.records[TOPIC, p]) for p in range(log.partitions)}
        if {p: offset.offset for p, offset in log.offsets.items()} == ends and len(worker.live) == log.partitions:
            more -= 1
        if not more:
            return worker
    raise AssertionError("the worker does not come to the end of its input")


def worker_of(engine: type[Engine], bundle: Bundle, transport: MemoryTransport, **changed: Any) -> Worker:
    """A worker whose clock goes by its own steps."""
    still = {"model": "unused", "commit_interval_ms": 0, "snapshot_interval_s": 1e9}
    settings, ticks = Settings.load(still | changed), itertools.count()
    own = engine(bundle, settings, Metrics())
    worker = Worker(own, lambda: transport, settings, Metrics(), lambda _: None, clock_s=lambda: next(ticks) / 10)
    worker.begin_session()
    return worker


def counts(log: Log) -> list[int]:
    """How many observations the last forecast of each stream had seen."""
    last = {r.key: json.loads(r.value or b"") for p in range(log.partitions) for r in log.records[FORECASTS, p]}
    return [forecast["count"] for _, forecast in sorted(last.items())]


def test_the_next_life_goes_on_where_the_last_one_stood(bundle: Bundle, log: Log) -> None:
    produce(log, range(30, 31))
    live(bundle, log)
    assert counts(log) == [31] * 4


def without_states(log: Log) -> None:
    log.records[STATES, 1].clear()


def without_one_state(log: Log) -> None:
    key = log.records[STATES, 1][-1].key
    log.write(Outgoing(STATES, 1, key, None))


def with_a_damaged_state(log: Log) -> None:
    key = log.records[STATES, 1][-1].key
    log.write(Outgoing(STATES, 1, key, b"garbage"))


def with_a_state_of_another_bucket(log: Log) -> None:
    last = log.records[STATES, 1][-1]
    log.write(Outgoing(STATES, 1, (last.key or b"") + b"0", last.value))


def with_a_state_of_another_time(log: Log) -> None:
    last = log.records[STATES, 1][-1]
    before = next(r for r in reversed(log.records[STATES, 1][:-1]) if r.key == last.key)
    log.write(Outgoing(STATES, 1, last.key, before.value))


def with_an_offset_set_by_hand(log: Log) -> None:
    log.offsets[1] = Offset(3, "")


def with_an_offset_set_back(log: Log) -> None:
    log.offsets[1] = dataclasses.replace(log.offsets[1], offset=3)


def without_its_offset(log: Log) -> None:
    del log.offsets[1]


def with_truncated_input(log: Log) -> None:
    del log.records[TOPIC, 1][10:]


def with_input_gone_that_was_not_read(log: Log) -> None:
    log.first[TOPIC, 1] = log.offsets[1].offset + 1
    produce(log, range(30, 40))


def with_input_gone_that_the_states_need(log: Log) -> None:
    log.first[TOPIC, 1] = log.offsets[1].offset - 1


def with_partitions_added(log: Log) -> None:
    log.partitions = 3


Tamper = Callable[[Log], None]


@pytest.mark.parametrize(
    ("tampered", "said"),
    [
        (without_states, "was the topic deleted"),
        (without_one_state, f"{STATES} does not hold the"),
        (with_a_damaged_state, "does not fit"),
        (with_a_state_of_another_bucket, "does not fit|another"),
        (with_a_state_of_another_time, f"{STATES} does not hold the"),
        (with_an_offset_set_by_hand, "reset by hand"),
        (with_an_offset_set_back, "ahead of the committed offset 3"),
        (without_its_offset, "group carousel has no committed offset"),
        (with_truncated_input, "truncated"),
        (with_input_gone_that_was_not_read, "is gone"),
        (with_input_gone_that_the_states_need, "snapshot_interval_s"),
    ],
)
def test_a_log_that_lost_something_stops_the_worker_which_names_it(
    bundle: Bundle, log: Log, tampered: Tamper, said: str
) -> None:
    tampered(log)
    before = len(log.records[FORECASTS, 1])
    with pytest.raises(LostStateError, match=said) as error:
        live(bundle, log)
    assert "partition 1" in str(error.value)
    assert "--on-lost-state restart_streams" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(log.records[FORECASTS, 1]) == before, "nothing was forecast from a wrong state"


@pytest.mark.parametrize(
    "tampered",
    [
        without_states,
        without_one_state,
        with_a_damaged_state,
        with_an_offset_set_by_hand,
        with_input_gone_that_was_not_read,
        with_input_gone_that_the_states_need,
    ],
)
def test_where_that_is_accepted_the_streams_of_the_partition_begin_afresh(
    bundle: Bundle, log: Log, tampered: Tamper
) -> None:
    tampered(log)
    worker = live(bundle, log, on_lost_state="restart_streams")
    log.records[FORECASTS, 1].clear()
    produce(log, range(40, 41))
    while log.offsets[1].offset < len(log.records[TOPIC, 1]):
        worker.turn()
    whole, afresh = counts(log)[::2], counts(log)[1::2]
    assert all(count > 30 for count in whole)
    assert all(count < 31 for count in afresh)
    produce(log, range(41, 42))
    live(bundle, log)  # and the next life takes up what is there now
    assert counts(log)[1::2] == [count + 1 for count in afresh]


def test_partitions_that_were_added_stop_the_worker_and_keep_their_states_where_that_is_accepted(
    bundle: Bundle, log: Log
) -> None:
    log.partitions = 3
    with pytest.raises(LostStateError, match="had 2 partitions and has 3 now"):
        live(bundle, log)
    live(bundle, log, on_lost_state="restart_streams")
    produce(log, range(30, 31))
    live(bundle, log)
    assert counts(log) == [31] * 4


def test_a_new_partition_alone_is_no_fresh_start(bundle: Bundle, log: Log) -> None:
    log.partitions = 3
    transport = MemoryTransport(log, TOPIC)
    transport.assigned = frozenset([2])
    worker = worker_of(Engine, bundle, transport)

    def live_alone() -> None:
        for _ in range(100):
            worker.turn()

    with pytest.raises(LostStateError, match="had 2 partitions"):
        live_alone()


def test_states_of_another_model_are_named(bundle: Bundle, log: Log, tmp_path: Path) -> None:
    other = load_bundle(random_bundle(tmp_path, layers=1))
    with pytest.raises(LostStateError, match=r"does not fit|are of model"):
        live(other, log)


def test_states_of_another_shape_are_named(bundle: Bundle, log: Log) -> None:
    with pytest.raises(LostStateError, match="history_ts_ms"):
        live(bundle, log, history_steps=7)


def test_a_damaged_state_that_was_written_anew_is_no_matter(bundle: Bundle, log: Log) -> None:
    states = log.records[STATES, 1]
    last = max(n for n, r in enumerate(states[:-1]) if r.key == states[-1].key)
    states[last] = replace(states[last], value=b"garbage")
    produce(log, range(30, 31))
    live(bundle, log)
    assert counts(log) == [31] * 4


def test_a_stream_that_ended_does_not_come_back_from_a_state_that_was_written_before(bundle: Bundle, log: Log) -> None:
    log.write(Outgoing(TOPIC, 1, b"s3", None))
    live(bundle, log, snapshot_interval_s=0.05)
    worker = live(bundle, log)
    assert sorted(worker.engine.arena) == [(0, "s0"), (0, "s2"), (1, "s1")]


def test_groups_may_share_a_state_topic(bundle: Bundle, log: Log) -> None:
    mine = log.offsets
    log.offsets = {}
    live(bundle, log, group_id="other")
    log.offsets = mine
    produce(log, range(30, 31))
    live(bundle, log)
    assert counts(log) == [31] * 4


def test_a_new_group_that_begins_with_the_latest_notes_where_that_was(bundle: Bundle) -> None:
    log = Log(1)
    for hour in range(5):
        log.write(Outgoing(TOPIC, 0, b"a", observation(hour, 1.0)))
    live(bundle, log, start="latest")
    log.write(Outgoing(TOPIC, 0, b"a", observation(5, 1.0)))
    live(bundle, log, start="latest")
    assert counts(log) == [1]


def test_unchanged_buckets_are_not_written_again(bundle: Bundle, log: Log) -> None:
    worker = live(bundle, log, snapshot_interval_s=0.05)
    written = len(log.records[STATES, 0])
    for _ in range(20):
        worker.turn()
    assert len(log.records[STATES, 0]) == written


class Fresh(MemoryTransport):
    """A transport that gives what it read away, as one does that fetches it."""

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        for records in super().read(topic, partition, first, end):
            yield [replace(r, value=bytes(bytearray(r.value or b""))) for r in records]


def test_beside_the_states_themselves_there_is_no_second_copy_of_them_all(bundle: Bundle) -> None:
    log = Log(2)
    for n in range(4_000):
        log.write(Outgoing(TOPIC, n % 2, b"s%d" % n, observation(0, 1.0)))
    live(bundle, log, snapshot_interval_s=0.05)
    worker = worker_of(Engine, bundle, Fresh(log, TOPIC))
    tracemalloc.start()  # the arena lies where it does not look
    while len(worker.live) < log.partitions:
        worker.turn()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(worker.engine.arena) == 4_000
    assert most < worker.engine.arena.state_bytes / 2


class Slow(MemoryTransport):
    """A transport that brings nothing of partition 1's past until it is let."""

    held = True

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        while partition == 1 and self.held:
            yield []
        yield from super().read(topic, partition, first, end)


def test_while_a_partition_is_restored_the_others_go_on_and_the_worker_is_not_ready(bundle: Bundle, log: Log) -> None:
    produce(log, range(30, 31))
    transport = Slow(log, TOPIC)
    worker = worker_of(Engine, bundle, transport)

    def turn_until(partition: int) -> None:
        for _ in range(300):
            worker.turn()
            if log.offsets[partition].offset == len(log.records[TOPIC, partition]):
                return
        raise AssertionError("no progress")

    turn_until(0)
    assert worker.live == {0}
    assert log.offsets[1].offset == 60, "nothing of the other one was looked at before its states were there"
    assert "being restored" in worker.unready
    transport.held = False
    turn_until(1)
    assert counts(log) == [31] * 4
    until("readiness", lambda: worker.turn() or worker.ready)


def deadly(records: Sequence[Record], limits: Limits) -> tuple[Observations, list[tuple[Record, Rejected]]]:
    """A parser that ends the process at a record, whenever it looks at it."""
    if any(b'"value": 666' in (record.value or b"") for record in records):
        raise Killed
    return read(records, limits)


def test_a_record_that_ends_the_process_each_time_becomes_a_dead_letter_and_no_other_does(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "read", deadly)
    log = Log(2)
    produce(log, range(10))
    for partition in range(2):
        log.write(Outgoing(TOPIC, partition, b"s%d" % partition, observation(10, 666.0)))
    produce(log, range(10, 11))
    produce(log, range(11, 19))
    for lives in range(60):
        worker = worker_of(Engine, bundle, MemoryTransport(log, TOPIC, seed=lives), crash_restarts=4)
        try:
            while sum(offset.offset for offset in log.offsets.values()) < 2 * 39:
                worker.turn()
            break
        except Killed:
            continue
    letters = [r for p in range(2) for r in log.records["carousel.observations.dlq", p]]
    assert [dict(r.headers)["carousel.errors.reason"] for r in letters] == [b"crash", b"crash"]
    assert all(b"666" in (r.value or b"") for r in letters)
    assert lives < 20
    assert counts(log) == [19] * 4
    live(bundle, log)  # and a later life does not come back to it
