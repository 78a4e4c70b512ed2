"""The ordered head, and the loss whose minimum is the quantile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.quantiles import OrderedQuantiles, pinball
from tests.model import seeded

LEVELS = (0.1, 0.3, 0.5, 0.8, 0.9)


def head_of(levels: tuple[float, ...], seed: int = 0, spread: float = 1.0) -> OrderedQuantiles:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = OrderedQuantiles(inputs=6, horizon=4, quantiles=levels)
        torch.nn.init.normal_(head.linear.weight, std=spread)
        torch.nn.init.normal_(head.linear.bias, std=spread)
    return head.requires_grad_(False)


@seeded(max_examples=100)
@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=9, unique=True),
    st.integers(0, 100),
    st.sampled_from([1e-3, 1.0, 100.0, 1e6]),
)
def test_quantiles_are_ordered_whatever_the_weights(percents: list[int], seed: int, spread: float) -> None:
    head = head_of(tuple(percent / 100 for percent in sorted(percents)), seed, spread)
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 3, 6, generator=random).clamp(-1, 1)
    ordered = head(hidden, spread * torch.randn(5, 3, 4, generator=random))
    assert ordered.shape == (5, 3, 4, len(percents))
    assert ordered.isfinite().all()
    assert (ordered.diff(dim=-1) >= 0).all()


def test_between_ordinary_quantiles_there_is_room() -> None:
    ordered = head_of(LEVELS)(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 4))
    assert (ordered.diff(dim=-1) > 0).all()


def test_the_location_moves_all_quantiles_alike() -> None:
    head, hidden = head_of(LEVELS), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    there = head(hidden, torch.tensor([[1.0, -2.0, 0.0, 5.0]]).expand(3, 4))
    torch.testing.assert_close(
        there - head(hidden, torch.zeros(3, 4)), torch.tensor([1.0, -2.0, 0.0, 5.0])[None, :, None].expand(3, 4, 5)
    )


@pytest.mark.parametrize(("levels", "middle"), [(LEVELS, 2), ((0.1, 0.4, 0.9), 1), ((0.7, 0.9), 0), ((0.5,), 0)])
def test_the_quantile_nearest_the_median_is_the_linear_one(levels: tuple[float, ...], middle: int) -> None:
    head, hidden = head_of(levels), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    raw = head.linear(hidden).unflatten(-1, (4, len(levels)))
    torch.testing.assert_close(head(hidden, torch.zeros(3, 4))[..., middle], raw[..., middle])


@pytest.mark.parametrize("level", LEVELS)
def test_pinball_is_least_at_the_quantile(level: float) -> None:
    sample = torch.from_numpy(np.random.default_rng(0).gamma(2, size=1001))
    candidates = sample.sort().values
    mean_loss = pinball(candidates[:, None, None], sample, torch.tensor([level])).mean(dim=(1, 2))
    assert candidates[mean_loss.argmin()].item() == torch.quantile(sample, level, interpolation="nearest").item()


def test_pinball_by_hand() -> None:
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    forecast = torch.tensor([[8.0, 10.0, 12.0]], dtype=torch.float64)
    assert pinball(forecast, torch.tensor([11.0]), levels)[0].tolist() == pytest.approx([0.3, 0.5, 0.1])
    assert pinball(forecast, torch.tensor([7.0]), levels)[0].tolist() == pytest.approx([0.9, 1.5, 0.5])
    assert pinball(forecast, torch.tensor([10.0]), levels)[0, 1].item() == 0


def test_pinball_of_an_unknown_truth_is_unknown() -> None:
    assert pinball(torch.zeros(1, 3), torch.tensor([torch.nan]), torch.tensor([0.1, 0.5, 0.9])).isnan().all()
