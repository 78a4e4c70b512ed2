"""Intervals hold what they say, also after the series has changed and the model has not."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from model.calibration import LIMIT, Calibration
from model.config import ModelConfig
from model.network import Forecast
from model.state import Rows, Schema
from model.waiting import Waiting
from tests.model import seeded

CONFIG = ModelConfig(season=24, horizon=24, hidden_size=8)
WEEK = 168
LENGTH, CHANGE = 3_000, 1_500
NORMAL = torch.tensor([NormalDist().inv_cdf(level) for level in CONFIG.quantiles])


# --- A model that was right once, and a series that changes -----------------------------------------------------------


def changed(kind: str, seed: int) -> NDArray[np.float64]:
    """Noise of variance 1 about a level of 100 that changes at `CHANGE`."""
    noise = np.random.default_rng(seed).normal(size=LENGTH)
    after = np.arange(LENGTH) >= CHANGE
    if kind == "level":
        return 100 + noise + 5 * after
    return 100 + noise * np.where(after, {"variance x 4": 2.0, "variance / 4": 0.5}[kind], 1.0)


def forecasts(y: NDArray[np.float64]) -> Forecast:
    """What a model of such noise says after each step: the mean of the last day or so, normal quantiles about it."""
    mean = np.empty(LENGTH)
    level = y[0]
    for step, value in enumerate(y):
        level += (value - level) / 24
        mean[step] = level
    base = torch.from_numpy(mean)[None, :, None].expand(1, LENGTH, CONFIG.horizon)
    return Forecast(base, torch.ones(1, LENGTH).double(), NORMAL.expand(1, LENGTH, CONFIG.horizon, -1))


@dataclass
class Outcome:
    """stretch [T, K, 2] of the forecasts issued, and whether they held their truths, [origins, H]."""

    stretch: Tensor
    hits: NDArray[np.bool_]
    raw_hits: NDArray[np.bool_]


def outcome(y: NDArray[np.float64]) -> Outcome:
    waiting, calibration, forecast = Waiting(CONFIG), Calibration(CONFIG), forecasts(y)
    state: Rows = Schema((*waiting.schema, *calibration.schema)).initial(1)
    base, offsets, _ = waiting.pass_on(state, forecast)
    values = torch.from_numpy(y)[None, :, None]
    counts = torch.arange(LENGTH)[:, None] - torch.tensor(waiting.horizons) >= CONFIG.warmup
    tracked = calibration.track(state, values - base, offsets, counts[None])
    ahead = torch.from_numpy(y)[1:].unfold(0, CONFIG.horizon, 1)
    raw, issued = (
        each.values[0, : len(ahead)] for each in (forecast, calibration.calibrated(forecast, tracked.issued))
    )
    return Outcome(tracked.issued[0], *(((q[..., 0] <= ahead) & (ahead <= q[..., -1])).numpy() for q in (issued, raw)))


def worst_week(hits: NDArray[np.bool_], first: int) -> float:
    """How far from 80 % the coverage of a rolling week comes, after step `first`. hits [T]."""
    return float(np.abs(np.convolve(hits[first:], np.ones(WEEK) / WEEK, "valid") - 0.8).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["level", "variance x 4", "variance / 4"])
def test_after_a_change_every_week_holds_80_percent_within_4_points_where_the_raw_one_does_not(
    kind: str, seed: int
) -> None:
    found = outcome(changed(kind, seed))
    assert worst_week(found.hits[:, 0], CHANGE) <= 0.04
    assert worst_week(found.raw_hits[:, 0], CHANGE) > 0.09


def test_longer_horizons_follow_a_change_of_variance_too() -> None:
    """Their truths come late, so not within 4 points; but the raw forecasts never come near."""
    found = outcome(changed("variance x 4", 0))
    settled = slice(CHANGE + 3 * 24, None)
    assert found.hits[settled].mean() == pytest.approx(0.8, abs=0.02)
    assert found.raw_hits[settled].mean() < 0.5
    assert worst_week(found.hits.mean(1), CHANGE) < 0.15 < 0.3 < worst_week(found.raw_hits.mean(1), CHANGE)


def test_where_forecasts_were_right_they_stay_nearly_as_they_are() -> None:
    stretch = outcome(changed("level", 5)).stretch[WEEK:CHANGE]
    assert stretch.mean((0, 2)).abs().max() < 0.15
    assert stretch[:, -1].std() < 0.15


# --- The recursion, by hand -------------------------------------------------------------------------------------------

SMALL = ModelConfig(horizon=2, quantiles=(0.1, 0.5, 0.9))


def tracked(missed: list[list[float]], config: ModelConfig = SMALL, *, on: bool = True) -> tuple[Tensor, Rows]:
    """s as issued [T, K, 2] after truths that missed the base by so much, where forecasts were -1, 0, 1 about it."""
    calibration = Calibration(config, on=on)
    state: Rows = Schema(calibration.schema).initial(1)
    values = torch.tensor(missed).double()[None]
    offsets = torch.linspace(-1, 1, len(config.quantiles)).expand(*values.shape, -1)
    found = calibration.track(state, values.nan_to_num(0.0), offsets, ~values.isnan())
    return found.issued[0], found.rows


def test_a_truth_beyond_widens_its_side_and_one_inside_narrows_a_little() -> None:
    _, rows = tracked([[5.0, 0.0]])
    (one, two) = rows["stretch"][0].tolist()
    assert one == pytest.approx([-0.5 * 0.1, 0.5 * 0.9])
    assert two == pytest.approx([-0.5 * 0.1 / 2**1.25] * 2), "horizon 2 learns by its own truths, and more slowly"


def test_a_rough_step_widens_all_horizons_at_once() -> None:
    (issued, _), (calm, _) = tracked([[3.0, 0.0]]), tracked([[0.62, 0.0]])
    assert issued[0, 1].min() > calm[0, 1].max()
    assert calm[0, 1].abs().max() < 0.05, "an error of the usual size is neither rough nor smooth"


def test_an_absurd_reading_widens_no_more_than_a_great_one() -> None:
    assert torch.equal(tracked([[1e12, 0.0]])[0], tracked([[4.0, 0.0]])[0])


def test_missing_values_teach_nothing() -> None:
    rows = tracked([[5.0, 2.0]])[1]
    with_gaps = tracked([[5.0, float("nan")], [float("nan"), 2.0], [float("nan"), float("nan")]])[1]
    for name in ("stretch", "roughness"):
        torch.testing.assert_close(with_gaps[name], rows[name], msg=name)


def test_s_stays_bounded_where_a_series_stands_still_or_breaks_out() -> None:
    for missed in (0.0, 1e9):
        issued, rows = tracked([[missed, missed]] * 800)
        assert issued.isfinite().all()
        assert rows["stretch"].abs().max() <= LIMIT


def test_a_side_without_quantiles_is_left_alone() -> None:
    rows = tracked([[-5.0, -5.0]] * 5, ModelConfig(horizon=2, quantiles=(0.5, 0.9)))[1]
    assert (rows["stretch"][..., 0] == 0).all()
    assert (rows["stretch"][..., 1] < 0).all()


@pytest.mark.parametrize("levels", [(0.5,), (0.025, 0.1, 0.5, 0.9, 0.975), (0.01, 0.5, 0.99)])
def test_tracked_are_the_quantiles_nearest_to_the_80_percent_interval(levels: tuple[float, ...]) -> None:
    calibration = Calibration(ModelConfig(quantiles=levels))
    low, high = (levels[q] for q in calibration.outer)
    assert (low, high) == {1: (0.5, 0.5), 5: (0.1, 0.9), 3: (0.01, 0.99)}[len(levels)]


def test_switched_off_it_changes_nothing() -> None:
    issued, rows = tracked([[5.0, 2.0]] * 20, on=False)
    assert (issued == 0).all()
    assert (rows["stretch"] == 0).all()


@seeded(40)
@given(st.integers(1, 40), st.integers(0, 2**16))
def test_quantiles_keep_their_order_and_horizons_between_lie_between(horizon: int, seed: int) -> None:
    config = ModelConfig(horizon=horizon)
    calibration, random = Calibration(config), torch.Generator().manual_seed(seed)
    offsets = torch.randn(3, horizon, 9, generator=random).sort(dim=-1).values
    s = torch.randn(3, len(calibration.horizons), 2, generator=random)
    issued = calibration.calibrated(Forecast(torch.zeros(3, horizon), torch.ones(3), offsets), s)
    assert (issued.offsets.diff(dim=-1) >= 0).all()
    assert torch.equal(issued.offsets[..., 4], offsets[..., 4]), "the median is as it was"
    stretch = torch.einsum("hk,bks->bhs", calibration.weights, s)
    torch.testing.assert_close(stretch[:, torch.tensor(calibration.horizons) - 1], s)
    assert (stretch <= s.amax(1, keepdim=True) + 1e-6).all()
    assert (stretch >= s.amin(1, keepdim=True) - 1e-6).all()
