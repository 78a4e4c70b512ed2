"""The contract on kafka-python. Its traps, and their guards, stay in this file; tests/service/transport/test_traps.py
has their numbers, and shows each not to reach us.

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
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NoReturn

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.errors import (
    CommitFailedError,
    CorruptRecordError,
    FencedInstanceIdError,
    InvalidProducerEpochError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    ProducerFencedError,
    UnknownError,
)
from kafka.protocol.consumer.offsets import IsolationLevel
from kafka.record.default_records import DefaultRecordBatch
from kafka.structs import MemberState, OffsetAndMetadata

from service.errors import AbortedError, DisconnectedError, LostStateError, ServiceError
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport.assignor import DisputeAssignor
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

JOIN_POLL_MS = 100
CLOSE_TIMEOUT_S = 5
REST_WAIT_MS = 250
"""How long a fetch may wait while nothing comes. Each takes a millisecond of Python, and whoever asks this worker over
HTTP waits for it; what the consumer asks besides may wait behind it.
"""


class KafkaPython(ConsumerRebalanceListener):  # type: ignore[misc]
    """A session: a consumer of the observations topic and a producer of the others.

    Raises DisconnectedError where Kafka is not there, ServiceError where its topics do not fit.
    """

    def __init__(self, settings: Settings, client_id: str) -> None:
        self.settings = settings
        self.topic = settings.observations_topic
        self._exactly = settings.guarantee == "exactly_once"
        self._common: dict[str, Any] = {
            "bootstrap_servers": settings.bootstrap_servers.split(","),
            "client_id": client_id,
            "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
            "reconnect_backoff_max_ms": 1_000,  # by default a broker that is back may be overlooked for half a minute
        }
        self._wait_ms = fetch_wait_ms(settings)
        self._rests = False
        """Whether fetches wait long, and end with the first record: for as long as nothing comes."""
        self._failed: KafkaError | None = None
        """Why what came after the records that were told last cannot be."""
        self._watchdog = Watchdog(DEADLINE_S)
        self._noted = threading.Lock()
        self._assigned: set[int] = set()
        self._revoked: set[int] = set()
        self._started: set[int] = set()
        self._settled_s = time.monotonic()
        self._url_due_s = self._settled_s + settings.session_timeout_ms / 1000 if settings.slot else math.inf
        self._clients: list[Any] = []
        self._limit_s = settings.transaction_timeout_ms / 1000 if self._exactly else DELIVERY_TIMEOUT_S
        self._began_s: float | None = None
        """When the first record of the commit at hand was sent; None: none was."""
        self._sent: list[tuple[Outgoing, Any]] = []
        """What was sent for that commit, with kafka-python's futures, unless it is known to be with the broker."""
        try:
            with self._answered("its topics"):
                prepare_topics(settings, self._common)
                self._admin = self._opened(KafkaAdminClient(**self._common, request_timeout_ms=CLOSE_TIMEOUT_S * 1000))
                self._producer = self._opened(self._new_producer())
                if self._exactly:
                    with self._watchdog.over("begin"):
                        self._producer.init_transactions()  # ends what this worker's last life left open
                self._consumer = self._opened(self._new_consumer())
        except (ProducerFencedError, InvalidProducerEpochError) as error:  # another came between, this very moment
            self.close()
            raise DisconnectedError(f"the session could not begin: {line(error)}") from error
        except BaseException:
            self.close()
            raise

    def _opened(self, client: Any) -> Any:
        self._clients.append(client)
        return client

    def _new_producer(self) -> KafkaProducer:
        settings = self.settings
        transactional = {
            "transactional_id": f"{settings.group_id}-{settings.slot or uuid.uuid4().hex}",
            "transaction_timeout_ms": settings.transaction_timeout_ms,
        }
        return KafkaProducer(
            **self._common,
            **(transactional if self._exactly else {}),
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=262_144,
            max_request_size=RECORD_BYTES_MAX + 65_536,
            delivery_timeout_ms=DELIVERY_TIMEOUT_S * 1000,
            retry_backoff_ms=10,  # by default a commit now and then waits 200 ms for the one before it
        )

    def _new_consumer(self) -> KafkaConsumer:
        settings, wait_ms = self.settings, self._wait_ms
        consumer = KafkaConsumer(
            **self._common,
            group_id=settings.group_id,
            group_instance_id=settings.slot or None,
            isolation_level="read_committed",  # committed offsets then wait for pending transactions, too
            enable_auto_commit=False,
            auto_offset_reset="none",  # nothing is ever skipped in silence
            session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.session_timeout_ms // 10,
            max_poll_interval_ms=settings.max_poll_interval_ms,
            metadata_max_age_ms=METADATA_AGE_MS,
            **({"fetch_max_wait_ms": wait_ms, "fetch_min_bytes": FETCH_BYTES} if wait_ms else {}),
            partition_assignment_strategy=[DisputeAssignor],
            # No deserializers: one that raises makes later polls spin for ever (trap 6).
        )
        consumer.subscribe([self.topic], listener=self)
        consumer.partitions_for_topic(self.topic)  # without metadata the first join may hang for ever (trap 4)
        return consumer

    # Callbacks run on the client's own thread while poll() waits, and one that is slow stops the whole group: they only
    # take notes and hold the place. Without a position poll() would raise.
    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        assigned = list(assigned)
        self._consumer.pause(*assigned)
        for tp in assigned:
            self._consumer.seek(tp, 0)
        with self._noted:
            self._assigned |= {tp.partition for tp in assigned}

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        with self._noted:
            gone = {tp.partition for tp in revoked}
            self._assigned -= gone
            self._revoked |= gone

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)

    @property
    def partitions(self) -> int:
        return len(self._consumer.partitions_for_topic(self.topic) or ())

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        if not self.stable:
            # A poll that is too short for a join forgets why it began one, and never ends it (trap 4).
            timeout_ms = max(timeout_ms, JOIN_POLL_MS)
            coordinator = self._consumer._coordinator
            coordinator.request_rejoin()
            # And a join that ended between two polls is not heard of, but begun again, by the whole group (trap 11).
            if coordinator._join_task and coordinator._join_task.is_done:
                coordinator._join_task = _Ended(coordinator._join_task)
        with self._answered(f"polling {self.topic}"), self._watchdog.over("a poll"):
            polled = self._fetched(timeout_ms, max_records)
        self._check_settled()
        self._check_url()
        if not self.partitions:  # trap 8, before it has us
            raise DisconnectedError(f"topic {self.topic} is gone")
        with self._noted:
            assigned, self._assigned = frozenset(self._assigned), set()
            revoked, self._revoked = frozenset(self._revoked), set()
        self._started -= revoked
        return Polled([record_of(r) for r in polled if r.partition not in revoked], assigned, revoked)

    def _fetched(self, timeout_ms: int, max_records: int) -> list[Any]:
        """kafka-python's records. What comes on the heels of the first one after a rest is waited for as long as it was
        on average without one: the commit after next is an interval away.
        """
        fetched = self._poll_once(timeout_ms, max_records)
        if fetched and self._rests:
            until_s = time.monotonic() + self._wait_ms / 2000
            while len(fetched) < max_records and not self._failed and (left_s := until_s - time.monotonic()) > 0:
                try:
                    fetched += self._poll_once(math.ceil(1000 * left_s), max_records - len(fetched))
                except KafkaError as error:  # what came before it is good: the next poll tells of it
                    self._failed = error
            self._rest(False)
        elif not fetched and timeout_ms > self._wait_ms:
            self._rest(True)
        return fetched

    def _poll_once(self, timeout_ms: int, max_records: int) -> list[Any]:
        if failed := self._failed:
            self._failed = None
            raise failed
        return list(chain.from_iterable(self._consumer.poll(timeout_ms, max_records=max_records).values()))

    def _rest(self, rests: bool) -> None:
        """The fetcher reads its settings for each request. At least once it waits for the first record as it is."""
        if self._wait_ms and rests != self._rests:
            self._rests = rests
            wait_ms, min_bytes = (max(self._wait_ms, REST_WAIT_MS), 1) if rests else (self._wait_ms, FETCH_BYTES)
            self._consumer._fetcher.config |= {"fetch_max_wait_ms": wait_ms, "fetch_min_bytes": min_bytes}

    def _check_url(self) -> None:
        """Once whoever had the slot before is surely gone, see that the group knows this worker by its own URL."""
        if time.monotonic() < self._url_due_s or not self.stable:
            return
        self._url_due_s = math.inf
        with self._answered("the group"):
            rejoin_if_renamed(self._admin, self.settings, self._common["client_id"])

    def _check_settled(self) -> None:
        if self.stable:
            self._settled_s = time.monotonic()
        elif time.monotonic() - self._settled_s > UNSETTLED_S:  # trap 4 again: it may never end by itself
            raise DisconnectedError(f"this worker was no settled member of its group for {UNSETTLED_S:g} s")

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        with self._watchdog.over("a record"), self._committing("a record"):
            self._begin()
            self._send(outgoing)

    def commit(self, before: Sequence[Outgoing], offsets: Mapping[int, Offset], after: Sequence[Outgoing]) -> None:
        try:
            if self._exactly:
                with self._watchdog.over("a transaction"), self._committing("a transaction"):
                    self._commit_transaction([*before, *after], offsets)
            else:
                with self._committing("a commit"):
                    self._begin()
                    self._deliver(before)
                    self._commit_offsets(offsets)
                    self._deliver(after)
        finally:
            self._began_s = None

    @contextmanager
    def _committing(self, what: str) -> Iterator[None]:
        try:
            with self._answered(what):
                yield
        except (ProducerFencedError, InvalidProducerEpochError) as error:
            raise fenced(self.settings, self._began_s or 0.0, line(error)) from error

    def _begin(self) -> None:
        if self._began_s is not None:
            return
        self._began_s = time.monotonic()
        self._sent.clear()
        if self._exactly:
            self._producer.begin_transaction()

    def _commit_transaction(self, outgoing: Sequence[Outgoing], offsets: Mapping[int, Offset]) -> None:
        # Taken after the last poll. Of one that is no member any more, the broker would accept the offsets (trap 5).
        member = self._consumer.group_metadata()
        owned = {tp.partition for tp in self._consumer.assignment()}
        if member.generation_id < 0 or not set(offsets) <= owned:
            if self._began_s is not None:
                self._producer.abort_transaction()
            raise AbortedError("this worker is not (or no longer) a member of its group")
        self._begin()
        # Trap 1, 2 and 9: a commit may report success for records that failed. So all are known to be with the broker
        # before the offsets go, and the offsets go last.
        self._deliver(outgoing)
        try:
            self._producer.send_offsets_to_transaction(self._offsets(offsets), member)
        except CommitFailedError as error:
            self._producer.abort_transaction()
            # Trap 10: else the next transaction commits these offsets, too, whoever has their partitions then.
            self._producer._transaction_manager._pending_txn_offset_commits.clear()
            raise AbortedError(line(error)) from error
        self._producer.commit_transaction()

    def _commit_offsets(self, offsets: Mapping[int, Offset]) -> None:
        try:
            self._consumer.commit(self._offsets(offsets))
        except CommitFailedError as error:
            raise AbortedError(line(error)) from error

    def _deliver(self, outgoing: Sequence[Outgoing]) -> None:
        self._send(outgoing)
        self._flush()

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        for o in outgoing:
            try:
                future = self._producer.send(
                    o.topic, o.value, key=o.key, partition=o.partition, headers=list(o.headers)
                )
            except KafkaError as error:  # for its own sake, or because one before it failed
                self._flush()
                self._blame(o, error)
            self._sent.append((o, future))

    def _flush(self) -> None:
        """Wait until all that was sent is with the broker. Neither flush() nor a commit says that a record failed. Of
        those that did, the largest is to blame: the others fail with it.
        """
        until_s = time.monotonic() + self._limit_s
        while not all(future.is_done for _, future in self._sent):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise late({o.topic for o, _ in self._sent}, self._limit_s)
            # Trap 14: it fails where a batch was too large for its topic, and is split, and goes on in two.
            with suppress(KafkaTimeoutError, UnknownError):
                self._producer.flush(timeout=left_s)
        failed = [(o, future.exception) for o, future in self._sent if future.exception]
        self._sent.clear()
        if failed:
            self._blame(*max(failed, key=lambda one: len(one[0].value or b"")))

    def _blame(self, outgoing: Outgoing, error: KafkaError) -> NoReturn:
        """Raise what it means that a record failed."""
        cause = next((part for part in error.args if isinstance(part, KafkaError)), error)
        if isinstance(cause, (ProducerFencedError, InvalidProducerEpochError)) or getattr(cause, "retriable", False):
            raise cause
        size = len(outgoing.value or b"")
        raise ServiceError(
            f"Kafka does not take a record of {size} bytes for {outgoing.topic}: {line(cause)}"
        ) from error

    def _offsets(self, offsets: Mapping[int, Offset]) -> dict[TopicPartition, OffsetAndMetadata]:
        return {TopicPartition(self.topic, p): OffsetAndMetadata(o.offset, o.note, -1) for p, o in offsets.items()}

    def committed(self, partition: int) -> Offset | None:
        try:
            with self._watchdog.over("asking where the group stands"):
                found = self._consumer.committed(
                    TopicPartition(self.topic, partition), metadata=True, timeout_ms=ANSWER_TIMEOUT_MS // 2
                )
        except KafkaTimeoutError as error:
            # Else the answer, when it comes, is kept, and given whenever this is asked again (trap 13).
            self._consumer._coordinator._offset_fetch_futures.clear()
            raise TimeoutError from error
        except KafkaError as error:
            raise DisconnectedError(line(error)) from error
        return None if found is None else Offset(found.offset, note_of(found.metadata))

    def bounds(self, topic: str, partition: int) -> Bounds:
        tp = TopicPartition(topic, partition)
        with self._answered(f"the offsets of {topic}"), self._watchdog.over("asking for offsets"):
            first = self._admin.list_partition_offsets({tp: OffsetSpec.EARLIEST})[tp].offset
            # Up to the high watermark: reading to the last stable offset only may miss what a commit just made visible.
            end = self._admin.list_partition_offsets({tp: OffsetSpec.LATEST})[tp].offset
        return Bounds(first, end)

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        if first >= end:
            return
        tp = TopicPartition(topic, partition)
        with self._answered(f"reading {topic}"):
            reader = KafkaConsumer(
                **self._common,
                group_id=None,
                isolation_level="read_committed",
                auto_offset_reset="none",
                max_poll_records=READ_RECORDS,
                fetch_max_bytes=1 << 25,
                max_partition_fetch_bytes=1 << 23,
            )
            try:
                reader.assign([tp])
                reader.seek(tp, first)
                while reader.position(tp) < end:
                    yield [record_of(r) for r in reader.poll(READ_POLL_MS).get(tp, ()) if r.offset < end]
            finally:
                reader.close(timeout_ms=ANSWER_TIMEOUT_MS)

    def start(self, partition: int, offset: int) -> None:
        tp = TopicPartition(self.topic, partition)
        self._consumer.seek(tp, offset)
        self._consumer.resume(tp)
        self._started.add(partition)

    def rewind(self, offsets: Mapping[int, int]) -> None:
        owned = self._consumer.assignment()
        for partition, offset in offsets.items():
            if (tp := TopicPartition(self.topic, partition)) in owned:
                self._consumer.seek(tp, offset)

    def pause(self, partitions: Iterable[int]) -> None:
        self._consumer.pause(*(TopicPartition(self.topic, p) for p in partitions))

    def resume(self, partitions: Iterable[int]) -> None:
        self._consumer.resume(*(TopicPartition(self.topic, p) for p in partitions))

    @property
    def stable(self) -> bool:
        return bool(self._consumer.group_metadata().state == MemberState.STABLE)

    def lag(self) -> Mapping[int, int] | None:
        # Not by the consumer: it may send the question behind a fetch, which waits for records. Partition 0 stands for
        # the broker where nothing is assigned.
        started = [tp for tp in self._consumer.assignment() if tp.partition in self._started]
        asked = dict.fromkeys([TopicPartition(self.topic, 0), *started], OffsetSpec.LATEST)
        try:
            ends = self._admin.list_partition_offsets(asked, IsolationLevel.READ_COMMITTED, ANSWER_TIMEOUT_MS)
            positions = {tp: self._consumer.position(tp, timeout_ms=ANSWER_TIMEOUT_MS) for tp in started}
        except KafkaError:  # the group's state says nothing of it: the member stays <stable> while no broker is there
            return None
        return {tp.partition: max(0, ends[tp].offset - position) for tp, position in positions.items()}

    def close(self) -> None:
        for client in reversed(self._clients):
            limit = {"timeout": CLOSE_TIMEOUT_S} if isinstance(client, KafkaProducer) else {}
            if isinstance(client, KafkaConsumer):
                limit = {"timeout_ms": CLOSE_TIMEOUT_S * 1000}
            with self._watchdog.over("hanging up"):
                try:
                    if isinstance(client, KafkaProducer):
                        # What it still holds is of a commit that failed. close() by itself waits for that, and where it
                        # cannot be delivered gives up, and leaves a thread that delivers it later (trap 12).
                        client._sender.force_close()
                    client.close(**limit)
                except Exception as error:  # whatever it was, this session is over
                    log.debug("while hanging up: %s", line(error))
        self._watchdog.stop()

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        """What of Kafka's errors ends the session, and what the service."""
        try:
            yield
        except (ProducerFencedError, InvalidProducerEpochError):
            raise
        except FencedInstanceIdError as error:
            raise taken(self.settings) from error
        except CorruptRecordError as error:
            raise ServiceError(f"{what}: a damaged batch cannot be read: {line(error)}") from error
        except (NoOffsetForPartitionError, OffsetOutOfRangeError, LogTruncationError) as error:
            raise LostStateError(f"input of {self.topic} that is still needed is gone: {line(error)}") from error
        except (KafkaConnectionError, KafkaTimeoutError) as error:
            raise unanswered(self.settings) from error
        except KafkaError as error:
            raise refused(self.settings, f"{what}: {line(error)}", getattr(error, "retriable", False)) from error


