"""Watched streams are metrics, as long as a worker has them; and metrics say which worker has how many partitions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.served import Served, observation, random_bundle, serving, until

WATCHED = [f"shop {n}" for n in range(12)]
"""Spread over all partitions."""
HOURS = 5


@pytest.fixture(scope="module")
def served(bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("watched")
    bundle = random_bundle(directory / "model")
    settings = {"watched_streams": ",".join(["nobody", *WATCHED]), "session_timeout_ms": 6_000}
    with serving(bundle, bootstrap_servers, directory, **settings) as running:
        for hour in range(HOURS):
            running.produce([(s.encode(), observation(hour, value_at(s, hour))) for s in [*WATCHED, "another"]])
        running.read(running.forecasts, HOURS * (len(WATCHED) + 1))
        yield running


def value_at(stream: str, hour: int) -> float:
    return 100.0 * len(stream) + ord(stream[-1]) + hour


def observed(worker: Served) -> dict[str, float]:
    """By stream, what a worker tells."""
    start, end = 'carousel_watched_observed{stream="', '"}'
    told = {name: value for name, value in worker.metrics().items() if name.startswith(start)}
    return {name.removeprefix(start).removesuffix(end): value for name, value in told.items()}


def expected(worker: Served, stream: str) -> dict[str, float]:
    """By quantile, what a worker tells of one stream's forecast."""
    name = 'carousel_watched_forecast{q="%s",stream="%s"}'
    metrics = worker.metrics()
    return {q: metrics[name % (q, stream)] for q in ("0.1", "0.5", "0.9") if name % (q, stream) in metrics}


def test_the_last_value_stands_beside_what_had_been_forecast_for_it(served: Served) -> None:
    last = {stream: value_at(stream, HOURS - 1) for stream in WATCHED}
    until("what was observed, of the watched alone", lambda: observed(served) == last)
    records = served.read(served.forecasts, HOURS * (len(WATCHED) + 1))
    for stream in WATCHED:
        before = json.loads([record.value for record in records if record.key == stream.encode()][-2])
        one_step = {quantile: values[0] for quantile, values in before["quantiles"].items()}
        assert expected(served, stream) == pytest.approx(one_step, rel=1e-3)


def test_it_is_told_by_who_has_the_stream_and_by_nobody_else(served: Served) -> None:
    second = Served(served.servers, served.settings, served.log_file.with_name("second.log"))
    second.start()
    workers = (served, second)

    def assigned() -> list[float]:
        return [worker.metrics()["carousel_partitions_assigned"] for worker in workers]

    try:
        until("a fair share each", lambda: assigned() == [2, 2])
        assert [worker.metrics()["carousel_partitions"] for worker in workers] == [4, 4]
        until("each to be told", lambda: len(observed(served)) + len(observed(second)) == len(WATCHED))
        assert observed(served).keys() | observed(second).keys() == set(WATCHED)
        assert observed(second), "streams of the partitions that moved"
    finally:
        assert second.stop() == 0
    until("all to be told by the one that is left", lambda: observed(served).keys() == set(WATCHED))
    assert served.metrics()["carousel_partitions_assigned"] == 4


def test_what_was_not_observed_is_not_told_and_what_ended_is_forgotten(served: Served) -> None:
    missing, ended = WATCHED[:2]
    served.produce([(missing.encode(), observation(HOURS, None)), (ended.encode(), None)])
    until("both to be gone", lambda: observed(served).keys() == set(WATCHED) - {missing, ended})
    assert len(expected(served, missing)) == 3, "something had been forecast all the same"
    assert not expected(served, ended)
