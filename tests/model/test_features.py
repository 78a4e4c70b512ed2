"""What the network sees, against plain loops; and that it says so when it does not know."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.features import CLIP, Features, Seen, calendar, fill_from_season, forgetting_sum, scaled, steps_since
from model.state import Rows, Schema
from tests.model import block_of, seeded

NAN = math.nan

some_numbers = st.floats(-1e6, 1e6, width=32)


def tables(steps: st.SearchStrategy[int], elements: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[np.float64]]:
    return st.tuples(st.integers(1, 3), steps).flatmap(
        lambda shape: arrays.arrays(np.float64, shape, elements=elements, fill=st.nothing())
    )


def see(config: ModelConfig, values: Tensor, **rest: Tensor) -> tuple[Features, Seen, Rows]:
    features = Features(config)
    seen, after = features(Schema(features.schema).initial(len(values)), block_of(values, **rest))
    return features, seen, after


# --- Holes are filled from the season before -------------------------------------------------------------------------


@seeded(max_examples=100)
@given(tables(st.integers(1, 40), some_numbers | st.just(NAN)), st.integers(1, 7), st.integers(0, 5))
def test_a_hole_is_filled_with_the_value_a_season_before_itself_filled(
    values: NDArray[np.float64], season: int, longer: int
) -> None:
    random = np.random.default_rng(values.shape[1])
    before = random.normal(size=(len(values), season + longer))
    before[random.random(before.shape) < 0.3] = NAN
    filled = fill_from_season(torch.from_numpy(before), torch.from_numpy(values), season)
    for row in range(len(values)):
        expected = before[row].tolist()
        for value in values[row]:
            expected.append(expected[-season] if math.isnan(value) else float(value))
        np.testing.assert_array_equal(filled[row].numpy(), expected[before.shape[1] :])


# --- Sums that forget ------------------------------------------------------------------------------------------------


@seeded(max_examples=100)
@given(tables(st.integers(1, 30) | st.integers(120, 150), some_numbers), st.sampled_from([0.5, 0.9, 63 / 64, 0.9999]))
def test_a_forgetting_sum_is_the_loop_it_stands_for(terms: NDArray[np.float64], forget: float) -> None:
    random = np.random.default_rng(terms.shape[1])
    keep = random.choice([1.0, forget], size=terms.shape)
    before = random.normal(size=len(terms))
    sums = forgetting_sum(torch.from_numpy(before), torch.from_numpy(terms), torch.from_numpy(keep))
    for row in range(len(terms)):
        total, largest = before[row], abs(before[row])
        for step, term in enumerate(terms[row]):
            total = keep[row, step] * total + term
            largest = keep[row, step] * largest + abs(term)
            assert sums[row, step].item() == pytest.approx(total, rel=0, abs=1e-12 * largest)


@seeded(max_examples=100)
@given(tables(st.integers(1, 40), st.sampled_from([0.0, 1.0])), st.integers(0, 10**6))
def test_steps_since_counts_from_what_happened_last(happened: NDArray[np.float64], before: int) -> None:
    counted = steps_since(torch.full((len(happened),), before), torch.from_numpy(happened) > 0)
    for row in range(len(happened)):
        steps = before
        for step, now in enumerate(happened[row]):
            steps = 0 if now else steps + 1
            assert counted[row, step].item() == steps


# --- Level and scale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("season", [1, 5, 24])
def test_the_level_is_the_mean_of_what_was_observed_recent_values_counting_more(season: int) -> None:
    config = ModelConfig(season=season, horizon=2)
    random = np.random.default_rng(season)
    values = random.normal(100, 20, size=(3, 400))
    values[random.random(values.shape) < 0.3] = NAN
    values[2, :150] = NAN
    _, seen, after = see(config, torch.from_numpy(values))
    forget = 1 - 1 / config.memory
    for row, series in enumerate(values.tolist()):
        total = weight = 0.0
        for step, value in enumerate(series):
            if not math.isnan(value):
                total, weight = forget * total + value, forget * weight + 1
            assert seen.level[row, step].item() == pytest.approx(total / weight if weight else 0, rel=1e-9)
        assert after["steps"][row] == 400
        assert after["weight"][row].item() == pytest.approx(weight)


def test_the_scale_comes_to_be_the_mean_deviation_from_the_level() -> None:
    values = torch.from_numpy(50 + 10 * np.random.default_rng(0).choice([-1.0, 1.0], size=(1, 2000)))
    _, seen, _ = see(ModelConfig(horizon=2), values)
    assert seen.scale[0, -1].item() == pytest.approx(10, rel=0.05)


def test_before_there_are_changes_the_scale_is_a_share_of_the_level() -> None:
    _, seen, _ = see(ModelConfig(horizon=2), torch.tensor([[NAN, 50.0], [NAN, -50.0], [NAN, 0.0]]).double())
    assert (seen.scale > 0).all()
    torch.testing.assert_close(seen.scale[:2, 1] / 50, torch.full((2,), 0.15).double(), rtol=0.01, atol=0)


def test_scaled_values_are_cut_and_unknown_ones_are_zero() -> None:
    values = torch.tensor([10.0, 12.0, 1e15, -1e15, NAN]).double()
    in_units = scaled(values, torch.tensor(10.0).double(), torch.tensor(4.0).double())
    assert in_units.tolist() == [0.0, 0.5, CLIP, -CLIP, 0.0]
    assert in_units.dtype == torch.float32


def test_missing_values_move_neither_level_nor_scale_and_are_told_by_mask_and_gap() -> None:
    _, seen, after = see(ModelConfig(horizon=2), torch.tensor([[4.0, 6.0, NAN, NAN, NAN]]).double())
    assert (seen.level[0, 1:] == seen.level[0, 1]).all()
    assert (seen.scale[0, 1:] == seen.scale[0, 1]).all()
    observed, gap = seen.inputs[0, :, 3], seen.inputs[0, :, 4]
    assert observed.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert (gap.diff()[1:] > 0).all()
    assert gap[:2].tolist() == [0.0, 0.0]
    assert after["gap"].item() == 3


# --- The calendar ----------------------------------------------------------------------------------------------------


def at(*moments: datetime) -> Tensor:
    return torch.tensor([[round(moment.timestamp() * 1000) for moment in moments]])


def test_midnight_and_monday_stand_at_the_top_of_their_circles() -> None:
    sin_day, sin_week, _, cos_day, cos_week, _ = calendar(at(datetime(2024, 1, 1, tzinfo=UTC)))[0, 0].tolist()
    assert (sin_day, cos_day) == pytest.approx((0, 1), abs=1e-6)
    assert (sin_week, cos_week) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize("year", [1899, 1969, 1970, 2024])
def test_the_hands_turn_once_a_day_a_week_and_a_year(year: int) -> None:
    quarters = calendar(at(*(datetime(year, 3, 5, hour, tzinfo=UTC) for hour in (0, 6, 12, 18))))[0]
    torch.testing.assert_close(quarters[:, [0, 3]], torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]]))
    day = datetime(year, 3, 5, 7, tzinfo=UTC).weekday() + 7 / 24
    now, week_later = calendar(at(datetime(year, 3, 5, 7, tzinfo=UTC), datetime(year, 3, 12, 7, tzinfo=UTC)))[0]
    angle = 2 * math.pi * day / 7
    assert now[[1, 4]].tolist() == pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-6)
    torch.testing.assert_close(now[[0, 1, 3, 4]], week_later[[0, 1, 3, 4]])
    assert not torch.allclose(now[[2, 5]], week_later[[2, 5]], atol=0.01)
    year_later = calendar(at(datetime(year + 4, 3, 5, 7, tzinfo=UTC)))[0, 0]
    torch.testing.assert_close(now[[2, 5]], year_later[[2, 5]], atol=0.02, rtol=0)


def test_who_does_not_look_at_the_year_sees_the_day_and_the_week_alone() -> None:
    moments = at(datetime(2024, 1, 1, 7, tzinfo=UTC), datetime(2024, 7, 1, 7, tzinfo=UTC))  # both Mondays
    january, july = calendar(moments, yearly=False)[0]
    torch.testing.assert_close(january, july)
    torch.testing.assert_close(january[[0, 1, 3, 4]], calendar(moments)[0, 0, [0, 1, 3, 4]])


# --- The naive forecast and the look back -----------------------------------------------------------------------------


def test_the_base_is_the_season_before_again_and_again() -> None:
    features, seen, _ = see(ModelConfig(season=3, horizon=7), torch.tensor([[1.0, 2, 3, 4, NAN]]).double())
    base = features.base(seen)
    assert base[0, 2].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert base[0, 3].tolist() == [2, 3, 4, 2, 3, 4, 2]
    assert base[0, 4].tolist() == [3, 4, 2, 3, 4, 2, 3]


def test_the_base_is_the_level_where_no_season_was_seen() -> None:
    features, seen, _ = see(ModelConfig(season=3, horizon=3), torch.tensor([[NAN, 8.0]]).double())
    assert features.base(seen)[0].tolist() == [[0, 0, 0], [8, 8, 8]]
    features, seen, _ = see(ModelConfig(season=3, horizon=3), torch.tensor([[6.0, 10.0]]).double())
    level = seen.level[0, 1].item()
    assert features.base(seen)[0, 1].tolist() == [level, 6, 10]


def test_recent_are_the_last_values_in_the_units_of_their_step() -> None:
    config = ModelConfig(horizon=2)
    values = torch.from_numpy(np.random.default_rng(0).normal(5, 1, size=(2, 50)))
    features, seen, after = see(config, values)
    recent = features.recent(seen)
    assert recent.shape == (2, 50, config.context)
    for step in (0, 3, 49):
        past = values[:, : step + 1][:, -config.context :]
        level, scale = seen.level[:, step : step + 1], seen.scale[:, step : step + 1]
        known = recent[:, step, config.context - past.shape[1] :]
        torch.testing.assert_close(known, ((past - level) / scale).float())
        assert (recent[:, step, : config.context - past.shape[1]] == 0).all()
    assert torch.equal(after["values"], values[:, -config.context :])


def test_the_inputs_tell_the_value_now_a_season_before_and_a_season_before_the_next() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(5, 1, size=(1, 20)))
    _, seen, _ = see(ModelConfig(season=4, horizon=2), values)
    level, scale = seen.level[0, 9], seen.scale[0, 9]
    expected = [values[0, 9], values[0, 5], values[0, 6]]
    assert seen.inputs[0, 9, :3].tolist() == pytest.approx([((v - level) / scale).item() for v in expected], abs=1e-5)


def test_some_steps_of_what_was_seen_have_their_own_past_with_them() -> None:
    config = ModelConfig(season=3, horizon=4)
    features, seen, _ = see(config, torch.from_numpy(np.random.default_rng(0).normal(size=(2, 50))))
    some = seen.steps(20, 35)
    assert torch.equal(some.inputs, seen.inputs[:, 20:35])
    assert torch.equal(features.base(some), features.base(seen)[:, 20:35])
    assert torch.equal(features.recent(some), features.recent(seen)[:, 20:35])


# --- Covariates ------------------------------------------------------------------------------------------------------


def test_a_covariate_is_standardised_and_a_missing_one_flagged() -> None:
    config = ModelConfig(horizon=2, covariates=("temperature", "price"))
    features = Features(config)
    features.covariate_mean.copy_(torch.tensor([10.0, 0.0]))
    features.covariate_std.copy_(torch.tensor([5.0, 1.0]))
    covariates = torch.tensor([[[20.0, NAN], [NAN, 1e15]]]).double()
    block = block_of(torch.zeros(1, 2).double(), covariates=covariates)
    seen, _ = features(Schema(features.schema).initial(1), block)
    assert seen.inputs.shape == (1, 2, features.inputs)
    assert seen.inputs[0, :, -4:].tolist() == [[2.0, 0.0, 0.0, 1.0], [0.0, CLIP, 1.0, 0.0]]


def test_what_was_learnt_of_the_covariates_is_saved_with_the_weights() -> None:
    features = Features(ModelConfig(horizon=2, covariates=("temperature",)))
    assert {"covariate_mean", "covariate_std"} <= set(features.state_dict())
