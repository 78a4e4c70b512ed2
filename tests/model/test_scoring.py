"""Scores against numbers worked out by hand, and live ones against a plain loop."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import Forecast
from model.scoring import FORGET_STEPS, LiveScores, Scores, Settled, covered, middle, open_forecasts, score
from model.state import Rows
from tests.model import block_of, part_of, random_forecaster

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

LIVE = ModelConfig(season=3, horizon=4, quantiles=(0.2, 0.5, 0.9), hidden_size=8)


def settle(state: Rows, values: list[float]) -> Settled:
    """Settle what stands open in `state` with one value a stream."""
    nothing = Forecast(
        torch.zeros(len(values), 1, LIVE.horizon),
        torch.ones(len(values), 1),
        torch.zeros(len(values), 1, LIVE.horizon, 3),
    )
    column = torch.tensor(values).double()[:, None]
    return LiveScores(LIVE).settle(state, column, open_forecasts(state, nothing))


def zero_scores(streams: int) -> Rows:
    return {spec.name: torch.zeros(streams, *spec.shape, dtype=spec.dtype) for spec in LiveScores(LIVE).schema}


def test_live_scores_are_the_loop_they_stand_for() -> None:
    """Step by step as the worker does it: settle what stood open, then advance."""
    random = np.random.default_rng(0)
    series = random.normal(10, 2, size=(3, 80))
    series[random.random(series.shape) < 0.2] = NAN
    series[2, :30] = NAN
    forecaster, live = random_forecaster(LIVE), LiveScores(LIVE)
    state = forecaster.initial_state(3) | zero_scores(3)
    sums = [dict.fromkeys(("scored", "pinball", "absolute_error", "naive_error", "hits"), 0.0) for _ in range(3)]
    waits = [[NAN] * 3 for _ in range(3)]
    filled: list[list[float]] = [[NAN] * LIVE.season for _ in range(3)]
    ever_scored = 0
    for step in range(series.shape[1]):
        values = torch.from_numpy(series[:, [step]])
        forecast, after = forecaster.advance(state, block_of(values))
        settled = live.settle(state, values, open_forecasts(state, forecast))
        for stream, value in enumerate(series[:, step].tolist()):
            low, median, high = waits[stream]
            naive = filled[stream][-LIVE.season]
            counts = step >= LIVE.warmup and not math.isnan(value) and not math.isnan(naive)
            assert settled.scored[stream, 0].item() == counts
            assert settled.hit[stream, 0].item() == (counts and low <= value <= high)
            if counts:
                ever_scored += 1
                now = {
                    "scored": 1.0,
                    "pinball": np.mean(
                        [
                            2 * max(level * (value - forecast), (level - 1) * (value - forecast))
                            for level, forecast in zip(LIVE.quantiles, (low, median, high), strict=True)
                        ]
                    ),
                    "absolute_error": abs(value - median),
                    "naive_error": abs(value - naive),
                    "hits": float(low <= value <= high),
                }
                for name, total in sums[stream].items():
                    sums[stream][name] = total * (1 - 1 / FORGET_STEPS) + now[name]
            for name, total in sums[stream].items():
                assert settled.rows[name][stream].item() == pytest.approx(total, rel=1e-9, abs=1e-12), name
            filled[stream].append(naive if math.isnan(value) else value)
        state = after | settled.rows
        waits = forecast.values[:, 0, 0].tolist()
    assert ever_scored > 100


@pytest.mark.parametrize(("seed", "cut"), [(0, 1), (1, 20), (2, 40), (3, 79)])
def test_many_steps_are_scored_at_once_as_one_by_one(seed: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    series = random.normal(10, 2, size=(3, 80))
    series[random.random(series.shape) < 0.2] = NAN
    forecaster, live = random_forecaster(LIVE), LiveScores(LIVE)

    whole = block_of(torch.from_numpy(series))

    def scored(cuts: list[int]) -> Rows:
        state = forecaster.initial_state(3) | zero_scores(3)
        for start, stop in pairwise([0, *cuts, 80]):
            block = part_of(whole, start, stop)
            forecast, after = forecaster.advance(state, block)
            state = after | live.settle(state, block.values, open_forecasts(state, forecast)).rows
        return state

    at_once, one_by_one = scored([cut]), scored(list(range(1, 80)))
    assert one_by_one["scored"].min() > 10
    for name in zero_scores(1):
        torch.testing.assert_close(at_once[name], one_by_one[name], rtol=1e-4, atol=1e-4, msg=name)


def waiting(steps: list[int]) -> Rows:
    """Streams that have seen 1, 2, 3, 1, 2, 3 ... and forecast 4, 5 and 9 for the next step."""
    streams = len(steps)
    return zero_scores(streams) | {
        "steps": torch.tensor(steps),
        "values": torch.tensor([1.0, 2.0, 3.0]).double().repeat(11)[:32].expand(streams, 32),
        "base": torch.full((streams, LIVE.horizon), 3.0).double(),
        "scale": torch.full((streams,), 2.0).double(),
        "offsets": torch.tensor([0.5, 1.0, 3.0]).expand(streams, LIVE.horizon, 3),
    }


def test_an_observation_settles_the_forecast_that_waits_for_it() -> None:
    state = waiting([LIVE.warmup, LIVE.warmup])
    settled = settle(state, [6.0, 10.0])
    assert settled.scored.tolist() == [[True], [True]]
    assert settled.hit.tolist() == [[True], [False]]
    assert settled.rows["hits"].tolist() == pytest.approx([1.0, 0.0])
    assert settled.rows["absolute_error"].tolist() == pytest.approx([1.0, 5.0])
    naive = state["values"][0, -3].item()
    assert settled.rows["naive_error"].tolist() == pytest.approx([6 - naive, 10 - naive])
    assert settled.rows["pinball"][0].item() == pytest.approx(2 * (0.2 * 2 + 0.5 * 1 + 0.1 * 3) / 3)


def test_a_missing_value_settles_nothing() -> None:
    state = waiting([100])
    state |= {name: torch.full_like(rows, 3.0) for name, rows in zero_scores(1).items()}
    settled = settle(state, [NAN])
    assert not settled.scored.any()
    assert not settled.hit.any()
    assert all(rows.tolist() == [3.0] for rows in settled.rows.values())


def test_a_stream_that_warms_up_is_not_scored() -> None:
    settled = settle(waiting([0, LIVE.warmup - 1, LIVE.warmup]), [5.0] * 3)
    assert settled.scored.tolist() == [[False], [False], [True]]
    assert settled.rows["scored"].tolist() == pytest.approx([0.0, 0.0, 1.0])
