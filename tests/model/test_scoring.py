"""Scores against numbers worked out by hand, and live ones against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.scoring import FORGET_STEPS, LiveScores, Scores, Settled, covered, middle, score

NAN = math.nan
THREE = ModelConfig(quantiles=(0.1, 0.5, 0.9))


def score_of(forecast: list[list[float]], truth: list[float], naive_mae: list[float]) -> Scores:
    return score(
        torch.tensor(forecast, dtype=torch.float64),
        torch.tensor(truth, dtype=torch.float64),
        torch.tensor(naive_mae, dtype=torch.float64),
        THREE,
    )


def test_scores_by_hand() -> None:
    """Losses of truth 11: 0.3, 0.5, 0.1; of truth -9: 0.1, 2.0, 1.7 (all doubled in wql)."""
    scores = score_of([[8, 10, 12], [-10, -5, 8]], [11, -9], [2, 8])
    assert scores.count == 2
    assert scores.wql == pytest.approx((2 * 0.4 / 20 + 2 * 2.5 / 20 + 2 * 1.8 / 20) / 3)
    assert scores.mase == pytest.approx((1 / 2 + 4 / 8) / 2)
    assert scores.coverage == 1


def test_a_truth_on_the_edge_is_covered_and_one_beyond_is_not() -> None:
    forecast = torch.tensor([[8.0, 10.0, 12.0]]).expand(5, 3)
    truth = torch.tensor([8.0, 12.0, 7.9, 12.1, NAN])
    assert covered(forecast, truth).tolist() == [True, True, False, False, False]
    assert score_of([[8, 10, 12]] * 4, truth[:4].tolist(), [1] * 4).coverage == 0.5


def test_unknown_truths_are_not_scored() -> None:
    assert score_of([[8, 10, 12], [0, 1, 2]], [11, NAN], [2, 2]) == score_of([[8, 10, 12]], [11], [2])


def test_a_naive_error_of_zero_or_unknown_scales_nothing() -> None:
    """A constant history has no naive error; dividing by it would drown all other series."""
    scores = score_of([[8, 10, 12]] * 3, [11, 13, 14], [2, 0, NAN])
    assert scores.count == 3
    assert scores.mase == 0.5


def test_nothing_scored_is_nan_and_not_an_error() -> None:
    scores = score_of([[8, 10, 12]], [NAN], [2])
    assert scores.count == 0
    assert math.isnan(scores.wql)
    assert math.isnan(scores.mase)
    assert math.isnan(scores.coverage)


@pytest.mark.parametrize(
    ("quantiles", "index"), [((0.1, 0.5, 0.9), 1), ((0.05, 0.45, 0.6), 1), ((0.7, 0.9), 0), ((0.1, 0.3), 1)]
)
def test_the_middle_is_the_quantile_nearest_the_median(quantiles: tuple[float, ...], index: int) -> None:
    assert middle(ModelConfig(quantiles=quantiles)) == index


# --- Live ------------------------------------------------------------------------------------------------------------
# The scores of a stream that is followed, beside a plain loop, are in test_follow.

OPENED = torch.tensor([4.0, 5.0, 9.0])
"""What had been forecast one step ahead and two; naively, 3."""


def settle(before: Tensor, values: list[float], counts: list[list[bool]]) -> Settled:
    """One stream's scores [2, 5] after these values, whose forecasts count or not for each of two horizons."""
    live = LiveScores(THREE, horizons=2)
    opened = OPENED.double().expand(1, len(values), 2, 3)
    naive = torch.full((1, len(values), 2), 3.0).double()
    return live.settle({"scores": before[None]}, torch.tensor([values]).double(), opened, naive, torch.tensor([counts]))


def test_an_observation_settles_the_forecasts_that_waited_for_it() -> None:
    settled = settle(torch.zeros(2, 5).double(), [6.0], [[True, False]])
    pinball = 2 * (0.1 * 2 + 0.5 * 1 + 0.1 * 3) / 3
    assert settled.rows["scores"][0, 0].tolist() == pytest.approx([1, pinball, 1, 3, 1])
    assert settled.rows["scores"][0, 1].tolist() == [0] * 5
    torch.testing.assert_close(settled.scores[:, 0], settled.rows["scores"])


def test_scores_forget_only_where_something_is_scored() -> None:
    before = torch.full((2, 5), 10.0).double()
    settled = settle(before, [10.0, NAN, 10.0], [[True, True], [False, False], [True, False]])
    keep = 1 - 1 / FORGET_STEPS
    assert settled.rows["scores"][0, :, 0].tolist() == pytest.approx([(10 * keep + 1) * keep + 1, 10 * keep + 1])
    assert settled.rows["scores"][0, 0, -1].item() == pytest.approx(10 * keep**2), "10 lies beyond"
    assert settled.scores[0, 1].tolist() == [[0] * 5] * 2
