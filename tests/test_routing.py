"""Two genuine workers on the genuine Kafka: whichever is asked, the answer is the same."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.owners import PARTITION_HEADER
from tests.served import START_MS, Served, observation, random_bundle, serving, until

PARTITIONS, STEPS = 4, 3
JAVA = [f"java {n}" for n in range(12)]
LIBRDKAFKA = [f"librdkafka/{n}" for n in range(12)]
BY_HAND = [f"by hand {n}?" for n in range(12)]
STREAMS = JAVA + LIBRDKAFKA + BY_HAND
PATHS = [f"/v1/streams/{stream}" for stream in JAVA]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle"))


def produce(served: Served, steps: range) -> None:
    """Each stream's observations, as producers of three kinds would place them."""
    served.produce([(stream.encode(), observation(step, float(step))) for step in steps for stream in JAVA])
    for partition in range(PARTITIONS):
        placed = [stream for stream in LIBRDKAFKA if zlib.crc32(stream.encode()) % PARTITIONS == partition]
        placed += BY_HAND[partition::PARTITIONS]
        records = [(stream.encode(), observation(step, float(step))) for step in steps for stream in placed]
        served.produce(records, partition=partition)


def partitions_of(worker: Served) -> int:
    return sum(name.startswith("carousel_consumer_lag_records{") for name in worker.metrics())


CLIENT = httpx.Client(timeout=10)


def ask(worker: Served, path: str, **options: Any) -> httpx.Response:
    return CLIENT.request("POST" if "json" in options else "GET", worker.url + path, **options)


def said(worker: Served) -> list[Any]:
    """All that a worker says of all streams; each answer must be 200."""
    answers = [ask(worker, "/v1/predict", json={"stream": stream}) for stream in STREAMS]
    what_if = [{"ts": START_MS + 10_000 * 3_600_000, "value": 1.0}]
    answers += [ask(worker, "/v1/predict", json={"stream": stream, "history": what_if}) for stream in STREAMS]
    for stream in STREAMS:
        quoted = stream.replace("?", "%3F")
        answers += [ask(worker, f"/v1/streams/{quoted}{part}") for part in ("", "/state", "/history", "/forecast")]
    answers.append(ask(worker, "/v1/streams?limit=7&after=by"))
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200]
    return [answer.json() for answer in answers]


@pytest.fixture(scope="module")
def pair(
    bundle: Path, bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Served]]:
    """Two workers with half of the partitions each, that have heard all streams."""
    directory = tmp_path_factory.mktemp("routing")
    with serving(bundle, bootstrap_servers, directory, PARTITIONS, session_timeout_ms=6_000) as first:
        second = Served(first.servers, first.settings, directory / "second.log")
        second.start()
        try:
            until("a fair share each", lambda: partitions_of(first) == partitions_of(second) == 2)
            produce(first, range(STEPS))
            first.read(first.forecasts, len(STREAMS) * STEPS)
            yield first, second
        finally:
            if second.process.poll() is None:
                second.process.kill()
                second.process.wait()


def test_both_say_the_same_of_every_stream_however_it_was_placed(pair: tuple[Served, Served]) -> None:
    first, second = (said(worker) for worker in pair)
    assert first == second
    assert {answer["count"] for answer in first[: len(STREAMS)]} == {STEPS}
    assert {answer["stream"] for answer in first[: len(STREAMS)]} == set(STREAMS)


def test_what_they_say_is_what_was_written(pair: tuple[Served, Served]) -> None:
    records = pair[0].read(pair[0].forecasts, len(STREAMS) * STEPS)
    last = {record.key.decode(): json.loads(record.value) for record in records}
    for worker in pair:
        for stream in STREAMS:
            answer = worker.predict(stream=stream)
            answer.pop("timestamps")
            assert answer == last[stream]


def test_an_unknown_stream_is_404_from_both(pair: tuple[Served, Served]) -> None:
    for worker in pair:
        assert ask(worker, "/v1/predict", json={"stream": "nobody"}).status_code == 404
        for path in ("nobody", "nobody/state", "nobody/history", "nobody/forecast", f"{JAVA[0]}?partition=99"):
            answer = ask(worker, f"/v1/streams/{path}")
            assert answer.status_code == 404, answer.text
            assert answer.headers["content-type"] == "application/problem+json"


def test_the_list_is_of_both(pair: tuple[Served, Served]) -> None:
    for worker in pair:
        page = worker.get("/v1/streams?limit=1000")
        assert [stream["stream"] for stream in page["streams"]] == sorted(STREAMS)
        assert (page["total"], page["next"]) == (len(STREAMS), None)
        assert {stream["partition"] for stream in page["streams"]} == set(range(PARTITIONS))


