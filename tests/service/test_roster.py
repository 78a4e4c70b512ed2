"""Lists of streams: in every order each stream stands where its own numbers put it, and at a bounded price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from service import roster
from service.records import Record
from tests.service.conftest import PARTITIONS, Running, record, time_at, value_at
from tests.service.test_api import locs, ok
from tests.service.test_owners import share

Start = Callable[..., Running]
STEPS = 30
IDS = [f"s{n}" for n in range(12)]


def partition_of(stream: str) -> int:
    return IDS.index(stream) % PARTITIONS


def hear(api: Running, streams: Sequence[str] = IDS) -> None:
    """Let streams tell values; the higher its number, the longer one has been silent, and the odder is its last one."""
    for n in range(STEPS):
        told = {stream: IDS.index(stream) for stream in streams if n < STEPS - IDS.index(stream)}
        odd = {stream: 3.0 * number for stream, number in told.items() if n == STEPS - number - 1}
        api.feed([record(one, time_at(n), value_at(n, one) + odd.get(one, 0.0), partition_of(one)) for one in told])


@pytest.fixture
def api(start: Start) -> Running:
    api = start()
    hear(api)
    return api


def listed(api: Running, **asked: Any) -> list[str]:
    return [each["stream"] for each in ok(api.client.get("/v1/streams", params=asked))["streams"]]


def told(api: Running) -> list[dict[str, Any]]:
    return [ok(api.client.get(f"/v1/streams/{stream}")) for stream in IDS]


ORDERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "anomaly": lambda each: each["anomaly"],
    "error": lambda each: each["scores"]["mase"],
    "heard": lambda each: each["ts"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_in_an_order_are_those_whose_own_numbers_say_so(api: Running, order: str) -> None:
    everyone = sorted(told(api), key=ORDERS[order], reverse=True)
    assert len({ORDERS[order](each) for each in everyone}) == len(IDS), "else the order is not known"
    expected = [each["stream"] for each in everyone]
    assert listed(api, order=order) == expected
    assert listed(api, order=order, limit=3) == expected[:3]
    assert listed(api, order=order, limit=3, q="1") == [stream for stream in expected if "1" in stream][:3]
    page = ok(api.client.get("/v1/streams", params={"order": order, "limit": 3}))
    assert (page["total"], page["next"]) == (len(IDS), None)


@pytest.mark.parametrize("order", ORDERS)
def test_workers_put_their_streams_into_one_order(api: Running, start: Start, order: str) -> None:
    expected = listed(api, order=order, limit=5)
    pair = start(), start()
    share({"first": pair[0], "second": pair[1]}, {"first": {0, 1}, "second": {2, 3}})
    for number, worker in enumerate(pair):
        hear(worker, [stream for stream in IDS if partition_of(stream) // 2 == number])
    for worker in pair:
        assert listed(worker, order=order, limit=5) == expected


def test_a_stream_that_has_nothing_to_go_by_comes_last(api: Running) -> None:
    api.feed([record("new", time_at(0), 1.0)])
    for order in ("anomaly", "error"):
        assert listed(api, order=order)[-1] == "new"


def test_only_by_id_there_are_further_pages(api: Running) -> None:
    answer = api.client.get("/v1/streams", params={"order": "heard", "after": "s3"})
    assert locs(answer) == [["query", "after"]]


def test_who_comes_and_who_goes_is_seen_at_once(api: Running) -> None:
    api.feed([record("a", time_at(0), 1.0)])
    assert listed(api, limit=1) == ["a"]
    api.feed([Record("carousel.observations", 0, 1, time_at(1), b"a", None)])  # a tombstone
    assert listed(api, limit=1) == ["s0"]
    api.engine.rollback()  # nothing was committed
    assert listed(api) == []


def test_of_two_partitions_with_one_id_the_one_last_heard_is_ranked(api: Running) -> None:
    api.feed([record("s0", time_at(STEPS + 5), 1.0, partition=3), record("s11", time_at(STEPS + 9), 1.0, partition=0)])
    assert listed(api, order="heard", limit=2) == ["s11", "s0"]
    assert ok(api.client.get("/v1/streams"))["total"] == len(IDS)


def test_many_are_not_sorted_for_each_request(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask, and even while streams come and go."""
    genuine, made = roster.Roll, []

    class Counted(genuine):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            made.append("roll")
            super().__init__(*given)

        def _values(self, order: Any) -> Any:
            made.append(order)
            return super()._values(order)

    monkeypatch.setattr(roster, "MANY", 1)
    monkeypatch.setattr(roster, "FRESH_S", 3_600.0)
    monkeypatch.setattr(roster, "Roll", Counted)
    listed(api)
    made.clear()
    for n in range(5):
        api.feed([record(f"a{n}", time_at(0), 1.0)])
        for order in ("id", "heard"):
            listed(api, order=order, q=str(n))
    assert made == ["heard"]
