"""Records in, forecasts out: every stream as if it were alone, whatever the others do."""

from __future__ import annotations

import json
import math
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import Bundle, load_bundle
from model.features import Block
from model.follow import Follower
from model.grid import Grid
from model.network import Forecaster
from service.engine import Engine
from service.errors import ServiceError
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.settings import Settings
from tests.served import HOUR_MS, START_MS, random_bundle

DAY_MS = 24 * HOUR_MS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(random_bundle(tmp_path_factory.mktemp("bundle"), max_gap=50))


def engine_of(bundle: Bundle, **changed: Any) -> Engine:
    return Engine(bundle, Settings.load({"model": "unused"} | changed), Metrics())


def record(stream: str, ts_ms: int, value: float | None, partition: int = 0, offset: int = 0) -> Record:
    body = json.dumps({"ts": ts_ms, "value": value}).encode()
    return Record("carousel.observations", partition, offset, START_MS + 10_000 * HOUR_MS, stream.encode(), body)


def hourly(stream: str, values: dict[int, float | None], partition: int = 0) -> list[Record]:
    """The observations of a stream: hour -> value."""
    return [record(stream, START_MS + hour * HOUR_MS, value, partition) for hour, value in values.items()]


def forecasts(outgoing: list[Outgoing]) -> list[dict[str, Any]]:
    return [json.loads(o.value) for o in outgoing if o.topic == "carousel.forecasts"]


