"""The straight way answers as the API would, or leaves it to the API; and it never lets the event loop wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from model.config import ModelConfig
from model.grid import Grid
from service import owners, straight
from service.api import EXAMPLE_STREAM
from tests.served import until
from tests.service.conftest import (
    CONFIG,
    HOUR_MS,
    PARTITIONS,
    SEEN,
    Running,
    StubGroup,
    history,
    record,
    time_at,
    value_at,
)
from tests.service.test_api import JSON, metric, ok, problem_of

Start = Callable[..., Running]
STREAM = "s21"
PARTITION = StubGroup(None).candidates(STREAM.encode(), PARTITIONS)[0]
"""Where it is looked for first."""
SHAPES: list[dict[str, Any]] = [
    {},
    {"horizon": 3},
    {"horizon": None, "quantiles": None, "history": None, "partition": None},
    {"quantiles": [0.9, 0.1]},
    {"quantiles": [0.5], "horizon": 1, "raw": True},
    {"raw": True},
    {"partition": PARTITION},
]
ODD = [
    b"",
    b"\xef\xbb\xbf" + b'{"stream":"s21"}',
    b'{"stream":"s21"} x',
    b'{"stream":"s21","stream":"nobody"}',
    b'{"stream":"s21","step":1}',
    b'{"stream":"s21","horizon":true}',
    b'{"stream":"s21","horizon":2.0}',
    b'{"stream":"s21","horizon":99}',
    b'{"stream":"s21","quantiles":[0.25]}',
    b'{"stream":"s21","quantiles":[1e400]}',
    b'{"stream":"s21","raw":1}',
    b'{"stream":"s21","partition":-1}',
    b'{"stream":"s21","partition":4}',
    b'{"stream":"\\ud800"}',
    b'{"stream":"\xff"}',
    b'{"stream":"nobody"}',
    b'["s21"]',
    b"NaN",
]


@pytest.fixture
def api(start: Start) -> Running:
    """One that has heard a stream, in the partition where it is looked for first."""
    return heard(start())


def heard(api: Running) -> Running:
    for n in range(SEEN):
        api.feed([record(STREAM, time_at(n), value_at(n), PARTITION)])
    ok(api.predict({"stream": STREAM}))  # so that it knows its group
    return api


def post(api: Running, body: bytes) -> httpx.Response:
    return api.client.post("/v1/predict", content=body, headers=JSON)


def forbid_the_api(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object) -> None:
        raise AssertionError("the API was asked")

    monkeypatch.setattr(api.owners, "answer", answer)


@pytest.mark.parametrize("more", SHAPES)
def test_it_answers_as_the_api_does(api: Running, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    if more.get("partition"):
        more = {"partition": PARTITION}
    body = json.dumps({"stream": STREAM, **more}).encode()
    with monkeypatch.context() as patched:
        patched.setattr(straight, "_may_be", lambda _: False)
        usual = post(api, body)
    forbid_the_api(api, monkeypatch)
    answer = post(api, body)
    differs = {"date": "", "content-length": ""}
    assert ok(answer)["stream"] == STREAM
    assert [*answer.json().items()] == [*usual.json().items()], "but for zeros at the end of a number"
    assert {**answer.headers, **differs} == {**usual.headers, **differs}


@pytest.mark.parametrize("body", ODD)
def test_what_is_odd_is_left_to_the_api(api: Running, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    answer = post(api, body)
    monkeypatch.setattr(straight, "_may_be", lambda _: False)
    usual = post(api, body)
    assert (answer.status_code, answer.content) == (usual.status_code, usual.content)
    assert answer.status_code in (404, 422)


def test_it_is_counted_as_the_route_that_it_answers_for(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_api(api, monkeypatch)
    ok(api.predict({"stream": STREAM}))
    told = 'http_request_duration_seconds_count{handler="/v1/predict",method="POST",status="200"}'
    assert float(metric(api, told)) == 2


@pytest.mark.parametrize("placed", range(PARTITIONS))
def test_wherever_a_producer_put_it_while_all_is_live_here(
    api: Running, monkeypatch: pytest.MonkeyPatch, placed: int
) -> None:
    """And as the API would where several have such a stream: where it is looked for first, then the one last heard."""
    api.feed([record("s5", time_at(n), 1.0, placed) for n in range(3)])
    api.feed([record("s5", time_at(n), 2.0, (placed + 1) % PARTITIONS) for n in range(2)])
    with monkeypatch.context() as patched:
        patched.setattr(straight, "_may_be", lambda _: False)
        usual = ok(api.predict({"stream": "s5"}))
    forbid_the_api(api, monkeypatch)
    assert ok(api.predict({"stream": "s5"})) == usual


def test_where_another_may_have_it_the_api_asks(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it is looked for first, and not all is live here."""
    elsewhere = next(one for one in range(PARTITIONS) if one not in api.group.candidates(b"s5", PARTITIONS))
    api.feed([record("s5", time_at(0), 1.0, elsewhere)])
    live = frozenset({elsewhere, *api.group.candidates(b"s5", PARTITIONS)})
    assert live < api.worker.live
    api.worker.live = live
    problem_of(api.predict({"stream": "s5"}), 503)


