"""Any worker answers for any stream: who is asked, in which order, and what is said when nobody can know."""

from __future__ import annotations

import http.server
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import owners
from service.errors import Refused
from service.schemas import Page
from service.transport.contract import Described
from tests.served import until
from tests.service.conftest import PARTITIONS, Running, StubGroup, history, record, time_at
from tests.service.test_api import locs, metric, ok, problem_of

Start = Callable[..., Running]
candidates = StubGroup(None).candidates
PARTS = ("", "/state", "/history", "/forecast")


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_first_candidate_is_where_java_puts_a_key(key: bytes, hashed: int) -> None:
    """Vectors of Kafka's own UtilsTest."""
    for partitions in (1, 4, 17, 1 << 31):
        assert candidates(key, partitions)[0] == (hashed & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"23456", 0xB1B451D7),
        (b"this is another string with more length to it perhaps", 0xB0150DF7),
        (b"hejsan", 0xD077037E),
    ],
)
def test_the_last_candidate_is_where_librdkafka_puts_a_key(key: bytes, hashed: int) -> None:
    """Vectors of librdkafka's own test 0048."""
    for partitions in (1, 4, 17, 1 << 32):
        assert candidates(key, partitions)[-1] == hashed % partitions


def test_a_candidate_stands_once() -> None:
    assert candidates(b"abc", 1) == (0,)


def named(java: int, librdkafka: int) -> str:
    """A stream that these partitioners put into these partitions."""
    wanted = tuple(dict.fromkeys((java, librdkafka)))
    return next(f"s{n}" for n in range(1_000) if candidates(b"s%d" % n, PARTITIONS) == wanted)


def share(apis: dict[str, Running], assigned: dict[str, set[int]]) -> None:
    """Share the partitions out among workers, and let Kafka say so to all."""
    who = {partition: apis[name].server.url for name, mine in assigned.items() for partition in mine}
    for name, api in apis.items():
        api.worker.live = frozenset(assigned.get(name, ()))
        api.group.described = Described(PARTITIONS, who, stable=True)


@pytest.fixture
def pair(start: Start) -> tuple[Running, Running]:
    """Two workers: the first has partitions 0 and 1, the second 2 and 3."""
    first, second = start(), start()
    share({"first": first, "second": second}, {"first": {0, 1}, "second": {2, 3}})
    return first, second


