"""The transport's contract, on each client and the genuine Kafka."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import OffsetAndMetadata

from deploy.broker import BrokerConfig, EmbeddedBroker
from service.errors import AbortedError, DisconnectedError, LostStateError, ServiceError
from service.settings import Settings
from service.transport import CLIENTS
from service.transport.contract import Bounds, Offset, Transport
from tests.served import until
from tests.service.transport.conftest import (
    Connect,
    administered,
    assigned,
    create,
    forecast,
    last_transaction,
    own_settings,
    polled,
    produce,
    producing,
    session_of,
    shared,
    silent,
    snapshot,
    stands_at,
    started,
    thrown_out,
    visible,
    where_it_stands,
)

# Topics.


def test_missing_topics_are_created_with_as_many_partitions_as_the_input(settings: Settings, connect: Connect) -> None:
    create(settings, observations=3)
    connect()
    names = [settings.observations_topic, settings.forecasts_topic, settings.dead_letters_topic, settings.state_topic]
    with administered(settings) as admin:
        assert [len(topic["partitions"]) for topic in admin.describe_topics(names)] == [3, 3, 3, 3]
        asked = [[ConfigResource(ConfigResourceType.TOPIC, name)] for name in names]
        told = [admin.describe_configs(one, config_filter="all")["topic"] for one in asked]
    configs = [one[name] for one, name in zip(told, names, strict=True)]
    assert [config["cleanup.policy"]["value"] for config in configs] == ["delete", "delete", "delete", "compact"]
    assert int(configs[-1]["max.message.bytes"]["value"]) == 8 << 20


def test_missing_topics_that_must_not_be_created_are_named(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1, forecasts=1, dead_letters=1)
    with pytest.raises(ServiceError, match=f"not to be created .*: {settings.state_topic}$"):
        connect(partitions=0)


@pytest.mark.parametrize("role", ["forecasts", "dead_letters", "state"])
def test_an_output_with_fewer_partitions_than_the_input_is_refused_by_name(
    settings: Settings, connect: Connect, role: str
) -> None:
    create(settings, observations=3)
    create(settings, {"cleanup.policy": "compact"}, **{role: 2})
    with pytest.raises(ServiceError, match=f"{getattr(settings, f'{role}_topic')} has 2 partitions"):
        connect()


@pytest.mark.parametrize("policy", ["", "delete", "compact,delete"])
def test_a_state_topic_that_forgets_is_refused_by_name(settings: Settings, connect: Connect, policy: str) -> None:
    create(settings, {"cleanup.policy": policy} if policy else {}, state=1)
    told = f"{settings.state_topic} has cleanup.policy={policy or 'delete'} .*: set it to compact"
    with pytest.raises(ServiceError, match=told):
        connect()


# Input.


def test_records_come_as_they_were_sent_once_their_partition_was_started(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"0", b"1"], headers=[("h", b"1")])
    transport = connect()
    assigned(transport, 0)
    assert transport.stable
    assert silent(transport)
    transport.start(0, 1)
    (record,) = polled(transport, 1)
    assert (record.topic, record.partition, record.offset) == (settings.observations_topic, 0, 1)
    assert (record.key, record.value, list(record.headers)) == (b"k", b"1", [("h", b"1")])
    assert record.timestamp_ms > 0


def test_no_more_records_are_polled_than_are_asked_for(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"%d" % n for n in range(10)])
    transport = connect()
    started(transport, 0)
    counts: list[int] = []
    while sum(counts) < 10:
        counts.append(len(transport.poll(100, 3).records))
    assert [count for count in counts if count] == [3, 3, 3, 1]


def test_a_paused_partition_is_silent_until_it_is_resumed(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    transport = connect()
    started(transport, 0, 1)
    transport.pause([0])
    produce(settings, [b"0"], partition=0)
    produce(settings, [b"1"], partition=1)
    assert [record.partition for record in polled(transport, 1)] == [1]
    assert silent(transport)
    transport.resume([0])
    assert [record.partition for record in polled(transport, 1)] == [0]


def test_records_come_again_from_where_they_were_rewound_to(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    produce(settings, [b"0", b"1", b"2"])
    transport = connect()
    started(transport, 0, 1)
    polled(transport, 3)
    transport.rewind({0: 1, 1: 0, 7: 3})  # of partition 7, nothing is known here
    assert [record.offset for record in polled(transport, 2)] == [1, 2]


def test_lag_is_what_was_not_yet_polled(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    transport = connect()
    started(transport, 0)
    transport.pause([0])
    produce(settings, [b"x"] * 7)
    assert transport.lag() == {0: 7}
    transport.resume([0])
    polled(transport, 7)
    assert transport.lag() == {0: 0}


def test_a_second_member_takes_partitions_over_and_both_are_told(settings: Settings, connect: Connect) -> None:
    create(settings, observations=4)
    first = connect()
    started(first, 0, 1, 2, 3)
    second = connect(slot="b")
    held: dict[Transport, set[int]] = {first: {0, 1, 2, 3}, second: set()}
    until("a fair share", lambda: shared(held, 2), 30)
    for partition in range(4):
        produce(settings, [b"x"], partition)
    for partition in held[second]:
        second.start(partition, 0)
    found: dict[Transport, set[int]] = {first: set(), second: set()}

    def all_found() -> bool:
        for transport, partitions in found.items():
            partitions.update(record.partition for record in transport.poll(100, 100).records)
        return sum(map(len, found.values())) == 4

    until("a record of each partition", all_found, 30)
    assert found == held


@pytest.mark.parametrize("slots", ["ab", ("", "")], ids=["slots", "no slots"])
def test_workers_on_different_clients_share_a_group(
    settings: Settings, connect: Connect, client: str, slots: Sequence[str]
) -> None:
    """So that one can be changed for the other, worker by worker. Who comes first shares out."""
    (other,) = set(CLIENTS) - {client}
    create(settings, observations=4)
    first = connect(slot=slots[0])
    started(first, 0, 1, 2, 3)
    first.commit([], {p: Offset(0, "first") for p in range(4)}, [])
    second = connect(slot=slots[1], transport=other)
    held: dict[Transport, set[int]] = {first: {0, 1, 2, 3}, second: set()}
    until("a fair share", lambda: shared(held, 2), 30)
    assert held[first] | held[second] == {0, 1, 2, 3}
    for transport, partitions in held.items():
        transport.commit([], {p: Offset(1, "own") for p in partitions}, [])
    with pytest.raises(AbortedError):
        second.commit([], {p: Offset(7, "not its own") for p in held[first]}, [])
    assert {where_it_stands(first, p) for p in range(4)} == {Offset(1, "own")}
    first.close()
    third = connect(slot=slots[0], transport=other)
    held = {third: set(), second: held[second]}
    until("what the first one had", lambda: shared(held, 2), 30)


def test_the_next_life_of_a_slot_has_its_partitions_at_once(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    first = connect()
    started(first, 0, 1)
    first.close()
    began_s = time.monotonic()
    assigned(connect(), 0, 1)
    assert time.monotonic() - began_s < settings.session_timeout_ms / 2000


def test_input_that_is_gone_stops_the_service(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"0", b"1", b"2"])
    with administered(settings) as admin:
        admin.delete_records({TopicPartition(settings.observations_topic, 0): 2})
    transport = connect()
    assigned(transport, 0)
    assert transport.bounds(settings.observations_topic, 0) == Bounds(2, 3)
    transport.start(0, 1)
    with pytest.raises(LostStateError, match=f"input of {settings.observations_topic} that is still needed is gone"):
        until("an error", lambda: transport.poll(100, 100).records, 10)


# Transactions of others.


def test_records_of_an_aborted_transaction_are_neither_polled_nor_read(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    with producing(settings, transactional_id=f"{settings.group_id}-other") as other:
        other.init_transactions()
        for value, end in ((b"no", other.abort_transaction), (b"yes", other.commit_transaction)) * 2:
            other.begin_transaction()
            other.send(settings.observations_topic, value, key=b"k", partition=0)
            other.flush()
            end()
        other.begin_transaction()
        other.send(settings.observations_topic, b"no", key=b"k", partition=0)
        other.flush()
        other.abort_transaction()
    transport = connect()
    started(transport, 0)
    assert [(record.offset, record.value) for record in polled(transport, 2)] == [(2, b"yes"), (6, b"yes")]
    assert silent(transport)
    # Of ten offsets the last two hold an aborted record and its marker: reading ends all the same.
    assert transport.bounds(settings.observations_topic, 0) == Bounds(0, 10)
    read = [record.offset for batch in transport.read(settings.observations_topic, 0, 0, 10) for record in batch]
    assert read == [2, 6]
    assert list(transport.read(settings.observations_topic, 0, 10, 10)) == []


def test_reading_begins_and_ends_where_it_is_told(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"%d" % n for n in range(9)])
    transport = connect()
    batches = transport.read(settings.observations_topic, 0, 3, 6)
    assert [record.value for batch in batches for record in batch] == [b"3", b"4", b"5"]


def test_an_open_transaction_counts_as_there_and_its_offsets_as_unsettled(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"0", b"1"])
    transport = connect()
    started(transport, 0)
    assert transport.committed(0) is None
    offsets = {TopicPartition(settings.observations_topic, 0): OffsetAndMetadata(2, "", -1)}
    with producing(settings, transactional_id=f"{settings.group_id}-other") as other:
        other.init_transactions()
        other.begin_transaction()
        other.send(settings.state_topic, b"state", key=b"k", partition=0)
        other.flush()
        other.send_offsets_to_transaction(offsets, settings.group_id)
        assert transport.bounds(settings.state_topic, 0) == Bounds(0, 1)
        with pytest.raises(TimeoutError):
            transport.committed(0)
        reading = transport.read(settings.state_topic, 0, 0, 1)
        assert [next(reading) for _ in range(5)] == [[]] * 5
        other.commit_transaction()
        assert [record.value for batch in reading for record in batch] == [b"state"]
        stands = until("the offset", lambda: settled(transport))
    assert stands == Offset(2, "")


def settled(transport: Transport) -> Offset | None:
    try:
        return transport.committed(0)
    except TimeoutError:
        return None


# Commits.


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_what_was_committed_is_delivered_and_the_next_life_is_told_of_it(
    settings: Settings, connect: Connect, guarantee: str
) -> None:
    create(settings, observations=2)
    produce(settings, [b"%d" % n for n in range(10)])
    first = connect(guarantee=guarantee)
    started(first, 0, 1)
    records = polled(first, 10)
    before = [forecast(settings, b"f%d" % record.offset) for record in records[:4]]
    first.send(before[:1])
    first.send(before[1:3])
    first.commit(before[3:], {0: Offset(4, "note"), 1: Offset(0)}, [snapshot(settings, b"s")])
    first.close()
    second = connect(guarantee=guarantee)
    started(second, 0, 1)
    assert second.committed(0) == Offset(4, "note")
    assert second.committed(1) == Offset(0, "")
    assert [record.offset for record in polled(second, 6)] == [4, 5, 6, 7, 8, 9]
    assert visible(settings, settings.forecasts_topic) == [b"f0", b"f1", b"f2", b"f3"]
    assert visible(settings, settings.state_topic) == [b"s"]


def test_the_same_session_commits_again_and_again(settings: Settings, connect: Connect) -> None:
    transport = connect()
    started(transport, 0)
    for n in range(20):
        transport.commit([forecast(settings, b"%d" % n)], {0: Offset(n + 1, str(n))}, [])
    transport.commit([], {0: Offset(20, "offsets alone")}, [])
    transport.commit([forecast(settings, b"records alone")], {}, [])
    assert until("the note", lambda: settled(transport)) == Offset(20, "offsets alone")
    assert visible(settings, settings.forecasts_topic) == [*(b"%d" % n for n in range(20)), b"records alone"]


def test_a_life_that_ends_before_its_commit_leaves_nothing_to_be_seen(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"0", b"1"])
    first = connect()
    started(first, 0)
    first.commit([forecast(settings, b"0")], {0: Offset(1, "0")}, [])
    dies_before_the_offsets(first, settings)
    second = connect()
    started(second, 0)
    assert second.committed(0) == Offset(1, "0")
    assert visible(settings, settings.forecasts_topic) == [b"0"]
    second.commit([forecast(settings, b"again")], {0: Offset(2, "1")}, [])
    assert visible(settings, settings.forecasts_topic) == [b"0", b"again"]


def dies_before_the_offsets(transport: Any, settings: Settings) -> None:
    """A commit up to where its records are with the broker; then no more is heard of it."""
    transport.send([forecast(settings, b"torn"), snapshot(settings, b"torn")])
    until("it to be with the broker", lambda: transport.bounds(settings.state_topic, 0).end == 1)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("size", [2_000_000, 20_000_000])
def test_a_record_too_large_for_its_topic_stops_the_service_with_its_name_and_size(
    settings: Settings, connect: Connect, guarantee: str, size: int
) -> None:
    transport = connect(guarantee=guarantee)
    started(transport, 0)
    with pytest.raises(ServiceError, match=f"record of {size} bytes for {settings.forecasts_topic}"):
        transport.commit([forecast(settings, b"x" * size)], {0: Offset(1)}, [])
    transport.close()
    assert connect(guarantee=guarantee).committed(0) is None
    assert visible(settings, settings.forecasts_topic) == []


def test_at_least_once_delivers_first_notes_then_and_delivers_the_rest(settings: Settings, connect: Connect) -> None:
    small, large = forecast(settings, b"x"), forecast(settings, b"x" * 2_000_000)
    transport = connect(guarantee="at_least_once")
    started(transport, 0)
    with pytest.raises(ServiceError):
        transport.commit([small, large], {0: Offset(1)}, [small])
    assert visible(settings, settings.forecasts_topic) == [b"x"]
    assert transport.committed(0) is None
    transport = connect(guarantee="at_least_once")
    started(transport, 0)
    with pytest.raises(ServiceError):
        transport.commit([small], {0: Offset(2)}, [small, large])
    assert visible(settings, settings.forecasts_topic) == [b"x"] * 3
    assert transport.committed(0) == Offset(2)
    transport = connect(guarantee="at_least_once")
    started(transport, 0)
    thrown_out(settings)
    with pytest.raises(AbortedError):
        transport.commit([small], {0: Offset(3)}, [small])
    assert visible(settings, settings.forecasts_topic) == [b"x"] * 4
    assert stands_at(settings) == 2


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_a_member_that_was_thrown_out_is_told_and_goes_on(settings: Settings, connect: Connect, guarantee: str) -> None:
    transport = connect(guarantee=guarantee)
    started(transport, 0)
    transport.commit([], {0: Offset(1)}, [])
    if guarantee == "exactly_once":
        transport.send([forecast(settings, b"no")])
    thrown_out(settings)
    with pytest.raises(AbortedError):
        transport.commit([snapshot(settings, b"no")] if guarantee == "exactly_once" else [], {0: Offset(2)}, [])
    assert stands_at(settings) == 1
    assigned(transport, 0)
    transport.start(0, 1)
    transport.commit([forecast(settings, b"yes")], {0: Offset(3)}, [])
    assert transport.committed(0) == Offset(3)
    assert visible(settings, settings.forecasts_topic) == [b"yes"]
    assert visible(settings, settings.state_topic) == []


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_the_older_of_two_workers_of_one_slot_ends_and_names_the_slot(
    settings: Settings, connect: Connect, guarantee: str
) -> None:
    older = connect(guarantee=guarantee)
    started(older, 0)
    older.commit([forecast(settings, b"1")], {0: Offset(1)}, [])
    newer = connect(guarantee=guarantee)
    started(newer, 0)
    with pytest.raises(ServiceError, match=f"another worker has taken slot 'a' of group {settings.group_id}"):
        older.commit([forecast(settings, b"no")] if guarantee == "exactly_once" else [], {0: Offset(2)}, [])
    newer.commit([forecast(settings, b"2")], {0: Offset(2)}, [])
    assert visible(settings, settings.forecasts_topic) == [b"1", b"2"]


# A broker that goes away.


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """One that may be killed; who does so starts it again."""
    with EmbeddedBroker(BrokerConfig(data_dir=tmp_path_factory.mktemp("broker"))) as broker:
        yield broker


def killed(broker: EmbeddedBroker) -> None:
    assert broker.pid
    os.kill(broker.pid, signal.SIGKILL)
    until("the broker's end", lambda: broker.poll() is not None)


def test_a_session_without_a_broker_says_so_within_ten_seconds(client: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began_s = time.monotonic()
    with pytest.raises(DisconnectedError, match=f"no Kafka broker answers at 127.0.0.1:{port}"):
        session_of(own_settings(f"127.0.0.1:{port}", transport=client))
    assert time.monotonic() - began_s < 10


def test_a_broker_that_was_killed_ends_the_session_and_the_next_finds_all(
    own_broker: EmbeddedBroker, client: str
) -> None:
    settings = own_settings(own_broker.bootstrap_servers, transport=client, transaction_timeout_ms=2_000)
    first = session_of(settings, "first")
    try:
        started(first, 0)
        first.commit([forecast(settings, b"1")], {0: Offset(1, "1")}, [])
        # A broker that is killed before that, and is alone, may never reach itself afterwards to write its markers.
        until("the transaction's end", lambda: last_transaction(settings) == "CompleteCommit")
        killed(own_broker)
        assert first.lag() is None
        assert silent(first)
        with pytest.raises(DisconnectedError):
            first.commit([forecast(settings, b"no")], {0: Offset(2, "2")}, [])
    finally:
        first.close()
    own_broker.start()
    assert own_broker.bootstrap_servers == settings.bootstrap_servers
    second = session_of(settings, "second")
    try:
        started(second, 0)
        assert second.committed(0) == Offset(1, "1")
        second.commit([forecast(settings, b"2")], {0: Offset(2, "2")}, [])
        assert visible(settings, settings.forecasts_topic) == [b"1", b"2"]
    finally:
        second.close()


def test_a_damaged_batch_is_named(own_broker: EmbeddedBroker, client: str) -> None:
    settings = own_settings(own_broker.bootstrap_servers, transport=client)
    create(settings, observations=1)
    for value in (b"sound", b"to be damaged", b"sound"):
        produce(settings, [value])
    own_broker.stop()
    (log,) = (own_broker.data_dir / "kafka" / f"{settings.observations_topic}-0").glob("*.log")
    damage(log, b"to be damaged")
    own_broker.start()
    transport = session_of(settings)
    try:
        started(transport, 0)
        assert [record.value for record in polled(transport, 1)] == [b"sound"]
        damaged = f"a damaged batch .*{settings.observations_topic}.* partition=0.* offset 1 "
        with pytest.raises(ServiceError, match=f"polling {settings.observations_topic}: {damaged}"):
            until("an error", lambda: transport.poll(100, 100).records, 10)
        with pytest.raises(ServiceError, match=f"reading {settings.observations_topic}: {damaged}"):
            list(transport.read(settings.observations_topic, 0, 0, 3))
    finally:
        transport.close()


def damage(log: Path, value: bytes) -> None:
    content = log.read_bytes()
    assert content.count(value) == 1
    log.write_bytes(content.replace(value, value.upper()))