def test_it_keeps_to_what_is_live(api: Running) -> None:
    api.worker.live = frozenset(range(PARTITIONS)) - {PARTITION}
    problem_of(api.predict({"stream": STREAM}), 503)


def test_a_request_that_was_passed_on_is_told_which_partitions_were_seen(api: Running) -> None:
    header = {owners.PARTITION_HEADER: str(PARTITION)}
    answer = api.client.post("/v1/predict", json={"stream": STREAM}, headers=header)
    assert answer.headers[owners.PARTITIONS_HEADER] == str(PARTITION)


class TestWhileAWaveMoves:
    def ask(self, api: Running) -> httpx.Response:
        return httpx.post(f"{api.server.url}/v1/predict", json={"stream": STREAM}, timeout=20)

    def test_others_are_answered(self, api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        forbid_the_api(api, monkeypatch)
        with ThreadPoolExecutor(20) as threads:
            with api.engine.lock:
                asked = [threads.submit(self.ask, api) for _ in range(20)]
                for _ in range(20):  # an event loop that waits would answer none of them
                    ok(api.client.get("/livez"))
                    ok(api.client.get("/v1/model"))
                time.sleep(1)
                assert not any(one.done() for one in asked)
            assert {ok(one.result(5))["count"] for one in asked} == {SEEN}

    def test_only_one_thread_waits(self, api: Running) -> None:
        with ThreadPoolExecutor(20) as threads:
            with api.engine.lock:
                before = threading.active_count()
                asked = [threads.submit(self.ask, api) for _ in range(20)]
                time.sleep(1)
                assert threading.active_count() <= before + 20 + 1
            assert all(one.result(5).status_code == 200 for one in asked)

    def test_a_partition_that_goes_meanwhile_is_not_answered_for(self, api: Running) -> None:
        with ThreadPoolExecutor(1) as threads:
            with api.engine.lock:
                asked = threads.submit(self.ask, api)
                time.sleep(0.3)
                api.worker.live = frozenset()
            problem_of(asked.result(5), 503)

    def test_a_stream_that_ends_meanwhile_is_not_there(self, api: Running) -> None:
        key = api.engine.arena.keys_of(STREAM)[0]
        with ThreadPoolExecutor(1) as threads:
            with api.engine.lock:
                asked = threads.submit(self.ask, api)
                time.sleep(0.3)
                api.engine.arena.forget(key)
            problem_of(asked.result(5), 404)

    def test_no_row_is_torn(self, api: Running) -> None:
        """The time and the count of an observation come and go together, however many ask while waves move."""
        ended = threading.Event()

        def move() -> None:
            for n in range(SEEN, SEEN + 150):
                api.feed([record(STREAM, time_at(n), value_at(n), PARTITION)])
            ended.set()

        moving = threading.Thread(target=move)
        moving.start()
        seen = set()
        while not ended.is_set():
            told = ok(api.predict({"stream": STREAM}))
            n = told["count"] - 1
            assert (told["ts"], told["observed"]) == (time_at(n), value_at(n))
            seen.add(n)
        moving.join()
        assert len(seen) > 10


@pytest.mark.parametrize("compiled", [True, False])
def test_numbers_are_bit_for_bit_those_of_the_last_record(start: Start, compiled: bool) -> None:
    """Of many streams in one wave, of a model of the default sizes."""
    if compiled:
        pytest.importorskip("numba")
    api = start(ModelConfig(grid=Grid(HOUR_MS), season=24, horizon=24), compiled=compiled)
    random = np.random.default_rng(1)
    scales = 10.0 ** random.uniform(-3, 6, 40)
    for n in range(60):  # more than warm it up
        last = api.feed(
            [record(f"s{one}", time_at(n), float(scale * random.normal(10, 1))) for one, scale in enumerate(scales)]
        )
    for fields in last:
        told = ok(api.predict({"stream": fields["stream"]}))
        del told["timestamps"]
        assert told == fields


def test_the_example_is_answered(start: Start) -> None:
    """Before anything is known of the group, by the API."""
    api = start(CONFIG)
    api.feed([record(EXAMPLE_STREAM, time_at(0), 1.0)])
    assert ok(api.predict({"stream": EXAMPLE_STREAM}))["count"] == 1
    assert ok(api.predict({"stream": EXAMPLE_STREAM, "history": history(1, 3)}))["count"] == 3
    until("the group to be known", lambda: api.group.asked == 1)
