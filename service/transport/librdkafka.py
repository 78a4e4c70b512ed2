"""The contract on librdkafka, by confluent-kafka: several times faster than kafka-python, and compiled.

Topics and the group are looked after by kafka-python all the same, in what is rare: librdkafka can neither throw a
member out, nor tell what another one was assigned, nor what was noted beside an offset.

What can be said to have failed without effect is an AbortedError. After anything else about a commit nobody knows, and
only a new session can tell: its producer, by the same transactional id, ends what the old one left open.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from operator import methodcaller
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from kafka import KafkaAdminClient, KafkaConsumer
from kafka import TopicPartition as KafkaPythonPartition
from kafka.errors import KafkaConnectionError, KafkaTimeoutError
from kafka.errors import KafkaError as KafkaPythonError

from model.errors import CarouselError
from service.errors import AbortedError, DisconnectedError, LostStateError, ServiceError
from service.records import Headers, Outgoing, Record
from service.settings import Settings
from service.transport.contract import Bounds, Offset, Polled
from service.transport.group import rejoin_if_renamed
from service.transport.session import (
    ANSWER_TIMEOUT_MS,
    BOOTSTRAP_TIMEOUT_MS,
    DEADLINE_S,
    DELIVERY_TIMEOUT_S,
    FETCH_BYTES,
    METADATA_AGE_MS,
    READ_POLL_MS,
    READ_RECORDS,
    UNSETTLED_S,
    Watchdog,
    fenced,
    fetch_wait_ms,
    late,
    line,
    note_of,
    refused,
    taken,
    unanswered,
)
from service.transport.topics import RECORD_BYTES_MAX, prepare_topics

log = logging.getLogger(__name__)
librdkafka_log = logging.getLogger("kafka.librdkafka")

ANSWER_TIMEOUT_S = ANSWER_TIMEOUT_MS / 1000
BEGIN_TIMEOUT_S = 15.0
METADATA_TIMEOUT_S = 5.0
GRACE_S = 5.0
FULL_WAIT_S = 0.1
READ_WAIT_MS = 10
"""By default, a partition is said to be at its end after half a second."""
LEAVE_TIMEOUT_S = 1.0
LEAVE_POLL_S = 0.01
GOING_TIMEOUT_S = 5.0
BATCH_BYTES_MAX = 1_000_000
QUEUED_MAX = 1_000_000
"""Records that wait for delivery, and kilobytes of them: more than any commit has."""
FETCHING = {
    "isolation.level": "read_committed",  # committed offsets then wait for pending transactions, too
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # nothing is ever skipped in silence
    "enable.partition.eof": True,  # else nobody learns how far past aborted records and markers a partition was read
    "check.crcs": True,
    "queued.max.messages.kbytes": 32_768,
    "fetch.queue.backoff.ms": 10,  # where so much is fetched ahead, librdkafka else looks again only after a second
}

FENCED = {
    KafkaError._FENCED,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.TRANSACTION_COORDINATOR_FENCED,
}
"""Another has taken this producer's transactional id, or its coordinator has, after a transaction took too long."""
SLOT_FENCED = KafkaError(KafkaError.FENCED_INSTANCE_ID).str()
"""What a consumer's fatal error tells of its cause."""
MOVED_ON = {KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS}
GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
PASSING = {
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.CONCURRENT_TRANSACTIONS,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.REQUEST_TIMED_OUT,
}
"""Of what ends a transaction, librdkafka does not say that it is retriable."""
LOST = {
    KafkaError._AUTO_OFFSET_RESET,
    KafkaError.OFFSET_OUT_OF_RANGE,
    KafkaError._LOG_TRUNCATION,
    KafkaError._NO_OFFSET,
}
DAMAGED = {KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError.INVALID_MSG}
SILENT = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE}
PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
"""Records that fail so, fail because another did."""


