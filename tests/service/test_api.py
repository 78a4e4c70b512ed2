"""The API over real HTTP: what it answers, and that no request can harm it. Rows are those of RELIABILITY.md."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from model.config import ModelConfig
from model.grid import Grid
from service import guard, server
from service.api import EXAMPLE_STREAM, EXAMPLE_TS_MS
from service.engine import Engine
from service.errors import Refused, ServiceError
from service.events import QUEUE_MAX, READERS_MAX
from service.metrics import Metrics
from service.predict import Predictor
from service.schemas import PredictRequest
from service.server import HttpServer
from service.settings import Settings
from tests.service.conftest import (
    CONFIG,
    HOUR_MS,
    SEEN,
    STREAMS,
    Running,
    history,
    random_bundle,
    record,
    time_at,
    value_at,
)

Start = Callable[..., Running]
JSON = {"content-type": "application/json"}
SECRET = 31_337.25
"""A value that no error may repeat."""


def problem_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem that an answer is; fails if it is none, or of another status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == "about:blank"
    assert problem["title"]
    assert problem["status"] == status
    assert problem["detail"]
    assert ("errors" in problem) == (status == 422)
    return problem


def locs(answer: httpx.Response) -> list[list[str | int]]:
    """The fields that a 422 names."""
    return [error["loc"] for error in problem_of(answer, 422)["errors"]]


def ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def scale_of(api: Running, stream: str = EXAMPLE_STREAM) -> float:
    return float(api.state(stream)["scale"])


def numbers(answer: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(list(answer["quantiles"].values()))


class TestPredict:
    @pytest.mark.parametrize("stream", STREAMS)
    def test_a_live_stream_is_told_as_its_last_record(self, api: Running, stream: str) -> None:
        records = [json.loads(o.value) for o in api.published if o.key == stream.encode()]
        answer = ok(api.predict({"stream": stream}))
        timestamps = answer.pop("timestamps")
        assert answer == records[-1]
        assert answer["status"] == "live"
        assert timestamps == [answer["ts"] + (k + 1) * HOUR_MS for k in range(CONFIG.horizon)]

    def test_the_whole_history_is_forecast_as_the_live_stream(self, api: Running) -> None:
        live = ok(api.predict({"stream": EXAMPLE_STREAM}))
        anew = ok(api.predict({"history": history(0, SEEN)}))
        assert anew.pop("stream") is None
        assert np.abs(numbers(anew) - numbers(live)).max() < 1e-4 * scale_of(api)
        for name in ("ts", "slot", "count", "observed", "status", "timestamps", "model", "step_ms"):
            assert anew[name] == live[name]

    def test_a_what_if_goes_on_from_the_live_state(self, api: Running) -> None:
        told = ok(api.predict({"stream": EXAMPLE_STREAM, "history": history(SEEN, SEEN + 5)}))
        whole = ok(api.predict({"history": history(0, SEEN + 5)}))
        assert told["stream"] == EXAMPLE_STREAM
        assert told["count"] == SEEN + 5
        assert np.abs(numbers(told) - numbers(whole)).max() < 1e-4 * scale_of(api)

    def test_a_what_if_leaves_the_state_bit_for_bit(self, api: Running) -> None:
        before = api.state(EXAMPLE_STREAM)
        forecast = api.predict({"stream": EXAMPLE_STREAM}).content
        for first in (SEEN, SEEN + 10, SEEN + 500):  # the next step, after a gap, and after one too long
            ok(api.predict({"stream": EXAMPLE_STREAM, "history": history(first, first + 5)}))
        after = api.state(EXAMPLE_STREAM)
        assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
        assert api.predict({"stream": EXAMPLE_STREAM}).content == forecast

    @pytest.mark.parametrize("first", [0, SEEN - 1])
    def test_a_what_if_cannot_begin_in_the_past(self, api: Running, first: int) -> None:
        answer = api.predict({"stream": EXAMPLE_STREAM, "history": history(first, first + 3)})
        assert locs(answer) == [["body", "history", 0, "ts"]]
        assert str(time_at(SEEN - 1)) in answer.json()["detail"]

    def test_a_short_history_is_answered_as_warming(self, api: Running) -> None:
        answer = ok(api.predict({"history": history(0, 2)}))
        assert (answer["status"], answer["count"]) == ("warming", 2)
        assert ok(api.predict({"history": history(0, CONFIG.warmup)}))["status"] == "live"

    def test_one_observation_is_answered_with_all_steps_of_the_horizon(self, api: Running) -> None:
        """One-to-many: from a single value to what comes after it."""
        told = ok(api.predict({"history": history(7, 8)}))
        assert (told["count"], told["observed"], told["status"]) == (1, value_at(7), "warming")
        assert {quantile: len(of) for quantile, of in told["quantiles"].items()} == {"0.1": 8, "0.5": 8, "0.9": 8}
        assert told["timestamps"] == [time_at(8 + step) for step in range(8)]
        other = ok(api.predict({"history": [{"ts": time_at(7), "value": 10 * value_at(7)}]}))
        assert min(other["quantiles"]["0.5"]) > max(told["quantiles"]["0.5"])

    def test_a_history_without_any_value_is_answered(self, api: Running) -> None:
        answer = ok(api.predict({"history": [{"ts": EXAMPLE_TS_MS, "value": None}]}))
        assert answer["observed"] is None
        assert np.isfinite(numbers(answer)).all()

    def test_times_may_be_text(self, api: Running) -> None:
        asked = [history(0, 30), history(0, 30)]
        asked[1][-1]["ts"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_at(29) / 1000))
        answers = [ok(api.predict({"history": observations})) for observations in asked]
        assert answers[0] == answers[1]

    def test_the_answer_is_cut_as_asked_for(self, api: Running) -> None:
        whole = ok(api.predict({"stream": EXAMPLE_STREAM}))
        cut = ok(api.predict({"stream": EXAMPLE_STREAM, "horizon": 3, "quantiles": [0.9, 0.1]}))
        assert cut["quantiles"] == {q: whole["quantiles"][q][:3] for q in ("0.1", "0.9")}
        assert cut["timestamps"] == whole["timestamps"][:3]

    def test_beyond_the_model_is_refused_with_what_it_has(self, api: Running) -> None:
        answer = api.predict({"stream": EXAMPLE_STREAM, "horizon": CONFIG.horizon + 1})
        assert locs(answer) == [["body", "horizon"]]
        assert str(CONFIG.horizon) in answer.json()["detail"]
        answer = api.predict({"stream": EXAMPLE_STREAM, "quantiles": [0.1, 0.25]})
        assert locs(answer) == [["body", "quantiles"]]
        assert "0.1, 0.5, 0.9" in answer.json()["detail"]

    def test_covariates_are_the_models(self, start: Start) -> None:
        api = start(ModelConfig(grid=Grid(HOUR_MS), season=6, horizon=4, covariates=("wind",), hidden_size=8))
        asked = history(0, 30)
        for n, observation in enumerate(asked):
            observation["covariates"] = {"wind": n % 5}
        told = ok(api.predict({"history": asked}))
        asked[-1]["covariates"] = {}
        assert told["quantiles"] != ok(api.predict({"history": asked}))["quantiles"]
        asked[3]["covariates"] = {"rain": SECRET}
        answer = api.predict({"history": asked})
        assert locs(answer) == [["body", "history", 3, "covariates"]]
        assert "wind" in answer.json()["detail"]
        assert "rain" not in answer.text


def gaps() -> st.SearchStrategy[list[int]]:
    """Steps between observations: mostly the next, some gaps, duplicates, late ones, and gaps too long."""
    step = st.sampled_from([1, 1, 1, 1, 2, 5, 12, 0, -1, -7, 60])
    return st.lists(step, min_size=1, max_size=25)


CLOCKS = {
    "hours": Grid(step_ms=HOUR_MS),
    "weekdays": Grid(step_ms=24 * HOUR_MS, period=7, phases=(0, 1, 4, 5, 6)),
    "no clock": None,
}


@pytest.fixture(scope="module", params=CLOCKS)
def engine(request: pytest.FixtureRequest) -> Engine:
    config = ModelConfig(grid=CLOCKS[request.param], season=3, horizon=2, quantiles=(0.5,), hidden_size=4, max_gap=20)
    return Engine(random_bundle(config), Settings(model=Path("unused")), Metrics())


@settings(max_examples=25, deadline=None)
@given(
    steps=gaps(), split=st.integers(0, 8), values=st.lists(st.none() | st.floats(-1e6, 1e6), min_size=25, max_size=25)
)
def test_a_history_is_placed_as_the_worker_places_it(
    engine: Engine, steps: list[int], split: int, values: list[float | None]
) -> None:
    """Whatever its gaps, duplicates, late ones and restarts; also as a what-if from any observation on."""
    step_ms = engine.config.step_ms or HOUR_MS
    times = EXAMPLE_TS_MS + step_ms * np.cumsum(steps)
    if engine.config.grid:
        times = engine.config.grid.time_of(engine.config.grid.slot_of(np.array([EXAMPLE_TS_MS])) + np.cumsum(steps))
    given = [{"ts": int(ts), "value": value} for ts, value in zip(times, values, strict=False)]
    engine.forget_partitions([0])
    last: dict[str, Any] = {}
    for n, observation in enumerate(given):
        for outgoing in engine.process([record("s", observation["ts"], observation["value"])]):
            last = json.loads(outgoing.value)
        if n + 1 == split:
            (key,) = engine.arena.keys_of("s")
            state = engine.arena.gather(torch.tensor([engine.arena.find(key)]))
    (key,) = engine.arena.keys_of("s")
    final = engine.arena.gather(torch.tensor([engine.arena.find(key)]))
    _same(Predictor(engine).predict(PredictRequest(history=given)), last, final)  # type: ignore[arg-type]
    if 0 < split < len(given):
        engine.arena.scatter(torch.tensor([engine.arena.find(key)]), state)
        newer = given[split:]
        asked = PredictRequest(stream="s", history=newer)  # type: ignore[arg-type]
        if min(o["ts"] for o in newer) > int(state["ts_ms"]):
            _same(Predictor(engine).predict(asked), last, final)
        else:
            with pytest.raises(Refused, match=str(int(state["ts_ms"]))):
                Predictor(engine).predict(asked)


def _same(told: dict[str, Any], last: dict[str, Any], final: dict[str, torch.Tensor]) -> None:
    for name in ("ts", "slot", "count", "observed", "status"):
        assert told[name] == last[name], name
    assert np.abs(numbers(told) - numbers(last)).max() <= 1e-4 * float(final["scale"])


class TestStreams:
    def test_pages_hold_every_stream_once_in_order(self, api: Running) -> None:
        seen, after = [], ""
        while True:
            page = ok(api.client.get("/v1/streams", params={"limit": 2, "after": after}))
            assert page["total"] == len(STREAMS)
            seen += [stream["stream"] for stream in page["streams"]]
            if page["next"] is None:
                break
            after = page["next"]
        assert seen == sorted(STREAMS)
        found = ok(api.client.get("/v1/streams", params={"q": "7/temp"}))
        assert [stream["stream"] for stream in found["streams"]] == ["site 7/temperature"]
        assert found["total"] == 1

    @pytest.mark.parametrize("path", ["site 7/temperature", "site%207%2Ftemperature"])
    def test_an_id_may_have_slashes(self, api: Running, path: str) -> None:
        detail = ok(api.client.get(f"/v1/streams/{path}"))
        assert detail["stream"] == "site 7/temperature"
        assert detail["forecast"] == ok(api.predict({"stream": "site 7/temperature"}))
        for part in ("state", "history"):
            assert ok(api.client.get(f"/v1/streams/{path}/{part}"))["stream"] == "site 7/temperature"
        rows = ok(api.client.get(f"/v1/streams/{path}/forecast"))
        assert [row["q0_5"] for row in rows] == detail["forecast"]["quantiles"]["0.5"]

    def test_scores_are_those_of_the_state(self, api: Running) -> None:
        state = api.state(EXAMPLE_STREAM)
        detail = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}"))
        assert (detail["count"], detail["observed"]) == (SEEN, value_at(SEEN - 1))
        by_horizon = detail["scores"]["by_horizon"]
        assert list(by_horizon) == ["1", "2", "4", "8"]
        sums = [*state["scores"][0].tolist(), state["scores"][0].sum(0).tolist()]
        for told, (scored, pinball, error, naive_error, hits) in zip(
            [*by_horizon.values(), detail["scores"].pop("total")], sums, strict=True
        ):
            assert told["scored"] == scored > 0
            assert told["mase"] == error / naive_error
            assert told["coverage"] == hits / scored
            assert told["pinball"] == pinball / scored
        assert detail["scores"] | {"by_horizon": None} == by_horizon["1"] | {"by_horizon": None}

    def test_how_odd_an_observation_was_is_told_wherever_it_is(self, api: Running) -> None:
        anomaly = round(float(api.engine.follower.anomaly.score(api.state(EXAMPLE_STREAM))), 3)
        assert anomaly >= 0
        detail = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}"))
        past = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}/history"))["observations"]
        assert detail["anomaly"] == detail["forecast"]["anomaly"] == anomaly
        assert past[-1]["anomaly"] == anomaly
        assert past[0]["anomaly"] is None, "it was still warming"

    def test_raw_quantiles_are_there_for_the_asking(self, api: Running) -> None:
        state = api.state(EXAMPLE_STREAM)
        told, raw = (ok(api.predict({"stream": EXAMPLE_STREAM, "raw": raw})) for raw in (False, True))
        for answer, wanted in ((told, False), (raw, True)):
            values = api.engine.follower.standing(state, raw=wanted).values[0].T
            np.testing.assert_allclose(list(answer["quantiles"].values()), values, atol=1e-3)
        assert told["quantiles"]["0.9"] != raw["quantiles"]["0.9"]
        assert {**told, "quantiles": None} == {**raw, "quantiles": None}

    def test_the_state_is_opened_by_layer(self, api: Running) -> None:
        state = api.state(EXAMPLE_STREAM)
        told = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}/state"))
        assert len(told["layers"]) == CONFIG.layers
        for n, layer in enumerate(told["layers"]):
            assert layer["h"] == state["h"][0, n].tolist()
            assert layer["c"] == state["c"][0, n].tolist()
            assert list(layer["gates"]) == ["input", "forget", "candidate", "output"]
            assert layer["gates"]["output"] == state["gates"][0, n, 3].tolist()
        values = [value_at(n) for n in range(SEEN)]
        assert min(values) < told["level"] < max(values)
        assert (told["steps"], told["gap"], told["scale"]) == (SEEN, 0, scale_of(api))

    def test_history_stands_beside_what_was_forecast_for_it(self, start: Start) -> None:
        api = start(history_steps=10)
        values = [value_at(n) if n != 4 else None for n in range(6)]
        forecasts = api.feed([record("a", time_at(n), value) for n, value in enumerate(values)])
        told = ok(api.client.get("/v1/streams/a/history"))
        assert told["quantiles"] == ["0.1", "0.5", "0.9"]
        assert [o["ts"] for o in told["observations"]] == [time_at(n) for n in range(6)]
        assert [o["value"] for o in told["observations"]] == values
        assert told["observations"][0]["forecast"] is None
        for before, observation in zip(forecasts, told["observations"][1:], strict=False):
            expected = {quantile: of[0] for quantile, of in before["quantiles"].items()}
            assert observation["forecast"] == pytest.approx(expected, rel=1e-3)

    def test_the_open_forecast_comes_as_rows_to_be_drawn(self, api: Running) -> None:
        told = ok(api.predict({"stream": EXAMPLE_STREAM}))
        rows = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}/forecast"))
        assert [row["step"] for row in rows] == list(range(1, CONFIG.horizon + 1))
        assert [row["ts"] for row in rows] == told["timestamps"]
        assert [row["time"] for row in rows][:2] == ["2026-11-20T00:00:00.000Z", "2026-11-20T01:00:00.000Z"]
        for quantile, values in told["quantiles"].items():
            assert [row[f"q{quantile.replace('.', '_')}"] for row in rows] == values
        assert {len(row) for row in rows} == {3 + len(told["quantiles"])}, "flat, and nothing else"

    def test_rows_of_a_model_without_a_clock_have_no_times(self, start: Start) -> None:
        api = start(ModelConfig(grid=None, season=1, horizon=2, quantiles=(0.5,), hidden_size=4))
        api.feed([record("a", time_at(0), 1.0)])
        rows = ok(api.client.get("/v1/streams/a/forecast"))
        assert [(row["step"], row["ts"], row["time"]) for row in rows] == [(1, None, None), (2, None, None)]

    def test_of_two_partitions_the_one_last_heard_counts(self, start: Start) -> None:
        api = start()
        api.feed([record("a", time_at(5), 1.0, partition=2), record("a", time_at(9), 2.0, partition=1)])
        assert ok(api.predict({"stream": "a"}))["observed"] == 2.0
        api.feed([record("a", time_at(10), 3.0, partition=2)])
        assert ok(api.client.get("/v1/streams/a"))["partition"] == 2
        page = ok(api.client.get("/v1/streams"))
        assert (len(page["streams"]), page["total"]) == (1, 1)
        api.engine.forget_partitions([2])
        assert ok(api.predict({"stream": "a"}))["observed"] == 2.0

    def test_no_clock_no_timestamps(self, start: Start) -> None:
        api = start(ModelConfig(season=1, horizon=2, quantiles=(0.5,), cell="rnn", hidden_size=4))
        api.feed([record("a", EXAMPLE_TS_MS, 1.0)])
        assert ok(api.predict({"stream": "a", "horizon": 1}))["timestamps"] is None
        assert [layer["gates"] for layer in ok(api.client.get("/v1/streams/a/state"))["layers"]] == [{}, {}]
        check_against_schema(api, "get", "/v1/streams/{stream}/state", api.client.get("/v1/streams/a/state"))

    def test_a_gru_is_opened_by_the_names_of_its_own_gates(self, start: Start) -> None:
        api = start(ModelConfig(season=1, horizon=2, quantiles=(0.5,), cell="gru", hidden_size=4, layers=1))
        api.feed([record("a", EXAMPLE_TS_MS, 1.0)])
        (layer,) = ok(api.client.get("/v1/streams/a/state"))["layers"]
        assert list(layer["gates"]) == ["reset", "update", "candidate"]
        assert layer["gates"]["update"] == api.state("a")["gates"][0, 0, 1].tolist()
        assert layer["c"] == [0.0] * 4


BAD_FIELDS: list[tuple[dict[str, Any] | str, list[str | int]]] = [
    ({}, ["body"]),
    ({"stream": EXAMPLE_STREAM, "step": 1}, ["body", "step"]),
    ({"stream": 7}, ["body", "stream"]),
    ({"stream": EXAMPLE_STREAM, "horizon": 0}, ["body", "horizon"]),
    ({"stream": EXAMPLE_STREAM, "horizon": 10**30}, ["body", "horizon"]),
    ({"stream": EXAMPLE_STREAM, "horizon": "3"}, ["body", "horizon"]),
    ({"stream": EXAMPLE_STREAM, "quantiles": []}, ["body", "quantiles"]),
    ({"stream": EXAMPLE_STREAM, "quantiles": [False]}, ["body", "quantiles", 0]),
    ({"history": []}, ["body", "history"]),
    ({"history": [1]}, ["body", "history", 0]),
    ({"history": [{"ts": EXAMPLE_TS_MS}]}, ["body", "history", 0, "value"]),
    ({"history": [{"value": SECRET}]}, ["body", "history", 0, "ts"]),
    ({"history": [{"ts": True, "value": SECRET}]}, ["body", "history", 0, "ts"]),
    ({"history": [{"ts": 31337, "value": SECRET}]}, ["body", "history", 0, "ts"]),
    ({"history": [{"ts": "31337", "value": SECRET}]}, ["body", "history", 0, "ts"]),
    ({"history": [{"ts": 10**400, "value": SECRET}]}, ["body", "history", 0, "ts"]),
    ({"history": [{"ts": EXAMPLE_TS_MS, "value": str(SECRET)}]}, ["body", "history", 0, "value"]),
    ({"history": [{"ts": EXAMPLE_TS_MS, "value": True}]}, ["body", "history", 0, "value"]),
    ({"history": [{"ts": EXAMPLE_TS_MS, "value": 3.133725e16}]}, ["body", "history", 0, "value"]),
    ({"history": [{"ts": EXAMPLE_TS_MS, "value": 1, "unit": SECRET}]}, ["body", "history", 0, "unit"]),
    (
        {"history": [{"ts": EXAMPLE_TS_MS, "value": 1, "covariates": {"x": SECRET}}]},
        ["body", "history", 0, "covariates"],
    ),
    ('{"history": [{"ts": 1795132800000, "value": NaN}]}', ["body", "history", 0, "value"]),
    ('{"history": [{"ts": 1795132800000, "value": 1e400}]}', ["body", "history", 0, "value"]),
    ('{"history": [{"ts": 1795132800000, "value": -Infinity}]}', ["body", "history", 0, "value"]),
    ('{"history": [{"ts": 1795132800000, "value": ' + "9" * 400 + "}]}", ["body", "history", 0, "value"]),
]
BAD_PATHS = {
    "?limit=1000000000": "limit",
    "?limit=0": "limit",
    "?limit=-1": "limit",
    "?limit=ten": "limit",
    "?limit=1&limit=2": "limit",
    "?after=a&after=b": "after",
    "?q=" + "x" * 300: "q",
    "?offset=3": "offset",
}


class TestBadInput:
    @pytest.mark.parametrize(
        "body", [b"", b"{", b"null", b"[]", b'"\xff"', b'{"stream":"\xff"}', b"[" * 40_000, b'{"a":' * 8_000, b"\x00"]
    )
    def test_row_3_not_json(self, api: Running, body: bytes) -> None:
        problem_of(api.client.post("/v1/predict", content=body, headers=JSON), 422)

    @pytest.mark.parametrize(("body", "loc"), BAD_FIELDS)
    def test_row_4_the_field_is_named_and_its_value_is_not(self, api: Running, body: Any, loc: list[str | int]) -> None:
        content = body if isinstance(body, str) else json.dumps(body)
        answer = api.client.post("/v1/predict", content=content, headers=JSON)
        assert loc in locs(answer)
        assert "31337" not in answer.text
        assert "3.1337" not in answer.text
        assert "999" not in answer.text

    def test_row_4_names_of_fields_are_told_harmless(self, api: Running) -> None:
        for name in ("\x1b[31m", "x" * 10_000, "\ud800"):
            answer = api.client.post("/v1/predict", content=json.dumps({name: 1}), headers=JSON)
            problem_of(answer, 422)
            assert len(answer.content) < 500
            assert "\\u001b" not in answer.text

    def test_a_history_too_long(self, api: Running) -> None:
        assert locs(api.predict({"history": history(0, 301)})) == [["body", "history"]]
        ends = [history(n, n + 1)[0] for n in range(0, 400, 39)]
        assert locs(api.predict({"history": ends})) == [["body", "history"]]  # few records, 391 steps
        assert ok(api.predict({"history": history(0, 300)}))["count"] == 300
        assert locs(api.predict({"history": history(0, 1) * 301})) == [["body", "history"]]  # many records, one step

    def test_row_5_by_content_length(self, api: Running) -> None:
        head = (
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50001\r\n\r\n"
        )
        assert raw(api, head).startswith(b"HTTP/1.1 413 ")  # before any of the body came
        problem_of(api.client.post("/v1/predict", content=b" " * (64 << 20), headers=JSON), 413)
        locs(api.client.post("/v1/predict", content=b" " * 50_000, headers=JSON))

    def test_row_5_chunked(self, api: Running) -> None:
        sent = 0

        def body() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(1_000):
                sent += 1 << 16
                yield b" " * (1 << 16)

        problem_of(api.client.post("/v1/predict", content=body(), headers=JSON), 413)
        assert sent < 32 << 20  # what sockets hold; the server took no more than its limit

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
    def test_row_6_media_type(self, api: Running, kind: str | None) -> None:
        headers = {"content-type": kind} if kind else {}
        problem_of(api.client.post("/v1/predict", content=b'{"stream":"sensor-1"}', headers=headers), 415)
        utf8 = {"content-type": "application/json; charset=utf-8"}
        ok(api.client.post("/v1/predict", content=b'{"stream":"sensor-1"}', headers=utf8))

    def test_row_7_streams(self, api: Running) -> None:
        problem_of(api.predict({"stream": "nobody"}), 404)
        problem_of(api.predict({"stream": "nobody", "history": history(0, 3)}), 404)
        for part in ("", "/state", "/history", "/forecast"):
            problem_of(api.client.get(f"/v1/streams/nobody{part}"), 404)
        for malformed in ("", "\n", "x" * 257, "a/../b"):
            assert locs(api.predict({"stream": malformed})) == [["body", "stream"]]
            assert locs(api.client.get("/v1/events", params={"stream": malformed})) == [["query", "stream", 0]]
        assert locs(api.client.get("/v1/streams/%00")) == [["path", "stream"]]

    @pytest.mark.parametrize(
        "path", ["/nowhere", "/v1/streams/..%2f..%2fetc%2fpasswd", "/..%2fmetrics", "/docs", "/page"]
    )
    def test_row_8_paths(self, api: Running, path: str) -> None:
        problem_of(api.client.get(path), 404)

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
    def test_row_8_methods(self, api: Running, method: str) -> None:
        answer = api.client.request(method, "/v1/predict")
        problem_of(answer, 405)
        assert answer.headers["allow"] == "POST"

    @pytest.mark.parametrize(("query", "name"), BAD_PATHS.items())
    def test_row_9_parameters(self, api: Running, query: str, name: str) -> None:
        assert locs(api.client.get(f"/v1/streams{query}")) == [["query", name]]

    @pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
    def test_row_10_compressed(self, api: Running, encoding: str) -> None:
        headers = JSON | {"content-encoding": encoding}
        problem_of(api.client.post("/v1/predict", content=b"\x1f\x8b\x08", headers=headers), 415)

    def test_row_11_a_slow_body_ends(self, api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "BODY_S", 0.2)
        head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        assert raw(api, head).startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize(
        "parts", [[], [b"GET /livez HT"], [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /livez HT"]]
    )
    def test_row_11_a_slow_head_ends(self, api: Running, monkeypatch: pytest.MonkeyPatch, parts: list[bytes]) -> None:
        monkeypatch.setattr(server, "HEAD_S", 0.3)
        started = time.monotonic()
        raw(api, *parts)
        assert time.monotonic() - started < 5

    def test_an_upgrade_that_nobody_offers_is_passed_over(self, api: Running) -> None:
        """As Java's client asks for HTTP/2 with its first request."""
        ask = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        post = b"POST /v1/predict HTTP/1.1\r\n" + ask + b"Content-Type: application/json\r\nContent-Length: 21\r\n\r\n"
        get = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        for first in (b"GET /livez HTTP/1.1\r\n" + ask + b"\r\n", post + b'{"stream":"sensor-1"}'):
            assert raw(api, first, get).count(b"HTTP/1.1 200 ") == 2

    def test_row_13_while_restoring(self, start: Start) -> None:
        api = start()
        api.feed([record("a", time_at(0), 1.0)])
        api.worker.unready = "partitions are being restored"
        for answer in (api.client.get("/readyz"), api.predict({"stream": "b"}), api.client.get("/v1/streams/b/state")):
            problem_of(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        assert ok(api.predict({"history": history(0, 3)}))["count"] == 3
        assert ok(api.predict({"stream": "a"}))["count"] == 1
        assert ok(api.client.get("/livez")) == {"status": "alive"}
        api.worker.alive = False
        problem_of(api.client.get("/livez"), 503)

    def test_row_14_a_fault_inside(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        api = start()
        api.feed([record("a", time_at(0), 1.0)])
        api.engine.history.keys = []  # so that /history cannot pair them with what was forecast
        api.feed([record("a", time_at(1), 1.0)])
        answer = api.client.get("/v1/streams/a/history")
        detail = problem_of(answer, 500)["detail"]
        error_id = detail.split()[-1]
        assert len(error_id) == 32
        assert error_id in caplog.text
        assert "Traceback" in caplog.text
        assert "Error" not in answer.text.replace("Server Error", "")
        ok(api.client.get("/livez"))

    @pytest.mark.parametrize(
        "request_",
        [
            b"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
            b"".join((b"GET /livez HTTP/1.1\r\nHost: x\r\n", *(b"X%d: y\r\n" % n for n in range(5_000)), b"\r\n")),
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 5_000,
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;x=" + b"y" * 50_000,
            b"GET /livez HTTP/1.1\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            b"BREW /livez HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
        ],
    )
    def test_row_15_broken_http(self, api: Running, request_: bytes) -> None:
        assert raw(api, request_).startswith(b"HTTP/1.1 400 ")
        ok(api.client.get("/livez"))


def connect(api: Running) -> socket.socket:
    host, port = api.server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def raw(api: Running, *parts: bytes) -> bytes:
    """What comes back, until the server closes, for bytes sent as they are; 0.1 s between parts."""
    received = b""
    with connect(api) as connection, suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
            time.sleep(0.1 if len(parts) > 1 else 0)
        while part := connection.recv(65_536):
            received += part
    return received


def test_an_answer_comes_in_one_piece(api: Running) -> None:
    """Its head and its body each by itself would be sent, and received, twice."""
    body = b'{"stream": "%s"}' % EXAMPLE_STREAM.encode()
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with connect(api) as connection:
        for asked in range(1, 4):
            connection.sendall(head % len(body) + body)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
            assert segments(connection) == asked


def segments(connection: socket.socket) -> int:
    """How many pieces of data came in: tcpi_data_segs_in of Linux's tcp_info."""
    return int(struct.unpack_from("I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 152)[0])


LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(EXAMPLE_STREAM)
    | st.just(EXAMPLE_TS_MS)
)
ANY = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
OBSERVATION = st.fixed_dictionaries(
    {"ts": st.integers(EXAMPLE_TS_MS, EXAMPLE_TS_MS + 10**9) | ANY, "value": st.floats(-1e15, 1e15) | st.none() | ANY},
    optional={"covariates": st.just({}) | ANY},
)
BODY = ANY | st.fixed_dictionaries(
    {},
    optional={
        "stream": st.sampled_from(STREAMS) | ANY,
        "history": st.lists(OBSERVATION, max_size=4) | ANY,
        "horizon": st.integers(1, 9) | ANY,
        "quantiles": st.lists(st.sampled_from([0.1, 0.5, 0.9])) | ANY,
    },
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(body=BODY)
def test_no_body_is_too_strange(api: Running, body: Any) -> None:
    answer = api.client.post("/v1/predict", content=json.dumps(body), headers=JSON)
    if answer.status_code == 200:
        assert np.isfinite(numbers(answer.json())).all()
    else:
        assert answer.status_code in (404, 422)
        problem_of(answer, answer.status_code)


def spec_of(api: Running) -> dict[str, Any]:
    spec: dict[str, Any] = ok(api.client.get("/openapi.json"))
    return spec


def check_against_schema(api: Running, method: str, path: str, answer: httpx.Response) -> None:
    """Fails unless the answer is what the description of its route declares."""
    spec = spec_of(api)
    declared = spec["paths"][path][method]["responses"][str(answer.status_code)]["content"]
    media_type = answer.headers["content-type"].split(";")[0]
    schema = {**declared[media_type]["schema"], "components": spec["components"]}
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(answer.json() if "json" in media_type else answer.text)


class TestDescription:
    def test_every_example_runs_and_is_answered_as_declared(self, api: Running) -> None:
        ran = []
        for path, methods in spec_of(api)["paths"].items():
            for method, operation in methods.items():
                if path == "/v1/events":
                    continue
                url = path
                for parameter in operation.get("parameters", []):
                    if parameter["in"] == "path":
                        url = url.replace("{" + parameter["name"] + "}", parameter["schema"]["examples"][0])
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                bodies = [example["value"] for example in content.get("examples", {"": {"value": None}}).values()]
                for body in bodies:
                    answer = api.client.request(method, url, json=body) if body else api.client.request(method, url)
                    assert answer.status_code == 200, (path, body, answer.text)
                    check_against_schema(api, method, path, answer)
                    ran.append(path)
        assert len(ran) == 12, ran
        assert ran.count("/v1/predict") == 3

    def test_errors_are_as_declared(self, api: Running) -> None:
        check_against_schema(api, "post", "/v1/predict", api.predict({}))
        check_against_schema(api, "post", "/v1/predict", api.predict({"stream": "nobody"}))
        check_against_schema(api, "post", "/v1/predict", api.client.post("/v1/predict", content=b"{}"))
        check_against_schema(api, "get", "/v1/streams/{stream}", api.client.get("/v1/streams/nobody"))

    def test_everything_says_what_it_is(self, api: Running) -> None:
        spec = spec_of(api)
        for path, methods in spec["paths"].items():
            for operation in methods.values():
                assert operation["summary"], path
                assert operation["description"], path
                assert "HTTPValidationError" not in json.dumps(operation), path
                for parameter in operation.get("parameters", []):
                    assert parameter["description"], (path, parameter["name"])
        for name, schema in spec["components"]["schemas"].items():
            for field, described in schema.get("properties", {}).items():
                assert "description" in described, (name, field)


class TestEvents:
    def test_forecasts_arrive_as_they_were_written(self, start: Start) -> None:
        api = start()
        with api.client.stream("GET", "/v1/events", params={"stream": ["a", "b/c"]}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            wait_for_readers(api, 1)
            for n in range(3):
                api.feed([record(stream, time_at(n), float(n)) for stream in ("a", "z", "b/c")])
            events = list(read_events(answer, 6))
        written = [o.value.decode() for o in api.published if o.key in (b"a", b"b/c")]
        assert [event["data"] for event in events] == written
        assert [event["id"] for event in events] == list("123456")
        assert {event["event"] for event in events} == {"forecast"}
        wait_for_readers(api, 0)

    def test_without_streams_all_are_meant(self, start: Start) -> None:
        api = start()
        with api.client.stream("GET", "/v1/events") as answer:
            wait_for_readers(api, 1)
            keyless = record("b", time_at(0), 1.0)
            value = json.dumps({"stream": "b", "ts": time_at(0), "value": 1.0}).encode()
            api.feed([record("a", time_at(0), 1.0), type(keyless)("t", 0, 0, time_at(0), None, value)])
            assert [json.loads(event["data"])["stream"] for event in read_events(answer, 2)] == ["a", "b"]

    def test_a_slow_reader_loses_the_oldest(self, start: Start) -> None:
        api = start()
        with api.client.stream("GET", "/v1/events") as answer:
            wait_for_readers(api, 1)
            api.feed([record(f"s{n}", time_at(0), float(n)) for n in range(QUEUE_MAX + 100)])
            events = list(read_events(answer, QUEUE_MAX))
        assert [int(event["id"]) for event in events] == list(range(101, QUEUE_MAX + 101))
        assert float(metric(api, "carousel_events_dropped_total")) == 100

    def test_readers_are_bounded_and_leave(self, start: Start) -> None:
        api = start()
        readers = [connect(api) for _ in range(READERS_MAX)]
        for reader in readers:
            reader.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for_readers(api, READERS_MAX)
        answer = api.client.get("/v1/events")
        problem_of(answer, 503)
        assert "retry-after" in answer.headers
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # some just vanish
            reader.close()
        wait_for_readers(api, 0)

    def test_a_comment_comes_when_nothing_else_does(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("service.events.SILENCE_S", 0.1)
        api = start()
        with api.client.stream("GET", "/v1/events") as answer:
            assert next(answer.iter_lines()).startswith(":")

    def test_stopping_ends_them(self, start: Start) -> None:
        api = start()
        ended = threading.Event()

        def read() -> None:
            with httpx.stream("GET", f"{api.server.url}/v1/events", timeout=20) as answer:
                list(answer.iter_lines())
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        wait_for_readers(api, 1)
        started = time.monotonic()
        api.server.stop()
        assert time.monotonic() - started < 3
        assert ended.wait(3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{api.server.url}/livez")


def wait_for_readers(api: Running, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(api.hub._readers) != count:
        assert time.monotonic() < deadline, f"{len(api.hub._readers)} readers, not {count}"
        time.sleep(0.01)


def read_events(answer: httpx.Response, count: int) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in answer.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
            continue
        if event:
            yield event
            event, count = {}, count - 1
        if not count:
            return


def metric(api: Running, sample: str) -> str:
    lines = api.client.get("/metrics").text.splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == sample]
    return value


class TestOperations:
    def test_metrics_are_the_engines_and_the_apis(self, start: Start) -> None:
        api = start()
        api.feed([record("a/b", time_at(0), 1.0)])
        for path in ("/v1/streams/a/b", "/v1/streams/a/b", "/v1/streams/c", "/x", "/y"):
            api.client.get(path)
        api.client.request("TRACE", "/v1/streams/a")
        answer = api.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert float(metric(api, "carousel_active_streams")) == 1
        count = "http_request_duration_seconds_count"
        stream = 'handler="/v1/streams/{stream:path}"'
        assert float(metric(api, f'{count}{{{stream},method="GET",status="200"}}')) == 2
        assert float(metric(api, f'{count}{{{stream},method="GET",status="404"}}')) == 1
        assert float(metric(api, f'{count}{{{stream},method="other",status="405"}}')) == 1
        assert float(metric(api, f'{count}{{handler="none",method="GET",status="404"}}')) == 2
        assert "a/b" not in answer.text
        openmetrics = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert api.client.get("/metrics", headers=openmetrics).text.endswith("# EOF\n")

    def test_a_scrape_does_not_grow_with_the_streams(self, start: Start) -> None:
        """20 of them are watched, the most that can be."""
        config = ModelConfig(grid=Grid(HOUR_MS), horizon=1, quantiles=(0.1, 0.5, 0.9), hidden_size=2, layers=1)
        watched = ",".join(f"s{n}" for n in range(20))
        api = start(config, watched_streams=watched, history_steps=1, max_streams=100_000)

        def scraped(streams: int) -> list[str]:
            """The samples that there are, their values left out."""
            for hour in (0, 1):
                api.engine.process([record(f"s{n}", time_at(hour), 1.0) for n in range(streams)])
            api.engine.watch(frozenset({0}))
            text = api.client.get("/metrics").text
            assert len(text) < 200_000
            assert f"carousel_active_streams {float(streams)}" in text
            return [line.rpartition(" ")[0] for line in text.splitlines()]

        api.client.get("/metrics")  # that it was asked for is itself a sample
        assert scraped(1_000) == scraped(100_000)

    def test_the_model_is_told(self, api: Running) -> None:
        told = ok(api.client.get("/v1/model"))
        assert told["id"] == api.engine.bundle.model_id
        assert (told["step_ms"], told["season"], told["horizon"]) == (HOUR_MS, 6, 8)
        assert told["scores"] == {"carousel": {"mase": 1.0, "wql": None}}

    def test_a_taken_port_is_one_clear_line(self, api: Running) -> None:
        port = int(api.server.url.rpartition(":")[2])
        with pytest.raises(ServiceError, match=f"port {port} .* --http-port") as caught:
            HttpServer(Settings(model=Path("unused"), http_port=port))
        assert "\n" not in str(caught.value)

    def test_a_strange_host_is_one_clear_line(self) -> None:
        with pytest.raises(ServiceError, match="--http-host"):
            HttpServer(Settings(model=Path("unused"), http_host="203.0.113.7", http_port=0))

    def test_answers_do_not_wait_for_acknowledgements(self, api: Running) -> None:
        """Without TCP_NODELAY each would take 40 ms."""
        times = []
        for _ in range(20):
            started = time.perf_counter()
            ok(api.client.get("/livez"))
            times.append(time.perf_counter() - started)
        assert sorted(times)[5] < 0.03
