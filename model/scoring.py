"""How good forecasts were: the same measures for a backtest and for a live stream.

Everything is in units of the stream's seasonal naive error where a scale is needed (Hyndman and Koehler 2006), so
that streams of all sizes can be averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
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


def next_quantiles(state: Rows) -> Tensor:
    """What stands forecast for the next step of B streams, [B, Q] float64."""
    return state["base"][:, :1] + state["scale"][:, None] * state["offsets"][:, 0]


@dataclass(frozen=True)
class Settled:
    """What B observations said of the forecasts that waited for them.

    rows: the scores after it. scored [B] bool: whose forecast counted; hit [B] bool: whose interval held its truth.
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

    def settle(self, state: Rows, values: Tensor) -> Settled:
        """Score the open forecasts of B streams with the values [B] that came; not of streams that still warm up."""
        forecast = next_quantiles(state)
        naive = state["values"][:, -self.config.season]
        scored = (state["steps"] >= self.config.warmup) & ~values.isnan() & ~naive.isnan()
        hit = scored & covered(forecast, values)
        keep = 1 - scored.double() / FORGET_STEPS
        now = {
            "scored": torch.ones_like(values),
            "pinball": 2 * pinball(forecast, values, self.quantiles).mean(-1),
            "absolute_error": (values - forecast[:, middle(self.config)]).abs(),
            "naive_error": (values - naive).abs(),
            "hits": hit.double(),
        }
        rows = {name: state[name] * keep + torch.where(scored, now[name], 0.0) for name in now}
        return Settled(rows, scored, hit)
