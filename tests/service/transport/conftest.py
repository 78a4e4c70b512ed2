"""Transports on the genuine Kafka, and the others that have a hand in their topics."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import MemberToRemove

from deploy.broker import EmbeddedBroker
from deploy.distribution import Distribution, installed
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport import CLIENTS, transport_of
from service.transport.contract import Offset, Transport
from tests.served import until
from tests.service.transport.wire import Wire

Connect = Callable[..., Any]
"""-> a transport; Any, as some tests reach for its inside."""


def own_settings(servers: str, **changed: Any) -> Settings:
    """Topics, a group and a slot of its own; no minimum holds for what is changed."""
    name = f"transport-{uuid.uuid4().hex[:8]}"
    topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters", "state")}
    loaded = Settings.load(
        {"model": "unused", "bootstrap_servers": servers, "group_id": name, "partitions": 1} | topics
    )
    return loaded.model_copy(update={"slot": "a", "session_timeout_ms": 6_000} | changed)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """The setting `transport`: what uses it, is run on each."""
    return str(request.param)


@pytest.fixture
def settings(bootstrap_servers: str, client: str) -> Settings:
    return own_settings(bootstrap_servers, transport=client)


def session_of(settings: Settings, client_id: str = "test") -> Any:
    """A transport on the client that the settings name."""
    return transport_of(settings)(settings, client_id)


@pytest.fixture
def connect(settings: Settings) -> Iterator[Connect]:
    """Opens transports of one group, and closes them."""
    opened: list[Transport] = []

    def connected(client_id: str = "", **changed: Any) -> Any:
        transport = session_of(settings.model_copy(update=changed), client_id or f"test-{len(opened)}")
        opened.append(transport)
        return transport

    yield connected
    for transport in opened:
        transport.close()


@contextmanager
def administered(settings: Settings) -> Iterator[KafkaAdminClient]:
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    try:
        yield admin
    finally:
        admin.close()


def create(settings: Settings, configs: Mapping[str, str] | None = None, **partitions: int) -> None:
    """Topics by their roles."""
    names = {getattr(settings, f"{role}_topic"): count for role, count in partitions.items()}
    with administered(settings) as admin:
        topics = {name: {"num_partitions": count, "configs": dict(configs or {})} for name, count in names.items()}
        admin.create_topics(topics, wait_for_metadata=True)


@contextmanager
def producing(settings: Settings, **config: Any) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers, **config)
    try:
        yield producer
    finally:
        producer.close(timeout=5)


def produce(settings: Settings, values: Sequence[bytes], partition: int = 0, topic: str = "", **sent: Any) -> None:
    """Records of these values; of the observations topic unless told."""
    with producing(settings) as producer:
        for value in values:
            producer.send(topic or settings.observations_topic, value, partition=partition, **({"key": b"k"} | sent))
        producer.flush()


def forecast(settings: Settings, value: bytes, partition: int = 0) -> Outgoing:
    return Outgoing(settings.forecasts_topic, partition, b"k", value)


def snapshot(settings: Settings, value: bytes, partition: int = 0) -> Outgoing:
    return Outgoing(settings.state_topic, partition, b"s", value)


def assigned(transport: Transport, *partitions: int, poll_ms: int = 100) -> None:
    """Poll until the transport has been told of these partitions."""
    told: set[int] = set()

    def all_told() -> bool:
        polled = transport.poll(poll_ms, 100)
        told.difference_update(polled.revoked)
        told.update(polled.assigned)
        return told >= set(partitions)

    until(f"partitions {partitions}", all_told, 30)


def where_it_stands(transport: Transport, partition: int) -> Offset | None:
    """As a worker asks: again, while a transaction of the life before is not ended yet."""
    answers: list[Offset | None] = []

    def answered() -> bool:
        with suppress(TimeoutError):
            answers.append(transport.committed(partition))
        return bool(answers)

    until("where the group stands", answered, 60)
    return answers[0]


def started(transport: Transport, *partitions: int) -> None:
    """As a worker would: each partition from where the group stands."""
    assigned(transport, *partitions)
    for partition in partitions:
        stands = where_it_stands(transport, partition)
        transport.start(partition, stands.offset if stands else 0)


def last_transaction(settings: Settings) -> str:
    """What the coordinator says of it, of the worker with this slot."""
    with administered(settings) as admin:
        transaction = f"{settings.group_id}-{settings.slot}"
        return str(admin.describe_transactions([transaction])[transaction].state.value)


def shared(held: Mapping[Transport, set[int]], count: int) -> bool:
    """Whether each transport holds so many partitions, by what it was told."""
    for transport, partitions in held.items():
        told = transport.poll(100, 100)
        partitions -= told.revoked
        partitions |= told.assigned
    return all(len(partitions) == count and transport.stable for transport, partitions in held.items())


def thrown_out(settings: Settings, slot: str = "a") -> None:
    with administered(settings) as admin:
        admin.remove_group_members(settings.group_id, [MemberToRemove(group_instance_id=slot)])


def polled(transport: Transport, count: int) -> list[Record]:
    """So many records, and no more that come with them."""
    records: list[Record] = []

    def enough() -> bool:
        records.extend(transport.poll(100, 100).records)
        return len(records) >= count

    until(f"{count} records", enough, 30)
    assert len(records) == count
    return records


def silent(transport: Transport) -> bool:
    """Whether nothing comes in three polls."""
    heard = [transport.poll(100, 100) for _ in range(3)]
    return not any(told.records or told.assigned or told.revoked for told in heard)


def visible(settings: Settings, topic: str, partition: int = 0) -> list[bytes | None]:
    """The values that readers of committed records find, up to the last stable offset, as another client reads them."""
    consumer = KafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers,
        group_id=None,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    try:
        tp = TopicPartition(topic, partition)
        consumer.assign([tp])
        end = consumer.end_offsets([tp])[tp]
        values: list[bytes | None] = []
        while consumer.position(tp) < end:
            values += [record.value for batch in consumer.poll(100).values() for record in batch]
        return values
    finally:
        consumer.close()


def stands_at(settings: Settings, partition: int = 0) -> int | None:
    """The group's committed offset, as an operator sees it."""
    with administered(settings) as admin:
        offsets = admin.list_group_offsets([settings.group_id])[settings.group_id]
    found = offsets.get(TopicPartition(settings.observations_topic, partition))
    return None if found is None or found.offset < 0 else int(found.offset)


@dataclass(frozen=True)
class Overriding(Distribution):
    """Kafka with some settings of its own."""

    overrides: tuple[str, ...] = ()

    def command(self, *arguments: str) -> list[str]:
        if "kafka.Kafka" not in arguments:
            return super().command(*arguments)
        return super().command(*arguments, *(part for one in self.overrides for part in ("--override", one)))


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """The line to a broker that can be reached by it alone, and soon finds transactions that took too long."""
    wire = Wire()
    overrides = (
        f"advertised.listeners=BROKER://127.0.0.1:{wire.port}",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms=200",
    )
    home = installed(lambda distribution: None, lambda text: None).home
    with EmbeddedBroker(distribution=Overriding(home, overrides=overrides)) as broker:
        wire.target = broker.port
        yield wire
        wire.cut()
