"""The clients that a measurement's own observations go out by, and its forecasts come in: the faster of those at hand,
so that whoever measures takes as little as can be from whom it measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

HAS_LIBRDKAFKA = find_spec("confluent_kafka") is not None
QUEUE_FULL_S = 0.05


class Sender(Protocol):
    """Writes records; none waits for another."""

    def send(self, topic: str, partition: int, key: bytes, value: bytes) -> None: ...

    def close(self) -> None:
        """Return when all is with the broker."""


class Reader(Protocol):
    """Reads what is committed, from the topic's beginning on."""

    def poll(self, timeout_s: float) -> Sequence[tuple[bytes, int]]:
        """Keys, and the times (ms) at which the records were appended; waits for the first only."""

    def close(self) -> None: ...


@contextmanager
def open_sender(servers: str, linger_ms: int = 0) -> Iterator[Sender]:
    sender = (_LibrdkafkaSender if HAS_LIBRDKAFKA else _KafkaPythonSender)(servers, linger_ms)
    try:
        yield sender
    finally:
        sender.close()


@contextmanager
def open_reader(servers: str, topic: str, partitions: int) -> Iterator[Reader]:
    reader = (_LibrdkafkaReader if HAS_LIBRDKAFKA else _KafkaPythonReader)(servers, topic, partitions)
    try:
        yield reader
    finally:
        reader.close()


class _KafkaPythonSender:
    def __init__(self, servers: str, linger_ms: int) -> None:
        self._producer = KafkaProducer(bootstrap_servers=servers, acks=1, linger_ms=linger_ms, batch_size=262_144)

    def send(self, topic: str, partition: int, key: bytes, value: bytes) -> None:
        self._producer.send(topic, value, key=key, partition=partition)

    def close(self) -> None:
        self._producer.flush()
        self._producer.close()


class _LibrdkafkaSender:
    def __init__(self, servers: str, linger_ms: int) -> None:
        settings = {"bootstrap.servers": servers, "acks": 1, "linger.ms": linger_ms, "log_level": 0}
        self._producer: Any = import_module("confluent_kafka").Producer(settings)

    def send(self, topic: str, partition: int, key: bytes, value: bytes) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key, partition)
            except BufferError:
                self._producer.poll(QUEUE_FULL_S)
            else:
                return

    def close(self) -> None:
        self._producer.flush()


class _KafkaPythonReader:
    def __init__(self, servers: str, topic: str, partitions: int) -> None:
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        self._consumer.assign([TopicPartition(topic, p) for p in range(partitions)])

    def poll(self, timeout_s: float) -> Sequence[tuple[bytes, int]]:
        polled = self._consumer.poll(round(1_000 * timeout_s), max_records=5_000)
        return [(record.key, record.timestamp) for batch in polled.values() for record in batch]

    def close(self) -> None:
        self._consumer.close()


class _LibrdkafkaReader:
    def __init__(self, servers: str, topic: str, partitions: int) -> None:
        client = import_module("confluent_kafka")
        reading = {"group.id": "bench", "isolation.level": "read_committed"}
        settings = {
            "bootstrap.servers": servers,
            **reading,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "log_level": 0,
        }
        self._consumer: Any = client.Consumer(settings)
        self._consumer.assign([client.TopicPartition(topic, p, client.OFFSET_BEGINNING) for p in range(partitions)])

    def poll(self, timeout_s: float) -> Sequence[tuple[bytes, int]]:
        first = self._consumer.poll(timeout_s)  # consume(n, t) would wait for n messages, or all of t
        messages = [first, *self._consumer.consume(5_000, 0)] if first else []
        return [(message.key(), message.timestamp()[1]) for message in messages if not message.error()]

    def close(self) -> None:
        self._consumer.close()
