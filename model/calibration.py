"""Intervals that adapt: online conformal calibration of each stream, O(1) a step and part of its state.

Below and above the median, forecasts are stretched about it by a factor each, exp(s). What makes s:

*Tracking.* Each settled horizon k and side has an s of its own. A truth beyond the quantile that had been issued for
it raises s, one inside lowers it a little, so that in balance the share beyond is what the quantile says:

    s <- s + GAIN / k^FALL * (beyond - share)

This is the quantile tracking of Angelopoulos, Candes and Tibshirani (2023, "Conformal PID control for time series
prediction"), itself a form of Gibbs and Candes (2021, "Adaptive conformal inference under distribution shift"), on a
logarithmic scale, so that it knows no unit. Whatever the series does, over n steps the share beyond differs from its
goal by no more than |change of s| / (gain n): a gain of 0.5 holds the one-step coverage of every week of hours within
some points. Errors k steps ahead come late and in runs of k: the gain falls with k, or it would chase them.

*Mood.* All horizons share a term for how rough the last day was: half the logarithm of a fast mean of the one-step
errors, in units of their raw interval, over what that is for a normal variable. It needs no misses to react, and is
what makes longer horizons follow a change of variance within a day or two rather than weeks.

Horizons between the settled ones are stretched as if s were linear in log k.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import forgetting_sum
from model.network import Forecast
from model.quantiles import median_index
from model.state import Rows, TensorSpec
from model.waiting import passage, settled_horizons

GAIN, FALL = 0.5, 1.25
SHARE = 0.1
"""Tracked is, on each side, the quantile nearest to this and to 1 - this: rarer ones tell too seldom of themselves."""
MOOD = 0.5
MOOD_STEPS = 24
"""Over which the mean forgets."""
ABSURD = 4.0
"""One-step errors beyond so many half intervals are cut: one absurd reading is no change of variance."""
SMOOTH = 0.03
"""And what is smoother than this beside the usual is as smooth."""
LIMIT = 3.0
"""|s| stays below, even where a series stands still for a year."""
SOFT = 0.25
"""A truth within so much (in s) of the quantile is partly beyond, so that rounding decides nothing."""


@dataclass(frozen=True)
class Tracked:
    """used, issued [B, T, K, 2]: s of the forecasts settled at T steps, and of those issued there, below and above."""

    used: Tensor
    issued: Tensor
    rows: Rows


class Calibration:
    """The calibration of one model's streams; if not `on`, s is always 0."""

    def __init__(self, config: ModelConfig, *, on: bool = True) -> None:
        self.on = on
        self.horizons = settled_horizons(config.horizon)
        levels, self.middle = config.quantiles, median_index(config.quantiles)
        self.outer = (
            min(range(self.middle + 1), key=lambda q: abs(levels[q] - SHARE)),
            min(range(self.middle, len(levels)), key=lambda q: abs(levels[q] - (1 - SHARE))),
        )
        shares = levels[self.outer[0]], 1 - levels[self.outer[1]]
        self.share = torch.tensor(shares, dtype=torch.float32)
        there = torch.tensor([outer != self.middle for outer in self.outer])  # a side may have no quantiles
        self.gain = GAIN / torch.tensor(self.horizons)[:, None] ** FALL * there
        self.side = torch.tensor([int(q > self.middle) for q in range(len(levels))])
        self.weights = _interpolation(self.horizons, config.horizon)
        self.ends = torch.tensor(self.horizons).cumsum(0) - 1
        # The mean error of a normal variable in units of its interval's half; that of Laplace's is nearly the same.
        self.usual = math.sqrt(2 / math.pi) / NormalDist().inv_cdf(min(max(1 - float(self.share.mean()), 0.55), 0.995))
        self.schema = (
            TensorSpec("waiting_stretch", (sum(self.horizons), 2), torch.float32),
            TensorSpec("stretch", (len(self.horizons), 2), torch.float32),
            TensorSpec("roughness", (), torch.float64, self.usual),
        )

    def track(self, state: Rows, missed: Tensor, offsets: Tensor, counts: Tensor) -> Tracked:
        """Learn from the raw forecasts settled at T steps: missed [B, T, K] by their base, offsets [B, T, K, Q].

        counts [B, T, K] bool: which of them to learn from. `state` is that before the first step.
        """
        streams, steps, lines = counts.shape
        settled, waiting = passage(self.horizons, steps)
        before = state["waiting_stretch"]
        line = torch.cat((before, before.new_zeros(streams, steps * lines, 2)), dim=1)
        rows = {name: state[name] for name in ("stretch", "roughness")}
        if self.on:
            distance = self._distance(missed, offsets)
            mood, rows["roughness"] = self._mood(state["roughness"], distance[:, :, 0].amax(-1), counts[..., 0])
            log = torch.where(counts[..., None], distance, 1.0).log().float()  # of 0: -inf, well inside
            gain = counts[..., None] * self.gain
            s = state["stretch"]
            issued = line[:, before.shape[1] :].view(streams, steps, lines, 2)
            for step in range(steps):
                used = line.index_select(1, settled[step * lines : (step + 1) * lines])
                beyond = ((log[:, step] - used) / (2 * SOFT) + 0.5).clamp(0, 1)
                s = (s + gain[:, step] * (beyond - self.share)).clamp(-LIMIT, LIMIT)
                issued[:, step] = s + mood[:, step, None, None]
            rows["stretch"] = s
        used, issued = (
            part.view(streams, steps, lines, 2) for part in (line.index_select(1, settled), line[:, before.shape[1] :])
        )
        return Tracked(used, issued, {**rows, "waiting_stretch": line.index_select(1, waiting)})

    def _mood(self, before: Tensor, error: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What errors one step ahead [B, T], in units of their interval, add to all s [B, T]; and their mean after."""
        known = counts.double() / MOOD_STEPS
        roughness = forgetting_sum(before, known * torch.where(counts, error, 0.0).clamp_max(ABSURD), 1 - known)
        return MOOD * (roughness / self.usual).clamp_min(SMOOTH).log().float(), roughness[:, -1]

    def _distance(self, missed: Tensor, offsets: Tensor) -> Tensor:
        """How far truths lie from the median, in units of the tracked quantiles' distance. -> [..., 2], 0 on the other
        side.
        """
        off = missed - offsets[..., self.middle]
        reach = (offsets[..., list(self.outer)] - offsets[..., self.middle, None]).abs()
        tiny = torch.finfo(reach.dtype).tiny
        return torch.stack((-off, off), dim=-1).clamp_min(0) / reach.clamp_min(tiny)

    def settled(self, offsets: Tensor, stretch: Tensor) -> Tensor:
        """Offsets [..., Q], stretched by s [..., 2] about their median: ordered as they were."""
        middle = offsets[..., self.middle, None]
        return middle + stretch.exp().index_select(-1, self.side) * (offsets - middle)

    def calibrated(self, forecast: Forecast, issued: Tensor) -> Forecast:
        """Forecasts of H steps, stretched by s [..., K, 2] of the settled horizons."""
        if not self.on:
            return forecast
        stretch = torch.einsum("hk,...ks->...hs", self.weights, issued)
        return dataclasses.replace(forecast, offsets=self.settled(forecast.offsets, stretch))

    def standing(self, state: Rows) -> Tensor:
        """s of the forecasts that stand open in B states, [B, K, 2]: those that joined their lines last."""
        return state["waiting_stretch"][:, self.ends]


def _interpolation(horizons: tuple[int, ...], horizon: int) -> Tensor:
    """What each settled horizon counts at each of the H, linear in log k: [H, K], rows summing to 1."""
    at, log = torch.arange(1, horizon + 1).log(), torch.tensor(horizons).log()
    weights = torch.zeros(horizon, len(horizons))
    weights[0, 0] = 1.0
    for number, (low, high) in enumerate(pairwise(log)):
        between = (at > low) & (at <= high)
        weights[between, number + 1] = ((at - low) / (high - low))[between]
        weights[between, number] = 1 - weights[between, number + 1]
    return weights
