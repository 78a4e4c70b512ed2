"""The regression is fitted to what series share and how they differ, and takes part where that is of use."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.network import Forecaster
from tests.training.synthetic import HOUR_MS, config, series
from training.backtest import CAROUSEL, backtest
from training.regression import RANK, fit_regression, rank_of
from training.series import Series
from training.windows import Split

SPLIT = Split(test=80, validation=80)


def of_its_own_map(coefficient: float, number: int, steps: int = 600) -> Series:
    """y_t = c y_{t-8} + noise: for each series another c."""
    random = np.random.default_rng(number)
    y = random.normal(size=steps)
    for step in range(8, steps):
        y[step] += coefficient * y[step - 8]
    return Series(f"s{number}", 0, HOUR_MS * np.arange(steps), y, np.empty((steps, 0)))


def table() -> list[Series]:
    return [of_its_own_map(c, k) for k, c in enumerate((0.95, 0.5, 0.0, -0.5, -0.95))]


def untrained(rank: int) -> Forecaster:
    torch.manual_seed(0)
    return Forecaster(config(rank=rank))


def loss(forecaster: Forecaster, many: Sequence[Series]) -> float:
    return backtest(forecaster, many, [SPLIT.test_start(len(each.y)) for each in many]).scores()[CAROUSEL].wql


def test_it_takes_part_where_each_series_follows_a_map_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    forecaster = untrained(rank=2)
    before = loss(forecaster, table())
    with caplog.at_level(logging.INFO, "training"):
        share = fit_regression(forecaster, table(), SPLIT, seed=0)
    assert forecaster.regression.share == pytest.approx(share)
    assert share > 0
    assert loss(forecaster, table()) < 0.95 * before
    assert f"share of the regression: {share:.1f}; validation loss by share" in caplog.text
    together = untrained(rank=0)
    fit_regression(together, table(), SPLIT, seed=0)
    for each in (forecaster, together):
        each.regression.share.fill_(1)
    assert loss(forecaster, table()) < 0.95 * loss(together, table()), "one map for all is not enough"


def test_its_spread_is_that_of_what_it_misses() -> None:
    forecaster = untrained(rank=2)
    fit_regression(forecaster, table(), SPLIT, seed=0)
    forecaster.regression.share.fill_(1)
    scores = backtest(forecaster, table(), [SPLIT.test_start(600)] * 5).scores()[CAROUSEL]
    assert 0.7 < scores.coverage < 0.85, "0.8 between the outermost quantiles"


def test_the_test_part_changes_nothing() -> None:
    spoiled = [dataclasses.replace(each, y=np.where(np.arange(600) < 520, each.y, 1e6)) for each in table()]
    clean, poisoned = untrained(rank=2), untrained(rank=2)
    assert fit_regression(clean, table(), SPLIT, seed=0) == fit_regression(poisoned, spoiled, SPLIT, seed=0)
    for name, tensor in clean.state_dict().items():
        assert torch.equal(tensor, poisoned.state_dict()[name]), name


def test_the_share_is_chosen_where_the_regression_was_not_fitted() -> None:
    """Series that swing against their season and then repeat it: what fits the part before is of no use after."""
    swings = [of_its_own_map(-0.95, number) for number in range(3)]
    turned = []
    for each in swings:
        y, stop = each.y.copy(), SPLIT.fit_stop(600)
        y[stop:] = np.resize(y[stop - 8 : stop], 600 - stop)
        turned.append(dataclasses.replace(each, y=y))
    assert fit_regression(untrained(rank=0), swings, SPLIT, seed=0) > 0.5
    assert fit_regression(untrained(rank=0), turned, SPLIT, seed=0) == 0


@pytest.mark.parametrize("many", [[], [series(70)], [series(40), series(60, 1)]])
def test_of_too_little_nothing_is_fitted(many: list[Series]) -> None:
    forecaster = untrained(rank=1)
    assert fit_regression(forecaster, many, SPLIT, seed=0) == 0
    assert forecaster.regression.share == 0


def test_short_and_gappy_series_do_no_harm() -> None:
    gappy = [
        dataclasses.replace(each, y=np.where(np.arange(600) % 7 == k, np.nan, each.y)) for k, each in enumerate(table())
    ]
    gappy[0].y[:300] = np.nan
    forecaster = untrained(rank=3)
    fit_regression(forecaster, [*gappy, series(20), series(1, 1)], SPLIT, seed=0)
    assert all(tensor.isfinite().all() for tensor in forecaster.state_dict().values())
    assert forecaster.regression.maps[:, 1:].abs().sum((0, 2)).gt(0).all()


def test_so_many_directions_as_long_series_less_one() -> None:
    shape = config()
    assert [rank_of(shape, [500] * count) for count in (0, 1, 2, 5, 100)] == [0, 0, 1, 4, RANK]
    assert rank_of(shape, [500, 500, 71]) == 1
