"""The regression beside the network: fitted in closed form, and its share of the forecast chosen.

Ridge regression over the history of all series gives what they share; one more for each series, of what that
misses, gives how they differ, and the first singular vectors of all those are the directions along which a stream
finds its place when it is served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.features import CLIP
from model.network import Forecaster
from model.quantiles import pinball
from training.module import pick
from training.series import Series
from training.windows import Split, block_of, cut, replay

log = logging.getLogger(__name__)

RIDGE = 300.0
"""On coefficients of what is measured in scales: what so many rows of one scale each weigh."""
ROWS_MAX = 60_000
"""More than these are thinned evenly: hundreds for each coefficient, in seconds."""
SERIES_MAX = 64
"""So many series at most, drawn by the seed, say how series differ and what share is best."""
LEAD_STEPS = 8192
"""The steps before those that are forecast, in which a stream finds its coefficients: twice their memory."""
RANK = 6
ROWS_LEAST = 4
"""Rows for each coefficient of a forecast, below which nothing is fitted."""
SHARES = tuple(k / 10 for k in range(8))


def least_steps(config: ModelConfig) -> int:
    """The steps of a history that tells something of its own: twice what one row of the regression spans."""
    return 2 * (config.context + config.horizon)


def rank_of(config: ModelConfig, lengths: Sequence[int]) -> int:
    """How many directions so many steps of history can tell apart: one fewer than series of some length, 6 at most."""
    long = sum(length >= least_steps(config) for length in lengths)
    return max(0, min(RANK, long - 1))


@torch.no_grad()
def fit_regression(forecaster: Forecaster, series: Sequence[Series], split: Split, seed: int) -> float:
    """Fit the regression of a trained forecaster and choose its share of the forecast. -> the share.

    It is the one with the smallest loss in the validation parts, of a regression fitted to the parts before; then
    that is fitted to all but the test parts. Where there is too little to fit it to, or it is of no use: 0.
    """
    histories = [cut(each, 0, split.test_start(len(each.y))) for each in series]
    fit_stops = [split.fit_stop(len(each.y)) for each in series]
    long = [k for k, stop in enumerate(fit_stops) if stop >= least_steps(forecaster.config)]
    chosen = np.random.default_rng(seed).permutation(long)[:SERIES_MAX].tolist()
    forecaster.eval()
    share = 0.0
    if _fit(forecaster, [cut(each, 0, stop) for each, stop in zip(histories, fit_stops, strict=True)], chosen):
        sums = torch.stack([_losses(forecaster, histories[k], fit_stops[k]) for k in chosen]).sum(0)
        share = SHARES[int(sums[:-1].argmin())]
        losses = " ".join(f"{loss:.5f}" for loss in (sums[:-1] / sums[-1].clamp_min(1)).tolist())
        log.info("share of the regression: %.1f; validation loss by share, from 0 on: %s", share, losses)
        _fit(forecaster, histories, chosen)
    forecaster.regression.share.fill_(share)
    return share


def _fit(forecaster: Forecaster, series: Sequence[Series], chosen: Sequence[int]) -> bool:
    """Fit maps and spread to series. -> whether there was enough to fit to; if not, all is left as it was.

    chosen: those of which each tells how it differs from the others.
    """
    regression = forecaster.regression
    every = -(-sum(len(each.y) for each in series) // ROWS_MAX)
    rows = [_rows(forecaster, each, every) for each in series]
    if not chosen or sum(len(x) for x, _ in rows) < ROWS_LEAST * regression.inputs:
        return False
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    shared = _ridge(x, y)
    regression.maps.zero_()
    regression.maps[:, 0] = shared
    if rank := forecaster.config.rank:
        own = torch.stack([_ridge(x, y - x @ shared).flatten() for x, y in (rows[k] for k in chosen)])
        directions = torch.linalg.svd(own, full_matrices=False).Vh[:rank]
        regression.maps[:, 1 : 1 + len(directions)] = directions.unflatten(1, shared.shape).transpose(0, 1)
    missed = torch.cat([_missed(forecaster, series[k], every) for k in chosen])
    levels = torch.tensor(forecaster.config.quantiles)
    for step, each in enumerate(missed.T):
        regression.spread[step] = each.nanquantile(levels).nan_to_num(0.0)
    return True


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """x [N, p], y [N, H] -> [p, H] float32."""
    x, y = x.double(), y.double()
    weights: Tensor = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return weights.float()


def _rows(forecaster: Forecaster, series: Series, every: int) -> tuple[Tensor, Tensor]:
    """What the regression sees and should say at each `every`-th origin with a whole context before it. -> [N, p],
    [N, H] float32.
    """
    config = forecaster.config
    if len(series.y) < least_steps(config):
        return torch.empty(0, forecaster.regression.inputs), torch.empty(0, config.horizon)
    origins = torch.arange(config.context - 1, len(series.y) - config.horizon, every)
    seen = replay(forecaster, series, 0).seen
    at = pick(seen, torch.zeros_like(origins), origins)
    x = forecaster.regression.regressors(at, torch.from_numpy(series.ts_ms)[origins, None])[:, 0]
    values = seen.filled[0, config.past :].unfold(0, config.horizon + 1, 1)[origins]
    y = ((values[:, 1:] - values[:, :1]) / at.scale).clamp(-CLIP, CLIP).float()
    known = ~y.isnan().any(-1) & ~torch.from_numpy(series.y)[origins].isnan()
    return x[known], y[known]


def _missed(forecaster: Forecaster, series: Series, every: int) -> Tensor:
    """What the regression, learning as it goes, misses. -> [N, H] float32, in scales, NaN where unknown."""
    config = forecaster.config
    series = cut(series, max(0, len(series.y) - 2 * LEAD_STEPS), len(series.y))
    stop = len(series.y) - config.horizon
    block, state = block_of([series]), forecaster.initial_state(1)
    seen, _ = forecaster.features(state, block)
    ahead: Tensor = forecaster.regression(state, seen, block)[0]
    truths = block.values[0, 1:].unfold(0, config.horizon, 1)
    missed: Tensor = (truths - ahead[0, :stop]) / seen.scale[0, :stop, None]
    return missed[config.context :: every].clamp(-CLIP, CLIP).float()


def _losses(forecaster: Forecaster, history: Series, fit_stop: int) -> Tensor:
    """The summed pinball losses, in scales, over what comes after `fit_stop` for each of SHARES, then of how many
    truths. -> [len(SHARES) + 1] float64.
    """
    config, regression = forecaster.config, forecaster.regression
    start = max(0, fit_stop - LEAD_STEPS)
    block, state = block_of([cut(history, start, len(history.y))]), forecaster.initial_state(1)
    first, stop = max(0, fit_stop - start - 1), block.steps - config.horizon
    if stop <= first:
        return torch.zeros(len(SHARES) + 1, dtype=torch.float64)
    seen, _ = forecaster.features(state, block)
    outputs, _ = forecaster.recur(seen, state)
    network = forecaster.forecast(seen.steps(first, block.steps), outputs[:, first:])
    regression.share.fill_(1)
    other, _ = forecaster.blend(network, state, seen, block)
    truths = block.values[:, first + 1 :].unfold(1, config.horizon, 1)
    truths = (truths - network.base[:, : stop - first]) / network.scale[:, : stop - first, None]
    known = ~truths.isnan()
    truths, quantiles = truths[known].clamp(-CLIP, CLIP).float(), torch.tensor(config.quantiles)
    ours, theirs = (each.offsets[:, : stop - first][known] for each in (network, other))
    losses = [pinball((1 - share) * ours + share * theirs, truths, quantiles).mean(-1).sum() for share in SHARES]
    return torch.stack([*losses, known.sum()]).double()
