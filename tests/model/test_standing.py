"""What is read off rows by numpy is what torch says that stands open in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.features import Block
from model.follow import Follower
from model.grid import Grid
from model.network import Forecaster
from model.standing import Standing
from model.state import Rows

HOUR_MS = 3_600_000
CONFIGS = {
    "default": ModelConfig(grid=Grid(HOUR_MS), season=24, horizon=24),
    "median": ModelConfig(season=1, horizon=1, quantiles=(0.5,), hidden_size=4),
    "one side": ModelConfig(season=3, horizon=5, quantiles=(0.5, 0.7, 0.9), hidden_size=4),
}


def state_of(follower: Follower, steps: int = 80, streams: int = 6) -> Rows:
    """After noise, with values missing here and there, at the end too."""
    values = 50 + torch.randn(streams, steps, dtype=torch.float64).cumsum(1)
    values[torch.rand(streams, steps) < 0.1] = torch.nan
    values[0, -1], values[1, -1] = torch.nan, 1e3
    ts_ms = (HOUR_MS * torch.arange(steps)).expand(streams, -1)
    block = Block(values, ts_ms, values.new_zeros(streams, steps, 0))
    return follower.through(follower.schema.initial(streams), block)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_it_reads_what_stands_open(name: str, calibrate: bool, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("numba")
    torch.manual_seed(3)
    forecaster = Forecaster(CONFIGS[name]).eval().requires_grad_(False)
    torch.nn.init.normal_(forecaster.shortcut.weight, std=0.02)
    follower = Follower(forecaster, calibrate=calibrate)
    standing, state = Standing(follower, compiled=compiled), state_of(follower)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    for raw in (True, False):
        expected = follower.standing(state, raw=raw).values.numpy()
        scale = arrays["scale"][:, None, None]
        np.testing.assert_allclose(standing.values(arrays, raw=raw) / scale, expected / scale, atol=2e-6)
    np.testing.assert_allclose(standing.anomaly(arrays), follower.anomaly.score(state).numpy(), atol=1e-9)
    young = {**state, "steps": torch.zeros_like(state["steps"])}
    assert np.isnan(standing.anomaly({name: tensor.numpy() for name, tensor in young.items()})).all()
