"""The limit of a Kafka client: observations in, records as large as forecasts out, in the worker's own rhythm of
flushes and transactions; no model, no state, no guard.

    BOOTSTRAP=... IN_TOPIC=... OUT_TOPIC=... GROUP=... python -m deploy.bench.bare --client librdkafka --value FILE
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from deploy.bench.clients import HAS_LIBRDKAFKA
from service.settings import Settings
from service.worker import EAGER_S, EAGER_SHARE

CLIENTS = ("kafka-python", "librdkafka") if HAS_LIBRDKAFKA else ("kafka-python",)
IDLE_S = 0.1
"""The worker's longest wait for a first record."""
FLUSH_S = 60.0


@dataclass(frozen=True)
class Rhythm:
    """When the worker flushes: a batch is what comes within `interval_s` of the one before, `records` at most; at least
    once, sooner.
    """

    records: int
    interval_s: float
    exactly_once: bool

    @classmethod
    def of(cls, settings: Settings) -> Rhythm:
        interval_s = settings.commit_interval_ms / 1_000
        return cls(settings.max_poll_records, interval_s, settings.guarantee == "exactly_once")


@dataclass(frozen=True)
class Topics:
    """Where a program reads and writes, and the group that it is of."""

    servers: str
    source: str
    sink: str
    group: str
    partitions: int

    @classmethod
    def of(cls, settings: Settings) -> Topics:
        names = settings.observations_topic, settings.forecasts_topic, settings.group_id
        return cls(settings.bootstrap_servers, *names, settings.partitions)


class Taken(NamedTuple):
    """Of a record, what must go on from here."""

    partition: int
    offset: int
    key: bytes | None


