"""Measures of a backtest: right by hand, the same however they are added up, and honest about how sure they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.grid import Grid
from tests.training.synthetic import HOUR_MS
from training.backtest import CAROUSEL, NAIVE, Backtest
from training.measures import (
    ERRORS,
    by_series,
    by_step,
    differences,
    overall,
    reliability,
    resampled_units,
)

NINE = tuple(round(0.1 * k, 1) for k in range(1, 10))


def made(
    series: int,
    origins: int,
    *,
    horizon: int = 4,
    quantiles: tuple[float, ...] = NINE,
    errors: float = 1.0,
    seed: int = 0,
    **forecasts: Tensor,
) -> Backtest:
    """Truths of noise about 10, and forecasts that err as widely; a fifth of the truths unknown."""
    random = np.random.default_rng(seed)
    shape = (series * origins, horizon)
    truth = 10 + random.normal(size=shape)
    truth[random.random(shape) < 0.2] = math.nan
    point = 10 + errors * random.normal(size=(*shape, 1))
    spread = torch.linspace(-1.3, 1.3, len(quantiles), dtype=torch.float64)
    of = torch.arange(series).repeat_interleave(origins)
    return Backtest(
        config=ModelConfig(grid=Grid(HOUR_MS), season=4, horizon=horizon, quantiles=quantiles),
        ids=[f"s{k}" for k in range(series)],
        of=of,
        origin_ms=torch.arange(origins).repeat(series) * HOUR_MS,
        truth=torch.from_numpy(truth),
        quantiles={
            CAROUSEL: torch.from_numpy(point) + spread,
            NAIVE: torch.from_numpy(10 + random.normal(size=(*shape, 1))) + 2 * spread,
            **forecasts,
        },
        naive_mae=1.0 + of.double(),
        naive_rmse=2.0 + of.double(),
    )


def test_they_agree_with_the_scores_that_a_bundle_keeps() -> None:
    result = made(3, 20)
    for method, row in overall(result).items():
        kept = result.scores()[method]
        assert int(row.count) == kept.count
        assert float(row.wql) == pytest.approx(kept.wql)
        assert float(row.mase) == pytest.approx(kept.mase)
        assert float(row.coverage[0.8]) == pytest.approx(kept.coverage)


def test_by_hand() -> None:
    result = made(1, 1, horizon=2, quantiles=(0.1, 0.5, 0.9))
    forecast = torch.tensor([[[8.0, 10.0, 12.0], [6.0, 10.0, 14.0]]], dtype=torch.float64)
    result.truth[:] = torch.tensor([11.0, 15.0])
    result.quantiles[CAROUSEL][:] = forecast
    result.naive_mae[:], result.naive_rmse[:] = 2.0, 3.0
    row = overall(result)[CAROUSEL]
    pinball = 2 * np.array([[0.3, 0.5, 0.1], [0.9, 2.5, 0.9]])
    assert float(row.wql) == pytest.approx(pinball.mean(1).sum() / 26)
    assert float(row.sql) == pytest.approx(pinball.mean() / 2)
    assert float(row.mase) == pytest.approx((1 + 5) / 2 / 2)
    assert float(row.rmsse) == pytest.approx(math.sqrt((1 + 25) / 2) / 3)
    assert float(row.coverage[0.8]) == 0.5
    assert float(row.width[0.8]) == (4 + 8) / 2 / 2


def test_an_interval_between_the_quantiles_is_interpolated_and_beyond_them_left_out() -> None:
    result = made(1, 1, horizon=1, quantiles=(0.2, 0.3, 0.7, 0.8))
    result.quantiles[CAROUSEL][:] = torch.tensor([2.0, 4.0, 8.0, 10.0])
    for truth, within in ((2.9, 0), (3.1, 1), (8.9, 1), (9.1, 0)):
        result.truth[:] = truth
        row = overall(result)[CAROUSEL]
        assert float(row.coverage[0.5]) == within
        assert float(row.width[0.5]) == pytest.approx(6.0)
        assert set(row.coverage) == {0.5}, "of 80% and 95% these quantiles say nothing"


def test_an_unknown_truth_counts_nowhere() -> None:
    result, spoiled = made(6, 10), made(6, 10)
    for quantiles in spoiled.quantiles.values():
        quantiles[spoiled.truth.isnan()] = 1e9
    for method in result.quantiles:
        clean, other = overall(result)[method], overall(spoiled)[method]
        assert all(torch.equal(getattr(clean, name), getattr(other, name)) for name in ("count", *ERRORS))
        assert clean.coverage == other.coverage
        assert clean.width == other.width
        assert torch.equal(reliability(result)[method], reliability(spoiled)[method])
    assert differences(result) == differences(spoiled)


def test_a_series_that_never_changed_sets_no_scale() -> None:
    result = made(2, 10)
    result.naive_mae[10:], result.naive_rmse[10:] = 0.0, math.nan
    whole, alone = overall(result)[CAROUSEL], overall(result.at(torch.arange(10)))[CAROUSEL]
    for name in ("sql", "mase", "rmsse"):
        assert getattr(whole, name) == getattr(alone, name)
    assert by_series(result)[CAROUSEL].mase[1].isnan()


def test_parts_add_up_to_the_whole() -> None:
    result = made(5, 20)
    whole = overall(result)[CAROUSEL]
    for parts, length in ((by_step(result)[CAROUSEL], 4), (by_series(result)[CAROUSEL], 5)):
        assert parts.count.shape == (length,)
        assert parts.count.sum() == whole.count
        for each, total in ((parts.mase, whole.mase), (parts.coverage[0.5], whole.coverage[0.5])):
            assert float((each * parts.count).sum() / whole.count) == pytest.approx(float(total))
    assert float(by_series(result)[CAROUSEL].rmsse.mean()) == pytest.approx(float(whole.rmsse))
    assert float(by_series(result)[CAROUSEL].at(2).wql) == pytest.approx(
        float(overall(result.at((result.of == 2).nonzero()[:, 0]))[CAROUSEL].wql)
    )


def test_reliability_is_the_share_of_truths_below_each_quantile() -> None:
    result = made(1, 4, horizon=1, quantiles=(0.1, 0.5, 0.9))
    result.quantiles[CAROUSEL][:] = torch.tensor([1.0, 2.0, 3.0])
    result.truth[:, 0] = torch.tensor([0.0, 1.5, 2.5, math.nan])
    assert reliability(result)[CAROUSEL].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])


# --- How sure that is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("series", [1, 8])
def test_the_bootstrap_is_paired(series: int) -> None:
    """What always is half as wrong is half as wrong in every resample, however much these differ."""
    result = made(series, 200)
    half = (result.quantiles[NAIVE] + result.truth.nan_to_num(10.0)[..., None]) / 2
    found = differences(made(series, 200, **{CAROUSEL: half}))[NAIVE]
    for name in ERRORS:
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((-0.5, -0.5, -0.5))


def test_a_difference_that_is_chance_is_not_called_sure() -> None:
    equal = differences(made(12, 20))[NAIVE]["mase"]
    assert equal.low < 0 < equal.high
    worse = differences(made(12, 20, errors=2.0))[NAIVE]["mase"]
    assert 0 < worse.low < worse.value < worse.high


def test_series_are_drawn_whole() -> None:
    """Twelve series of which one alone differs: it is in 65% of the resamples, so the interval reaches from nothing."""
    result = made(12, 20)
    result.quantiles[CAROUSEL][:] = result.quantiles[NAIVE]
    result.quantiles[CAROUSEL][result.of == 3] += 5.0
    found = differences(result)[NAIVE]["wql"]
    assert found.low == 0.0
    assert found.high > 1.8 * found.value
    assert resampled_units(result) == "12 series"


def test_of_one_series_blocks_are_drawn_that_hold_overlapping_forecasts_together() -> None:
    result = made(1, 80)  # a block: two horizons of four origins
    assert resampled_units(result) == "10 blocks of origins"
    result.quantiles[CAROUSEL][:] = result.quantiles[NAIVE]
    result.quantiles[CAROUSEL][8:16] += 5.0
    assert differences(result)[NAIVE]["wql"].low == 0.0, "a third of the resamples lack that one block"
    assert differences(result)[NAIVE]["rmsse"].low == 0.0


def test_of_too_little_nothing_is_said() -> None:
    found = differences(made(1, 24))[NAIVE]["wql"]
    assert math.isfinite(found.value)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_equal_seeds_give_equal_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made(7, 10)
    assert differences(result, seed=1) == differences(result, seed=1) != differences(result, seed=2)
