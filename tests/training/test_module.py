"""The loss: pinball, in each stream's own scale, over exactly what counts."""

from __future__ import annotations

import math

import pytest
import torch

from model.features import CLIP
from model.network import Forecaster
from model.quantiles import pinball
from tests.training.synthetic import forecaster, series
from training.module import TrainingModule
from training.series import Series
from training.windows import Batch, Window, block_of, cut, gather, replay

LENGTH = 60


@pytest.fixture
def module() -> TrainingModule:
    return TrainingModule(forecaster(), learning_rate=1e-3, weight_decay=0.0, total_steps=10, seed=0)


def whole(model: Forecaster, one: Series, counted: int = 0) -> Window:
    length = len(one.y)
    return Window(replay(model, one, length), 0, length, counted, limit=length)


def test_it_is_the_pinball_loss_of_what_would_be_served(module: TrainingModule) -> None:
    model, one = module.forecaster, series(LENGTH)
    one.y[20:23] = math.nan
    loss, count = module.loss(gather([whole(model, one, counted=10)], horizon=4))

    forecast, _ = model.advance(model.initial_state(1), block_of([one]))
    losses = [
        pinball(
            forecast.offsets[0, step, ahead].double(),
            (torch.tensor(one.y[step + 1 + ahead]) - forecast.base[0, step, ahead]) / forecast.scale[0, step],
            torch.tensor(model.config.quantiles, dtype=torch.float64),
        )
        for step in range(10, LENGTH)
        for ahead in range(4)
        if step + 1 + ahead < LENGTH and not math.isnan(one.y[step + 1 + ahead])
    ]
    assert count == len(losses)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_windows_of_different_lengths_count_by_their_truths(module: TrainingModule) -> None:
    windows = [whole(module.forecaster, series(LENGTH)), whole(module.forecaster, series(25, seed=1))]
    together, count = module.loss(gather(windows, horizon=4))
    alone = [module.loss(gather([window], horizon=4)) for window in windows]
    assert count == sum(counted for _, counted in alone)
    assert together.item() == pytest.approx(sum(loss.item() * n for loss, n in alone) / count, rel=1e-5)


def test_where_a_new_stream_begins_is_learned_and_no_other_starts_there(module: TrainingModule) -> None:
    loss, _ = module.loss(gather([whole(module.forecaster, series(LENGTH))], horizon=4))
    loss.backward()
    model = module.forecaster
    for first in (model.first_h, model.first_c):
        assert first.grad is not None
        assert first.grad.abs().sum() > 0
    start, later = block_of([cut(series(LENGTH), 0, 30)]), block_of([cut(series(LENGTH), 30, 40)])
    issued, state = model.advance(model.initial_state(1), start)
    goes_on, _ = model.advance(state, later)
    with torch.no_grad():
        model.first_h += 1
        model.first_c += 1
    assert not torch.equal(model.advance(model.initial_state(1), start)[0].offsets, issued.offsets)
    assert torch.equal(model.advance(state, later)[0].offsets, goes_on.offsets)


def test_one_absurd_reading_is_cut(module: TrainingModule) -> None:
    one = series(LENGTH)
    one.y[-1] = 1e12
    loss, count = module.loss(gather([whole(module.forecaster, one)], horizon=4))
    assert loss.item() < 4 * CLIP / count + 2.0


def test_a_batch_without_a_truth_changes_nothing(module: TrainingModule) -> None:
    batch = gather([whole(module.forecaster, series(LENGTH))], horizon=4)
    loss, count = module.loss(Batch(batch.seen, torch.full_like(batch.truths, math.nan)))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(weights.grad is None or weights.grad.eq(0).all() for weights in module.parameters())
