"""A backtest forecasts as the service would, scores it beside the seasonal naive, and writes it down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.follow import Follower
from model.network import Forecaster
from tests.training.synthetic import SEASON, forecaster, series
from training import backtest as backtest_module
from training.backtest import CAROUSEL, NAIVE, RAW, Backtest, backtest
from training.series import Series
from training.table import TableError
from training.windows import block_of, cut

LENGTHS = (90, 61, 90, 33)
LAST = 20


def table() -> list[Series]:
    made = [series(length, seed) for seed, length in enumerate(LENGTHS)]
    made[0].y[40:44] = math.nan
    made[1].y[-12] = math.nan
    return made


def starts(many: Sequence[Series], last: int = LAST) -> list[int]:
    return [len(each.y) - last for each in many]


@pytest.fixture
def model() -> Forecaster:
    return forecaster()


def rows_of(result: Backtest, name: str) -> torch.Tensor:
    return (result.of == result.ids.index(name)).nonzero()[:, 0]


def live(model: Forecaster, each: Series, *, raw: bool = False) -> list[torch.Tensor]:
    """The forecasts [H, Q] of a stream fed one observation at a time, as they stand open after each of them."""
    follower = Follower(model)
    state, forecasts = follower.schema.initial(1), []
    for step in range(len(each.y)):
        state = follower.advance(state, block_of([cut(each, step, step + 1)])).rows
        forecasts.append(follower.standing(state, raw=raw).values[0])
    return forecasts


def test_forecasts_are_those_of_a_stream_fed_one_by_one(model: Forecaster) -> None:
    many = table()
    result = backtest(model, many, starts(many), every=3)
    for each in many:
        forecasts, raw = live(model, each), live(model, each, raw=True)
        rows = rows_of(result, each.unique_id)
        assert len(rows) >= 5
        for row in rows:
            step = int(np.flatnonzero(each.ts_ms == result.origin_ms[row].item())[0])
            torch.testing.assert_close(result.quantiles[CAROUSEL][row], forecasts[step], rtol=0, atol=1e-4)
            torch.testing.assert_close(result.quantiles[RAW][row], raw[step], rtol=0, atol=1e-4)
            np.testing.assert_array_equal(result.truth[row].numpy(), each.y[step + 1 : step + 5])


@pytest.mark.parametrize(("block", "group"), [(40, 512), (4_000_000, 1), (700, 3)])
def test_memory_bounds_change_no_forecast(
    block: int, group: int, model: Forecaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = table()
    at_once = backtest(model, many, starts(many), every=1)
    monkeypatch.setattr(backtest_module, "BLOCK_NUMBERS", block)
    monkeypatch.setattr(backtest_module, "GROUP_STREAMS", group)
    in_pieces = backtest(model, many, starts(many), every=1)
    for method in (CAROUSEL, RAW, NAIVE):
        torch.testing.assert_close(in_pieces.quantiles[method], at_once.quantiles[method], rtol=0, atol=1e-4)
    assert torch.equal(in_pieces.origin_ms, at_once.origin_ms)


@pytest.mark.parametrize("every", [1, 3])
def test_origins_run_from_the_last_step_known_to_the_last_with_all_truths(every: int, model: Forecaster) -> None:
    one = series(90)
    result = backtest(model, [one], [70], every)
    assert result.origin_ms.tolist() == one.ts_ms[69:86:every].tolist()
    assert not result.truth.isnan().any()


def test_no_forecast_is_issued_where_nothing_was_observed(model: Forecaster) -> None:
    one = series(90)
    one.y[75] = math.nan
    result = backtest(model, [one], [70], 1)
    assert one.ts_ms[75] not in result.origin_ms.tolist()
    assert len(result.of) == 16
    assert int(result.truth.isnan().sum()) == 4, "and as a truth it is unknown to the four origins before"
    assert result.scores()[CAROUSEL].count == 16 * 4 - 4


def test_without_a_stride_as_many_origins_as_fit(model: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(backtest(model, [series(90)], [70]).of) == 17
    monkeypatch.setattr(backtest_module, "NUMBERS_MAX", 17 * 4 * 3 // 2)
    assert len(backtest(model, [series(90)], [70]).of) == 9


def test_the_seasonal_naive_repeats_the_last_season_with_the_spread_of_its_history(model: Forecaster) -> None:
    one = series(90)
    result = backtest(model, [one], [70], every=5)
    misses = one.y[SEASON:70] - one.y[: 70 - SEASON]
    for row, step in enumerate(range(69, 86, 5)):
        point = one.y[step + 1 - SEASON : step + 5 - SEASON]
        expected = point[:, None] + np.quantile(misses, (0.1, 0.5, 0.9))
        np.testing.assert_allclose(result.quantiles[NAIVE][row].numpy(), expected)
    assert result.naive_mae.unique().item() == pytest.approx(np.abs(misses).mean())


def test_beyond_a_season_the_naive_spread_is_that_of_two() -> None:
    one = series(90)
    result = backtest(forecaster(horizon=12), [one], [70], every=50)
    spread = result.quantiles[NAIVE][0] - torch.from_numpy(one.y[[*range(62, 70), *range(62, 66)]])[:, None]
    for ahead, lag in ((7, SEASON), (8, 2 * SEASON)):
        np.testing.assert_allclose(spread[ahead], np.quantile(one.y[lag:70] - one.y[: 70 - lag], (0.1, 0.5, 0.9)))


def test_what_is_forecast_sets_no_scale(model: Forecaster) -> None:
    one, other = series(90), series(90)
    other.y[70:] *= 100
    clean, changed = (backtest(model, [each], [70], every=50) for each in (one, other))
    assert torch.equal(clean.naive_mae, changed.naive_mae)
    assert torch.equal(clean.quantiles[NAIVE][0], changed.quantiles[NAIVE][0])


def test_some_of_the_origins_are_a_backtest_too(model: Forecaster) -> None:
    many = table()
    whole = backtest(model, many, starts(many), every=3)
    rows = rows_of(whole, many[2].unique_id)
    part = whole.at(rows)
    assert list(part.ids) == [many[2].unique_id]
    assert part.of.tolist() == [0] * len(rows)
    assert torch.equal(part.origin_ms, whole.origin_ms[rows])
    for method in (CAROUSEL, NAIVE):
        assert torch.equal(part.quantiles[method], whole.quantiles[method][rows])
    assert part.scores()[CAROUSEL].count == len(rows) * 4


def test_forecasts_are_written_as_a_long_table(model: Forecaster, tmp_path: Path) -> None:
    many = table()
    result = backtest(model, many, starts(many), every=4)
    result.write_forecasts(tmp_path / "forecasts.parquet")
    frame = pd.read_parquet(tmp_path / "forecasts.parquet")
    assert list(frame.columns) == ["unique_id", "origin", "step", "y", "q0.1", "q0.5", "q0.9"]
    assert len(frame) == len(result.of) * 4
    assert str(frame.origin.dtype).startswith("datetime64")
    assert frame.origin.dt.tz is None
    each = many[1]
    first = frame[frame.unique_id == each.unique_id].iloc[:4]
    assert first.step.tolist() == [1, 2, 3, 4]
    start = len(each.y) - LAST
    assert (first.origin == pd.Timestamp(each.ts_ms[start - 1], unit="ms")).all()
    np.testing.assert_array_equal(first.y, each.y[start : start + 4])
    np.testing.assert_allclose(first[["q0.1", "q0.5", "q0.9"]], live(model, each)[start - 1].numpy(), atol=1e-4)


def test_a_series_broken_in_two_is_scored_as_one(model: Forecaster) -> None:
    whole = series(180, name="a")
    parts = [cut(whole, 0, 90), cut(whole, 90, 180)]
    result = backtest(model, parts, starts(parts), every=1)
    assert result.ids == ["a"]
    assert set(result.of.tolist()) == {0}


def test_nothing_to_forecast_is_said_in_one_line(model: Forecaster) -> None:
    with pytest.raises(TableError, match=r"no series holds 4 steps .* the longest has 90 in all") as caught:
        backtest(model, [series(90)], [88], 1)
    assert "\n" not in str(caught.value)


def test_one_series_of_constants_has_no_mase_but_a_forecast(model: Forecaster) -> None:
    flat = dataclasses.replace(series(90), y=np.full(90, 5.0))
    result = backtest(model, [flat], [70], 1)
    assert result.quantiles[CAROUSEL].isfinite().all()
    assert math.isnan(result.scores()[CAROUSEL].mase)
