"""A forecast k steps ahead waits k steps, whether these come one by one or at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.network import Forecast
from model.state import Rows, Schema
from model.waiting import Waiting, settled_horizons
from tests.model import seeded

STEPS = 40


@pytest.mark.parametrize(
    ("horizon", "settled"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (24, (1, 2, 4, 8, 16, 24)), (1024, ())]
)
def test_powers_of_two_and_the_last_horizon_are_settled_and_few_forecasts_wait(
    horizon: int, settled: tuple[int, ...]
) -> None:
    horizons = settled_horizons(horizon)
    assert not settled or horizons == settled
    assert horizons[-1] == horizon
    assert sum(horizons) < 3 * horizon
    assert len(horizons) <= 11, "each is a label of metrics"


def numbered(config: ModelConfig, first: int, stop: int) -> Forecast:
    """Forecasts that tell where they are from: base 1000 t + k, offsets 0.5 t, in a scale of 2."""
    issued = torch.arange(first, stop)[None, :, None]
    base = 1000.0 * issued + torch.arange(1, config.horizon + 1)
    offsets = (0.5 * issued)[..., None].expand(1, -1, config.horizon, len(config.quantiles))
    return Forecast(base.double(), torch.full((1, stop - first), 2.0).double(), offsets.float())


@seeded(60)
@given(st.integers(1, 9), st.lists(st.integers(1, STEPS - 1), max_size=6, unique=True))
def test_what_comes_out_is_what_was_issued_k_steps_before(horizon: int, cuts: list[int]) -> None:
    """However the steps are cut into blocks."""
    config = ModelConfig(horizon=horizon, quantiles=(0.1, 0.5, 0.9))
    waiting = Waiting(config)
    state: Rows = Schema(waiting.schema).initial(1)
    bases, offsets = [], []
    edges = [0, *sorted(cuts), STEPS]
    for start, stop in pairwise(edges):
        base, offset, state = waiting.pass_on(state, numbered(config, start, stop))
        bases.append(base)
        offsets.append(offset)
    for step in range(STEPS):
        for line, k in enumerate(waiting.horizons):
            settled = torch.cat(bases, dim=1)[0, step, line].item()
            expected = 1000 * (step - k) + k if step >= k else 0
            assert settled == expected, "at the start of a stream nothing waits"
            assert torch.cat(offsets, dim=1)[0, step, line].tolist() == [max(0.0, float(step - k))] * 3


def test_a_stream_whose_level_dwarfs_its_changes_waits_without_loss() -> None:
    config = ModelConfig(horizon=1, quantiles=(0.1, 0.5, 0.9))
    waiting = Waiting(config)
    offsets = torch.tensor([-0.3, 0.0, 0.3]).view(1, 1, 1, 3)
    level = torch.full((1, 1, 1), 1e12, dtype=torch.float64)
    state: Rows = Schema(waiting.schema).initial(1)
    for _ in range(2):
        forecast = Forecast(level, torch.tensor([[0.01]]).double(), offsets)
        base, missed, state = waiting.pass_on(state, forecast)
    assert base.item() == 1e12
    assert missed.flatten().tolist() == pytest.approx([-0.003, 0.0, 0.003])
    assert sum(spec.row_bytes for spec in waiting.schema) == 8 + 3 * 4
