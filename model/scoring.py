"""How good forecasts were: the same measures for a backtest and for a live stream.

Everything is in units of the stream's seasonal naive error where a scale is needed (Hyndman and Koehler 2006), so
that streams of all sizes can be averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import fill_from_season, forgetting_sum
from model.network import Forecast
from model.quantiles import median_index, pinball
from model.state import Rows, TensorSpec

FORGET_STEPS = 500
"""Live scores forget over this many scored observations."""


@dataclass(frozen=True)
class Scores:
    """Means over what was scored; NaN where nothing was.

    wql: weighted quantile loss, the mean over the quantiles of sum(2 pinball) / sum|y|. mase: absolute error of the
    median over that of the seasonal naive forecast *of the history* (or, live, of the same observations). coverage:
    the share of truths within the outermost quantiles.
    """

    count: int
    wql: float
    mase: float
    coverage: float


def score(forecast: Tensor, truth: Tensor, naive_mae: Tensor, config: ModelConfig) -> Scores:
    """Score forecasts [N, Q] against truths [N] (NaN: unknown), scaled by naive_mae [N].

    >>> config = ModelConfig(quantiles=(0.1, 0.5, 0.9))
    >>> score(torch.tensor([[8.0, 10.0, 12.0]]), torch.tensor([11.0]), torch.tensor([2.0]), config)
    Scores(count=1, wql=0.054545462131500244, mase=0.5, coverage=1.0)
    """
    known = ~truth.isnan()
    forecast, truth, naive_mae = forecast[known], truth[known], naive_mae[known]
    losses = 2 * pinball(forecast, truth, torch.tensor(config.quantiles, dtype=forecast.dtype))
    error = (truth - forecast[:, middle(config)]).abs()
    scalable = naive_mae > 0
    return Scores(
        count=len(truth),
        wql=float((losses.sum(0) / truth.abs().sum()).mean()),
        mase=float((error[scalable] / naive_mae[scalable]).mean()),
        coverage=float(covered(forecast, truth).double().mean()),
    )


def middle(config: ModelConfig) -> int:
    """The index of the quantile nearest to the median."""
    return median_index(config.quantiles)


def covered(forecast: Tensor, truth: Tensor) -> Tensor:
    """Whether truth [...] lies within the outermost quantiles of forecast [..., Q]."""
    return (forecast[..., 0] <= truth) & (truth <= forecast[..., -1])


def open_forecasts(state: Rows, forecast: Forecast) -> Tensor:
    """What had been forecast for each of the T steps of `forecast`, one step before it; `state` is that before the
    first. -> [B, T, Q] float64.
    """
    first = state["base"][:, :1] + state["scale"][:, None] * state["offsets"][:, 0]
    base, scale = forecast.base[:, :-1, :1], forecast.scale[:, :-1, None]
    return torch.cat((first[:, None], base + scale * forecast.offsets[:, :-1, 0]), dim=1)


@dataclass(frozen=True)
class Settled:
    """What the values of T steps of B streams said of the forecasts that waited for them.

    rows: the scores after them. scored [B, T] bool: whose forecast counted; hit [B, T] bool: whose interval held its
    truth.
    """

    rows: Rows
    scored: Tensor
    hit: Tensor


class LiveScores:
    """Scores of one-step-ahead forecasts as observations settle them, with exponential forgetting: O(1) a stream."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.quantiles = torch.tensor(config.quantiles, dtype=torch.float64)
        self.schema = tuple(
            TensorSpec(name, (), torch.float64)
            for name in ("scored", "pinball", "absolute_error", "naive_error", "hits")
        )

    def settle(self, state: Rows, values: Tensor, opened: Tensor) -> Settled:
        """Score what had been forecast for T steps, `opened` [B, T, Q], with their values [B, T], NaN where missing;
        not of streams that still warm up. `state` is that before the first step.
        """
        season, steps = self.config.season, values.shape[1]
        filled = torch.cat((state["values"], fill_from_season(state["values"], values, season)), dim=1)
        naive = filled[:, -season - steps : -season]
        before = state["steps"][:, None] + torch.arange(steps)
        scored = (before >= self.config.warmup) & ~values.isnan() & ~naive.isnan()
        hit = scored & covered(opened, values)
        keep = 1 - scored.double() / FORGET_STEPS
        now = {
            "scored": torch.ones_like(values),
            "pinball": 2 * pinball(opened, values, self.quantiles).mean(-1),
            "absolute_error": (values - opened[..., middle(self.config)]).abs(),
            "naive_error": (values - naive).abs(),
            "hits": hit.double(),
        }
        rows = {name: forgetting_sum(state[name], torch.where(scored, now[name], 0.0), keep)[:, -1] for name in now}
        return Settled(rows, scored, hit)
