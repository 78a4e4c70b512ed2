"""Each trap of a client that its transport steers round, sprung: none reaches whoever uses the transport.

Up to 15 they are kafka-python's; librdkafka is led into those of them that it could have, too.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.errors import CoordinatorNotAvailableError
from kafka.protocol.producer import ProduceRequest
from kafka.record.default_records import DefaultRecordBatchBuilder

from service.errors import AbortedError, DisconnectedError, Reason, Rejected, ServiceError
from service.records import Limits, dead_letter, parse
from service.settings import Settings
from service.transport import CLIENTS
from service.transport.contract import Offset, Transport
from service.transport.session import EXIT_RESTART
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
from tests.service.transport.wire import (
    ADD_OFFSETS_TO_TXN,
    END_TXN,
    FETCH,
    OFFSET_FETCH,
    PRODUCE,
    TXN_OFFSET_COMMIT,
    Message,
    Wire,
)

SLOW = "slow"
"""The client whose messages are held."""

LIFE = """
import logging, sys, time
from kafka import KafkaAdminClient
from service.records import Outgoing
from service.settings import Settings
from service.transport import kafka_python, transport_of
from service.transport.contract import Offset

logging.basicConfig(level="CRITICAL", format="%(message)s")
kafka_python.DEADLINE_S = 3.0
settings = Settings.model_validate_json(sys.argv[1])
transport = transport_of(settings)(settings, "slow")
while not transport.poll(100, 1).assigned:
    pass
transport.start(0, 0)
transport.commit([Outgoing(settings.forecasts_topic, 0, b"k", b"1")], {0: Offset(1)}, [])
if "delete" in sys.argv:
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    admin.delete_topics([settings.observations_topic])
transport.commit([Outgoing(settings.forecasts_topic, 0, b"k", b"2")], {0: Offset(2)}, [])
"""
"""Of a process: it commits twice. `delete`: and the topic goes between."""
OVER = "a transaction did not end within 3 s: exit, to be started again"


only_kafka_python = pytest.mark.parametrize("client", ["kafka-python"])
only_librdkafka = pytest.mark.parametrize("client", ["librdkafka"])


@pytest.fixture
def module(client: str) -> ModuleType:
    """Where the transport is."""
    return import_module(f"service.transport.{CLIENTS[client][0]}")


@pytest.fixture
def wired(wire: Wire, client: str) -> Iterator[Settings]:
    """A session there is at the end of the wire."""
    yield own_settings(f"127.0.0.1:{wire.port}", transport=client, transaction_timeout_ms=2_000)
    wire.mend()


@contextmanager
def session(settings: Settings, client_id: str = "test") -> Iterator[Any]:
    transport = session_of(settings, client_id)
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def held(wire: Wire, api: int, after: int = 0) -> Iterator[threading.Event]:
    """Until the event, or the end, the slow client's requests of this kind do not arrive, but for the first ones."""
    released = threading.Event()
    passed: list[Message] = []

    def hold(message: Message) -> None:
        if (message.client, message.api) == (SLOW, api):
            passed.append(message)
            if len(passed) > after:
                released.wait()

    wire.on_request = hold
    try:
        yield released
    finally:
        released.set()
        wire.on_request = lambda message: None


def at_the_second(api: int, act: Callable[[Message], None]) -> Callable[[Message], None]:
    """Act on the slow client's second message of this kind."""
    heard: list[Message] = []

    def listen(message: Message) -> None:
        if (message.client, message.api) == (SLOW, api):
            heard.append(message)
            if len(heard) == 2:
                act(message)

    return listen


def ends_as(life: str, settings: Settings, *arguments: str) -> tuple[int, str]:
    """A process's exit status and its last line."""
    command = [sys.executable, "-c", life, settings.model_dump_json(), *arguments]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return ended.returncode, (ended.stderr.splitlines() or [""])[-1]


def create_with_room(settings: Settings) -> None:
    """Topics that one partition may be added to."""
    create(settings, observations=1, forecasts=2, dead_letters=2)
    create(settings, {"cleanup.policy": "compact"}, state=2)


def add_a_partition(settings: Settings) -> None:
    with administered(settings) as admin:
        admin.create_partitions({settings.observations_topic: 2})


