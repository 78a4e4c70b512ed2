"""What Kafka says of the group: the genuine one, of genuine members."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from deploy.broker import BrokerConfig, EmbeddedBroker
from service.settings import Settings
from service.transport.contract import Described
from service.transport.group import KafkaPythonGroup
from tests.served import until
from tests.service.transport.conftest import session_of


def settings_for(servers: str, name: str, client: str = "kafka-python") -> Settings:
    topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters", "state")}
    return Settings.load(
        {"model": "unused", "bootstrap_servers": servers, "group_id": name, "transport": client, **topics}
    )


def test_members_are_described_by_the_urls_that_they_gave_as_client_ids(bootstrap_servers: str, client: str) -> None:
    settings = settings_for(bootstrap_servers, f"described-{client}", client)
    group = KafkaPythonGroup(settings)
    names = ("http://127.0.0.1:8001", "https://worker-2.example", "no url", "http://user@host/path")
    members = [session_of(settings, name) for name in names]
    partitions: dict[str, set[int]] = {name: set() for name in names}

    def settled() -> Described | None:
        for name, member in zip(names, members, strict=True):
            polled = member.poll(100, 1)
            partitions[name] = partitions[name] - polled.revoked | polled.assigned
        described = group.describe()
        if described and described.stable and all(len(mine) == 1 for mine in partitions.values()):
            return described
        return None

    described = until("a partition each", settled)
    assert described.partitions == 4
    assert described.owners == {p: name for name in names[:2] for p in partitions[name]}
    for member in members:
        member.close()
    until("the group to be empty", lambda: group.describe() == Described(4, {}, stable=False))
    group.close()


def test_a_broker_that_is_away_is_no_answer_in_time_and_leaves_nothing_behind(tmp_path: Path) -> None:
    data = BrokerConfig(data_dir=tmp_path / "kafka")
    before = threading.active_count()
    with EmbeddedBroker(data) as broker:
        settings = settings_for(broker.bootstrap_servers, "away")
        member, group = session_of(settings, "http://127.0.0.1:1"), KafkaPythonGroup(settings)
        until("the group", lambda: member.poll(100, 1).assigned)
        until("its description", group.describe)
        member.close()
        assert broker.pid
        os.kill(broker.pid, signal.SIGSTOP)
        begun = time.monotonic()
        assert group.describe() is None
        assert time.monotonic() - begun < 3
        os.kill(broker.pid, signal.SIGCONT)
        until("an answer", group.describe)
        os.kill(broker.pid, signal.SIGKILL)
        for _ in range(3):
            begun = time.monotonic()
            assert group.describe() is None
            assert time.monotonic() - begun < 3
        with EmbeddedBroker(data):
            until("an answer", group.describe)
            group.close()
    assert threading.active_count() == before
