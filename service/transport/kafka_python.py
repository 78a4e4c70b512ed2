"""The contract on kafka-python. Its traps, and their guards, stay in this file.

At least once for now: records first, offsets after them. A worker that dies between the two does that work again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CommitFailedError, KafkaConnectionError, KafkaError, KafkaTimeoutError, TopicAlreadyExistsError
from kafka.structs import MemberState, OffsetAndMetadata

from service.errors import ServiceError
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport.contract import Polled

log = logging.getLogger(__name__)

BOOTSTRAP_TIMEOUT_MS = 10_000
DELIVERY_TIMEOUT_S = 120
JOIN_POLL_MS = 100
"""A shorter poll, while the member joins, drops the join half-way: kafka-python then never joins."""
CLOSE_TIMEOUT_S = 5
ANSWER_TIMEOUT_MS = 1_000


class KafkaPython(ConsumerRebalanceListener):  # type: ignore[misc]
    """A consumer of the observations topic and a producer of the others. Raises ServiceError where Kafka is not there
    or its topics do not fit.
    """

    def __init__(self, settings: Settings, client_id: str) -> None:
        self.settings = settings
        self.topic = settings.observations_topic
        common = {
            "bootstrap_servers": settings.bootstrap_servers.split(","),
            "client_id": client_id,
            "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
            "reconnect_backoff_max_ms": 1_000,  # by default a broker that is back may be overlooked for half a minute
        }
        self._noted = threading.Lock()
        self._assigned: set[int] = set()
        self._revoked: set[int] = set()
        try:
            prepare_topics(settings, common)
            self._producer = KafkaProducer(
                **common,
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                batch_size=262_144,
                delivery_timeout_ms=DELIVERY_TIMEOUT_S * 1000,
                retry_backoff_ms=10,
            )
            self._consumer = KafkaConsumer(
                **common,
                group_id=settings.group_id,
                isolation_level="read_committed",
                enable_auto_commit=False,
                auto_offset_reset=settings.start,
                max_poll_records=settings.max_poll_records,
                session_timeout_ms=settings.session_timeout_ms,
                heartbeat_interval_ms=settings.session_timeout_ms // 10,
                partition_assignment_strategy=[CooperativeStickyAssignor],
                # No deserializers: one that raises makes later polls spin for ever.
            )
            self._consumer.subscribe([self.topic], listener=self)
            self._consumer.partitions_for_topic(self.topic)  # without metadata the first join may hang for ever
        except KafkaError as error:
            raise unreachable(settings.bootstrap_servers, error) from error

    # Both callbacks run on the client's own thread while poll() waits; they only take notes.
    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        with self._noted:
            self._assigned |= {tp.partition for tp in assigned}

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        with self._noted:
            gone = {tp.partition for tp in revoked}
            self._assigned -= gone
            self._revoked |= gone

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)

    def poll(self, timeout_ms: int) -> Polled:
        polled = self._consumer.poll(timeout_ms if self.stable else max(timeout_ms, JOIN_POLL_MS))
        with self._noted:
            assigned, self._assigned = frozenset(self._assigned), set()
            revoked, self._revoked = frozenset(self._revoked), set()
        records = [
            Record(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, r.headers)
            for batch in polled.values()
            for r in batch
        ]
        return Polled(records, assigned, revoked)

    def commit(self, outgoing: Sequence[Outgoing], offsets: Mapping[int, int]) -> None:
        try:
            futures = [
                self._producer.send(o.topic, o.value, key=o.key, partition=o.partition, headers=list(o.headers))
                for o in outgoing
            ]
            self._producer.flush(timeout=DELIVERY_TIMEOUT_S)
            for future in futures:
                future.get(timeout=0)  # flush() does not say that a record failed
        except KafkaError as error:
            raise ServiceError(f"Kafka did not take {len(outgoing)} records: {_line(error)}") from error
        try:
            self._consumer.commit(
                {TopicPartition(self.topic, p): OffsetAndMetadata(offset, "", -1) for p, offset in offsets.items()}
            )
        except CommitFailedError as error:  # another worker has the partitions by now, and does this work again
            log.warning("the group moved on before offsets were committed: %s", _line(error))
        except KafkaError as error:
            raise ServiceError(f"Kafka did not take the offsets: {_line(error)}") from error

    def pause(self, partitions: Iterable[int]) -> None:
        self._consumer.pause(*(TopicPartition(self.topic, p) for p in partitions))

    def resume(self, partitions: Iterable[int]) -> None:
        self._consumer.resume(*(TopicPartition(self.topic, p) for p in partitions))

    @property
    def stable(self) -> bool:
        return bool(self._consumer.group_metadata().state == MemberState.STABLE)

    def lag(self) -> Mapping[int, int] | None:
        partitions = self._consumer.assignment()
        try:
            ends = self._consumer.end_offsets(partitions, timeout_ms=ANSWER_TIMEOUT_MS)
            positions = {tp: self._consumer.position(tp, timeout_ms=ANSWER_TIMEOUT_MS) for tp in partitions}
        except KafkaError:  # the group's state says nothing of it: the member stays <stable> while no broker is there
            return None
        return {tp.partition: max(0, ends[tp] - position) for tp, position in positions.items()}

    def close(self) -> None:
        for hang_up in (
            partial(self._consumer.close, timeout_ms=CLOSE_TIMEOUT_S * 1000),
            partial(self._producer.close, timeout=CLOSE_TIMEOUT_S),
        ):
            try:
                hang_up()
            except KafkaError as error:
                log.warning("while hanging up: %s", _line(error))


def prepare_topics(settings: Settings, common: Mapping[str, Any]) -> None:
    """Create the topics that are missing, where allowed, and see that partition numbers can be kept from input to
    output. Raises ServiceError where they cannot.
    """
    source, *sinks = names = [settings.observations_topic, settings.forecasts_topic, settings.dead_letters_topic]
    admin = KafkaAdminClient(**common)
    try:
        existing = set(admin.list_topics())
        missing = [name for name in names if name not in existing]
        if missing and not settings.partitions:
            raise ServiceError(f"topics are missing and not to be created (partitions 0): {', '.join(missing)}")
        if source in missing:
            _create(admin, [source], settings.partitions)
        partitions = _partitions(admin, [source])[source]
        _create(admin, [name for name in missing if name != source], partitions)
        for name, count in _partitions(admin, sinks).items():
            if count < partitions:
                raise ServiceError(
                    f"topic {name} has {count} partitions and {source} has {partitions}: a forecast goes to the"
                    f" partition its observation came from, so add partitions to {name}"
                )
    finally:
        admin.close()


def _create(admin: KafkaAdminClient, names: Sequence[str], partitions: int) -> None:
    for name in names:
        with suppress(TopicAlreadyExistsError):  # another worker was as quick
            admin.create_topics({name: {"num_partitions": partitions}})
            log.info("created topic %s with %d partitions", name, partitions)
    admin.wait_for_topics(names)


def _partitions(admin: KafkaAdminClient, names: Sequence[str]) -> dict[str, int]:
    return {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}


def unreachable(bootstrap_servers: str, error: KafkaError) -> ServiceError:
    """What to tell an operator when Kafka does not answer."""
    if isinstance(error, KafkaConnectionError | KafkaTimeoutError):
        return ServiceError(
            f"no Kafka broker answers at {bootstrap_servers}; is it running? (`carousel broker` starts one)"
        )
    return ServiceError(f"Kafka at {bootstrap_servers} refused: {_line(error)}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