class Librdkafka:
    """A session: a consumer of the observations topic and a producer of the others.

    Raises DisconnectedError where Kafka is not there, ServiceError where its topics do not fit.
    """

    def __init__(self, settings: Settings, client_id: str) -> None:
        self.settings = settings
        self.topic = settings.observations_topic
        self._exactly = settings.guarantee == "exactly_once"
        self._transaction_s = settings.transaction_timeout_ms / 1000
        self._common: dict[str, Any] = {
            "bootstrap.servers": settings.bootstrap_servers,
            "client.id": client_id,
            "reconnect.backoff.max.ms": 1_000,  # by default a broker that is back may be overlooked for ten seconds
        }
        self._admin_config = {
            "bootstrap_servers": settings.bootstrap_servers.split(","),
            "client_id": client_id,
            "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
        }
        self._held: set[int] = set()
        self._assigned: set[int] = set()
        self._revoked: set[int] = set()
        self._positions: dict[int, int] = {}
        """Of the started partitions: the offset after what was polled."""
        self._joined = False
        self._failure: KafkaException | None = None
        """What polling met, to be raised once the records before it have been handed out."""
        self._limit_s = self._transaction_s if self._exactly else DELIVERY_TIMEOUT_S
        self._began_s: float | None = None
        """When the first record of the commit at hand was sent; None: none was."""
        self._topics: set[str] = set()
        """Those of what was sent for it."""
        self._undelivered: list[tuple[int, str, KafkaError]] = []
        """Of each record that failed its size, its topic and why."""
        self._settled_s = time.monotonic()
        self._url_due_s = self._settled_s + settings.session_timeout_ms / 1000 if settings.slot else math.inf
        self._watchdog = Watchdog(DEADLINE_S)
        self._consumer: Any = None
        self._producer: Any = None
        try:
            with self._answered("its topics"):
                batch_bytes = prepare_topics(settings, self._admin_config)
                self._admin = AdminClient(self._common | {"log_level": 0})  # what it says goes to stderr, unasked
                self._producer = self._new_producer(min(batch_bytes, BATCH_BYTES_MAX))
                if self._exactly:
                    self._producer.init_transactions(BEGIN_TIMEOUT_S)  # ends what this worker's last life left open
                self._consumer = self._new_consumer()
        except BaseException:
            self.close()
            raise

    def _new_producer(self, batch_bytes: int) -> Producer:
        settings = self.settings
        transactional = {
            "transactional.id": f"{settings.group_id}-{settings.slot or uuid.uuid4().hex}",
            "transaction.timeout.ms": settings.transaction_timeout_ms,
        }
        limit_ms = min(settings.transaction_timeout_ms, DELIVERY_TIMEOUT_S * 1000)
        return Producer(
            self._common
            | (transactional if self._exactly else {})
            | {
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 5,
                "batch.size": batch_bytes,  # librdkafka does not split one that is too large for its topic
                "message.max.bytes": RECORD_BYTES_MAX + 65_536,
                "message.timeout.ms": limit_ms if self._exactly else DELIVERY_TIMEOUT_S * 1000,
                "queue.buffering.max.messages": QUEUED_MAX,
                "queue.buffering.max.kbytes": QUEUED_MAX,
                "retry.backoff.ms": 10,
                "allow.auto.create.topics": False,
                "delivery.report.only.error": True,  # else Python is called for each record
                "on_delivery": self._on_failed_delivery,
            },
            logger=librdkafka_log,
        )

    def _new_consumer(self) -> Consumer:
        settings, wait_ms = self.settings, fetch_wait_ms(self.settings)
        consumer = Consumer(
            self._common
            | FETCHING
            | {
                "group.id": settings.group_id,
                **({"fetch.wait.max.ms": wait_ms, "fetch.min.bytes": FETCH_BYTES} if wait_ms else {}),
                **({"group.instance.id": settings.slot} if settings.slot else {}),
                "session.timeout.ms": settings.session_timeout_ms,
                "heartbeat.interval.ms": settings.session_timeout_ms // 10,
                # librdkafka refuses one that is shorter than a session.
                "max.poll.interval.ms": max(settings.max_poll_interval_ms, settings.session_timeout_ms),
                "topic.metadata.refresh.interval.ms": METADATA_AGE_MS,
                "partition.assignment.strategy": "cooperative-sticky",
            },
            logger=librdkafka_log,
        )
        consumer.subscribe([self.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        return consumer

    # Callbacks run within poll() and close(), on the same thread, and one that is slow stops the whole group: they only
    # take notes. What was assigned is not given on to librdkafka before its `start`: until then it is silent, and
    # nobody asks for an offset that may not be there.
    def _on_assign(self, consumer: Consumer, assigned: Sequence[TopicPartition]) -> None:
        consumer.incremental_assign([])
        self._joined = True
        self._held |= {tp.partition for tp in assigned}
        self._assigned |= {tp.partition for tp in assigned}

    def _on_revoke(self, consumer: Consumer, revoked: Sequence[TopicPartition]) -> None:
        gone = {tp.partition for tp in revoked}
        consumer.incremental_unassign(self._tps(gone & self._positions.keys()))
        for partition in gone:
            self._positions.pop(partition, None)
        self._held -= gone
        self._assigned -= gone
        self._revoked |= gone

    def _on_lost(self, consumer: Consumer, lost: Sequence[TopicPartition]) -> None:
        self._joined = False
        self._on_revoke(consumer, lost)

    def _on_failed_delivery(self, error: KafkaError, message: Message) -> None:
        if error.code() not in PURGED:
            self._undelivered.append((len(message.value() or b""), message.topic() or "", error))

    def _tps(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self.topic, partition) for partition in partitions]

    @property
    def partitions(self) -> int:
        # The consumer would send the question behind its fetches, which wait for records.
        with self._answered(f"how many partitions {self.topic} has"):
            return len(self._admin.list_topics(self.topic, METADATA_TIMEOUT_S).topics[self.topic].partitions)

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        self._raise_failure()
        with self._answered(f"polling {self.topic}"):
            messages = _taken(self._consumer, max_records, timeout_ms / 1000)
        self._check_settled()
        self._check_url()
        assigned, self._assigned = frozenset(self._assigned), set()
        revoked, self._revoked = frozenset(self._revoked), set()
        if revoked:
            messages = [m for m in messages if m.error() or m.partition() in self._positions]
        if any(map(Message.error, messages)):
            messages = list(self._sound(messages))
        records = _records_of(self.topic, messages)
        for partition, offset in {record.partition: record.offset for record in records}.items():
            self._reached(partition, offset + 1)
        return Polled(records, assigned, revoked)

    def _sound(self, messages: Sequence[Any]) -> Iterator[Any]:
        """The messages before one that says what is wrong, without those that say where a partition ends."""
        for message in messages:
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                self._reached(message.partition(), message.offset())
            elif error.code() == KafkaError._MAX_POLL_EXCEEDED:
                log.warning("%s", error.str())  # what follows from it, the callbacks are told
            else:
                self._failure = _failure_of(message)
                return

    def _reached(self, partition: int, offset: int) -> None:
        if partition in self._positions:
            self._positions[partition] = max(offset, self._positions[partition])

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if self._failure.args[0].code() in GONE:
            raise DisconnectedError(f"topic {self.topic} is gone")
        with self._answered(f"polling {self.topic}"):
            raise self._failure

    def _check_url(self) -> None:
        """Once whoever had the slot before is surely gone, see that the group knows this worker by its own URL."""
        if time.monotonic() < self._url_due_s or not self.stable:
            return
        self._url_due_s += self.settings.session_timeout_ms / 1000
        try:
            with closing(KafkaAdminClient(**self._admin_config | {"bootstrap_timeout_ms": ANSWER_TIMEOUT_MS})) as admin:
                rejoin_if_renamed(admin, self.settings, self._common["client.id"])
            self._url_due_s = math.inf
        except KafkaPythonError as error:
            log.debug("asking for the group's members: %s; again later", line(error))

    def _check_settled(self) -> None:
        if self.stable:
            self._settled_s = time.monotonic()
        elif time.monotonic() - self._settled_s > UNSETTLED_S:
            raise DisconnectedError(f"this worker was no settled member of its group for {UNSETTLED_S:g} s")

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        with self._failing("a record"):
            self._begin()
            self._send(outgoing)

    def commit(self, before: Sequence[Outgoing], offsets: Mapping[int, Offset], after: Sequence[Outgoing]) -> None:
        try:
            with self._failing("a commit"):
                # Taken after the last poll. Of one that is no member any more, the broker would accept the offsets
                # (trap 5).
                member = self._consumer.consumer_group_metadata()
                if not self.stable or not set(offsets) <= self._held:
                    self._abort()
                    raise AbortedError("this worker is not (or no longer) a member of its group")
                self._begin()
                if self._exactly:
                    self._commit_transaction([*before, *after], offsets, member)
                else:
                    self._deliver(before)
                    self._commit_offsets(offsets)
                    self._deliver(after)
        finally:
            self._began_s = None

    def _begin(self) -> None:
        if self._began_s is not None:
            return
        self._began_s = time.monotonic()
        self._topics.clear()
        self._undelivered.clear()
        if self._exactly:
            self._producer.begin_transaction()

    def _abort(self) -> None:
        if self._exactly and self._began_s is not None:
            self._producer.abort_transaction(self._transaction_s)

    def _commit_transaction(self, outgoing: Sequence[Outgoing], offsets: Mapping[int, Offset], member: Any) -> None:
        # Trap 19: when the broker goes, sending the offsets may take no heed of its limit, and never come back.
        with self._watchdog.over("a transaction", 2 * self._transaction_s + GRACE_S):
            self._send(outgoing)
            # librdkafka commits nothing of which a part has failed, nor before all of it is with the broker.
            self._producer.send_offsets_to_transaction(self._offsets(offsets), member, self._transaction_s)
            self._producer.commit_transaction(self._transaction_s)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Raise what it means that a part of a commit fails."""
        with self._answered(what):
            try:
                yield
            except KafkaException as error:
                if self._exactly:
                    self._give_up(error.args[0])
                else:
                    self._producer.flush(DELIVERY_TIMEOUT_S)
                    self._blame()
                raise

    def _give_up(self, error: KafkaError) -> None:
        """Abort a transaction that failed, and raise what is to be said of it, if that is not simply the error."""
        if error.code() in FENCED:
            raise fenced(self.settings, self._began_s or 0.0, error.str())
        if error.txn_requires_abort():
            self._abort()
        self._blame()
        if error.code() in MOVED_ON:
            raise AbortedError(error.str())
        if error.code() in SILENT and len(self._producer):
            raise late(self._topics, self._limit_s)

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        """Hand records to librdkafka, which sends them while it is given more. It has a bound: then wait for room."""
        self._topics |= {o.topic for o in outgoing}
        produce = self._producer.produce
        for o in outgoing:
            while True:
                try:
                    if o.headers:
                        produce(o.topic, o.value, o.key, o.partition, headers=list(o.headers))
                    else:  # a quarter of the time is for arguments by name
                        produce(o.topic, o.value, o.key, o.partition)
                    break
                except BufferError:
                    self._producer.poll(FULL_WAIT_S)
                    if self._left_s <= 0:
                        raise late(self._topics, self._limit_s) from None
                except KafkaException as error:
                    self._undelivered.append((len(o.value or b""), o.topic, error.args[0]))
                    raise

    @property
    def _left_s(self) -> float:
        """Of the time in which what was sent must have been delivered."""
        return (self._began_s or 0.0) + self._limit_s - time.monotonic()

    def _deliver(self, outgoing: Sequence[Outgoing]) -> None:
        self._send(outgoing)
        left = self._producer.flush(max(0.0, self._left_s))
        self._blame()
        if left:
            raise late(self._topics, self._limit_s)

    def _blame(self) -> None:
        """Raise what it means that a record failed. Of several the largest is to blame: others fail with it."""
        if not self._undelivered:
            return
        size, topic, error = max(self._undelivered, key=lambda one: one[0])
        if error.code() < 0 or error.retriable():
            raise DisconnectedError(f"records for {topic} could not be delivered: {error.str()}")
        raise ServiceError(f"Kafka does not take a record of {size} bytes for {topic}: {error.str()}")

    def _commit_offsets(self, offsets: Mapping[int, Offset]) -> None:
        if not offsets:
            return
        with self._watchdog.over("a commit"):
            try:
                _checked(self._consumer.commit(offsets=self._offsets(offsets), asynchronous=False))
            except KafkaException as error:
                if error.args[0].code() in MOVED_ON:
                    raise AbortedError(error.args[0].str()) from error
                raise

    def _offsets(self, offsets: Mapping[int, Offset]) -> list[TopicPartition]:
        return [TopicPartition(self.topic, p, o.offset, o.note) for p, o in offsets.items()]

    def committed(self, partition: int) -> Offset | None:
        # By kafka-python, and anew each time: confluent-kafka ends each note with a zero byte that it sends along, and
        # reads one that has none on into whatever lies behind it (trap 18).
        with self._answered("where the group stands"):
            asking = KafkaConsumer(
                **self._admin_config,
                group_id=self.settings.group_id,
                isolation_level="read_committed",
                enable_auto_commit=False,
            )
            with closing(asking):
                try:
                    tp = KafkaPythonPartition(self.topic, partition)
                    found = asking.committed(tp, metadata=True, timeout_ms=ANSWER_TIMEOUT_MS)
                except KafkaTimeoutError as error:
                    raise TimeoutError from error
        return None if found is None else Offset(found.offset, note_of(found.metadata))

    def bounds(self, topic: str, partition: int) -> Bounds:
        tp = TopicPartition(topic, partition)
        with self._answered(f"the offsets of {topic}"):
            first = self._listed([tp], OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED, METADATA_TIMEOUT_S)
            # Up to the high watermark: reading to the last stable offset only may miss what a commit just made visible.
            end = self._listed([tp], OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED, METADATA_TIMEOUT_S)
        return Bounds(first[partition], end[partition])

    def _listed(
        self, tps: Sequence[TopicPartition], which: OffsetSpec, isolation: IsolationLevel, timeout_s: float
    ) -> dict[int, int]:
        asked = self._admin.list_offsets(
            dict.fromkeys(tps, which), isolation_level=isolation, request_timeout=timeout_s
        )
        return {tp.partition: future.result(timeout_s).offset for tp, future in asked.items()}

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        if first >= end:
            return
        with self._answered(f"reading {topic}"):
            # A member of no group: that would take a subscription.
            config = {"group.id": self.settings.group_id, "fetch.wait.max.ms": READ_WAIT_MS}
            reader = Consumer(self._common | FETCHING | config, logger=librdkafka_log)
            reader.assign([TopicPartition(topic, partition, first)])
            reached = first
            while reached < end:
                batch = []
                for message in _taken(reader, READ_RECORDS, READ_POLL_MS / 1000):
                    error = message.error()
                    if error is None:
                        batch.append(message)
                        reached = message.offset() + 1
                    elif error.code() == KafkaError._PARTITION_EOF:  # past records that were not committed
                        reached = message.offset()
                    else:
                        raise _failure_of(message)
                yield [record for record in _records_of(topic, batch) if record.offset < end]

    def start(self, partition: int, offset: int) -> None:
        with self._answered("a start"):
            self._consumer.incremental_assign([TopicPartition(self.topic, partition, offset)])
        self._positions[partition] = offset

    def rewind(self, offsets: Mapping[int, int]) -> None:
        for partition, offset in offsets.items():
            if partition in self._positions:
                with self._answered("going back"), self._watchdog.over("going back"):
                    self._consumer.seek(TopicPartition(self.topic, partition, offset))
                self._positions[partition] = offset

    def pause(self, partitions: Iterable[int]) -> None:
        self._consumer.pause(self._tps(partitions))

    def resume(self, partitions: Iterable[int]) -> None:
        self._consumer.resume(self._tps(partitions))

    @property
    def stable(self) -> bool:
        # Who is thrown out, or was too slow, loses its id at once, and hears of what it lost at the next poll.
        return self._joined and bool(self._consumer.memberid())

    def lag(self) -> Mapping[int, int] | None:
        positions = dict(self._positions)
        try:
            ends = self._listed(
                self._tps({0, *positions}), OffsetSpec.latest(), IsolationLevel.READ_COMMITTED, ANSWER_TIMEOUT_S
            )
        except (KafkaException, TimeoutError):
            return None
        return {partition: max(0, ends[partition] - position) for partition, position in positions.items()}

    def close(self) -> None:
        with self._watchdog.over("hanging up"):
            try:
                if self._consumer:
                    self._leave()
                if self._producer:
                    self._producer.purge()  # what it still holds is of a commit that failed
            except (KafkaException, RuntimeError) as error:  # whatever it was, this session is over
                log.debug("while hanging up: %s", line(error))
        clients, self._consumer, self._producer = [self._consumer, self._producer], None, None
        # Neither is closed. The producer would wait for what it holds, and then complain of an open transaction on
        # stderr. The consumer may wait for good, in a callback that holds the interpreter, and the process with it,
        # watchdog and all (trap 17). They simply go, once nobody refers to them: that may wait for good, too, but
        # holds nothing, and whatever is left of the consumer leaves the group within its session timeout.
        going = threading.Thread(target=clients.clear, name="hanging up", daemon=True)
        going.start()
        going.join(GOING_TIMEOUT_S)
        self._watchdog.stop()

    def _leave(self) -> None:
        """Hear of assignments that nobody was told of yet, and if its place is not to be kept, see that none comes."""
        if self.settings.slot:
            self._consumer.consume(QUEUED_MAX, 0)
            return
        self._consumer.unsubscribe()
        until_s = time.monotonic() + LEAVE_TIMEOUT_S
        while (self._held or self._consumer.memberid()) and time.monotonic() < until_s:
            self._consumer.consume(1, LEAVE_POLL_S)

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        """What of Kafka's errors ends the session, and what the service."""
        try:
            yield
        except KafkaException as error:
            raise self._meaning(what, *error.args) from error
        except (KafkaConnectionError, KafkaTimeoutError) as error:
            raise unanswered(self.settings) from error
        except KafkaPythonError as error:
            raise refused(self.settings, f"{what}: {line(error)}", getattr(error, "retriable", False)) from error

    def _meaning(self, what: str, error: KafkaError, where: str = "") -> CarouselError:
        code, told = error.code(), f"{what}: {error.str()}"
        if code == KafkaError.FENCED_INSTANCE_ID or (code == KafkaError._FATAL and SLOT_FENCED in error.str()):
            return taken(self.settings)
        if code in DAMAGED:
            return ServiceError(f"{what}: a damaged batch {where} cannot be read: {error.str()}")
        if code in LOST:
            return LostStateError(f"input of {self.topic} that is still needed is gone: {error.str()}")
        if code in SILENT:
            return unanswered(self.settings)
        # Below zero it is librdkafka itself that does not go on.
        local = code < 0 and code != KafkaError._INVALID_ARG
        return refused(self.settings, told, error.retriable() or local or code in PASSING)


def _checked(tps: list[TopicPartition]) -> list[TopicPartition]:
    """As they are. Raises KafkaException for the first that has an error of its own."""
    for tp in tps:
        if tp.error:
            raise KafkaException(tp.error)
    return tps


def _failure_of(message: Any) -> KafkaException:
    return KafkaException(message.error(), f"of {message.topic()}, partition={message.partition()},")


def _taken(consumer: Consumer, most: int, timeout_s: float) -> list[Any]:
    """Up to so many messages, once there are any: consume() by itself waits for all of them, or for all of the time."""
    try:
        messages: list[Any] = consumer.consume(1, timeout_s)
        return messages + consumer.consume(most - 1, 0) if messages and most > 1 else messages
    finally:
        del consumer  # whoever keeps an error would keep it, too, and it would go when close() looks after it no more


def _records_of(topic: str, messages: Sequence[Any]) -> list[Record]:
    return [
        Record(topic, m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value(), _headers_of(m)) for m in messages
    ]


def _headers_of(message: Any) -> Headers:
    """All headers, or the name of the first that is not UTF-8, with surrogates, for which `parse` has a dead letter:
    the others cannot be had then (trap 16).
    """
    try:
        return _all_headers(message) or ()
    except (SystemError, UnicodeDecodeError) as error:
        cause = error.__cause__ if isinstance(error, SystemError) else error
        if not isinstance(cause, UnicodeDecodeError):
            raise
        return [(cause.object.decode(errors="surrogateescape"), None)]


_all_headers = methodcaller("headers")
"""Trap 16: where a name is not UTF-8, headers() gives what crashes whoever looks at it, and an exception that comes up
anywhere later. Called in this way, at once.
"""
