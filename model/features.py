"""From values on the grid to what the network sees: scale, seasonal lags, calendar, age and gaps.

All of it is causal (a feature at t knows nothing after t), costs O(1) a step, and is the same function for one step
(T = 1) and for many. What it remembers of a stream, it declares in `Features.schema`. Sums are kept in float64, so
that a stream whose level is 10^8 times its changes is forecast as well as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.state import Rows, TensorSpec

DAY_MS = 86_400_000
YEAR_MS = 365.2425 * DAY_MS
CLIP = 12.0
"""Scaled values beyond this are cut: one absurd reading must not shout down all else."""
PRIOR = 0.3
"""Before anything is known, a stream is taken to vary by this share of its level."""
FLOOR = 1e-9
"""The scale of a stream that never changes, as a share of its level: well above what is mere rounding."""


@dataclass(frozen=True)
class Block:
    """B streams by T consecutive steps of their grids.

    values [B, T] float64, NaN where nothing was observed; ts_ms [B, T] int64, the epoch time of each step;
    covariates [B, T, K] float64, NaN where unknown.
    """

    values: Tensor
    ts_ms: Tensor
    covariates: Tensor

    @property
    def steps(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True)
class Seen:
    """What the network sees of B streams at T steps.

    inputs [B, T, F] float32: what goes into the recurrence. filled [B, L + T] float64: the values with holes filled
    by the season before, and the L (`ModelConfig.past`) before them. level, scale [B, T] float64: the units that a
    step thinks in.
    """

    inputs: Tensor
    filled: Tensor
    level: Tensor
    scale: Tensor

    def steps(self, start: int, stop: int) -> Self:
        """The steps start ... stop - 1 alone."""
        past = self.filled.shape[1] - self.level.shape[1]
        return type(self)(
            self.inputs[:, start:stop],
            self.filled[:, start : stop + past],
            self.level[:, start:stop],
            self.scale[:, start:stop],
        )

    def windows(self, length: int, ago: int = 0) -> Tensor:
        """The last `length` values as they stood at each step, or `ago` steps before it. -> [B, T, length] float64."""
        stop = self.filled.shape[1] - ago
        return self.filled[:, stop - self.level.shape[1] - length + 1 : stop].unfold(1, length, 1)


def fill_from_season(before: Tensor, values: Tensor, season: int) -> Tensor:
    """Fill each missing value with the one a season earlier, itself filled. before [B, >= season], values [B, T].

    >>> nan = math.nan
    >>> fill_from_season(torch.tensor([[1.0, 2.0]]), torch.tensor([[nan, 3.0, nan, nan]]), season=2)
    tensor([[1., 3., 1., 3.]])
    """
    series = torch.cat((before[:, before.shape[1] - season :], values), dim=1)
    steps = series.shape[1]
    # One row a season: filling is then carrying the last known value down each column.
    padded = functional.pad(series, (0, -steps % season), value=math.nan)
    table = padded.view(len(series), -1, season)
    row = torch.arange(table.shape[1])[None, :, None]
    known = torch.where(table.isnan(), 0, row).cummax(dim=1).values
    return table.gather(1, known).flatten(1)[:, season:steps]


def forgetting_sum(before: Tensor, terms: Tensor, keep: Tensor) -> Tensor:
    """s_t = keep_t * s_{t-1} + terms_t for all t. before [B]; terms, keep [B, T], keep in (0, 1] -> [B, T].

    >>> forgetting_sum(torch.tensor([8.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([[4., 3.]])
    """
    pieces = []
    for start in range(0, terms.shape[1], 128):  # short enough for the product of `keep` to stay far from zero
        decay = keep[:, start : start + 128].cumprod(dim=1)
        sums = decay * (before[:, None] + (terms[:, start : start + 128] / decay).cumsum(dim=1))
        pieces.append(sums)
        before = sums[:, -1]
    return torch.cat(pieces, dim=1)


def steps_since(before: Tensor, happened: Tensor) -> Tensor:
    """How many steps ago something last happened. before [B] int64; happened [B, T] bool -> [B, T] int64.

    >>> steps_since(torch.tensor([3]), torch.tensor([[False, True, False]]))
    tensor([[4, 0, 1]])
    """
    step = torch.arange(1, happened.shape[1] + 1).expand_as(happened)
    last = torch.where(happened, step, -before[:, None]).cummax(dim=1).values
    return step - last


def calendar(ts_ms: Tensor, *, yearly: bool = True) -> Tensor:
    """Time of day, of week and of year as points on circles; zeros for the year's if not `yearly`.

    ts_ms [B, T] int64 -> [B, T, 6] float32.
    """
    day = ts_ms.remainder(DAY_MS).double() / DAY_MS
    week = (ts_ms + 3 * DAY_MS).remainder(7 * DAY_MS).double() / (7 * DAY_MS)  # the epoch began on a Thursday
    year = ts_ms.double().remainder(YEAR_MS) / YEAR_MS
    angle = 2 * math.pi * torch.stack((day, week, year), dim=-1)
    looked_at = torch.tensor((True, True, yearly) * 2)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float() * looked_at


def scaled(values: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """Values in a step's own units, as float32: 0 where unknown, cut at +-CLIP."""
    return ((values - level) / scale).float().nan_to_num(0.0).clamp(-CLIP, CLIP)


class Features(nn.Module):
    """The features of one model. Its only parameters are the covariates' means and deviations, from training."""

    covariate_mean: Tensor
    covariate_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        known = len(config.covariates)
        self.register_buffer("covariate_mean", torch.zeros(known, dtype=torch.float64))
        self.register_buffer("covariate_std", torch.ones(known, dtype=torch.float64))
        self.inputs = 13 + 2 * known
        self.schema = (
            TensorSpec("values", (config.past,), torch.float64, math.nan),
            TensorSpec("steps", (), torch.int64),
            TensorSpec("gap", (), torch.int64),
            TensorSpec("weight", (), torch.float64),
            TensorSpec("value_sum", (), torch.float64),
            TensorSpec("deviation_sum", (), torch.float64),
            TensorSpec("naive_weight", (), torch.float64),
            TensorSpec("naive_sum", (), torch.float64),
        )

    def forward(self, state: Rows, block: Block) -> tuple[Seen, Rows]:
        """What the network sees of `block` after `state`, and the rows of this part after it."""
        past, season = self.config.past, self.config.season
        values, observed = block.values, ~block.values.isnan()
        filled = torch.cat((state["values"], fill_from_season(state["values"], values, season)), dim=1)
        naive = filled[:, past - season : -season]  # the value a season before each step
        naive_error = (values - naive).abs()

        keep = 1 - observed.double() / self.config.memory
        comparable = ~naive_error.isnan()
        naive_keep = 1 - comparable.double() / self.config.memory
        weight = forgetting_sum(state["weight"], observed.double(), keep)
        value_sum = forgetting_sum(state["value_sum"], values.nan_to_num(0.0), keep)
        level = value_sum / weight.clamp_min(torch.finfo(torch.float64).tiny)
        deviation = (values - level).abs().nan_to_num(0.0)
        deviation_sum = forgetting_sum(state["deviation_sum"], deviation, keep)
        naive_weight = forgetting_sum(state["naive_weight"], comparable.double(), naive_keep)
        naive_sum = forgetting_sum(state["naive_sum"], naive_error.nan_to_num(0.0), naive_keep)
        # Before the first observation stands an imaginary one that deviates by PRIOR and is forgotten as the others
        # are: of its weight, what the weights lack of their limit, the memory, is left.
        prior, least = PRIOR * level.abs(), FLOOR * level.abs() + torch.finfo(torch.float32).tiny
        left, naive_left = 1 - weight / self.config.memory, 1 - naive_weight / self.config.memory
        scale = (deviation_sum + left * prior) / (weight + left) + least
        naive_scale = (naive_sum + naive_left * prior) / (naive_weight + naive_left) + least

        steps = state["steps"][:, None] + torch.arange(1, block.steps + 1)
        gap = steps_since(state["gap"], observed)
        ahead = filled[:, past - season + 1 : filled.shape[1] - season + 1]  # a season before the next step
        scalars = torch.stack(
            (
                scaled(values, level, scale),
                scaled(naive, level, scale),
                scaled(ahead, level, scale),
                observed.float(),
                gap.float().log1p() / 4,
                steps.float().log1p() / 8,
                (naive_scale / scale).log().clamp(-CLIP, CLIP).float(),
            ),
            dim=-1,
        )
        known = (block.covariates - self.covariate_mean) / self.covariate_std
        covariates = torch.cat((known.nan_to_num(0.0).clamp(-CLIP, CLIP), known.isnan()), dim=-1).float()
        inputs = torch.cat((scalars, calendar(block.ts_ms, yearly=self.config.yearly), covariates), dim=-1)
        after = {
            "values": filled[:, -past:],
            "steps": steps[:, -1],
            "gap": gap[:, -1],
            "weight": weight[:, -1],
            "value_sum": value_sum[:, -1],
            "deviation_sum": deviation_sum[:, -1],
            "naive_weight": naive_weight[:, -1],
            "naive_sum": naive_sum[:, -1],
        }
        return Seen(inputs, filled, level, scale), after

    def base(self, seen: Seen) -> Tensor:
        """The seasonal naive forecast of each step, its level where no season was seen. -> [B, T, H] float64."""
        season, steps = self.config.season, seen.level.shape[1]
        ahead = torch.arange(self.config.horizon) % season - season  # relative to the first unseen step
        first_unseen = seen.filled.shape[1] - steps + 1 + torch.arange(steps)
        values = seen.filled[:, first_unseen[:, None] + ahead]
        return torch.where(values.isnan(), seen.level[..., None], values)

    def recent(self, seen: Seen) -> Tensor:
        """The last L values at each step, in its own units. -> [B, T, L] float32."""
        return scaled(seen.windows(self.config.context), seen.level[..., None], seen.scale[..., None])
