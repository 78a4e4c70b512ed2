"""Series become windows: exactly what a stream sees live, and nothing from beyond the cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from model.network import Forecaster
from tests.training.synthetic import forecaster, series
from training import windows as windows_module
from training.series import Series
from training.windows import (
    Batch,
    RandomWindows,
    Split,
    Window,
    WindowData,
    WindowOptions,
    block_of,
    cut,
    find_split,
    gather,
)

SPLIT = Split(test=40, validation=30)
OPTIONS = WindowOptions(steps=24, burn_in=6, batch_size=8, batches=3)
LENGTH = 200


@pytest.fixture(autouse=True)
def few_cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "COLD_STARTS", 40)


@pytest.fixture
def model() -> Forecaster:
    return forecaster(covariates=("heat",))


def data(model: Forecaster, table: Sequence[Series], seed: int = 0) -> WindowData:
    return WindowData(model, table, SPLIT, OPTIONS, seed)


def tensors(batches: Sequence[Batch]) -> list[Tensor]:
    return [
        tensor
        for batch in batches
        for tensor in (batch.truths, *(getattr(batch.seen, field.name) for field in dataclasses.fields(batch.seen)))
    ]


def same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(this.nan_to_num(-1.0), that.nan_to_num(-1.0)) for this, that in zip(these, those, strict=True)
    )


def spoiled(each: Series, start: int) -> Series:
    """The series with nonsense from step `start` on."""
    y, covariates = each.y.copy(), each.covariates.copy()
    y[start:] = 1e9
    covariates[start:] = -1e9
    return dataclasses.replace(each, y=y, covariates=covariates)


def table() -> list[Series]:
    return [series(LENGTH, 0, covariates=1), series(LENGTH + 60, 1, covariates=1), series(20, 2, covariates=1)]


def train_batches(windows: WindowData) -> list[Batch]:
    return list(windows.train_dataloader())


def validation_batches(windows: WindowData) -> list[Batch]:
    return list(windows.val_dataloader())


@pytest.mark.parametrize("batches", [train_batches, validation_batches])
def test_nothing_sees_the_test_part(batches: Callable[[WindowData], list[Batch]], model: Forecaster) -> None:
    clean = tensors(batches(data(model, table())))
    scaling = model.features.covariate_mean.clone(), model.features.covariate_std.clone()
    poisoned = [spoiled(each, SPLIT.test_start(len(each.y))) for each in table()]
    assert same(tensors(batches(data(model, poisoned))), clean)
    assert same((model.features.covariate_mean, model.features.covariate_std), scaling)


def test_fitting_sees_nothing_of_the_validation_part(model: Forecaster) -> None:
    clean = tensors(train_batches(data(model, table())))
    poisoned = [spoiled(each, SPLIT.fit_stop(len(each.y))) for each in table()]
    assert same(tensors(train_batches(data(model, poisoned))), clean)


def test_validation_scores_every_truth_of_its_part_and_no_other(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    (batch,) = validation_batches(data(model, [one]))
    scored = np.unique(batch.truths[~batch.truths.isnan()].numpy())
    part = one.y[SPLIT.fit_stop(LENGTH) : SPLIT.test_start(LENGTH)]
    assert scored.tolist() == sorted(part.tolist())


def test_a_window_holds_what_a_stream_sees_step_by_step(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    one.y[50:53] = np.nan
    windows = data(model, [one])
    batch = gather([Window(windows.replays[0], 40, 60, counted=40, limit=130)], horizon=4)
    state = model.initial_state(1)
    for step in range(60):
        live, after = model.features(state, block_of([cut(one, step, step + 1)]))
        state = {**state, **after}
        if step >= 40:
            window = batch.seen.steps(step - 40, step - 39)
            for field in dataclasses.fields(live):
                expected = getattr(live, field.name)
                torch.testing.assert_close(getattr(window, field.name), expected, equal_nan=True)


def test_truths_are_the_values_after_each_step(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    replay = data(model, [one]).replays[0]
    truths = gather([Window(replay, 10, 30, counted=13, limit=31)], horizon=4).truths[0]
    assert truths[:3].isnan().all()
    for step in range(3, 20):
        expected = [one.y[10 + step + k] if 10 + step + k < 31 else np.nan for k in range(1, 5)]
        np.testing.assert_array_equal(truths[step].numpy(), expected)


def test_only_a_window_at_the_beginning_counts_from_its_first_step(model: Forecaster) -> None:
    windows = [each for batch in _drawn(data(model, table()), 0) for each in batch]
    phases = {0, 1, 2}
    assert {each.counted - each.start for each in windows if each.start == 0} <= phases
    assert {each.counted - each.start - OPTIONS.burn_in for each in windows if each.start > 0} == phases


def test_one_step_in_three_counts_and_each_comes_up(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    windows = data(model, [one])
    batch = gather([Window(windows.replays[0], 40, 60, counted=41, limit=130, every=3)], horizon=4)
    assert (~batch.truths[0].isnan()).any(-1).nonzero()[:, 0].tolist() == [1, 4, 7, 10, 13, 16, 19]
    drawn = [each for batch in _drawn(windows, 0) for each in batch if each.start > 0]
    assert {each.every for each in drawn} == {3}
    assert {each.counted % 3 for each in drawn} == {0, 1, 2}, "or a phase of a season of 3 n steps would never count"


def test_some_windows_start_afresh_in_the_midst_of_the_history(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    windows = data(model, [one])
    begun = {float(each.values[0]) for each in windows.cold}
    assert len(begun) > 10, "at many places"
    assert begun <= set(one.y[: SPLIT.fit_stop(LENGTH)].tolist())
    # The seventh input is the stream's age.
    assert all(torch.equal(each.seen.inputs[0, 0, 5], torch.tensor(1.0).log1p() / 8) for each in windows.cold)
    drawn = [each for batch in _drawn(windows, 0) for each in batch]
    assert any(each.replay is cold for each in drawn for cold in windows.cold)


def test_a_series_shorter_than_a_window_is_padded_and_used(model: Forecaster) -> None:
    short = series(20, 2, covariates=1)
    windows = data(model, [short, series(LENGTH, 0, covariates=1)])
    replay = windows.replays[0]
    stop = SPLIT.fit_stop(20)
    batch = gather([Window(replay, 0, stop, 0, stop), Window(windows.replays[1], 30, 54, 36, 130)], horizon=4)
    assert batch.truths.shape == (2, 24, 4)
    known = batch.truths[0][~batch.truths[0].isnan()].numpy()
    assert np.unique(known).tolist() == sorted(short.y[1:stop].tolist())
    assert batch.seen.inputs[0, stop:].eq(0).all()
    assert batch.seen.scale[0, stop:].eq(1).all()
    drawn = [each for epoch in range(5) for batch in _drawn(windows, epoch) for each in batch]
    assert any(each.replay is replay for each in drawn)


def test_a_window_among_longer_ones_counts_no_more_than_itself(model: Forecaster) -> None:
    one = data(model, [series(LENGTH, 0, covariates=1)]).replays[0]
    alone = gather([Window(one, 30, 40, 30, 130)], horizon=4)
    beside = gather([Window(one, 30, 40, 30, 130), Window(one, 60, 84, 60, 130)], horizon=4)
    assert torch.equal(beside.truths[0, :10], alone.truths[0])
    assert beside.truths[0, 10:].isnan().all()


def test_windows_are_drawn_by_seed_and_epoch(model: Forecaster) -> None:
    def places(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
        return tuple((each.start, each.stop) for batch in _drawn(by_seed[seed], epoch) for each in batch)

    by_seed = [data(model, table(), seed) for seed in (0, 1)]
    assert places(0, 0) == places(0, 0)
    assert len({places(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_covariates_are_scaled_by_what_is_fitted_to(model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    one.covariates[:10] = np.nan
    data(model, [one])
    fitted = one.covariates[10 : SPLIT.fit_stop(LENGTH), 0]
    assert model.features.covariate_mean.item() == pytest.approx(fitted.mean())
    assert model.features.covariate_std.item() == pytest.approx(fitted.std())


@pytest.mark.parametrize("constant", [7.0, np.nan])
def test_a_covariate_that_never_changes_divides_by_nothing(constant: float, model: Forecaster) -> None:
    one = series(LENGTH, 0, covariates=1)
    one.covariates[:] = constant
    batch = train_batches(data(model, [one]))[0]
    assert batch.seen.inputs.isfinite().all()
    assert model.features.covariate_std.item() == 1.0


def test_the_split_leaves_short_series_something_to_learn_from() -> None:
    split = find_split([1000, 4000, 4000], horizon=24, test=168)
    assert (split.test_start(4000), split.fit_stop(4000)) == (4000 - 168, 4000 - 168 - 400)
    assert (split.test_start(40), split.fit_stop(40)) == (30, 23)
    assert find_split([100], horizon=24) == Split(48, 48)


def _drawn(windows: WindowData, epoch: int) -> list[list[Window]]:
    sampler = windows.train_dataloader().sampler
    assert isinstance(sampler, RandomWindows)
    sampler.set_epoch(epoch)
    return list(sampler)