def feed(pair: tuple[Running, Running], stream: str, partition: int, steps: int = 3) -> None:
    """Let the partition's owner hear the hours 0 ... steps - 1 of a stream; its values tell the partition."""
    for n in range(steps):
        pair[partition // 2].feed([record(stream, time_at(n), 10.0 * partition + n, partition)])


def answers(api: Running, stream: str, **body: Any) -> list[Any]:
    """What is said of a stream on every route that one has."""
    said = [ok(api.predict({"stream": stream, **body})) for body in (body, {"history": history(3, 5), **body})]
    return said + [ok(api.client.get(f"/v1/streams/{stream}{part}", params=body)) for part in PARTS]


def forwarded(api: Running, outcome: str) -> float:
    return float(metric(api, f'carousel_requests_forwarded_total{{outcome="{outcome}"}}'))


class TestStreams:
    @pytest.mark.parametrize(
        ("java", "librdkafka", "placed"), [(0, 3, 0), (3, 0, 3), (0, 3, 3), (0, 1, 1), (0, 1, 2), (2, 3, 1), (2, 2, 3)]
    )
    def test_all_workers_say_the_same_wherever_a_producer_put_it(
        self, pair: tuple[Running, Running], java: int, librdkafka: int, placed: int
    ) -> None:
        stream = named(java, librdkafka)
        feed(pair, stream, placed)
        first, second = (answers(api, stream) for api in pair)
        assert first == second
        assert first[2]["partition"] == placed
        assert first[0]["observed"] == 10.0 * placed + 2

    def test_ids_with_slashes_and_spaces_are_passed_on(self, pair: tuple[Running, Running]) -> None:
        for stream in ("site 7/temperature", "a?b=c#d", "ü/%41", "x/state"):
            for partition in range(PARTITIONS):
                pair[partition // 2].feed([record(f"{stream}{partition}", time_at(0), 1.0, partition)])
                told = [ok(api.predict({"stream": f"{stream}{partition}"})) for api in pair]
                path = f"/v1/streams/{quote(stream)}{partition}"
                told += [ok(api.client.get(path))["forecast"] for api in pair]
                assert all(each == told[0] for each in told)
                assert told[0]["stream"] == f"{stream}{partition}"
        feed(pair, "y/state", 3)
        assert [ok(api.predict({"stream": "y/state"}))["count"] for api in pair] == [3, 3]

    def test_of_several_the_one_where_partitioners_put_it_counts_then_the_one_last_heard(
        self, pair: tuple[Running, Running]
    ) -> None:
        stream = named(2, 0)
        for partition, steps in ((1, 9), (3, 7), (0, 2), (2, 1)):
            feed(pair, stream, partition, steps)
            counts = {ok(api.predict({"stream": stream}))["count"] for api in pair}
            assert counts == {9 if partition in (1, 3) else steps}, partition

    def test_those_that_were_heard_at_the_same_time_are_told_apart_alike(self, pair: tuple[Running, Running]) -> None:
        for stream, partitions in ((named(2, 0), (1, 3)), (named(2, 2), (0, 1)), (named(3, 3), (1, 2))):
            for partition in partitions:
                feed(pair, stream, partition)
            told = {ok(api.client.get(f"/v1/streams/{stream}"))["partition"] for api in pair}
            assert told == {max(partitions)}

    def test_a_partition_addresses_one_of_several_exactly(self, pair: tuple[Running, Running]) -> None:
        stream = named(0, 1)
        for partition in (0, 1, 3):
            feed(pair, stream, partition)
        for api in pair:
            for partition in (0, 1, 3):
                told = answers(api, stream, partition=partition)
                assert told[0]["observed"] == 10.0 * partition + 2
                *others, rows = told[2:]
                assert {each["partition"] for each in others} == {partition}
                assert [row["q0_5"] for row in rows] == told[0]["quantiles"]["0.5"]
            for partition in (2, 4, 2**31 - 1):
                problem_of(api.predict({"stream": stream, "partition": partition}), 404)
                problem_of(api.client.get(f"/v1/streams/{stream}", params={"partition": partition}), 404)

    def test_a_partition_that_is_none_is_named(self, pair: tuple[Running, Running]) -> None:
        api = pair[0]
        for part in PARTS:
            assert locs(api.client.get(f"/v1/streams/a{part}?partition=-1")) == [["query", "partition"]]
            assert locs(api.client.get(f"/v1/streams/a{part}?partition=1&partition=2")) == [["query", "partition"]]
        assert locs(api.predict({"stream": "a", "partition": "1"})) == [["body", "partition"]]
        assert locs(api.predict({"history": history(0, 3), "partition": 1})) == [["body", "partition"]]

    def test_unknown_is_404_once_all_have_said_so(self, pair: tuple[Running, Running]) -> None:
        for api in pair:
            problem_of(api.predict({"stream": "nobody"}), 404)
            for part in PARTS:
                problem_of(api.client.get(f"/v1/streams/nobody{part}"), 404)
        assert forwarded(pair[0], "answered") > 0

    def test_what_is_wrong_with_a_request_is_told_as_its_owner_tells_it(self, pair: tuple[Running, Running]) -> None:
        stream = named(2, 2)
        feed(pair, stream, 2)
        for body in ({"horizon": 99}, {"history": history(0, 2)}, {"quantiles": [0.25]}):
            first, second = (api.predict({"stream": stream, **body}) for api in pair)
            assert first.json() == second.json()
            assert locs(first) == locs(second)

    def test_proxies_of_the_environment_are_not_asked(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        first, second = start(), start()
        share({"first": first, "second": second}, {"first": {0, 1}, "second": {2, 3}})
        second.feed([record(named(2, 2), time_at(0), 1.0, 2)])
        with httpx.Client(base_url=first.server.url, trust_env=False) as client:
            assert ok(client.get(f"/v1/streams/{named(2, 2)}"))["count"] == 1


class TestPassedOn:
    """What a worker does with a request that another has passed on to it."""

    def test_it_is_answered_from_that_partition_only(self, pair: tuple[Running, Running]) -> None:
        stream = named(0, 1)
        feed(pair, stream, 0)
        header = {owners.PARTITION_HEADER: "0"}
        answer = pair[0].client.get(f"/v1/streams/{stream}", headers=header)
        assert ok(answer)["partition"] == 0
        assert answer.headers[owners.PARTITIONS_HEADER] == "0"
        answer = pair[0].client.get(f"/v1/streams/{stream}", headers={owners.PARTITION_HEADER: "1"})
        problem_of(answer, 404)
        assert answer.headers[owners.PARTITIONS_HEADER] == "1"

    def test_it_is_never_passed_on_again(self, pair: tuple[Running, Running]) -> None:
        stream = named(2, 2)
        feed(pair, stream, 2)
        api = pair[0]
        for only, status in (("2", 503), ("any", 404), ("9", 503)):
            header = {owners.PARTITION_HEADER: only}
            for answer in (
                api.client.post("/v1/predict", json={"stream": stream}, headers=header),
                *(api.client.get(f"/v1/streams/{stream}{part}", headers=header) for part in PARTS),
            ):
                problem_of(answer, status)
                assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
        page = api.client.get("/v1/streams", headers={owners.PARTITION_HEADER: "any"})
        assert ok(page)["streams"] == []
        assert page.headers[owners.PARTITIONS_HEADER] == "0,1"
        assert sum(forwarded(api, outcome) for outcome in ("answered", "refused", "unreachable", "busy")) == 0
        assert api.group.asked == 0

    def test_two_that_name_each_other_do_not_send_it_to_and_fro(self, pair: tuple[Running, Running]) -> None:
        first, second = pair
        urls = (first.server.url, second.server.url)
        for api, other in ((first, urls[1]), (second, urls[0])):
            api.worker.live = frozenset()
            api.group.described = Described(PARTITIONS, dict.fromkeys(range(PARTITIONS), other), stable=True)
        problem_of(first.predict({"stream": "a"}), 503)
        assert forwarded(first, "refused") == 2  # once more, with news of the group
        assert forwarded(second, "refused") == 0

    @pytest.mark.parametrize("only", ["", "-1", "all", "1,2", "1" * 10, "٣"])
    def test_a_header_that_means_nothing_is_refused(self, pair: tuple[Running, Running], only: str) -> None:
        header = {owners.PARTITION_HEADER.encode(): only.encode()}
        problem_of(pair[0].client.get("/v1/streams/a", headers=header), 422)

    def test_what_is_not_there_counts_only_while_the_partition_stays(self, pair: tuple[Running, Running]) -> None:
        """Revoked between the look and the answer: its streams are just being forgotten."""
        api = pair[0]

        def look(partitions: frozenset[int]) -> dict[str, Any]:
            api.worker.live = frozenset()
            raise Refused(404, "forgotten")

        with pytest.raises(owners.Moved):
            api.owners.answer(owners.Question("a", None, look, "/v1/streams/a"), "0")


@contextmanager
def silent() -> Iterator[str]:
    """The URL of one that lets itself be called and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """A URL at which nobody is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield url


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Another program that took over a worker's port."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b"welcome")

    do_POST = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def stranger(status: int) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    yield ""


AWAY: dict[str, Callable[[], Any]] = {
    "silent": silent,
    "closed": closed,
    "404 by a stranger": lambda: stranger(404),
    "200 by a stranger": lambda: stranger(200),
    "none": nobody,
}


class TestNotNow:
    @pytest.mark.parametrize("how", AWAY)
    def test_an_owner_that_cannot_be_asked_is_503_soon_and_never_404(
        self, start: Start, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        monkeypatch.setattr(owners, "WHOLE_S", 0.5)
        api = start()
        api.worker.live = frozenset({0, 1})
        with AWAY[how]() as url:
            others = {2: url, 3: url} if url else {}
            api.group.described = Described(PARTITIONS, {0: api.server.url, 1: api.server.url, **others}, stable=True)
            for stream in (named(2, 2), named(0, 0)):  # on the way to its owner; among all
                for ask in (
                    lambda stream=stream: api.predict({"stream": stream}),
                    lambda stream=stream: api.client.get(f"/v1/streams/{stream}"),
                    lambda: api.client.get("/v1/streams"),
                ):
                    begun = time.monotonic()
                    answer = ask()
                    assert time.monotonic() - begun < 2
                    problem_of(answer, 503)
                    assert answer.headers["retry-after"] == "1"
            api.feed([record(named(0, 0), time_at(0), 1.0, 0)])
            assert ok(api.predict({"stream": named(0, 0)}))["count"] == 1, "what it has itself it tells"

    def test_a_partition_that_is_not_live_is_not_answered_for(self, pair: tuple[Running, Running]) -> None:
        stream = named(2, 2)
        feed(pair, stream, 2)
        pair[1].worker.live = frozenset({3})  # it is still restoring 2
        for api in pair:
            answer = api.predict({"stream": stream})
            problem_of(answer, 503)
            assert answer.headers["retry-after"] == "1"
            problem_of(api.predict({"stream": "nobody"}), 503)
            problem_of(api.client.get("/v1/streams"), 503)
        pair[1].worker.live = frozenset({2, 3})
        assert [ok(api.predict({"stream": stream}))["count"] for api in pair] == [3, 3]

    def test_a_partition_that_moved_is_found_at_once(
        self, pair: tuple[Running, Running], start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owners, "FRESH_S", 1e9)  # so that only a refusal lets it ask Kafka again
        first, second = pair
        third, stream = start(), named(2, 2)
        feed(pair, stream, 2, steps=1)
        assert ok(first.predict({"stream": stream}))["count"] == 1
        third.feed([record(stream, time_at(n), 1.0, 2) for n in range(2)])
        apis = {"first": first, "second": second, "third": third}
        share(apis, {"first": {0, 1}, "second": {3}, "third": {2}})
        assert ok(first.predict({"stream": stream}))["count"] == 2
        assert first.group.asked == 2
        second.feed([record("last", time_at(0), 1.0, 3)])
        assert {ok(api.client.get("/v1/streams"))["total"] for api in apis.values()} == {2}

    def test_while_partitions_are_shared_out_anew_those_that_stay_are_answered_for(
        self, pair: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owners, "FRESH_S", -1.0)
        stream = named(2, 2)
        feed(pair, stream, 2)
        assert ok(pair[0].predict({"stream": stream}))["count"] == 3
        pair[0].group.described = Described(PARTITIONS, {}, stable=False)
        assert ok(pair[0].predict({"stream": stream}))["count"] == 3
        assert pair[0].group.asked == 2

    def test_what_is_known_of_the_group_is_a_second_old_at_most(
        self, pair: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        feed(pair, named(2, 2), 2)
        asked = []
        for fresh_s in (1e9, 1e9, -1.0, -1.0):
            monkeypatch.setattr(owners, "FRESH_S", fresh_s)
            ok(pair[0].predict({"stream": named(2, 2)}))
            asked.append(pair[0].group.asked)
        assert asked == [1, 1, 2, 3]

    def test_a_worker_that_others_call_by_another_workers_name_says_so(self, pair: tuple[Running, Running]) -> None:
        api = pair[0]
        api.group.described = Described(PARTITIONS, dict.fromkeys(range(PARTITIONS), api.server.url), stable=True)
        detail = problem_of(api.predict({"stream": named(2, 2)}), 503)["detail"]
        assert "advertised_url" in detail

    def test_a_worker_that_is_not_ready_does_not_say_that_there_is_no_such_stream(
        self, pair: tuple[Running, Running]
    ) -> None:
        pair[1].worker.unready = "partitions are being restored"
        first, second = (api.predict({"stream": named(2, 2), "partition": 2}) for api in pair)
        assert problem_of(first, 503) == problem_of(second, 503)
        assert first.headers["retry-after"] == second.headers["retry-after"] == "5"

    def test_a_silent_owner_cannot_hold_more_than_its_share_of_requests(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owners, "AT_ONCE", 2)
        monkeypatch.setattr(owners, "WHOLE_S", 60.0)
        api = start()
        api.worker.live = frozenset({0, 1})
        api.feed([record(named(0, 0), time_at(0), 1.0, 0)])
        with silent() as url:
            api.group.described = Described(PARTITIONS, {2: url, 3: url}, stable=True)
            waiting = [
                threading.Thread(target=api.client.get, args=(f"/v1/streams/{named(2, 2)}",), daemon=True)
                for _ in range(2)
            ]
            for thread in waiting:
                thread.start()
            until("both to wait for the silent one", lambda: api.owners._turns._value == 0)  # type: ignore[attr-defined]
            for _ in range(20):
                answer = api.client.get(f"/v1/streams/{named(2, 2)}")
                assert "too many" in problem_of(answer, 503)["detail"]
                assert answer.headers["retry-after"] == "1"
            assert ok(api.client.get(f"/v1/streams/{named(0, 0)}"))["count"] == 1
            assert forwarded(api, "busy") == 20
            assert all(thread.is_alive() for thread in waiting)
        for thread in waiting:  # the silent one has hung up
            thread.join()


class TestWithoutKafka:
    def test_what_a_worker_has_live_it_tells(self, start: Start) -> None:
        api = start()
        api.group.described = None
        api.worker.live = frozenset({0, 1, 3})
        for partition in (0, 1):
            api.feed([record(named(3, 2), time_at(0), 1.0, partition)])
        assert ok(api.predict({"stream": named(3, 2)}))["count"] == 1
        assert ok(api.predict({"stream": named(3, 2), "partition": 0}))["count"] == 1
        for unknown in ({"stream": "nobody"}, {"stream": named(3, 2), "partition": 3}):
            problem_of(api.predict(unknown), 503)
        problem_of(api.client.get("/v1/streams"), 503)
        assert ok(api.predict({"history": history(0, 3)}))["count"] == 3
        assert api.group.asked == 1, "and does not ask Kafka each time"

    def test_others_are_still_asked_where_they_last_were(
        self, pair: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owners, "FRESH_S", -1.0)
        stream = named(2, 2)
        feed(pair, stream, 2)
        assert ok(pair[0].predict({"stream": stream}))["count"] == 3
        pair[0].group.described = None
        assert ok(pair[0].predict({"stream": stream}))["count"] == 3

    def test_a_stream_here_is_told_though_the_one_to_be_asked_first_is_away(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owners, "FRESH_S", -1.0)
        api, stream = start(), named(2, 0)
        api.worker.live = frozenset({0, 1})
        api.feed([record(stream, time_at(0), 1.0, 0)])
        with closed() as url:
            api.group.described = Described(PARTITIONS, {2: url, 3: url}, stable=True)
            problem_of(api.predict({"stream": stream}), 503)  # it might be there as well
            api.group.described = None
            assert ok(api.predict({"stream": stream}))["count"] == 1


class TestAlone:
    def test_a_worker_that_has_all_partitions_asks_nobody(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owners, "AT_ONCE", 1)
        api = start()
        assert api.owners._turns.acquire(), "so that it could not"
        for partition in range(PARTITIONS):
            api.feed([record(f"s{partition}", time_at(0), 1.0, partition)])
        for _ in range(10):
            assert [ok(api.predict({"stream": f"s{n}"}))["count"] for n in range(PARTITIONS)] == [1] * PARTITIONS
            problem_of(api.predict({"stream": "nobody"}), 404)
            assert ok(api.client.get("/v1/streams"))["total"] == PARTITIONS
        assert api.group.asked == 1
        assert forwarded(api, "answered") == 0


class TestList:
    def test_pages_hold_the_streams_of_all_workers_once_in_order(self, pair: tuple[Running, Running]) -> None:
        for n in range(25):
            feed(pair, f"s{n:02}", zlib.crc32(b"%d" % n) % PARTITIONS, steps=1)
        for api in pair:
            seen, after = [], ""
            while True:
                page = ok(api.client.get("/v1/streams", params={"limit": 4, "after": after}))
                assert page["total"] == 25
                assert len(page["streams"]) <= 4
                seen += [stream["stream"] for stream in page["streams"]]
                if page["next"] is None:
                    break
                after = page["next"]
            assert seen == [f"s{n:02}" for n in range(25)]
            assert ok(api.client.get("/v1/streams", params={"q": "s1"}))["total"] == 10
            for stream, there in (("s11", ["s11"]), ("s1", [])):
                exact = ok(api.client.get("/v1/streams", params={"stream": stream}))
                assert [each["stream"] for each in exact["streams"]] == there
        both = [ok(api.client.get("/v1/streams", params={"limit": 1000})) for api in pair]
        assert both[0] == both[1]

    def test_a_stream_that_two_have_is_told_by_who_heard_it_last(self, pair: tuple[Running, Running]) -> None:
        feed(pair, "a", 1, steps=5)
        feed(pair, "a", 3, steps=4)
        for api in pair:
            (only,) = ok(api.client.get("/v1/streams"))["streams"]
            assert (only["partition"], only["count"]) == (1, 5)


@given(
    held=st.lists(st.sets(st.text("abc", min_size=1, max_size=3)), min_size=1, max_size=4),
    ended=st.sets(st.text("abc", min_size=1, max_size=3), max_size=3),
    limit=st.integers(1, 5),
)
def test_merged_pages_hold_every_stream_once_though_some_end_meanwhile(
    held: list[set[str]], ended: set[str], limit: int
) -> None:
    def page(ids: set[str], after: str) -> dict[str, Any]:
        later = sorted(stream for stream in ids if stream > after)
        streams = [{"stream": stream, "ts": 0, "partition": 0} for stream in later[:limit] if stream not in ended]
        return {"streams": streams, "total": len(ids), "next": later[limit - 1] if len(later) > limit else None}

    seen, after = [], ""
    while True:
        asked = Page(limit=limit, after=after, q="", stream=None, order="id")
        merged = owners.merge([page(ids, after) for ids in held], asked)
        assert len(merged["streams"]) <= limit
        seen += [stream["stream"] for stream in merged["streams"]]
        if merged["next"] is None:
            break
        assert merged["next"] > after
        after = merged["next"]
    assert seen == sorted(set.union(*held) - ended)


def test_answers_are_as_they_were_for_those_who_read_them(pair: tuple[Running, Running]) -> None:
    """Nothing of the way between workers."""
    feed(pair, named(2, 2), 2)
    for api in pair:
        answer = api.predict({"stream": named(2, 2)})
        assert set(answer.headers) == {"date", "content-length", "content-type"}
