"""The baselines: fitted by statsforecast, from the same origins, to no more than was known there."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from tests.training.synthetic import SEASON, config, forecaster, series
from training import baselines as module
from training.backtest import CAROUSEL, NAIVE, Backtest, backtest
from training.baselines import BaselineError, beside, fitted, parse_baselines, spread
from training.series import Series

LENGTH, START = 120, 70


def table() -> list[Series]:
    made = [series(LENGTH, 0), series(LENGTH, 1)]
    made[0].y[40:44] = math.nan
    return made


def replayed(many: list[Series]) -> Backtest:
    return backtest(forecaster(), many, [START] * len(many), every=1)


@pytest.fixture
def histories(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Keeps what each baseline is fitted to, and forecasts nought."""
    seen: list[np.ndarray] = []

    def remember(_method: str, history: np.ndarray, _config: object) -> np.ndarray:
        seen.append(history.copy())
        return np.zeros((4, 3))

    monkeypatch.setattr(module, "fitted", remember)
    return seen


def test_our_seasonal_naive_is_that_of_statsforecast() -> None:
    models = pytest.importorskip("statsforecast.models")
    one = series(LENGTH)
    result = backtest(forecaster(horizon=12), [one], [START], every=7)  # of more than a season
    median_miss = [np.median(one.y[lag:START] - one.y[: START - lag]) for lag in (SEASON, 2 * SEASON)]
    for quantiles, origin_ms in zip(result.quantiles[NAIVE], result.origin_ms.tolist(), strict=True):
        known = one.y[one.ts_ms <= origin_ms]
        point = models.SeasonalNaive(season_length=SEASON).forecast(y=known, h=12)["mean"]
        np.testing.assert_allclose(quantiles[:, 1].numpy() - np.repeat(median_miss, SEASON)[:12], point)


@pytest.mark.parametrize("method", ["AutoETS", "AutoTheta"])
def test_their_quantiles_are_the_ends_of_their_intervals(method: str) -> None:
    models = pytest.importorskip("statsforecast.models")
    history = series(100).y
    quantiles = fitted(method, history, config(quantiles=(0.1, 0.3, 0.5, 0.975)))
    options = {"model": "ZZA"} if method == "AutoETS" else {}
    theirs = getattr(models, method)(season_length=SEASON, **options).forecast(y=history, h=4, level=[40.0, 80.0, 95.0])
    assert quantiles is not None
    for number, end in enumerate(("lo-80.0", "lo-40.0", "mean", "hi-95.0")):
        np.testing.assert_allclose(quantiles[:, number], theirs[end])


def test_each_sees_exactly_what_was_known_at_its_origin(histories: list[np.ndarray]) -> None:
    many = table()
    found = beside(replayed(many), many, ["ets"], origins=30).result
    assert len(histories) == len(found.of) == 30
    last_values = sorted(float(history[-1]) for history in histories)
    origins = [
        many[int(number)].y[many[int(number)].ts_ms == int(origin)][0]
        for number, origin in zip(found.of, found.origin_ms, strict=True)
    ]
    assert last_values == sorted(map(float, origins))
    lengths = {len(history) for history in histories}
    assert lengths <= set(range(START, LENGTH)), "all that there is, where that is little"


def test_a_long_history_is_cut_and_its_gaps_are_filled(
    histories: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HISTORY_STEPS", (10, 45))
    many = table()
    beside(replayed(many), many, ["ets"], origins=8)
    assert {len(history) for history in histories} == {45}
    assert not any(np.isnan(history).any() for history in histories)


def test_all_are_compared_on_the_same_origins_in_their_order() -> None:
    pytest.importorskip("statsforecast")
    many = table()
    whole = replayed(many)
    found = beside(whole, many, ["ets", "theta"], origins=3).result
    assert list(found.quantiles) == [*whole.quantiles, "AutoETS", "AutoTheta"]
    places = [
        int(((whole.of == found.of[row]) & (whole.origin_ms == found.origin_ms[row])).nonzero()[0, 0])
        for row in range(len(found.of))
    ]
    assert places == sorted(places)
    assert torch.equal(found.quantiles[CAROUSEL], whole.quantiles[CAROUSEL][places])
    for row, place in enumerate(places):
        step = int(np.flatnonzero(many[0].ts_ms == int(found.origin_ms[row]))[0])
        history = module.without_gaps(many[int(whole.of[place])].y[: step + 1], SEASON)
        np.testing.assert_array_equal(found.quantiles["AutoTheta"][row], fitted("AutoTheta", history, whole.config))


def test_origins_are_spread_over_all_and_over_the_hours_of_the_day() -> None:
    rows = np.array(sorted(spread(24 * 100, 100)))
    assert np.array_equal(rows // 24, np.arange(100)), "one in each equal part"
    assert len(set(rows % 24)) > 12, "and not always at the same hour"
    assert max(np.diff(sorted(spread(24 * 100, 100)[:30]))) < 24 * 20, "even if it has to end early"


def test_it_ends_early_rather_than_never(histories: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", -1.0)
    many = table()
    assert len(beside(replayed(many), many, ["ets"]).result.of) == 1
    assert len(beside(replayed(many), many, ["ets"], origins=9).result.of) == 9, "unless so many were asked for"


def test_where_one_cannot_be_fitted_the_naive_stands_in_and_that_is_counted() -> None:
    pytest.importorskip("statsforecast")
    short = [series(7)]
    result = backtest(forecaster(), short, [2], every=1)
    found = beside(result, short, ["ets"])
    assert found.stood_in == {"AutoETS": len(result.of)}
    assert torch.equal(found.result.quantiles["AutoETS"], result.quantiles[NAIVE])


def test_a_flat_series_is_forecast_flat() -> None:
    pytest.importorskip("statsforecast")
    for method in ("AutoETS", "AutoTheta"):
        np.testing.assert_allclose(fitted(method, np.full(100, 5.0), config()), 5.0)


def test_options_name_what_there_is() -> None:
    pytest.importorskip("statsforecast")
    assert parse_baselines(None) == parse_baselines("naive,ets,theta") == ("ets", "theta")
    assert parse_baselines("none") == parse_baselines("naive") == ()
    with pytest.raises(BaselineError, match="arima"):
        parse_baselines("ets,arima")


def test_without_the_library_they_are_left_out_or_refused_and_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert parse_baselines(None) == ()
    assert "carousel[backtest]" in caplog.text
    with pytest.raises(BaselineError, match=r"carousel\[backtest\]"):
        parse_baselines("ets")
    assert parse_baselines("naive") == ()
