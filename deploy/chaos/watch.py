"""What Kafka tells of the run: how far the group is, who owns which partitions, what stands in a topic."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import MemberToRemove
from kafka.errors import KafkaError, NoError

from deploy.chaos.plan import ChaosError
from service.records import Record

EVERY_S = 0.1
TIMEOUT_MS = 3_000
READ_LIMIT_S = 90.0
"""For a topic to be read to its end; an open transaction of the dead hides the end for up to its time-out and 10 s."""


@dataclass(frozen=True)
class Member:
    """A member of the group. slot: "" for one that has none."""

    member_id: str
    slot: str
    url: str
    partitions: frozenset[int]


@dataclass(frozen=True)
class Seen:
    """The group as it was when Kafka was asked, at `asked_at` on the monotonic clock. offsets: committed ones."""

    asked_at: float = 0.0
    offsets: Mapping[int, int] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    @property
    def done(self) -> int:
        """How many records of the input are done with; aborted ones count too."""
        return sum(self.offsets.values())

    def member(self, slot: str, url: str) -> Member | None:
        """A worker as a member, known by its slot or else by its URL."""
        return next((m for m in self.members if (m.slot == slot if m.slot else m.url == url)), None)


class Watch(threading.Thread):
    """Asks again and again; `seen` is the last answer. While the broker is away it stays as it was."""

    def __init__(self, servers: str, group: str) -> None:
        super().__init__(name="watch", daemon=True)
        self.servers, self.group = servers, group
        self.seen = Seen()
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(TIMEOUT_MS / 1_000)

    def run(self) -> None:
        while not self._stopping.is_set():
            with suppress(Exception), admin_client(self.servers) as admin:  # a broker that dies may answer anything
                while not self._stopping.wait(EVERY_S):
                    self.seen = self._ask(admin)
            self._stopping.wait(EVERY_S)

    def _ask(self, admin: KafkaAdminClient) -> Seen:
        asked_at = time.monotonic()
        offsets = admin.list_group_offsets([self.group])[self.group]
        members = admin.describe_groups([self.group])[self.group]["members"]
        return Seen(
            asked_at,
            {tp.partition: committed.offset for tp, committed in offsets.items() if committed.offset >= 0},
            tuple(_member(each) for each in members),
        )


def _member(told: Mapping[str, Any]) -> Member:
    assignment = told["member_assignment"]
    topics = assignment["assigned_partitions"] if assignment else ()
    partitions = frozenset(p for topic in topics for p in topic["partitions"])
    return Member(told["member_id"], told.get("group_instance_id") or "", told["client_id"], partitions)


@contextmanager
def admin_client(servers: str) -> Iterator[KafkaAdminClient]:
    """An admin client that gives up soon, for the length of a block."""
    client = KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=TIMEOUT_MS, request_timeout_ms=TIMEOUT_MS)
    try:
        yield client
    finally:
        with suppress(KafkaError):
            client.close()


def evict(servers: str, group: str, member: Member) -> None:
    """Throw a member out of its group. Raises KafkaError if Kafka would not."""
    who = MemberToRemove(group_instance_id=member.slot) if member.slot else MemberToRemove(member_id=member.member_id)
    with admin_client(servers) as admin:
        for error in admin.remove_group_members(group, [who]).values():
            if error is not NoError:
                raise error(f"{member.slot or member.url} could not be removed")


def read(servers: str, topic: str) -> list[Record]:
    """All that a careful reader (read_committed) sees of a topic, a partition's records in order.

    Raises ChaosError if that does not become clear in time: a transaction in it is still open.
    """
    deadline = time.monotonic() + READ_LIMIT_S
    with _consumer(servers, "read_uncommitted") as careless, _consumer(servers, "read_committed") as careful:
        partitions = [TopicPartition(topic, p) for p in sorted(careful.partitions_for_topic(topic) or ())]
        ends = careless.end_offsets(partitions)
        careful.assign(partitions)
        records: list[Record] = []
        while behind := [tp for tp in partitions if careful.position(tp) < ends[tp]]:
            for batch in careful.poll(500, max_records=5_000).values():
                records += [
                    Record(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, r.headers) for r in batch
                ]
            if time.monotonic() > deadline:
                where = ", ".join(f"partition {tp.partition} at {careful.position(tp)} of {ends[tp]}" for tp in behind)
                raise ChaosError(f"{topic} could not be read to its end, a transaction in it is still open: {where}")
    return records


@contextmanager
def _consumer(servers: str, isolation_level: str) -> Iterator[KafkaConsumer]:
    consumer = KafkaConsumer(
        bootstrap_servers=servers, group_id=None, isolation_level=isolation_level, auto_offset_reset="earliest"
    )
    try:
        yield consumer
    finally:
        with suppress(KafkaError):
            consumer.close()