def in_background(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# 1: a commit reports success though the coordinator has timed the transaction out.
@pytest.mark.parametrize("api", [PRODUCE, ADD_OFFSETS_TO_TXN, END_TXN])
def test_a_transaction_that_took_too_long_is_not_told_as_done(wire: Wire, wired: Settings, api: int) -> None:
    with session(wired, SLOW) as transport:
        started(transport, 0)
        transport.commit([forecast(wired, b"1")], {0: Offset(1)}, [])
        with held(wire, api) as released:
            given_up = threading.Event()

            def release_once_aborted() -> None:
                # librdkafka adds the offsets first: the coordinator may never hear of the transaction at all.
                never = given_up.is_set if api == ADD_OFFSETS_TO_TXN else bool
                until("the coordinator to abort it", lambda: last_transaction(wired) == "CompleteAbort" or never())
                released.set()

            releasing = in_background(release_once_aborted)
            with pytest.raises(DisconnectedError):
                transport.commit([forecast(wired, b"no"), snapshot(wired, b"no")], {0: Offset(2)}, [])
            given_up.set()
            releasing.join()
    assert visible(wired, wired.forecasts_topic) == [b"1"]
    assert visible(wired, wired.state_topic) == []
    assert stands_at(wired) == 1


# 2: a commit goes through without the records whose delivery took too long.
def test_nothing_of_a_commit_is_visible_where_a_part_could_not_be_delivered(
    wire: Wire, wired: Settings, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KafkaProducer.DEFAULT_CONFIG, "request_timeout_ms", 1_000)
    monkeypatch.setattr(module, "DELIVERY_TIMEOUT_S", 2)
    with session(wired.model_copy(update={"transaction_timeout_ms": 60_000}), SLOW) as transport:
        started(transport, 0)
        halves = [forecast(wired, b"1" * 600_000), forecast(wired, b"2" * 600_000)]  # a batch, and a request, for each
        with held(wire, PRODUCE, after=1), pytest.raises(DisconnectedError):
            transport.commit(halves, {0: Offset(1)}, [])
    with session(wired) as transport:
        assert transport.committed(0) is None
        assert visible(wired, wired.forecasts_topic) == []


# 3: a commit never returns after the coordinator refused a connection.
@only_kafka_python
def test_a_commit_that_does_not_come_back_ends_the_process(wire: Wire, wired: Settings) -> None:
    def cut_before_the_offsets(message: Message) -> None:
        wire.cut(spared=message)
        threading.Timer(0.5, wire.mend).start()

    wire.on_answer = at_the_second(PRODUCE, cut_before_the_offsets)
    assert ends_as(LIFE, wired) == (EXIT_RESTART, OVER)
    with session(wired) as transport:
        assert transport.committed(0) == Offset(1)
        assert visible(wired, wired.forecasts_topic) == [b"1"]


@only_kafka_python
def test_a_commit_that_is_done_and_not_heard_of_is_found_by_the_next_life(wire: Wire, wired: Settings) -> None:
    wire.on_answer = at_the_second(END_TXN, lambda message: wire.cut())
    assert ends_as(LIFE, wired) == (EXIT_RESTART, OVER)
    wire.mend()
    with session(wired) as transport:
        assert transport.committed(0) == Offset(2)
        assert visible(wired, wired.forecasts_topic) == [b"1", b"2"]


# 4: a member polled at short intervals never joins.
@only_kafka_python
def test_ten_sessions_in_a_row_get_their_partitions_though_polled_at_10_ms(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(10):
        with session(settings.model_copy(update={"group_id": f"{settings.group_id}-{n}"})) as transport:
            assigned(transport, 0, poll_ms=10)


def test_partitions_that_are_added_are_taken_up_though_polled_at_10_ms(
    settings: Settings, connect: Connect, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.METADATA_AGE_MS <= 10_000
    monkeypatch.setattr(module, "METADATA_AGE_MS", 500)
    create_with_room(settings)
    transport = connect()
    started(transport, 0)
    assert transport.partitions == 1
    add_a_partition(settings)
    assigned(transport, 1, poll_ms=10)
    assert transport.partitions == 2
    assert transport.stable


# 5: what a member says that was thrown out is taken.
def test_a_worker_that_was_too_slow_cannot_commit_what_is_another_s(settings: Settings, connect: Connect) -> None:
    slow = connect(slot="", max_poll_interval_ms=2_000)
    started(slow, 0)
    slow.commit([forecast(settings, b"1")], {0: Offset(1)}, [])
    until("the slow one to be thrown out", lambda: not slow.stable, 15)
    other = connect(slot="")
    started(other, 0)
    other.commit([forecast(settings, b"2")], {0: Offset(2)}, [])
    with pytest.raises(AbortedError):
        slow.commit([forecast(settings, b"no")], {0: Offset(1)}, [])
    assert stands_at(settings) == 2
    assert visible(settings, settings.forecasts_topic) == [b"1", b"2"]
    other.close()
    assert slow.poll(100, 100).revoked == {0}


# 6: a value that cannot be decoded makes polling spin.
def test_values_may_be_any_bytes(settings: Settings, connect: Connect) -> None:
    create(settings, observations=1)
    produce(settings, [b"1", b"\xff", b"", b"{"])
    transport = connect()
    started(transport, 0)
    assert [record.value for record in polled(transport, 4)] == [b"1", b"\xff", b"", b"{"]


# 7: so does a header's name that is not UTF-8. 16: librdkafka then gives what crashes whoever looks.
class OddName(str):
    """A header's name that a producer of another language may send."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"n\xffme"


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_header_s_name_may_be_any_bytes(settings: Settings, connect: Connect, compression: str | None) -> None:
    create(settings, observations=1)
    with producing(settings, compression_type=compression, linger_ms=1_000) as producer:
        for value, name in ((b"before", "name"), (b"odd", OddName()), (b"after", "näme")):
            producer.send(settings.observations_topic, value, key=b"k", partition=0, headers=[(name, b"1")])
    transport = connect()
    started(transport, 0)
    lost = None if settings.transport == "librdkafka" else b"1"
    expected = [(b"before", "name", b"1"), (b"odd", "n\udcffme", lost), (b"after", "näme", b"1")]
    records = polled(transport, 3)
    assert [(record.value, *record.headers) for record in records] == [
        (value, (name, content)) for value, name, content in expected
    ]
    read = [record for batch in transport.read(settings.observations_topic, 0, 0, 3) for record in batch]
    assert read == records
    with pytest.raises(Rejected) as rejected:
        parse(records[1], Limits())
    assert rejected.value.reason == Reason.UNDECODABLE
    transport.commit([dead_letter(records[1], rejected.value, settings.dead_letters_topic)], {0: Offset(3)}, [])
    assert visible(settings, settings.dead_letters_topic) == [b"odd"]


# 8: offsets of a topic that is gone are sent for ever.
@only_kafka_python
def test_a_commit_for_a_topic_that_is_gone_ends_the_process(settings: Settings) -> None:
    assert ends_as(LIFE, settings, "delete") == (EXIT_RESTART, OVER)


def test_a_topic_that_is_gone_is_named(settings: Settings, connect: Connect) -> None:
    transport = connect()
    started(transport, 0)
    with administered(settings) as admin:
        admin.delete_topics([settings.observations_topic])
    with pytest.raises(DisconnectedError, match=f"topic {settings.observations_topic} is gone"):
        until("an error", lambda: transport.poll(100, 100).records, 20)
    with pytest.raises(ServiceError, match=f"topics are missing .*: {settings.observations_topic}"):
        connect(partitions=0)


def test_an_output_topic_that_is_gone_is_named(settings: Settings, connect: Connect) -> None:
    transport = connect(transaction_timeout_ms=1_000)
    started(transport, 0)
    transport.commit([forecast(settings, b"1")], {0: Offset(1)}, [])
    with administered(settings) as admin:
        admin.delete_topics([settings.forecasts_topic])
    with pytest.raises(DisconnectedError, match=f"records for {settings.forecasts_topic} could not be delivered"):
        transport.commit([forecast(settings, b"2")], {0: Offset(2)}, [])


# 9: headers come with None, but cannot be sent so; and no flush tells that a record failed.
def test_headers_without_a_value_come_through_and_go_out_with_a_dead_letter(
    settings: Settings, connect: Connect
) -> None:
    create(settings, observations=1)
    produce_as_others(settings, b"{", [("h", None)])
    transport = connect()
    started(transport, 0)
    (record,) = polled(transport, 1)
    assert list(record.headers) == [("h", None)]
    letter = dead_letter(record, Rejected(Reason.DECODE, "no JSON"), settings.dead_letters_topic)
    transport.commit([letter], {0: Offset(1)}, [])
    ((sent,),) = (batch for batch in transport.read(settings.dead_letters_topic, 0, 0, 1) if batch)
    assert (sent.value, sent.headers[0]) == (b"{", ("h", b""))


def produce_as_others(settings: Settings, value: bytes, headers: list[tuple[str, bytes | None]]) -> None:
    """A record that kafka-python's own producer refuses to send."""
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1_000)
    builder.append(0, None, b"k", value, headers)
    topic = ProduceRequest.TopicProduceData
    partition = topic.PartitionProduceData(index=0, records=bytes(builder.build()))
    sent = [topic(name=settings.observations_topic, partition_data=[partition])]
    request = ProduceRequest(transactional_id=None, acks=-1, timeout_ms=5_000, topic_data=sent, max_version=9)
    with administered(settings) as admin:
        (described,) = admin.describe_topics([settings.observations_topic])
        leader = described["partitions"][0]["leader_id"]
        admin._manager.run(lambda: admin._manager.send(request, node_id=leader))


def test_one_record_that_failed_is_noticed_among_those_that_did_not(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    transport = connect()
    started(transport, 0, 1)
    too_large = forecast(settings, b"x" * 2_000_000, 1)
    with pytest.raises(ServiceError, match=f"record of 2000000 bytes for {settings.forecasts_topic}"):
        transport.commit([forecast(settings, b"1"), too_large, snapshot(settings, b"2")], {0: Offset(1)}, [])
    transport.close()
    assert connect().committed(0) is None
    assert visible(settings, settings.forecasts_topic) == visible(settings, settings.state_topic) == []


# 10: offsets that the group refused are sent again with the next transaction, whoever has their partitions then.
def test_offsets_of_an_aborted_commit_do_not_come_back_with_the_next(settings: Settings, connect: Connect) -> None:
    create(settings, observations=2)
    first = connect()
    started(first, 0, 1)
    thrown_out(settings)
    with pytest.raises(AbortedError):
        first.commit([], {0: Offset(1, "old"), 1: Offset(1, "old")}, [])
    second = connect(slot="b")
    held: dict[Transport, set[int]] = {first: {0, 1}, second: set()}
    until("a partition for each", lambda: shared(held, 1), 30)
    (kept,), (moved,) = held.values()
    second.commit([], {moved: Offset(5, "new")}, [])
    first.commit([], {kept: Offset(5, "new")}, [])
    assert [second.committed(0), second.committed(1)] == [Offset(5, "new")] * 2


# 11: a join that ends while its member is not polled is begun again, by the whole group.
@only_kafka_python
def test_a_join_that_ended_between_two_polls_is_not_begun_again(
    settings: Settings, connect: Connect, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "METADATA_AGE_MS", 500)
    create_with_room(settings)
    leader = connect()
    started(leader, 0)
    follower = connect(slot="b")
    held: dict[Transport, set[int]] = {leader: {0}, follower: set()}
    until("both to be members", lambda: not shared(held, 1) and settled(held), 30)
    add_a_partition(settings)
    until("the leader to ask", lambda: not leader.poll(100, 1).records and group_is("PreparingRebalance", settings), 10)
    joining = leader._consumer._coordinator._join_task
    until("the other to join", lambda: not follower.poll(100, 1).records and group_is("Stable", settings), 10)
    until("the join to end", lambda: joining.is_done, 10)
    assert not leader.stable
    generation = leader._consumer.group_metadata().generation_id
    leader.poll(100, 1)
    follower.poll(100, 1)  # its own join may have ended so, too
    assert settled(held)
    assert leader._consumer.group_metadata().generation_id == generation
    assert group_is("Stable", settings)


def settled(transports: Iterable[Any]) -> bool:
    """Whether they are stable members of one generation."""
    members = [transport._consumer.group_metadata() for transport in transports]
    return all(t.stable for t in transports) and len({member.generation_id for member in members}) == 1


def group_is(state: str, settings: Settings) -> bool:
    with administered(settings) as admin:
        try:
            return bool(admin.describe_groups([settings.group_id])[settings.group_id]["group_state"] == state)
        except CoordinatorNotAvailableError:  # the first of a new broker
            return False


# 12: a producer that is closed while it cannot deliver stays, and delivers later.
def test_nothing_is_left_of_a_session_that_could_not_deliver(wire: Wire, wired: Settings) -> None:
    with session(wired, SLOW) as transport:
        started(transport, 0)
        transport.commit([forecast(wired, b"1")], {0: Offset(1)}, [])
        wire.cut()
        with pytest.raises(DisconnectedError, match=f"records for {wired.forecasts_topic} could not be delivered"):
            transport.commit([forecast(wired, b"no")], {0: Offset(2)}, [])
    until("its threads to end", lambda: not [t for t in threading.enumerate() if SLOW in t.name], 10)
    wire.mend()
    with session(wired) as transport:
        assert transport.committed(0) == Offset(1)
        assert visible(wired, wired.forecasts_topic) == [b"1"]


# 13: an answer that came too late is given as soon as it is asked for again, however old it is then.
@only_kafka_python
def test_what_the_group_stands_at_is_never_told_late(wire: Wire, wired: Settings) -> None:
    with session(wired, SLOW) as transport:
        started(transport, 0)
        transport.commit([], {0: Offset(1)}, [])
        answered = threading.Event()
        with held(wire, OFFSET_FETCH) as released:
            with pytest.raises(TimeoutError):
                transport.committed(0)
            wire.on_answer = lambda message: answered.set() if message.api == OFFSET_FETCH else None
            released.set()
            assert answered.wait(10)
        transport.commit([], {0: Offset(2)}, [])
        assert transport.committed(0) == Offset(2)


# 14: waiting for records fails when a batch of them is too large for its topic, and is split.
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_records_that_are_small_enough_one_by_one_are_delivered(
    settings: Settings, connect: Connect, guarantee: str
) -> None:
    create(settings, {"max.message.bytes": "10000"}, forecasts=1)
    transport = connect(guarantee=guarantee)
    started(transport, 0)
    values = [b"%03d" % n * 300 for n in range(200)]
    transport.commit([forecast(settings, value) for value in values], {0: Offset(1)}, [])
    assert visible(settings, settings.forecasts_topic) == values
    assert transport.committed(0) == Offset(1)


# 17: a consumer that is closed while an assignment waits for its callback may stop the process for good. One that is
# not closed, but goes, may never end going.
@only_librdkafka
@pytest.mark.parametrize("slot", ["a", ""])
def test_a_session_may_end_before_it_was_told_what_it_was_assigned(settings: Settings, slot: str) -> None:
    create(settings, observations=1)
    with session(settings.model_copy(update={"slot": slot})):
        until("the assignment", lambda: group_is("Stable", settings))
    assert group_is("Stable" if slot else "Empty", settings), "of a slot, its place is kept"


# 19: when the broker goes while the offsets of a transaction are sent, that call takes no heed of its limit.
@only_librdkafka
def test_a_transaction_that_overruns_its_limit_ends_the_process(wire: Wire, wired: Settings) -> None:
    wire.on_request = at_the_second(TXN_OFFSET_COMMIT, lambda message: wire.cut())
    over = "a transaction did not end within 9 s: exit, to be started again"
    assert ends_as(LIFE, wired) == (EXIT_RESTART, over)
    wire.mend()
    with session(wired) as transport:
        assert where_it_stands(transport, 0) == Offset(1)
        assert visible(wired, wired.forecasts_topic) == [b"1"]


# No trap, but its price: each fetch takes a millisecond of Python.
@only_kafka_python
def test_while_nothing_comes_kafka_is_seldom_asked(wire: Wire, wired: Settings) -> None:
    with session(wired) as transport:
        started(transport, 0)
        assert silent(transport)
        fetches: list[Message] = []
        wire.on_request = lambda message: fetches.append(message) if message.api == FETCH else None
        for _ in range(10):
            transport.poll(100, 100)
    assert 0 < len(fetches) < 20, "of 20 ms each there would be 50"


@only_kafka_python
def test_what_comes_on_the_heels_of_the_first_record_after_a_rest_comes_with_it(
    settings: Settings, connect: Connect
) -> None:
    create(settings, observations=2)
    transport = connect(commit_interval_ms=10_000)  # of which a fetch may wait for 1 s
    started(transport, 0, 1)
    for _ in range(2):  # then no fetch is left from before the rest
        assert not transport.poll(1_100, 100).records
    with producing(settings) as producer:

        def send() -> None:
            for partition in (0, 1):
                producer.send(settings.observations_topic, b"0", partition=partition).get(30)

        in_background(send)
        assert {record.partition for record in transport.poll(30_000, 100).records} == {0, 1}
