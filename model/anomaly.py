"""How surprising each observation was to the forecast that stood open for it.

Its tail probability p, two-sided, is read off the calibrated one-step quantiles: linear between them; beyond the
outermost a power of the distance that goes on with the density of the interval next to it. (An exponential tail is too
light: on four open tables 2 to 4 % of all observations then had a p below 1 %; with this one 0.8 to 2 %.) One odd
reading in a hundred is nothing odd, some in a row are: so the last p are combined as Fisher did (1932, "Statistical
methods for research workers", 4th ed., 21.1), each counting half as much as the one after it,

    S <- S / 2 - ln p

and the score is -log10 of the probability that S would be as large if forecasts were right: 2 is one in a hundred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import forgetting_sum
from model.state import Rows, TensorSpec

CERTAIN = 30.0
"""-ln p is cut here: tails are not known any further, and it must fade within a few steps."""
TAIL = 3.0
"""The power with which a tail falls: it is exponential at first, and heavy far out."""
WEIGHTS = torch.tensor([1, -1, 1 / 3, -1 / 21, 1 / 315, -1 / 9765], dtype=torch.float64)
RATES = 2.0 ** torch.arange(len(WEIGHTS), dtype=torch.float64)
"""S is a sum of exponential variables with the rates 1, 2, 4 ..., whose tail is a sum of their tails (hypoexponential):
the weights are the products of 1 / (1 - 2^(j - i)) over all other j, shared out so that the tail of 0 is 1."""


def surprise(values: Tensor, opened: Tensor, levels: Tensor) -> Tensor:
    """-ln of the two-sided tail probability of values [...] under the quantiles opened [..., Q >= 2] of levels [Q].

    >>> opened, levels = torch.tensor([8.0, 10.0, 12.0]), torch.tensor([0.1, 0.5, 0.9])
    >>> [round(math.exp(-surprise(torch.tensor(value), opened, levels)), 4) for value in (10.0, 12.0, 13.0)]
    [1.0, 0.2, 0.0432]
    """
    widths = opened.diff(dim=-1).clamp_min(torch.finfo(opened.dtype).tiny)
    steps = levels.diff()
    below = levels[0] + (steps * ((values[..., None] - opened[..., :-1]) / widths).clamp(0, 1)).sum(-1)
    under = (opened[..., 0] - values).clamp_min(0) * steps[0] / (levels[0] * widths[..., 0])
    over = (values - opened[..., -1]).clamp_min(0) * steps[-1] / ((1 - levels[-1]) * widths[..., -1])
    tails = TAIL * (torch.stack((under, over)) / TAIL).log1p()
    both = tails - torch.stack((below, 1 - below)).log()
    return (both.amax(0) - math.log(2)).clamp(0, CERTAIN)


class Anomaly:
    """The anomaly scores of one model's streams: O(1) a step, one number in their state."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.levels = torch.tensor(config.quantiles, dtype=torch.float64)
        self.schema = (TensorSpec("surprise", (), torch.float64, 2.0),)  # what S is in the mean

    def notice(self, state: Rows, values: Tensor, opened: Tensor, counts: Tensor) -> tuple[Tensor, Rows]:
        """Score values [B, T], for which opened [B, T, Q] had been forecast; counts [B, T] bool: where it had by a warm
        stream, and something was observed. -> scores [B, T], NaN where nothing counts; the rows after them.
        """
        if len(self.levels) < 2:
            return torch.full_like(values, math.nan), {"surprise": state["surprise"]}
        new = torch.where(counts, surprise(values, opened, self.levels), 0.0)
        sums = forgetting_sum(state["surprise"], new, 1 - counts.double() / 2)
        return torch.where(counts, self._score(sums), math.nan), {"surprise": sums[:, -1]}

    def score(self, state: Rows) -> Tensor:
        """The score of the last observation of B streams [B]; NaN where it is missing, or came while warming."""
        known = (state["steps"] > self.config.warmup) & (state["gap"] == 0) & (len(self.levels) > 1)
        return torch.where(known, self._score(state["surprise"]), math.nan)

    @staticmethod
    def _score(sums: Tensor) -> Tensor:
        tail = (WEIGHTS * torch.exp(-RATES * sums[..., None])).sum(-1) / WEIGHTS.sum()
        return tail.clamp(0, 1).log10().abs()