def record_of(r: Any) -> Record:
    headers = [(str(name), value) for name, value in r.headers] if r.headers else ()  # str: no _Name goes on from here
    return Record(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, headers)


class _Ended:
    """A join that has ended, and says that it goes on: so it is waited for, which takes no time."""

    is_done = False

    def __init__(self, join: Any) -> None:
        self.add_callback, self.add_errback = join.add_callback, join.add_errback


class _Lenient(bytearray):
    """Bytes whose text may be anything."""

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return _Lenient(part) if isinstance(index, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002
        return _Name(super().decode(encoding, "surrogateescape"))


class _Name(str):
    """What such bytes were decoded to: they can be had again, as kafka-python does to know their number."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:  # noqa: ARG002
        return super().encode(encoding, "surrogateescape")


def _read_message(batch: Any, read_message: Any = DefaultRecordBatch._read_msg) -> Any:
    """Trap 7: a header's name that is not UTF-8 makes kafka-python lose the batch it is in, and then spin. Here its
    bytes come through as surrogates, for which `parse` has a dead letter.
    """
    position = batch._pos
    try:
        return read_message(batch)
    except UnicodeDecodeError:
        batch._buffer, batch._pos = _Lenient(batch._buffer), position
        return read_message(batch)


DefaultRecordBatch._read_msg = _read_message
