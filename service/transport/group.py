"""The group's description by kafka-python's admin client: who has which partition, and where producers put a key."""

from __future__ import annotations

import logging
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove
from kafka.errors import KafkaError
from kafka.net.compat import KafkaNetClient
from kafka.partitioner.default import murmur2

from service.settings import Settings, base_url
from service.transport.contract import Described

log = logging.getLogger(__name__)

ANSWER_S = 2.0


class KafkaPythonGroup:
    """Asks Kafka on a thread of its own: kafka-python waits 10 s for a host that is silent, whatever it is told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin: KafkaAdminClient | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="group")
        self._asked: Future[Described] | None = None
        self._asking = threading.Lock()

    def describe(self) -> Described | None:
        with self._asking:
            if self._asked is None or self._asked.done():
                self._asked = self._thread.submit(self._describe)
            asked = self._asked
        try:
            return asked.result(ANSWER_S)
        except (KafkaError, OSError) as error:  # TimeoutError is one of the latter
            log.debug("Kafka does not describe the group %s: %r", self._settings.group_id, error)
            return None

    def candidates(self, key: bytes, partitions: int) -> tuple[int, ...]:
        java, librdkafka = (murmur2(key) & 0x7FFFFFFF) % partitions, zlib.crc32(key) % partitions
        return (java,) if java == librdkafka else (java, librdkafka)

    def close(self) -> None:
        self._thread.submit(self._hang_up)
        self._thread.shutdown()

    def _describe(self) -> Described:
        try:
            if self._admin is None:
                self._admin = _connect(self._settings.bootstrap_servers)
            return _describe(self._admin, self._settings.group_id, self._settings.observations_topic)
        except (KafkaError, OSError):
            self._hang_up()  # it would never again ask which broker has the group
            raise

    def _hang_up(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None


def _describe(admin: KafkaAdminClient, group_id: str, topic: str) -> Described:
    group = admin.describe_groups([group_id])[group_id]
    (found,) = admin.describe_topics([topic])
    if group["error"] or found["error_code"]:
        raise KafkaError(group["error"] or f"no topic {topic}")
    stable = group["group_state"] == "Stable"  # until then the members are named without their partitions
    return Described(len(found["partitions"]), _owners(group["members"], topic) if stable else {}, stable)


def _owners(members: list[dict[str, Any]], topic: str) -> dict[int, str]:
    """By partition, the URL that its member gave as client id. A member that gave none cannot be asked."""
    owners: dict[int, str] = {}
    for member in members:
        try:
            url = base_url(member["client_id"])
        except ValueError:
            continue
        for assigned in (member["member_assignment"] or {"assigned_partitions": ()})["assigned_partitions"]:
            if assigned["topic"] == topic:
                owners |= dict.fromkeys(assigned["partitions"], url)
    return owners


def rejoin_if_renamed(admin: KafkaAdminClient, settings: Settings, client_id: str) -> None:
    """Kafka keeps the client id under which a slot's first life joined, and by it other workers ask for its streams.
    Make one that has come back under another join anew.
    """
    members = admin.describe_groups([settings.group_id])[settings.group_id]["members"]
    own = [member for member in members if member["group_instance_id"] == settings.slot]
    if any(member["client_id"] != client_id for member in own):
        log.info("slot %s has a new URL: joining the group anew", settings.slot)
        admin.remove_group_members(settings.group_id, [MemberToRemove(group_instance_id=settings.slot)])


def _connect(bootstrap_servers: str) -> KafkaAdminClient:
    """An admin client; where Kafka is away, none and nothing left over: its constructor would leave a thread behind."""
    begun: list[KafkaNetClient] = []

    def begin(**configs: Any) -> KafkaNetClient:
        begun.append(KafkaNetClient(**configs))
        return begun[-1]

    timeout_ms = int(ANSWER_S * 1000)
    try:
        return KafkaAdminClient(
            bootstrap_servers=bootstrap_servers.split(","),
            client_id="carousel-group",
            kafka_client=begin,
            bootstrap_timeout_ms=timeout_ms,
            request_timeout_ms=timeout_ms,
            reconnect_backoff_max_ms=1_000,
        )
    except BaseException:
        for client in begun:
            client.close()
        raise
