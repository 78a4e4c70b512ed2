"""The whole path, as its users drive it: a genuine Kafka, a genuine `carousel serve`, HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from kafka import KafkaConsumer, TopicPartition

from deploy.broker import BrokerConfig, EmbeddedBroker
from tests.served import HOUR_MS, START_MS, Served, group_members, observation, random_bundle, serving, until

STREAMS, STEPS = 50, 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def served(bundle: Path, bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that has taken 50 streams x 200 observations with 1% garbage among them."""
    with serving(bundle, bootstrap_servers, tmp_path_factory.mktemp("serve"), compiled=True) as served:
        served.produce(records())
        yield served


def value_at(stream: int, step: int) -> float | None:
    noise = random.Random(stream * STEPS + step)
    return (
        None if noise.random() < 0.02 else round(100 * stream + 10 * np.sin(step / 24 * 6.283) + noise.gauss(0, 1), 3)
    )


def records() -> list[tuple[bytes | None, bytes | None]]:
    """Good and bad records, in the order in which they are sent."""
    mixed: list[tuple[bytes | None, bytes | None]] = []
    for step in range(STEPS):
        mixed += [(b"s%d" % stream, observation(step, value_at(stream, step))) for stream in range(STREAMS)]
    garbage = random.Random(1)
    for n in range(STREAMS * STEPS // 100):
        mixed.insert(garbage.randrange(len(mixed)), (b"s%d" % (n % STREAMS), b"garbage %d" % n))
    return mixed


def reason_of(record: Any) -> str:
    return str(dict(record.headers)["carousel.errors.reason"].decode())


def test_each_good_observation_yields_one_forecast_with_its_key_and_partition_in_order(served: Served) -> None:
    wanted: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for record in served.read(served.observations, STREAMS * STEPS):
        if record.value.startswith(b"{"):
            wanted[record.partition, record.key].append(json.loads(record.value)["ts"])
    got: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for record in served.read(served.forecasts, STREAMS * STEPS):
        forecast = json.loads(record.value)
        assert forecast["stream"] == record.key.decode()
        got[record.partition, record.key].append(forecast["ts"])
    assert got == wanted
    assert len({partition for partition, _ in got}) == 4


def test_each_bad_record_becomes_a_dead_letter_with_its_reason_and_its_bytes(served: Served) -> None:
    sent = Counter(value for _, value in records() if value and value.startswith(b"garbage"))
    letters = served.read(served.dead_letters, sum(sent.values()))
    assert Counter(letter.value for letter in letters) == sent
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["carousel.errors.reason"] == b"decode"
        assert headers["__streams.errors.topic"] == served.observations.encode()
        assert headers["__streams.errors.partition"] == b"%d" % letter.partition
        assert int(headers["__streams.errors.offset"]) >= 0
        assert headers["__streams.errors.exception"]
        assert headers["__streams.errors.message"]


def test_the_metrics_agree_with_both_topics(served: Served) -> None:
    forecasts = served.read(served.forecasts, STREAMS * STEPS)
    letters = served.read(served.dead_letters, STREAMS * STEPS // 100)
    missing = sum(json.loads(record.value)["observed"] is None for record in forecasts)
    metrics = served.metrics()
    expected = {
        f'carousel_records_consumed_total{{topic="{served.observations}"}}': len(forecasts) + len(letters),
        'carousel_observations_total{outcome="observed"}': len(forecasts) - missing,
        'carousel_observations_total{outcome="missing"}': missing,
        'carousel_observations_total{outcome="rejected"}': len(letters),
        'carousel_records_rejected_total{reason="decode"}': len(letters),
        "carousel_forecasts_produced_total": len(forecasts),
        "carousel_end_to_end_latency_seconds_count": len(forecasts),
        "carousel_active_streams": STREAMS,
    }
    assert {name: metrics.get(name) for name in expected} == expected
    until("the lag to be seen as none", lambda: lags(served) == [0.0] * 4)
    assert not [name for name in metrics if '"s1"' in name], "a stream must never be a label"


def lags(served: Served) -> list[float]:
    return [value for name, value in served.metrics().items() if name.startswith("carousel_consumer_lag_records{")]


def last_forecast(served: Served, stream: str) -> dict[str, Any]:
    records = served.read(served.forecasts, STREAMS * STEPS)
    return dict(json.loads([r.value for r in records if r.key == stream.encode()][-1]))


def test_predict_for_a_live_stream_equals_its_last_record_on_the_forecasts_topic(served: Served) -> None:
    answer = served.predict(stream="s7")
    timestamps = answer.pop("timestamps")
    assert answer == last_forecast(served, "s7")
    assert timestamps == [answer["ts"] + (k + 1) * HOUR_MS for k in range(6)]


def history_of(stream: int) -> list[dict[str, Any]]:
    return [{"ts": START_MS + step * HOUR_MS, "value": value_at(stream, step)} for step in range(STEPS)]


def test_predict_with_the_full_history_equals_it_too(served: Served) -> None:
    live, anew = last_forecast(served, "s7"), served.predict(history=history_of(7))
    scale = served.get("/v1/streams/s7/state")["scale"]
    for name, values in live["quantiles"].items():
        np.testing.assert_allclose(anew["quantiles"][name], values, rtol=0, atol=1e-4 * scale)
    for same in ("ts", "slot", "count", "observed", "status", "model", "step_ms"):
        assert anew[same] == live[same]


def test_a_what_if_continues_the_live_stream_and_leaves_it_as_it_was(served: Served) -> None:
    before = served.get("/v1/streams/s9/state")
    fork = [{"ts": START_MS + (STEPS + k) * HOUR_MS, "value": 5_000.0} for k in range(3)]
    answer = served.predict(stream="s9", history=fork)
    assert answer["count"] == STEPS + 3
    assert answer["quantiles"] != served.predict(stream="s9")["quantiles"]
    full = served.predict(history=history_of(9) + fork)
    for name, values in full["quantiles"].items():
        np.testing.assert_allclose(answer["quantiles"][name], values, rtol=1e-5)
    assert served.get("/v1/streams/s9/state") == before


def test_bad_records_of_every_kind_cost_nothing_but_themselves(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    from tests.service.test_records import BAD_KEYS, BAD_VALUES

    kinds = [(key, b'{"value": 1}', "key") for key in BAD_KEYS.values()]
    kinds += [(b"a", value, reason.value) for value, reason in BAD_VALUES.values() if b"temperature" not in value]
    kinds += [(b"a", b'{"value": 1, "pad": "' + b"x" * 1_000_000 + b'"}', "size")]
    kinds += [(b"k" * 500_000, b"v" * 540_000, "key")]  # as large as Kafka takes it: larger with why it was rejected
    with serving(bundle, bootstrap_servers, tmp_path, partitions=2) as served:
        mixed = []
        for step, (key, value, _) in enumerate(kinds):
            mixed += [(b"a", observation(step, float(step))), (key, value)]
        served.produce(mixed, headers=[("trace", b"1")])
        letters = served.read(served.dead_letters, len(kinds))
        assert Counter(map(reason_of, letters)) == Counter(reason for *_, reason in kinds)
        assert {letter.headers[0] for letter in letters} == {("trace", b"1")}
        forecasts = [json.loads(record.value) for record in served.read(served.forecasts, len(kinds))]
        assert [f["count"] for f in forecasts] == list(range(1, len(kinds) + 1))
        metrics = served.metrics()
        for reason, count in Counter(map(reason_of, letters)).items():
            assert metrics[f'carousel_records_rejected_total{{reason="{reason}"}}'] == count


def test_a_null_is_a_known_gap_and_a_tombstone_ends_the_stream(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path) as served:
        served.produce([(b"a", observation(0, 1.0)), (b"a", observation(1, None)), (b"b", observation(0, 1.0))])
        forecasts = [json.loads(r.value) for r in served.read(served.forecasts, 3)]
        assert [(f["count"], f["observed"]) for f in forecasts if f["stream"] == "a"] == [(1, 1.0), (2, None)]
        served.produce([(b"a", None)])
        until("the end of stream a", lambda: httpx.get(f"{served.url}/v1/streams/a").status_code == 404)
        assert served.get("/v1/streams/b")["count"] == 1
        served.produce([(b"a", observation(2, 1.0))])
        assert json.loads(served.read(served.forecasts, 4)[-1].value)["stream"] in ("a", "b")
        assert served.get("/v1/streams/a")["count"] == 1


def test_a_stopped_worker_has_committed_left_its_group_and_goes_on_where_it_stood(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, partitions=1) as served:
        served.produce([(b"a", observation(step, 1.0)) for step in range(500)])
        until("some forecasts", lambda: served.metrics()["carousel_forecasts_produced_total"] > 0)
        assert served.stop() == 0
        assert group_members(bootstrap_servers, str(served.settings["group_id"])) == 0
        count = committed(served)
        assert len(served.read(served.forecasts, count)) == count, "each forecast delivered is committed, and no other"
        served.start()
        served.produce([(b"a", observation(step, 1.0)) for step in range(500, 600)])
        forecasts = [json.loads(r.value) for r in served.read(served.forecasts, 600)]
        assert [f["ts"] for f in forecasts] == [START_MS + step * HOUR_MS for step in range(600)]
        assert [f["count"] for f in forecasts] == list(range(1, 601)), "its states went on too"
        assert served.stop() == 0


def committed(served: Served) -> int:
    consumer = KafkaConsumer(bootstrap_servers=served.servers, group_id=served.settings["group_id"])
    offset = consumer.committed(TopicPartition(served.observations, 0))
    consumer.close()
    return int(offset or 0)


def test_a_broker_that_goes_away_is_waited_for_and_nothing_is_lost(bundle: Path, tmp_path: Path) -> None:
    data = BrokerConfig(data_dir=tmp_path / "kafka")
    with EmbeddedBroker(data) as broker:
        with serving(bundle, broker.bootstrap_servers, tmp_path) as served:
            served.produce([(b"a", observation(0, 1.0))])
            assert len(served.read(served.forecasts, 1)) == 1
            assert broker.pid
            os.kill(broker.pid, signal.SIGKILL)
            until("the worker to say that it is not ready", lambda: not served.ready())
            assert httpx.get(f"{served.url}/livez").status_code == 200, "to restart the worker would be no help"
            assert served.predict(stream="a")["count"] == 1, "what it knows it still tells"
            with EmbeddedBroker(data):
                until("the worker to be ready again", served.ready)
                served.produce([(b"a", observation(1, 2.0))])
                counts = [json.loads(record.value)["count"] for record in served.read(served.forecasts, 2)]
                assert counts == [1, 2]
                assert served.stop() == 0
        said = served.log_file.read_text()
    assert said.count("does not answer") == said.count("answers again") == 1


def test_a_broker_that_is_not_there_yet_is_waited_for(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(bundle, f"127.0.0.1:{port}", tmp_path, wait=False) as served:
        until("the worker to say what it waits for", lambda: "no Kafka broker answers" in served.log_file.read_text())
        assert httpx.get(f"{served.url}/livez").status_code == 200
        unready = httpx.get(f"{served.url}/readyz")
        assert unready.status_code == 503
        assert f"127.0.0.1:{port}" in unready.json()["detail"]
        with EmbeddedBroker(BrokerConfig(port=port)):
            until("the worker to be ready", served.ready)
            served.produce([(b"a", observation(0, 1.0))])
            assert len(served.read(served.forecasts, 1)) == 1
            assert served.stop() == 0


def test_two_workers_share_the_partitions_and_one_takes_over_when_the_other_leaves(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path) as first:
        second = Served(first.servers, first.settings, tmp_path / "second.log")
        second.start()
        try:
            until("a fair share each", lambda: len(lags(first)) == len(lags(second)) == 2)
            first.produce([(b"s%d" % n, observation(0, 1.0)) for n in range(40)])
            assert len({r.key for r in first.read(first.forecasts, 40)}) == 40
            counts = [int(w.metrics()["carousel_active_streams"]) for w in (first, second)]
            assert sum(counts) == 40
            assert min(counts) > 0
        finally:
            assert second.stop() == 0
        until("all partitions", lambda: len(lags(first)) == 4)
        first.produce([(b"s%d" % n, observation(1, 1.0)) for n in range(40)])
        assert len(first.read(first.forecasts, 80)) == 80