class Bare(ABC):
    """Passes records on, batch by batch."""

    def __init__(self, rhythm: Rhythm, values: Sequence[bytes]) -> None:
        self.rhythm, self.values = rhythm, values
        self.passed = 0
        self._gathered_at = self._batch_s = 0.0

    def turn(self) -> None:
        """One batch, if anything came."""
        if batch := self._gather():
            self._gathered_at = time.monotonic()
            values = [self.values[n % len(self.values)] for n in range(self.passed, self.passed + len(batch))]
            self._pass_on(batch, values, {taken.partition: taken.offset + 1 for taken in batch})
            self._batch_s = time.monotonic() - self._gathered_at
            self.passed += len(batch)

    def _gather(self) -> list[Taken]:
        """As the worker does it."""
        batch: list[Taken] = []
        until = time.monotonic() + IDLE_S
        while True:
            came = self._poll(max(0.0, until - time.monotonic()), self.rhythm.records - len(batch))
            if came and not batch:
                until = time.monotonic() + self._patience_s
            batch += came
            if len(batch) >= self.rhythm.records or time.monotonic() >= until:
                return batch

    @property
    def _patience_s(self) -> float:
        since_s, interval_s = time.monotonic() - self._gathered_at, self.rhythm.interval_s
        eager_s = min(max(EAGER_S, (1 + EAGER_SHARE) * self._batch_s - since_s), interval_s)
        return max(eager_s, interval_s - since_s) if self.rhythm.exactly_once else eager_s

    @abstractmethod
    def _poll(self, wait_s: float, most: int) -> Sequence[Taken]: ...

    @abstractmethod
    def _pass_on(self, batch: Sequence[Taken], values: Sequence[bytes], offsets: dict[int, int]) -> None: ...

    @abstractmethod
    def pause(self) -> None:
        """Bring no records until `resume`."""

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class BareKafkaPython(Bare):
    """By kafka-python, with the transport's own options."""

    def __init__(self, topics: Topics, rhythm: Rhythm, values: Sequence[bytes]) -> None:
        super().__init__(rhythm, values)
        self.topics = topics
        self._consumer = KafkaConsumer(
            bootstrap_servers=topics.servers,
            group_id=topics.group,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        self._consumer.assign([TopicPartition(topics.source, p) for p in range(topics.partitions)])
        transactional = {"transactional_id": topics.group} if rhythm.exactly_once else {}
        self._producer = KafkaProducer(
            bootstrap_servers=topics.servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=262_144,
            retry_backoff_ms=10,
            **transactional,
        )
        if rhythm.exactly_once:
            self._producer.init_transactions()

    def _poll(self, wait_s: float, most: int) -> Sequence[Taken]:
        polled = self._consumer.poll(round(1_000 * wait_s), max_records=most)
        return [Taken(record.partition, record.offset, record.key) for batch in polled.values() for record in batch]

    def _pass_on(self, batch: Sequence[Taken], values: Sequence[bytes], offsets: dict[int, int]) -> None:
        source, producer = self.topics.source, self._producer
        positions = {TopicPartition(source, p): OffsetAndMetadata(offset, "", -1) for p, offset in offsets.items()}
        if self.rhythm.exactly_once:
            producer.begin_transaction()
        for taken, value in zip(batch, values, strict=True):
            producer.send(self.topics.sink, value, key=taken.key, partition=taken.partition)
        producer.flush()
        if self.rhythm.exactly_once:
            producer.send_offsets_to_transaction(positions, self._consumer.group_metadata())
            producer.commit_transaction()
        else:
            self._consumer.commit(positions)

    def pause(self) -> None:
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        self._consumer.resume(*self._consumer.assignment())

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


class BareLibrdkafka(Bare):
    """By librdkafka, as confluent-kafka wraps it."""

    def __init__(self, topics: Topics, rhythm: Rhythm, values: Sequence[bytes]) -> None:
        super().__init__(rhythm, values)
        self.topics = topics
        self._client: Any = import_module("confluent_kafka")
        common = {"bootstrap.servers": topics.servers, "log_level": 0}
        reading = {"group.id": topics.group, "isolation.level": "read_committed", "enable.auto.commit": False}
        self._consumer = self._client.Consumer(common | reading | {"auto.offset.reset": "earliest"})
        beginning = self._client.OFFSET_BEGINNING
        self._consumer.assign(
            [self._client.TopicPartition(topics.source, p, beginning) for p in range(topics.partitions)]
        )
        writing = {"acks": "all", "enable.idempotence": True, "linger.ms": 5, "batch.size": 262_144}
        writing["retry.backoff.ms"] = 10  # by default a transaction now and then waits 100 ms for the one before it
        transactional = {"transactional.id": topics.group} if rhythm.exactly_once else {}
        self._producer = self._client.Producer(common | writing | transactional)
        if rhythm.exactly_once:
            self._producer.init_transactions()

    def _poll(self, wait_s: float, most: int) -> Sequence[Taken]:
        first = self._consumer.poll(wait_s)  # consume(n, t) would wait for n messages, or all of t
        messages = [first, *self._consumer.consume(most - 1, 0)] if first and most > 1 else [first] if first else []
        return [Taken(m.partition(), m.offset(), m.key()) for m in messages if not m.error()]

    def _pass_on(self, batch: Sequence[Taken], values: Sequence[bytes], offsets: dict[int, int]) -> None:
        producer, sink = self._producer, self.topics.sink
        positions = [self._client.TopicPartition(self.topics.source, p, offset) for p, offset in offsets.items()]
        if self.rhythm.exactly_once:
            producer.begin_transaction()
        for taken, value in zip(batch, values, strict=True):
            while True:
                try:
                    producer.produce(sink, value, taken.key, taken.partition)
                except BufferError:  # its queue is full
                    producer.poll(0.01)
                else:
                    break
        producer.flush(FLUSH_S)
        if self.rhythm.exactly_once:
            producer.send_offsets_to_transaction(positions, self._consumer.consumer_group_metadata())
            producer.commit_transaction()
        else:
            self._consumer.commit(offsets=positions, asynchronous=False)

    def pause(self) -> None:
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        self._consumer.resume(self._consumer.assignment())

    def close(self) -> None:
        self._consumer.close()
        self._producer.flush(FLUSH_S)


def bare_client(client: str, topics: Topics, rhythm: Rhythm, values: Sequence[bytes]) -> Bare:
    return (BareLibrdkafka if client == "librdkafka" else BareKafkaPython)(topics, rhythm, values)


def command(client: str, settings: Settings, value: Path) -> list[str]:
    """How this program is started to pass on what `settings` name; value: the file with what it answers."""
    rhythm = Rhythm.of(settings)
    told = ["--client", client, "--value", str(value), "--partitions", str(settings.partitions)]
    told += ["--records", str(rhythm.records), "--interval-s", str(rhythm.interval_s)]
    return [sys.executable, "-m", "deploy.bench.bare", *told, *(["--exactly-once"] if rhythm.exactly_once else [])]


def main() -> None:
    """Pass on until ended by a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", choices=CLIENTS, required=True)
    parser.add_argument("--value", type=Path, required=True)
    parser.add_argument("--partitions", type=int, required=True)
    parser.add_argument("--records", type=int, required=True)
    parser.add_argument("--interval-s", type=float, required=True)
    parser.add_argument("--exactly-once", action="store_true")
    given = parser.parse_args()
    servers, source, sink, group = (os.environ[name] for name in ("BOOTSTRAP", "IN_TOPIC", "OUT_TOPIC", "GROUP"))
    topics = Topics(servers, source, sink, group, given.partitions)
    rhythm = Rhythm(given.records, given.interval_s, given.exactly_once)
    bare = bare_client(given.client, topics, rhythm, [given.value.read_bytes()])
    with suppress(KeyboardInterrupt):
        while True:
            bare.turn()


if __name__ == "__main__":
    main()
