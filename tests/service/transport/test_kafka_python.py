"""The transport's contract, on kafka-python and the genuine Kafka."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from service.errors import ServiceError
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport.contract import Transport
from service.transport.kafka_python import KafkaPython
from tests.served import Served, until

Connect = Callable[..., KafkaPython]


@pytest.fixture
def settings(bootstrap_servers: str) -> Settings:
    name = f"transport-{uuid.uuid4().hex[:8]}"
    topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters")}
    return Settings.load({"model": "unused", "bootstrap_servers": bootstrap_servers, "group_id": name, **topics})


@pytest.fixture
def connect(settings: Settings) -> Iterator[Connect]:
    """Opens transports of one group, and closes them."""
    opened = []

    def connected(**changed: Any) -> KafkaPython:
        opened.append(KafkaPython(settings.model_copy(update=changed), client_id=f"test-{len(opened)}"))
        return opened[-1]

    yield connected
    for transport in opened:
        transport.close()


def create(settings: Settings, **partitions: int) -> None:
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    names = {getattr(settings, f"{role}_topic"): count for role, count in partitions.items()}
    admin.create_topics({name: {"num_partitions": count} for name, count in names.items()}, wait_for_metadata=True)
    admin.close()


def produce(settings: Settings, count: int, partition: int = 0) -> None:
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    for n in range(count):
        producer.send(settings.observations_topic, b"%d" % n, key=b"k", partition=partition, headers=[("h", b"1")])
    producer.flush()
    producer.close()


def polled(transport: Transport, count: int) -> list[Record]:
    records: list[Record] = []

    def enough() -> bool:
        records.extend(transport.poll(100).records)
        return len(records) >= count

    until(f"{count} records", enough)
    return records


def test_missing_topics_are_created_with_as_many_partitions_as_the_input(settings: Settings, connect: Connect) -> None:
    create(settings, observations=3)
    connect()
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    names = [settings.observations_topic, settings.forecasts_topic, settings.dead_letters_topic]
    assert [len(topic["partitions"]) for topic in admin.describe_topics(names)] == [3, 3, 3]
    admin.close()


def test_missing_topics_that_must_not_be_created_are_named(settings: Settings, connect: Connect) -> None:
    with pytest.raises(ServiceError, match=settings.observations_topic):
        connect(partitions=0)


def test_an_output_with_fewer_partitions_than_the_input_is_refused_by_name(
    settings: Settings, connect: Connect
) -> None:
    create(settings, observations=3, forecasts=2)
    with pytest.raises(ServiceError, match=f"{settings.forecasts_topic} has 2 partitions"):
        connect()


def test_records_come_as_they_were_sent_and_are_assigned_before_they_come(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, 1)
    transport = connect()
    assigned: set[int] = set()

    def first() -> Record | None:
        result = transport.poll(100)
        assigned.update(result.assigned)
        return result.records[0] if result.records else None

    record = until("a record", first)
    assert assigned == {0}
    assert (record.topic, record.partition, record.offset) == (settings.observations_topic, 0, 0)
    assert (record.key, record.value, list(record.headers)) == (b"k", b"0", [("h", b"1")])
    assert record.timestamp_ms > 0
    assert transport.stable


def test_what_was_committed_is_delivered_and_the_next_life_goes_on_after_it(
    settings: Settings, connect: Connect, tmp_path: Path
) -> None:
    create(settings, observations=1)
    produce(settings, 10)
    first = connect()
    records = polled(first, 10)
    first.commit([Outgoing(settings.forecasts_topic, 0, r.key, b"f" + (r.value or b"")) for r in records[:4]], {0: 4})
    first.close()
    second = connect()
    assert [record.offset for record in polled(second, 6)] == [4, 5, 6, 7, 8, 9]
    reader = Served(settings.bootstrap_servers, {}, tmp_path / "log")
    assert [r.value for r in reader.read(settings.forecasts_topic, 4)] == [b"f0", b"f1", b"f2", b"f3"]


def test_a_record_that_kafka_does_not_take_stops_the_commit(settings: Settings, connect: Connect) -> None:
    transport = connect()
    produce(settings, 1)
    polled(transport, 1)
    with pytest.raises(ServiceError, match="did not take 1 records"):
        transport.commit([Outgoing(settings.forecasts_topic, 0, None, b"x" * 2_000_000)], {0: 1})


def test_a_paused_partition_is_silent_until_it_is_resumed(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    transport = connect()
    until("both partitions", lambda: transport.poll(100).assigned)
    transport.pause([0])
    produce(settings, 1, partition=0)
    produce(settings, 1, partition=1)
    assert [record.partition for record in polled(transport, 1)] == [1]
    transport.resume([0])
    assert [record.partition for record in polled(transport, 1)] == [0]


def test_lag_is_what_was_not_yet_polled(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    transport = connect()
    until("the partition", lambda: transport.poll(100).assigned)
    transport.pause([0])
    produce(settings, 7)
    assert transport.lag() == {0: 7}
    transport.resume([0])
    polled(transport, 7)
    assert transport.lag() == {0: 0}


def test_a_second_member_takes_partitions_over_and_both_are_told(settings: Settings, connect: Connect) -> None:
    create(settings, observations=4)
    first = connect()
    until("all partitions", lambda: first.poll(100).assigned)
    second = connect()
    taken: set[int] = set()
    gone: set[int] = set()

    def shared() -> bool:
        gone.update(first.poll(100).revoked)
        taken.update(second.poll(100).assigned)
        return len(taken) == 2

    until("a fair share", shared)
    assert gone == taken
