"""The regression beside the network: what it looks at, what each stream learns of its own, and its share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import Block
from model.grid import Grid
from model.network import Forecaster
from tests.model import HOUR_MS, block_of, part_of, random_forecaster

CONFIG = ModelConfig(horizon=3, hidden_size=8, rank=2)


def follows(coefficients: list[float], steps: int) -> Tensor:
    """A stream each: y_t = c y_{t-1} + noise. -> [B, steps] float64."""
    noise = torch.randn(len(coefficients), steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [torch.zeros(len(coefficients), dtype=torch.float64)]
    for step in range(steps):
        values.append(torch.tensor(coefficients, dtype=torch.float64) * values[-1] + noise[:, step])
    return torch.stack(values[1:], dim=1)


def of_two_kinds() -> Forecaster:
    """Streams are taken to stay where they are; along the one direction they swing about the mean of the last two."""
    forecaster = random_forecaster.__wrapped__(dataclasses.replace(CONFIG, rank=1))
    regression = forecaster.regression
    regression.maps.zero_()
    regression.spread.zero_()
    regression.maps[-3, 1] = 0.5  # the value before the last, less the last
    regression.share.fill_(1)
    return forecaster


def mistakes(forecaster: Forecaster, values: Tensor) -> Tensor:
    """The absolute errors one step ahead. -> [B, T - 1]."""
    forecast, _ = forecaster.advance(forecaster.initial_state(len(values)), block_of(values))
    return (forecast.values[:, :-1, 0, 0] - values[:, 1:]).abs()


def test_a_stream_learns_its_own_map_as_it_goes() -> None:
    values = follows([-0.9], 3000)
    missed = mistakes(of_two_kinds(), values)[0]
    still = values.diff().abs()[0]  # what the shared map alone would miss
    assert missed[2000:].mean() < 0.7 * still[2000:].mean()
    unlearnt = slice(CONFIG.context - 1, CONFIG.context + CONFIG.horizon - 1)  # nothing has come true yet
    torch.testing.assert_close(missed[unlearnt], still[unlearnt], rtol=1e-5, atol=1e-5)


def test_each_stream_learns_for_itself_and_follows_when_it_changes() -> None:
    forecaster = of_two_kinds()
    swings, wanders = follows([-0.9, 1.0], 6000)
    turned = torch.stack((torch.cat((wanders, 2 * swings)), wanders.repeat(2)))
    _, state = forecaster.advance(forecaster.initial_state(2), part_of(block_of(turned), 0, 6000))
    first = (state["moment"] / state["gram"][:, 0]).flatten()
    assert first.abs().max() < 0.2
    _, state = forecaster.advance(state, part_of(block_of(turned), 6000, 12_000))
    changed, same = (state["moment"] / state["gram"][:, 0]).flatten().tolist()
    assert changed > 0.5 > 0.3 > abs(same)


@pytest.mark.parametrize("rank", [0, 2])
def test_steps_one_by_one_learn_as_all_at_once(rank: int) -> None:
    config = dataclasses.replace(CONFIG, grid=Grid(HOUR_MS), season=24, rank=rank)
    forecaster = random_forecaster.__wrapped__(config)
    forecaster.regression.share.fill_(0.5)
    forecaster.regression.maps.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    values = follows([0.5, 0.99], 300)
    values[0, 30:60] = torch.nan
    block = block_of(values)
    whole, final = forecaster.advance(forecaster.initial_state(2), block)
    state = forecaster.initial_state(2)
    for step in range(300):
        forecast, state = forecaster.advance(state, part_of(block, step, step + 1))
        torch.testing.assert_close(forecast.offsets[:, 0], whole.offsets[:, step], rtol=1e-4, atol=1e-4)
    for name in ("gram", "moment") if rank else ():
        torch.testing.assert_close(state[name], final[name], rtol=1e-4, atol=1e-3)
        assert final[name].abs().max() > 1, "something was learnt"


def test_without_a_share_the_forecast_is_the_networks_and_nothing_is_learnt() -> None:
    forecaster = random_forecaster.__wrapped__(CONFIG)
    block = block_of(follows([0.5], 100))
    state = forecaster.initial_state(1)
    blended, _ = forecaster.advance(state, block)
    forecaster.regression.share.zero_()
    alone, after = forecaster.advance(state, block)
    seen, _ = forecaster.features(state, block)
    network = forecaster.forecast(seen, forecaster.recur(seen, state)[0])
    torch.testing.assert_close(alone.values, network.values, rtol=1e-5, atol=1e-5)
    assert after["gram"].abs().max() == 0
    whole = CONFIG.context - 1
    assert torch.equal(blended.values[:, :whole], alone.values[:, :whole]), "and so it is before the context is full"
    assert not torch.isclose(blended.values[:, whole:], alone.values[:, whole:]).all(-1).any()


def test_the_share_is_how_far_the_forecast_lies_on_the_way_to_the_regressions() -> None:
    forecaster = random_forecaster.__wrapped__(CONFIG)
    block, offsets = block_of(follows([0.5], 100)), {}
    for share in (0.0, 0.25, 1.0):
        forecaster.regression.share.fill_(share)
        offsets[share] = forecaster.advance(forecaster.initial_state(1), block)[0].offsets[:, CONFIG.context :]
    torch.testing.assert_close(offsets[0.25], 0.75 * offsets[0.0] + 0.25 * offsets[1.0])
    assert (offsets[0.25].diff(dim=-1) >= 0).all()


def test_nothing_is_learnt_where_nothing_is_observed() -> None:
    forecaster = of_two_kinds()
    _, before = forecaster.advance(forecaster.initial_state(1), block_of(follows([-0.9], 200)))
    missing = block_of(torch.full((1, 20), torch.nan, dtype=torch.float64))
    forecast, after = forecaster.advance(before, missing)
    assert torch.equal(after["gram"], before["gram"])
    assert torch.equal(after["moment"], before["moment"])
    assert forecast.values.isfinite().all()


def test_a_stream_learns_once_a_context_and_a_horizon_are_known() -> None:
    forecaster, needed = of_two_kinds(), CONFIG.context + CONFIG.horizon
    block = block_of(follows([-0.9], needed))
    _, early = forecaster.advance(forecaster.initial_state(1), part_of(block, 0, needed - 1))
    _, now = forecaster.advance(early, part_of(block, needed - 1, needed))
    assert early["gram"] == 0 < now["gram"]


def test_of_a_long_horizon_each_fifth_step_is_learnt_from_and_stands_for_five() -> None:
    """Their truths overlap, so that is nearly what learning from all of them comes to."""
    config = dataclasses.replace(CONFIG, horizon=24, rank=1)
    forecaster, sums = random_forecaster.__wrapped__(config), {}
    forecaster.regression.maps.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    forecaster.regression.share.fill_(0.5)
    assert forecaster.regression.every == 5
    block = block_of(follows([0.9], 2000))
    for every in (5, 1):
        forecaster.regression.every = every
        _, before = forecaster.advance(forecaster.initial_state(1), part_of(block, 0, 1994))
        _, still = forecaster.advance(before, part_of(block, 1994, 1999))  # 1,995 to 1,999: the first is a fifth one
        _, after = forecaster.advance(still, part_of(block, 1999, 2000))
        sums[every] = after["gram"].item()
        assert not torch.equal(before["gram"], still["gram"])
        assert not torch.equal(still["gram"], after["gram"])
        _, between = forecaster.advance(before, part_of(block, 1994, 1995))
        assert torch.allclose(between["gram"], still["gram"], rtol=1e-6) == (every == 5)
    assert sums[5] == pytest.approx(sums[1], rel=0.1)


def test_what_is_learnt_at_a_step_is_what_was_seen_a_horizon_before_it_in_the_scale_of_now() -> None:
    forecaster = random_forecaster(dataclasses.replace(CONFIG, grid=Grid(HOUR_MS), season=24))
    horizon, regression = CONFIG.horizon, forecaster.regression
    values = follows([0.5], 400)
    block = Block(values, 1000 * HOUR_MS + torch.arange(400)[None] * HOUR_MS, torch.empty(1, 400, 0))
    seen, _ = forecaster.features(forecaster.initial_state(1), block)
    seen = dataclasses.replace(seen, scale=torch.full_like(seen.scale, 2.0))
    now, then = regression.regressors(seen, block.ts_ms), regression.regressors(seen, block.ts_ms, horizon)
    assert torch.equal(then[:, 300:], now[:, 300 - horizon : -horizon])
    assert now.shape[-1] == regression.inputs == 168 + 24 + 7 + 1
    assert now[..., 168:].sum(-1).unique().tolist() == [3]
    expected = (values[0, 301 - horizon : 301] - values[0, 300 - horizon]) / 2
    torch.testing.assert_close(regression.targets(seen)[0, 300], expected.float())
