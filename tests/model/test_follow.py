"""What is served, replayed and backtested is one function: step by step or at once, alone or in a crowd."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.follow import Followed, Follower
from model.scoring import FORGET_STEPS, MEASURES
from model.state import Rows
from tests.model import block_of, part_of, random_forecaster, seeded, streams_of

CONFIG = ModelConfig(season=3, horizon=5, quantiles=(0.1, 0.2, 0.5, 0.9), hidden_size=8)
STEPS = 70


def follower(config: ModelConfig = CONFIG, *, calibrate: bool = True) -> Follower:
    return Follower(random_forecaster(config), calibrate=calibrate)


def values(seed: int, streams: int = 3, steps: int = STEPS) -> Tensor:
    """Noise about a season, with holes; the last stream begins with a long one."""
    random = np.random.default_rng(seed)
    series = 10 + 3 * np.sin(np.arange(steps) * 2 * np.pi / 3) + random.normal(size=(streams, steps))
    series[random.random(series.shape) < 0.15] = math.nan
    series[-1, 3:12] = math.nan
    return torch.from_numpy(series)


def in_parts(followed: Follower, series: Tensor, cuts: list[int]) -> tuple[list[Followed], Rows]:
    """Follow series cut at these steps. -> what each part brought, the last state."""
    whole, state = block_of(series), followed.schema.initial(len(series))
    parts = []
    edges = [0, *sorted(cuts), series.shape[1]]
    for start, stop in pairwise(edges):
        parts.append(followed.advance(state, part_of(whole, start, stop)))
        state = parts[-1].rows
    return parts, state


def assert_same(left: Rows, right: Rows) -> None:
    assert set(left) == set(right)
    for name, rows in left.items():
        torch.testing.assert_close(rows, right[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@seeded(25)
@given(st.integers(0, 1000), st.lists(st.integers(1, STEPS - 1), max_size=5, unique=True))
def test_at_once_is_step_by_step(seed: int, cuts: list[int]) -> None:
    one, series = follower(), values(seed)
    singly, last = in_parts(one, series, list(range(1, STEPS)))
    parts, state = in_parts(one, series, cuts)
    assert_same(state, last)
    for name in ("stretch", "opened", "scores", "anomaly"):
        found, expected = (torch.cat([getattr(part, name) for part in some], dim=1) for some in (parts, singly))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
    found, expected = (torch.cat([one.calibrated(part).values for part in some], dim=1) for some in (parts, singly))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_streams_know_nothing_of_each_other() -> None:
    one, block = follower(), block_of(values(0))
    together = one.advance(one.schema.initial(3), block).rows
    for stream in range(3):
        alone = one.advance(one.schema.initial(1), streams_of(block, torch.tensor([stream]))).rows
        assert_same(alone, {name: rows[stream : stream + 1] for name, rows in together.items()})


def test_the_open_forecast_is_told_by_the_rows_alone() -> None:
    one = follower()
    followed = one.advance(one.schema.initial(3), block_of(values(1)))
    assert one.schema.check(followed.rows) == 3
    torch.testing.assert_close(one.standing(followed.rows).values, one.calibrated(followed).values[:, -1])
    torch.testing.assert_close(one.standing(followed.rows, raw=True).values, followed.raw.values[:, -1])
    assert not torch.allclose(one.standing(followed.rows).values, followed.raw.values[:, -1]), "it was calibrated"


def test_raw_forecasts_are_the_forecasters_own() -> None:
    one, block = follower(), block_of(values(2))
    forecast, _ = one.forecaster.advance(one.forecaster.initial_state(3), block)
    assert torch.equal(one.advance(one.schema.initial(3), block).raw.values, forecast.values)


def test_uncalibrated_the_raw_forecast_is_issued_and_scored() -> None:
    one = follower(calibrate=False)
    followed = one.advance(one.schema.initial(3), block_of(values(3)))
    assert torch.equal(one.calibrated(followed).values, followed.raw.values)
    torch.testing.assert_close(followed.opened[:, 1:], followed.raw.values[:, :-1, 0], rtol=1e-5, atol=1e-5)
    assert (followed.scores[..., 0].sum(1) > 0).all()


def test_many_steps_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one, block = follower(), block_of(values(4))
    at_once = one.advance(one.schema.initial(3), block).rows
    monkeypatch.setattr("model.follow.PIECE_NUMBERS", 3 * 5 * 4 * 9)
    assert_same(one.through(one.schema.initial(3), block), at_once)


@pytest.mark.parametrize("calibrate", [True, False])
def test_each_truth_settles_the_forecasts_issued_1_2_4_and_h_steps_before_it(calibrate: bool) -> None:
    """Beside the plain loop over all steps and horizons, with the forecasts as they were issued."""
    one, series = follower(calibrate=calibrate), values(5, steps=120)
    followed = one.advance(one.schema.initial(3), block_of(series))
    issued = one.calibrated(followed)
    assert one.horizons == (1, 2, 4, 5)
    for stream in range(3):
        sums = np.zeros((4, len(MEASURES)))
        for step in range(120):
            truth = series[stream, step].item()
            for line, k in enumerate(one.horizons):
                origin = step - k
                now = np.zeros(len(MEASURES))
                if not math.isnan(truth) and origin + 1 >= CONFIG.warmup:
                    quantiles = issued.values[stream, origin, k - 1].numpy()
                    losses = [
                        2 * max(level * (truth - q), (level - 1) * (truth - q))
                        for level, q in zip(CONFIG.quantiles, quantiles, strict=True)
                    ]
                    naive = issued.base[stream, origin, k - 1].item()
                    hit = quantiles[0] <= truth <= quantiles[-1]
                    now[:] = 1, np.mean(losses), abs(truth - quantiles[2]), abs(truth - naive), hit
                    sums[line] *= 1 - 1 / FORGET_STEPS
                np.testing.assert_allclose(followed.scores[stream, step, line].numpy(), now, rtol=1e-4, atol=1e-4)
                sums[line] += now
        np.testing.assert_allclose(followed.rows["scores"][stream].numpy(), sums, rtol=1e-4, atol=1e-3)
        assert sums[:, 0].min() > 50


def test_the_naive_forecast_of_a_horizon_is_the_last_season_known_when_it_was_issued() -> None:
    one = follower()
    series = torch.arange(60.0).double()[None] ** 2
    followed = one.advance(one.schema.initial(1), block_of(series))
    naive = MEASURES.index("naive_error")
    for line, lag in zip(range(4), (3, 3, 6, 6), strict=True):
        assert followed.scores[0, 50, line, naive].item() == pytest.approx(50**2 - (50 - lag) ** 2)


def test_missing_values_settle_nothing() -> None:
    one = follower()
    state = one.advance(one.schema.initial(2), block_of(values(6, streams=2))).rows
    followed = one.advance(state, block_of(torch.full((2, 9), math.nan).double()))
    assert not followed.scores.any()
    for name in ("scores", "stretch", "roughness", "surprise"):
        assert torch.equal(followed.rows[name], state[name]), name


@pytest.mark.parametrize("season", [1, 24])
def test_a_model_of_one_step_without_a_season_is_followed_too(season: int) -> None:
    config = ModelConfig(season=season, horizon=1, quantiles=(0.5,), hidden_size=4)
    one = Follower(random_forecaster(config))
    followed = one.advance(one.schema.initial(3), block_of(values(7, steps=100)))
    assert one.calibrated(followed).values.isfinite().all()
    assert followed.rows["scores"][..., 0].min() > 0
