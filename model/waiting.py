"""Forecasts that wait for their truths, as part of a stream's state.

To settle every horizon, each of the last H forecasts would be kept whole: H^2 numbers a quantile. What is learned from
horizon 11 is much like what is learned from 12, so only 1, 2, 4, 8 ... and H are settled: fewer than 3 H numbers wait.

Each settled horizon k has a line of k places, the oldest first. What is issued joins a line at its end, and leaves it
at its head k steps later, just as its truth comes. The lines stand side by side in one tensor [B, W, ...].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from model.config import ModelConfig
from model.network import Forecast
from model.state import Rows, TensorSpec


def settled_horizons(horizon: int) -> tuple[int, ...]:
    """The horizons whose forecasts are settled: 1, 2, 4 ... and the last.

    >>> settled_horizons(24)
    (1, 2, 4, 8, 16, 24)
    """
    return (*(1 << n for n in range((horizon - 1).bit_length())), horizon)


@lru_cache(maxsize=64)
def passage(horizons: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """How lines move in T steps. Of a tensor [B, W + T * K, ...] of what waited, and then what was issued step by step:
    the places of what is settled [T * K], step by step, and of what waits afterwards [W].

    >>> passage((1, 3), steps=1)
    (tensor([0, 1]), tensor([4, 2, 3, 5]))
    """
    settled, waiting, first = [], [], 0
    for number, horizon in enumerate(horizons):
        issued = sum(horizons) + number + len(horizons) * torch.arange(steps)
        line = torch.cat((torch.arange(first, first + horizon), issued))
        settled.append(line[:steps])
        waiting.append(line[steps:])
        first += horizon
    return torch.stack(settled, dim=1).flatten(), torch.cat(waiting)


class Waiting:
    """The raw forecasts of one model that wait in lines, for the K settled horizons."""

    def __init__(self, config: ModelConfig) -> None:
        self.horizons = settled_horizons(config.horizon)
        self.places = sum(self.horizons)
        self.ahead = torch.tensor(self.horizons) - 1
        self.schema = (
            TensorSpec("waiting_base", (self.places,), torch.float64),
            TensorSpec("waiting_offsets", (self.places, len(config.quantiles)), torch.float32),
        )

    def pass_on(self, state: Rows, forecast: Forecast) -> tuple[Tensor, Tensor, Rows]:
        """Let the forecasts of T steps join, and those whose truths came at these steps leave.

        -> of those that leave, base [B, T, K] and offsets [B, T, K, Q], in the series' own units; the rows.
        """
        streams, steps = forecast.scale.shape
        settled, waiting = passage(self.horizons, steps)
        issued = {
            "waiting_base": forecast.base.index_select(2, self.ahead),
            "waiting_offsets": (forecast.scale[..., None, None] * forecast.offsets.index_select(2, self.ahead)).float(),
        }
        both = {name: torch.cat((state[name], new.flatten(1, 2)), dim=1) for name, new in issued.items()}
        base, offsets = (
            line.index_select(1, settled).view(streams, steps, len(self.horizons), *line.shape[2:])
            for line in both.values()
        )
        rows = {name: line.index_select(1, waiting) for name, line in both.items()}
        return base, offsets, rows