def test_what_was_passed_on_is_not_passed_on_again(pair: tuple[Served, Served]) -> None:
    def forwards() -> float:
        names = "carousel_requests_forwarded_total{"
        return sum(value for worker in pair for name, value in worker.metrics().items() if name.startswith(names))

    before = forwards()
    for worker in pair:
        statuses = []
        for partition in range(PARTITIONS):
            answer = ask(worker, "/v1/streams/nobody", headers={PARTITION_HEADER: str(partition)})
            statuses.append(answer.status_code)
            assert answer.headers.get("retry-after") == ("1" if answer.status_code == 503 else None)
        assert sorted(statuses) == [404, 404, 503, 503]
        assert ask(worker, "/v1/streams/nobody", headers={PARTITION_HEADER: "any"}).status_code == 404
    assert forwards() == before


def test_while_partitions_move_each_answer_is_right_or_an_honest_503(
    pair: tuple[Served, Served], tmp_path: Path
) -> None:
    """A third worker comes and goes three times, so the group rebalances at least five times."""
    right = {stream: pair[0].predict(stream=stream) for stream in STREAMS}
    over, wrong, statuses = threading.Event(), list[str](), Counter[int]()

    def ask_on(worker: Served, client: httpx.Client) -> None:
        for stream in itertools.cycle(STREAMS):
            if over.is_set():
                return
            answer = client.post(f"{worker.url}/v1/predict", json={"stream": stream})
            statuses[answer.status_code] += 1
            if answer.status_code == 503:
                if "retry-after" not in answer.headers:
                    wrong.append("a 503 without Retry-After")
                time.sleep(0.05)
            elif answer.status_code != 200 or answer.json() != right[stream]:
                wrong.append(f"{stream}: {answer.status_code} {answer.text[:200]}")

    third = Served(pair[0].servers, pair[0].settings, tmp_path / "third.log")
    with ThreadPoolExecutor(4) as threads, httpx.Client(timeout=8) as client:
        asking = [threads.submit(ask_on, worker, client) for worker in pair * 2]
        try:
            for _ in range(3):
                third.start()
                until("its share", lambda: partitions_of(third) > 0)
                assert third.stop() == 0
                until("all partitions again", lambda: sum(map(partitions_of, pair)) == PARTITIONS)
            until("all to be answered again", lambda: {ask(pair[0], path).status_code for path in PATHS} == {200})
        finally:
            over.set()
            if third.process.poll() is None:
                third.process.kill()
        for each in asking:
            each.result()  # no time-out, no connection lost
    logging.getLogger(__name__).info("requests while partitions moved, by status: %s", dict(statuses))
    assert not wrong, wrong[:5]
    assert statuses[200] > 1_000


def test_one_that_hangs_or_ends_is_503_until_the_other_has_its_streams(pair: tuple[Served, Served]) -> None:
    first, second = pair
    theirs = [
        stream["stream"] for stream in ask(second, "/v1/streams", headers={PARTITION_HEADER: "any"}).json()["streams"]
    ]
    mine = sorted(set(STREAMS) - set(theirs))
    second.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    stream = next(stream for stream in theirs if stream in JAVA)
    answer = ask(first, "/v1/predict", json={"stream": stream})
    assert time.monotonic() - begun < 7
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
    own = next(stream for stream in mine if stream in JAVA)
    assert first.predict(stream=own)["count"] == STEPS
    second.process.kill()
    second.process.wait()
    seen = set()

    def taken_over() -> bool:
        answer = ask(first, "/v1/predict", json={"stream": stream})
        seen.add(answer.status_code)
        return partitions_of(first) == PARTITIONS and answer.status_code != 503

    until("all partitions with the first", taken_over)
    assert seen <= {503, 200}, "it never says that there is no such stream"
    assert first.predict(stream=stream)["count"] == STEPS, "the stream came with its state"
    produce(first, range(STEPS, STEPS + 1))
    now = {START_MS + STEPS * 3_600_000}
    until("the new observation of each stream", lambda: {each["ts"] for each in said(first)[: len(STREAMS)]} == now)


def test_a_slot_that_comes_back_under_another_url_is_found_there(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, PARTITIONS, session_timeout_ms=6_000, slot="w0") as first:
        second = Served(first.servers, {**first.settings, "slot": "w1"}, tmp_path / "second.log")
        second.start()
        try:
            until("a fair share each", lambda: partitions_of(first) == partitions_of(second) == 2)
            produce(first, range(1))
            first.read(first.forecasts, len(STREAMS))
            before = second.url
            second.process.kill()
            second.process.wait()
            second.start()
            assert second.url != before

            def all_answered() -> bool:
                asked = [
                    ask(each, "/v1/predict", json={"stream": stream}) for each in (first, second) for stream in JAVA
                ]
                return {answer.status_code for answer in asked} == {200}

            until("each to ask the other where it is now", all_answered)
            assert first.predict(stream=JAVA[0]) == second.predict(stream=JAVA[0])
            assert second.stop() == 0
        finally:
            if second.process.poll() is None:
                second.process.kill()
