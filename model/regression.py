"""A linear regression beside the network: from the last values to the next H, and a few coefficients of its own for
each stream, found while it is served.

All streams share one map. Where they differ, they differ along r directions, found in training; how far along each,
a stream learns by itself as its forecasts come true: recursive least squares with forgetting, of r numbers instead
of p x H. So it knows no names, costs O(1) a step and follows what drifts.

What is missing counts as what it was filled with, and nothing is learnt at a step without an observation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.features import CLIP, DAY_MS, Block, Seen, forgetting_sum, scaled
from model.state import Rows, TensorSpec

LAGS_MAX, PHASES_MAX = 336, 48
MEMORY = 4000
"""Steps over which a stream's own coefficients forget."""
PRIOR = 100.0
"""How many squared units of evidence (the scale's, over all H steps) it takes to believe half in a coefficient."""
EVERY_MOST = 5


def learnt_every(horizon: int, season: int) -> int:
    """Each how many-th step is learnt from. The H values up to a step are nearly those up to the step before, so little
    is lost with those between; but in time with the season, only some of its phases would ever be seen.

    >>> learnt_every(24, season=24), learnt_every(24, season=5), learnt_every(1, season=24)
    (5, 4, 1)
    """
    return max(n for n in range(1, EVERY_MOST + 1) if 2 * n <= max(horizon, 2) and math.gcd(n, season) == 1)


class Regression(nn.Module):
    """Forecasts of the next H values, in units of each step's scale, from its last one.

    maps [p, 1 + r, H] float32: what all streams share, then the r directions. spread [H, Q] float32: the quantiles
    about it. share []: how much of the blended forecast is the regression's; 0 until it is fitted.
    """

    maps: Tensor
    spread: Tensor
    share: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.lags = min(config.context, LAGS_MAX)
        self.every = learnt_every(config.horizon, config.season)
        # A grid with holes has no calendar here: the time H steps ago is not told by the time now.
        clocked = config.grid is not None and config.grid.period == 1 and config.season > 1
        self.phases = min(config.season, PHASES_MAX) if clocked else 0
        self.inputs = self.lags + (self.phases + 7 if clocked else 0) + 1
        self.register_buffer("maps", torch.zeros(self.inputs, 1 + config.rank, config.horizon))
        self.register_buffer("spread", torch.zeros(config.horizon, len(config.quantiles)))
        self.register_buffer("share", torch.zeros(()))
        rank = config.rank
        self.schema = (
            (TensorSpec("gram", (rank, rank), torch.float64), TensorSpec("moment", (rank,), torch.float64))
            if rank
            else ()
        )

    def regressors(self, seen: Seen, ts_ms: Tensor, ago: int = 0) -> Tensor:
        """What is regressed on at each step, or `ago` steps before it: lags, calendar, a constant. ts_ms [B, T]
        -> [B, T, p] float32.
        """
        windows = seen.windows(self.lags, ago)
        parts = [scaled(windows, windows[..., -1:], seen.scale[..., None])]
        if self.phases and self.config.step_ms:
            ts_ms = ts_ms - ago * self.config.step_ms
            phase = (ts_ms // self.config.step_ms) % self.config.season * self.phases // self.config.season
            parts += [
                functional.one_hot(phase, self.phases).float(),
                functional.one_hot(ts_ms // DAY_MS % 7, 7).float(),
            ]
        return torch.cat((*parts, parts[0].new_ones(*ts_ms.shape, 1)), dim=-1)

    def targets(self, seen: Seen) -> Tensor:
        """The H values up to each step, from the one before them and in units of its scale; NaN where unknown.
        -> [B, T, H] float32.
        """
        windows = seen.windows(self.config.horizon + 1)
        return ((windows[..., 1:] - windows[..., :1]) / seen.scale[..., None]).clamp(-CLIP, CLIP).float()

    def forward(self, state: Rows, seen: Seen, block: Block, first: int = 0) -> tuple[Tensor, Rows]:
        """The H values to come, as forecast at steps first ... T - 1. -> [B, T - first, H] float64, the new rows."""
        now = seen.steps(first, block.steps)
        parts = self._mapped(self.regressors(now, block.ts_ms[:, first:]))
        moves, rows = parts[..., 0, :], {}
        if self.config.rank:
            gram, moment = self._learn(state, seen, block)
            prior = PRIOR * torch.eye(self.config.rank, dtype=torch.float64)
            own = torch.linalg.solve(gram[:, first:] + prior, moment[:, first:])
            moves = moves + (own.float()[..., None, :] @ parts[..., 1:, :])[..., 0, :]
            rows = {"gram": gram[:, -1].contiguous(), "moment": moment[:, -1].contiguous()}
        last = now.windows(1)
        last = torch.where(last.isnan(), now.level[..., None], last)
        return last + now.scale[..., None] * moves, rows

    def _mapped(self, regressors: Tensor) -> Tensor:
        """[B, T, p] -> [B, T, 1 + r, H]: what the shared map and each direction make of it."""
        return (regressors @ self.maps.flatten(1)).view(*regressors.shape[:-1], *self.maps.shape[1:])

    def _learn(self, state: Rows, seen: Seen, block: Block) -> tuple[Tensor, Tensor]:
        """What is known of the coefficients after each step: every n-th settles the forecast of H steps before, taken
        in the scale of now, and stands for n. -> gram [B, T, r, r], moment [B, T, r] float64.
        """
        horizon, rank = self.config.horizon, self.config.rank
        parts, targets = self._mapped(self.regressors(seen, block.ts_ms, horizon)), self.targets(seen)
        steps = state["steps"][:, None] + torch.arange(1, block.steps + 1)
        counts = (steps >= self.lags + horizon) & (steps % self.every == 0)
        counts &= ~block.values.isnan() & ~targets.isnan().any(-1)
        evidence = self.every * counts.double()
        missed, along = (targets - parts[..., 0, :]).nan_to_num(0.0), parts[..., 1:, :]
        # [B, T, r, r + 1]: both sums are taken in one.
        terms = along @ torch.cat((along, missed[..., None, :]), dim=-2).mT
        terms = (terms.double() * evidence[..., None, None]).flatten(2).mT.flatten(0, 1)
        keep = (1 - evidence / MEMORY).repeat_interleave(rank * (rank + 1), dim=0)
        before = torch.cat((state["gram"], state["moment"][..., None]), dim=-1).flatten()
        sums = forgetting_sum(before, terms, keep).view(-1, rank, rank + 1, block.steps).movedim(-1, 1)
        return sums[..., :-1], sums[..., -1]