def quantiles(forecast: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array(list(forecast["quantiles"].values())).T


def at_once(forecaster: Forecaster, values: dict[int, float | None]) -> tuple[np.ndarray[Any, Any], float]:
    """The forecast after the last hour, from one pass over the whole series, and its scale."""
    hours = list(values)
    series = torch.full((1, hours[-1] - hours[0] + 1), math.nan, dtype=torch.float64)
    for hour, value in values.items():
        series[0, hour - hours[0]] = math.nan if value is None else value
    ts_ms = START_MS + HOUR_MS * torch.arange(hours[0], hours[-1] + 1)[None]
    block = Block(series, ts_ms, torch.zeros(*series.shape, 0, dtype=torch.float64))
    follower = Follower(forecaster)
    forecast = follower.standing(follower.advance(follower.schema.initial(1), block).rows)
    return forecast.values[0].numpy(), float(forecast.scale[0])


def some_series(seed: int) -> dict[int, float | None]:
    """A series with gaps and missing values, of any level and size."""
    random = np.random.default_rng(seed)
    hours = np.cumsum(random.choice([1] * 20 + [2, 3, 9, 51], size=random.integers(1, 70))).tolist()
    level, size = [(0, 1), (100, 5), (1e9, 1), (-3, 1e-6), (1e6, 1e5), (7, 0)][random.integers(6)]
    values = (level + size * random.standard_normal(len(hours))).tolist()
    return {h: None if random.random() < 0.1 else v for h, v in zip(hours, values, strict=True)}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
def test_each_forecast_is_that_of_one_pass_over_the_whole_series(bundle: Bundle, seed: int, count: int) -> None:
    series, order = {f"s{n}": some_series(seed + n) for n in range(count)}, Random(seed)
    engine = engine_of(bundle, max_wave_rows=3)
    left = {name: hourly(name, values) for name, values in series.items()}
    last: dict[str, dict[str, Any]] = {}
    while any(left.values()):  # polls of any size, of streams in any order
        poll = []
        for name in order.sample(sorted(left), len(left)):
            some = order.randint(0, len(left[name]))
            poll += left[name][:some]
            left[name] = left[name][some:]
        for forecast in forecasts(engine.process(poll)):
            last[forecast["stream"]] = forecast
    for name, values in series.items():
        expected, scale = at_once(bundle.forecaster, values)
        assert np.abs(quantiles(last[name]) - expected).max() <= 1e-4 * scale
        assert last[name]["count"] == len(values)
        assert last[name]["observed"] == pytest.approx(list(values.values())[-1])


def test_a_stream_among_999_others_is_forecast_as_if_alone(bundle: Bundle) -> None:
    mine = hourly("mine", {hour: 10.0 + hour % 24 for hour in range(40)})
    alone = forecasts(engine_of(bundle).process(mine))
    crowd = engine_of(bundle)
    random = np.random.default_rng(1)
    among = []
    for hour in range(40):
        poll = [*hourly("mine", {hour: 10.0 + hour % 24})]
        poll += [r for n in range(999) for r in hourly(f"s{n}", {hour: float(random.normal(n, 1))})]
        random.shuffle(poll)  # type: ignore[arg-type]
        among += [f for f in forecasts(crowd.process(poll)) if f["stream"] == "mine"]
    assert len(among) == len(alone) == 40
    for one, other in zip(alone, among, strict=True):
        np.testing.assert_allclose(quantiles(one), quantiles(other), atol=1e-4 * 6)


def test_a_forecast_says_all_that_its_reader_needs(bundle: Bundle) -> None:
    forecast = forecasts(engine_of(bundle).process(hourly("a/b", {0: 5.0, 1: None})))[-1]
    assert set(forecast) == {
        "stream", "ts", "slot", "step_ms", "model", "count", "observed", "anomaly", "quantiles", "status",
    }  # fmt: skip
    assert (forecast["stream"], forecast["ts"], forecast["step_ms"]) == ("a/b", START_MS + HOUR_MS, HOUR_MS)
    assert forecast["slot"] * HOUR_MS == forecast["ts"]
    assert (forecast["model"], forecast["count"], forecast["observed"]) == (bundle.model_id, 2, None)
    assert {name: len(values) for name, values in forecast["quantiles"].items()} == {"0.1": 6, "0.5": 6, "0.9": 6}
    assert (np.diff(quantiles(forecast)) >= 0).all()


def test_a_stream_is_warming_for_two_seasons_and_live_after(bundle: Bundle) -> None:
    said = forecasts(engine_of(bundle).process(hourly("a", dict.fromkeys(range(60), 1.0))))
    assert [f["status"] for f in said] == ["warming"] * 47 + ["live"] * 13


def test_duplicate_and_late_observations_change_nothing_and_are_counted(bundle: Bundle) -> None:
    plain, disturbed = engine_of(bundle), engine_of(bundle)
    values = {hour: float(hour % 7) for hour in range(30)}
    expected = forecasts(plain.process(hourly("a", values)))
    records = hourly("a", values)
    doubled = [copy for r in records for copy in (r, r)] + records[:5]
    assert forecasts(disturbed.process(doubled)) == expected
    assert disturbed.metrics.observations["duplicate"]._value.get() == 30
    assert disturbed.metrics.observations["late"]._value.get() == 5
    rows = torch.tensor([0])
    for name, tensor in plain.arena.gather(rows).items():
        assert torch.equal(tensor.nan_to_num(), disturbed.arena.gather(rows)[name].nan_to_num()), name


def test_after_a_gap_too_long_the_stream_starts_afresh(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    engine.process(hourly("a", dict.fromkeys(range(60), 50.0)))
    again = forecasts(engine.process(hourly("a", {111: 3.0})))[0]
    new = forecasts(engine_of(bundle).process(hourly("a", {111: 3.0})))[0]
    assert again == new
    assert engine.metrics.restarted._value.get() == 1


def test_gaps_of_all_lengths_in_one_wave_are_bridged_together(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    series = {f"s{gap}": {0: 1.0, 1: 2.0, 1 + gap: 3.0} for gap in range(1, 51)}
    for n in range(3):
        poll = [hourly(name, values)[n] for name, values in series.items()]
        last = forecasts(engine.process(poll))
    assert engine.metrics.bridged._value.get() == sum(range(50))
    for forecast in last:
        expected, scale = at_once(bundle.forecaster, series[forecast["stream"]])
        assert np.abs(quantiles(forecast) - expected).max() <= 1e-4 * scale


def test_many_observations_of_few_streams_go_some_steps_at_a_time_and_are_forecast_as_one_by_one(
    bundle: Bundle,
) -> None:
    at_once, one_by_one = engine_of(bundle), engine_of(bundle)
    records = hourly("a", {hour: float(hour % 24) for hour in range(200) if hour % 50 < 45})
    records += hourly("b", {0: 1.0, 60: 2.0, 61: None, 200: 4.0})
    together, alone = forecasts(at_once.process(records)), []
    for one in records:
        alone += forecasts(one_by_one.process([one]))
    steps = "carousel_step_duration_seconds_count"
    assert at_once.metrics.registry.get_sample_value(steps) < len(records) / 4  # type: ignore[operator]
    for told in (together, alone):
        told.sort(key=lambda forecast: (forecast["stream"], forecast["ts"]))
    assert [f["count"] for f in together] == [f["count"] for f in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(quantiles(one), quantiles(other), atol=1e-3)
    for name in ("bridged", "restarted"):
        assert getattr(at_once.metrics, name)._value.get() == getattr(one_by_one.metrics, name)._value.get() > 0


def test_garbage_among_the_records_disturbs_nobody(bundle: Bundle) -> None:
    clean, dirty = engine_of(bundle), engine_of(bundle)
    good = hourly("a", {hour: float(hour) for hour in range(20)})
    bad = [Record("carousel.observations", 0, n, START_MS, b"a", b"garbage") for n in range(20)]
    outgoing = dirty.process([r for pair in zip(good, bad, strict=True) for r in pair])
    assert forecasts(outgoing) == forecasts(clean.process(good))
    assert [o.value for o in outgoing if o.topic == "carousel.observations.dlq"] == [b"garbage"] * 20
    assert len(dirty.arena) == 1


def test_a_tombstone_ends_the_stream_between_its_neighbours(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    end = Record("carousel.observations", 0, 0, START_MS, b"a", None)
    said = forecasts(engine.process([*hourly("a", {0: 1.0, 1: 2.0}), end, *hourly("a", {2: 3.0})]))
    assert [f["count"] for f in said] == [1, 2, 1]
    engine.process([end])
    assert len(engine.arena) == 0


def test_one_stream_more_than_the_limit_becomes_a_dead_letter(bundle: Bundle) -> None:
    engine = engine_of(bundle, max_streams=2)
    outgoing = engine.process([r for name in "abc" for r in hourly(name, {0: 1.0})])
    assert [f["stream"] for f in forecasts(outgoing)] == ["a", "b"]
    reasons = [dict(o.headers)["carousel.errors.reason"] for o in outgoing if o.topic == "carousel.observations.dlq"]
    assert reasons == [b"limit"]
    assert len(forecasts(engine.process(hourly("a", {1: 1.0})))) == 1


def test_a_time_in_a_hole_of_the_grid_becomes_a_dead_letter_and_makes_no_stream(tmp_path: Path) -> None:
    weekdays = Grid(DAY_MS, period=7, phases=(0, 1, 4, 5, 6))
    engine = engine_of(load_bundle(random_bundle(tmp_path, grid=weekdays, season=5)))
    saturday = next(d for d in range(START_MS // DAY_MS, START_MS // DAY_MS + 7) if d % 7 == 2)
    outgoing = engine.process([record("a", saturday * DAY_MS, 1.0)])
    assert dict(outgoing[0].headers)["carousel.errors.reason"] == b"time"
    assert len(engine.arena) == 0
    friday, monday = (saturday - 1) * DAY_MS, (saturday + 2) * DAY_MS
    said = forecasts(engine.process([record("a", friday, 1.0), record("a", monday, 2.0)]))
    assert said[1]["slot"] == said[0]["slot"] + 1


def test_without_a_clock_each_observation_is_one_step(tmp_path: Path) -> None:
    engine = engine_of(load_bundle(random_bundle(tmp_path, grid=None, season=1)))
    said = forecasts(engine.process([record("a", START_MS + n * n * 1000, float(n)) for n in range(10)]))
    assert [f["slot"] for f in said] == list(range(10))
    assert {f["step_ms"] for f in said} == {None}


def test_covariates_reach_the_model_and_may_be_missing(tmp_path: Path) -> None:
    bundle = load_bundle(random_bundle(tmp_path, covariates=("wind", "sun")))
    results = []
    for covariates in ({"wind": 1.0, "sun": 0.5}, {"sun": 0.5, "wind": 1.0}, {"wind": 1.0}, {}):
        body = json.dumps({"ts": START_MS, "value": 1.0, "covariates": covariates}).encode()
        said = engine_of(bundle).process([Record("carousel.observations", 0, 0, START_MS, b"a", body)])
        results.append(forecasts(said)[0]["quantiles"])
    assert results[0] == results[1]
    assert results[0] != results[2] != results[3]


def test_values_as_large_as_accepted_leave_the_state_finite(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    values = {hour: (-1.0) ** hour * 1e15 if hour % 5 == 0 else 1e-15 for hour in range(80)}
    said = forecasts(engine.process(hourly("a", values)))
    assert all(np.isfinite(quantiles(f)).all() for f in said)


def test_a_model_whose_forecasts_kafka_could_not_carry_is_refused_at_start(tmp_path: Path) -> None:
    quantiles = tuple(n / 100 for n in range(1, 100))
    bundle = load_bundle(random_bundle(tmp_path, horizon=1024, quantiles=quantiles))
    with pytest.raises(ServiceError, match="1024 x 99"):
        engine_of(bundle)


def test_streams_of_lost_partitions_are_forgotten(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    engine.process(hourly("a", {0: 1.0}, partition=0) + hourly("b", {0: 1.0}, partition=1))
    engine.forget_partitions([0])
    assert [key.stream for key in engine.arena] == ["b"]


def test_live_scores_tell_how_good_the_open_forecasts_were(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    random = np.random.default_rng(3)
    values = {hour: float(10 + 5 * math.sin(hour / 4) + random.normal()) for hour in range(300)}
    said = forecasts(engine.process(hourly("a", values)))
    scores = engine.arena.gather(torch.tensor([0]))["scores"][0]
    for line, ahead in enumerate(engine.follower.horizons):
        hours = range(47 + ahead, 300)
        errors = [abs(values[hour] - said[hour - ahead]["quantiles"]["0.5"][ahead - 1]) for hour in hours]
        naive = [abs(values[hour] - values[hour - 24]) for hour in hours]
        weights = (1 - 1 / 500) ** np.arange(len(hours) - 1, -1, -1)
        scored, _, absolute_error, naive_error, _ = scores[line].tolist()
        assert scored == pytest.approx(weights.sum())
        assert absolute_error == pytest.approx(np.dot(weights, errors), rel=1e-4)
        assert naive_error == pytest.approx(np.dot(weights, naive), rel=1e-9)
        told = {"horizon": str(ahead)}
        found = engine.metrics.registry.get_sample_value
        assert found("carousel_intervals_scored_total", {**told, "level": "0.8"}) == len(hours)
        assert found("carousel_forecast_error_total", told) == pytest.approx(sum(errors), rel=1e-4)
        assert found("carousel_forecast_naive_error_total", told) == pytest.approx(sum(naive))


def test_each_observation_is_told_how_odd_it_was(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    random = np.random.default_rng(4)
    values: dict[int, float | None] = {hour: float(10 + random.normal()) for hour in range(200)}
    values |= {150: None, 180: 1_000.0}
    said = [forecast["anomaly"] for forecast in forecasts(engine.process(hourly("a", values)))]
    assert said[:48] == [None] * 48, "while warming nobody can say"
    assert said[150] is None
    known = np.array([said[hour] for hour in range(48, 180) if hour != 150])
    assert (known >= 0).all()
    assert said[180] > 3 > np.quantile(known, 0.9)
    found = engine.metrics.registry.get_sample_value
    assert found("carousel_anomaly_score_count") == 200 - 48 - 1
    assert found("carousel_anomaly_score_sum") == pytest.approx(sum(s for s in said if s is not None), abs=0.1)


def test_calibration_can_be_switched_off(bundle: Bundle) -> None:
    records = hourly("a", {hour: float(10 + hour % 24 + hour % 7) for hour in range(120)})
    on, off = (forecasts(engine_of(bundle, intervals=each).process(records)) for each in ("calibrated", "raw"))
    for one, other in zip(on[:48], off[:48], strict=True):
        assert one["quantiles"] == other["quantiles"], "it learns from warm streams' forecasts only"
    assert on[-1]["quantiles"]["0.5"] == off[-1]["quantiles"]["0.5"]
    assert on[-1]["quantiles"]["0.9"] != off[-1]["quantiles"]["0.9"]


def test_the_compiled_step_tells_what_the_plain_one_tells(tmp_path: Path) -> None:
    bundle = load_bundle(random_bundle(tmp_path, covariates=("wind",), max_gap=50))
    compiled, plain = engine_of(bundle), engine_of(bundle, compiled=False)
    assert compiled.compiled is not None, "numba is not installed"
    assert plain.compiled is None
    random, series = np.random.default_rng(8), [[*some_series(seed).items()] for seed in range(40)]
    for n in range(70):
        poll = []
        for name, values in enumerate(series):
            for hour, value in values[n : n + 1]:
                body = {"ts": START_MS + hour * HOUR_MS, "value": value, "covariates": {"wind": float(random.normal())}}
                poll.append(msgspec.structs.replace(record(f"s{name}", 0, 0.0), value=json.dumps(body).encode()))
        said = (sorted(forecasts(engine.process(poll)), key=itemgetter("stream")) for engine in (compiled, plain))
        for one, other in zip(*said, strict=True):
            scale = float(plain.arena.tensors["scale"][plain.arena.streams(0)[other["stream"]]])
            np.testing.assert_allclose(quantiles(one), quantiles(other), atol=1e-4 * scale, rtol=1e-12)
            assert one["anomaly"] == pytest.approx(other["anomaly"], abs=0.02)
            told = [{**fields, "quantiles": None, "anomaly": None} for fields in (one, other)]
            assert told[0] == told[1]
    assert compiled.metrics.registry.get_sample_value("carousel_anomaly_score_count") == pytest.approx(
        plain.metrics.registry.get_sample_value("carousel_anomaly_score_count") or 0
    )


def test_nobody_waits_for_a_stream_that_catches_up(bundle: Bundle) -> None:
    """Forecasts go out piece by piece; where few have much to catch up with, the others' come first."""
    engine = engine_of(bundle, max_wave_rows=100)
    late = hourly("late", dict.fromkeys(range(2_000), 1.0))
    others = [one for n in range(300) for one in hourly(f"s{n}", {0: 1.0})]
    pieces = [[each["stream"] for each in forecasts([*some])] for some in engine.answers([*late, *others])]
    told = [streams for streams in pieces if streams]
    assert len(told) >= 20
    assert {f"s{n}" for n in range(300)} <= {stream for streams in told[:4] for stream in streams}


def test_whoever_looks_between_two_passes_sees_a_stream_as_far_in_time_as_in_steps(bundle: Bundle) -> None:
    engine, seen = engine_of(bundle, max_wave_rows=4), set[int]()
    steps, slots = engine.arena.column("steps"), engine.arena.column("slot")
    for _ in engine.answers(hourly("a", dict.fromkeys([0, 3, 9, 10, 30], 1.0))):
        row = engine.arena.streams(0)["a"]
        if steps[row]:
            assert slots[row] == START_MS // HOUR_MS + steps[row] - 1
            seen.add(int(steps[row]))
    assert {4, 8, 12, 16, 31} <= seen, "passes end among missing steps"


def test_of_each_stream_only_the_latest_forecast_of_a_commit_may_be_written(bundle: Bundle) -> None:
    """The states are as exact: the next forecasts are those of an engine that writes every one."""
    every, latest = engine_of(bundle), engine_of(bundle, emit="latest")
    end = Record("carousel.observations", 0, 0, START_MS, b"c", None)
    random = np.random.default_rng(6)
    for first in (0, 40):
        poll = [r for hour in range(first, first + 40) for r in hourly("a", {hour: float(random.normal())})]
        poll += (
            hourly("b", {first: 1.0, first + 1: 2.0}) + hourly("c", {first: 1.0}) + [end] + hourly("c", {first: 1.0})
        )
        whole = {forecast["stream"]: forecast for forecast in forecasts(every.process(poll))}  # the last one counts
        assert sorted(forecasts(latest.process(poll)), key=lambda f: str(f["stream"])) == [
            whole[name] for name in "abc"
        ]
        assert (
            latest.metrics.observations["observed"]._value.get() == every.metrics.observations["observed"]._value.get()
        )


def test_what_is_written_of_a_forecast_is_a_setting(bundle: Bundle) -> None:
    records = hourly("a", {hour: 10.0 + hour % 24 for hour in range(5)})
    whole = forecasts(engine_of(bundle).process(records))[-1]["quantiles"]
    engine = engine_of(bundle, emit_quantiles=[0.5], emit_horizons=[1, 6], emit_decimals=1)
    told = forecasts(engine.process(records))[-1]
    assert (told["horizons"], list(told["quantiles"])) == ([1, 6], ["0.5"])
    assert told["quantiles"]["0.5"] == pytest.approx([whole["0.5"][0], whole["0.5"][5]], abs=0.0501)
    with pytest.raises(ServiceError, match=r"emit_quantiles.*0\.1, 0\.5, 0\.9"):
        engine_of(bundle, emit_quantiles=[0.3])


def test_a_replay_passes_over_what_a_stream_has_behind_it(bundle: Bundle) -> None:
    """Snapshots are of different ages: of a younger one, the replay meets records that are in it already."""
    end = Record("carousel.observations", 0, 2, START_MS, b"a", None)
    for covered, left in ((6, ["a"]), (2, [])):
        engine = engine_of(bundle)
        engine.process(hourly("a", dict.fromkeys(range(6), 1.0)))
        engine.commit({0: 6})
        engine.partition(0).replay([])
        engine.replay(0, [end], lambda _stream, covered=covered: covered)  # type: ignore[misc]
        assert list(engine.arena.streams(0)) == left


def numbered(records: list[Record]) -> list[Record]:
    return [msgspec.structs.replace(r, offset=offset) for offset, r in enumerate(records)]


@pytest.mark.parametrize("clock", [True, False])
def test_a_replay_many_steps_at_a_time_leads_to_the_states_of_the_first_time(tmp_path: Path, clock: bool) -> None:
    bundle = load_bundle(random_bundle(tmp_path, covariates=("wind",), max_gap=50, **({} if clock else {"grid": None})))
    random, records = np.random.default_rng(5), []
    for n in range(8):
        for hour, value in some_series(n).items():
            body = {"ts": START_MS + hour * HOUR_MS, "value": value, "covariates": {"wind": float(random.normal())}}
            records.append(msgspec.structs.replace(record(f"s{n}", 0, 0.0), value=json.dumps(body).encode()))
    records += hourly("s3", dict.fromkeys(range(200, 500), 2.0)) + hourly("s3", {600: 1.0, 601: None, 605: 2.0})
    records = numbered(records)
    first, second = engine_of(bundle, max_poll_records=7), engine_of(bundle)
    for n in range(0, len(records), 7):
        first.process(records[n : n + 7])
        first.commit({0: n + 7})
    second.partition(0).replay([])
    for some in (records[:90], records[90:]):
        second.replay(0, some, lambda _stream: -1)
    rows = [torch.tensor(list(engine.arena.streams(0).values())) for engine in (first, second)]
    one, other = (engine.arena.gather(index) for engine, index in zip((first, second), rows, strict=True))
    assert list(first.arena.streams(0)) == list(second.arena.streams(0))
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor.double(), other[name].double(), rtol=1e-3, atol=1e-3, equal_nan=True, msg=name
        )
