"""How good forecasts were: the same measures for a backtest and for a live stream.

Everything is in units of the stream's seasonal naive error where a scale is needed (Hyndman and Koehler 2006), so
that streams of all sizes can be averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import forgetting_sum
from model.quantiles import median_index, pinball
from model.state import Rows, TensorSpec

FORGET_STEPS = 500
"""Live scores forget over this many settled forecasts of a horizon."""


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


MEASURES = ("scored", "pinball", "absolute_error", "naive_error", "hits")
"""What is summed of the forecasts settled, in this order: how many, twice the pinball loss in the mean of the
quantiles, the absolute error of the median and of the seasonal naive forecast of the same horizon, and how many
intervals held their truth."""


@dataclass(frozen=True)
class Settled:
    """What the values of T steps of B streams said of the forecasts that waited for them.

    scores [B, T, K, 5]: the measures, by settled horizon; zeros where nothing was scored. rows: the scores after them.
    """

    scores: Tensor
    rows: Rows


class LiveScores:
    """Scores of the forecasts of K horizons as observations settle them, with exponential forgetting: O(1) a stream."""

    def __init__(self, config: ModelConfig, horizons: int) -> None:
        """horizons: K."""
        self.middle = middle(config)
        self.quantiles = torch.tensor(config.quantiles, dtype=torch.float64)
        self.schema = (TensorSpec("scores", (horizons, len(MEASURES)), torch.float64),)

    def settle(self, state: Rows, values: Tensor, opened: Tensor, naive: Tensor, counts: Tensor) -> Settled:
        """Score what had been forecast for T steps, opened [B, T, K, Q], beside the seasonal naive forecast
        [B, T, K], with their values [B, T]. counts [B, T, K] bool: what is scored. `state` is that before them.
        """
        truth = values[..., None].expand_as(naive)
        measures = (
            torch.ones_like(naive),
            2 * pinball(opened, truth, self.quantiles).mean(-1),
            (truth - opened[..., self.middle]).abs(),
            (truth - naive).abs(),
            covered(opened, truth).double(),
        )
        scores = torch.where(counts[..., None], torch.stack(measures, dim=-1), 0.0)
        keep = (1 - counts.double() / FORGET_STEPS)[..., None].expand_as(scores)
        # A column for each stream, horizon and measure: all are summed alike.
        columns = (each.transpose(0, 1).flatten(1).T for each in (scores, keep))
        sums = forgetting_sum(state["scores"].flatten(), *columns)[:, -1]
        return Settled(scores, {"scores": sums.view_as(state["scores"])})
