"""How good the forecasts of a backtest were, overall, by horizon and by series, and how sure that is.

Every measure is a ratio of sums over forecasts. So the sums are made once for each unit that may be resampled (a
series, or a block of origins) and each step ahead; the rest is adding them up in this way or that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.quantiles import median_index, pinball
from training.backtest import CAROUSEL, Backtest

LEVELS = (0.5, 0.8, 0.95)
"""Of the central intervals whose coverage and width are told, as far as the quantiles reach."""
ERRORS = ("wql", "sql", "mase", "rmsse")
"""The measures that are to be low."""
RESAMPLES = 2_000
SERIES_MIN = 5
"""With fewer series than these, blocks of origins are resampled instead."""
BLOCKS_MIN = 5
"""With fewer blocks than these, nothing is said."""
NUMBERS_AT_ONCE = 4_000_000

Sums = dict[str, Tensor]
"""By term of a measure."""


@dataclass(frozen=True)
class Measures:
    """Of one method; all tensors [...], one element for each group of forecasts; NaN where nothing can be said.

    count: truths. wql: the weighted quantile loss, the mean over the quantiles of sum(2 pinball) / sum|y|. sql: the
    mean of the same losses, each over the error of the seasonal naive point in the series' history, so that a large
    series counts as a small one. mase: the error of the median over the same (Hyndman and Koehler 2006). rmsse: by
    series, its root mean squared over that of the seasonal naive in the history; their mean. coverage: of each
    central interval, the share of truths within; width: how wide it is, over the seasonal naive error.
    """

    count: Tensor
    wql: Tensor
    sql: Tensor
    mase: Tensor
    rmsse: Tensor
    coverage: Mapping[float, Tensor]
    width: Mapping[float, Tensor]

    def at(self, index: int) -> Measures:
        """Those of one group."""
        of_level = [{level: each[index] for level, each in part.items()} for part in (self.coverage, self.width)]
        return Measures(self.count[index], *(getattr(self, name)[index] for name in ERRORS), *of_level)


@dataclass(frozen=True)
class Difference:
    """How much lower (below 0) or higher a measure of Carousel's is than a rival's, as a share of the rival's.

    low, high: between them it lies in 95% of the resamples; NaN where there is too little to resample.
    """

    value: float
    low: float
    high: float


def overall(result: Backtest) -> dict[str, Measures]:
    """Over everything, by method; the tensors have no dimension."""
    return {
        method: _measures(
            {term: sums.sum(1) for term, sums in _sums(result, method, result.of, len(result.ids)).items()}
        )
        for method in result.quantiles
    }


def by_step(result: Backtest) -> dict[str, Measures]:
    """For each of the H steps ahead, by method; tensors [H]."""
    return {
        method: _measures({term: sums.T for term, sums in _sums(result, method, result.of, len(result.ids)).items()})
        for method in result.quantiles
    }


def by_series(result: Backtest) -> dict[str, Measures]:
    """For each series in the order of `ids`, by method; tensors [S]."""
    return {
        method: _measures(
            {term: sums.sum(1)[:, None] for term, sums in _sums(result, method, result.of, len(result.ids)).items()}
        )
        for method in result.quantiles
    }


def reliability(result: Backtest) -> dict[str, Tensor]:
    """The share of truths that came out below each quantile, by method; [Q]. Ideally the quantile itself."""
    known = ~result.truth.isnan()
    return {
        method: (result.truth[..., None] <= quantiles)[known].double().mean(0)
        for method, quantiles in result.quantiles.items()
    }


def _measures(sums: Mapping[str, Tensor], weight: Tensor | None = None) -> Measures:
    """From the sums [..., S] of S series. weight [..., S]: how often each of them counts (None: once)."""
    total = {term: each.sum(-1) for term, each in sums.items()}
    root = (sums["square"] / sums["rooted"]).sqrt()
    counts = (~root.isnan()) * (1.0 if weight is None else weight)
    return Measures(
        count=total["known"],
        wql=total["pinball"] / total["size"],
        sql=total["scaled_pinball"] / total["scaled"],
        mase=total["scaled_error"] / total["scaled"],
        rmsse=(root.nan_to_num(0.0) * counts).sum(-1) / counts.sum(-1),
        coverage={level: total[f"within {level}"] / total["known"] for level in LEVELS if f"within {level}" in total},
        width={level: total[f"width {level}"] / total["scaled"] for level in LEVELS if f"width {level}" in total},
    )


def _sums(result: Backtest, method: str, unit: Tensor, units: int, *, errors_only: bool = False) -> Sums:
    """Each term summed over the forecasts of a unit. unit [N] int64: which one each forecast belongs to. -> [U, H]."""
    zeros = torch.zeros(units, result.config.horizon, dtype=torch.float64)
    return {term: zeros.index_add(0, unit, each) for term, each in _terms(result, method, errors_only=errors_only)}


def _terms(result: Backtest, method: str, *, errors_only: bool) -> Iterator[tuple[str, Tensor]]:
    """What measures are made of, [N, H]; 0 where the truth is unknown or, if it takes one, there is no scale."""
    quantiles, forecast = result.config.quantiles, result.quantiles[method]
    known = ~result.truth.isnan()
    truth = result.truth.nan_to_num(0.0)
    losses = 2 * pinball(forecast, truth, torch.tensor(quantiles, dtype=torch.float64)).mean(-1) * known
    missed = (truth - forecast[..., median_index(quantiles)]) * known
    scale, root_scale = result.naive_mae[:, None], result.naive_rmse[:, None]
    scaled, rooted = known & (scale > 0), known & (root_scale > 0)
    yield "known", known.double()
    yield "size", truth.abs()
    yield "pinball", losses
    yield "scaled", scaled.double()
    yield "scaled_pinball", torch.where(scaled, losses / scale, 0.0)
    yield "scaled_error", torch.where(scaled, missed.abs() / scale, 0.0)
    yield "rooted", rooted.double()
    yield "square", torch.where(rooted, (missed / root_scale).square(), 0.0)
    for level in LEVELS if not errors_only else ():
        if ends := interval(forecast, quantiles, level):
            low, high = ends
            yield f"within {level}", ((low <= truth) & (truth <= high) & known).double()
            yield f"width {level}", torch.where(scaled, (high - low) / scale, 0.0)


def interval(forecast: Tensor, quantiles: tuple[float, ...], level: float) -> tuple[Tensor, Tensor] | None:
    """The ends [...] of the central interval of a level, by linear interpolation between the quantiles of a forecast
    [..., Q]; None if they do not reach so far.

    >>> interval(torch.tensor([10.0, 20.0, 40.0]), (0.2, 0.4, 0.8), level=0.4)
    (tensor(15.), tensor(35.))
    >>> interval(torch.tensor([10.0, 20.0, 40.0]), (0.2, 0.4, 0.8), level=0.8)
    """
    ends = []
    for wanted in (0.5 - level / 2, 0.5 + level / 2):
        # 0.1 is not always quite 0.1
        place = float(np.interp(wanted, quantiles, range(len(quantiles)), left=np.nan, right=np.nan))
        near = np.isclose(wanted, quantiles)
        place = float(near.argmax()) if near.any() else place
        if np.isnan(place):
            return None
        below = int(place)
        above = min(below + 1, len(quantiles) - 1)
        ends.append(torch.lerp(forecast[..., below], forecast[..., above], place - below))
    return ends[0], ends[1]


# --- How sure that is -------------------------------------------------------------------------------------------


def differences(result: Backtest, seed: int = 0) -> dict[str, dict[str, Difference]]:
    """Carousel beside each other method on the same forecasts: by method, then by measure (`ERRORS`).

    The bootstrap is paired: each resample draws series (or, of few, blocks of consecutive origins in each), and both
    methods are measured on those. Equal seeds give equal intervals.
    """
    unit, strata = _units(result)
    series = torch.empty(int(unit.max()) + 1, dtype=torch.int64).scatter_(0, unit, result.of)
    enough = len(series) >= BLOCKS_MIN
    measured = {
        method: _resampled(result, method, unit, series, strata, RESAMPLES if enough else 0, seed)
        for method in result.quantiles
    }
    return {
        rival: {name: _difference(measured[CAROUSEL][name], others[name]) for name in ERRORS}
        for rival, others in measured.items()
        if rival != CAROUSEL
    }


def resampled_units(result: Backtest) -> str:
    """What the bootstrap draws, in words."""
    unit, strata = _units(result)
    count = int(unit.max()) + 1
    return f"{count:,} series" if len(strata) == 1 and count == len(result.ids) else f"{count:,} blocks of origins"


def _difference(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Difference:
    """Of the measure itself (first) and its resamples (the others)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = ours / theirs - 1
    low, high = np.quantile(shares[1:], (0.025, 0.975)) if len(shares) > 1 else (np.nan, np.nan)
    return Difference(float(shares[0]), float(low), float(high))


def _units(result: Backtest) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """What is drawn. -> of each forecast the unit that it belongs to [N]; the units among which is drawn together."""
    if len(result.ids) >= SERIES_MIN:
        return result.of, [np.arange(len(result.ids))]
    grid, of = result.config.grid, result.of.numpy()
    slots = grid.slot_of(result.origin_ms.numpy()) if grid else np.arange(len(of))
    # Forecasts that overlap err alike, and so do those of one season: a block spans them.
    block = slots // max(2 * result.config.horizon, result.config.season)
    known, unit = np.unique(np.stack((of, block)), axis=1, return_inverse=True)
    strata = [np.flatnonzero(known[0] == number) for number in range(len(result.ids))]
    return torch.from_numpy(unit.reshape(-1).astype(np.int64)), strata


def _resampled(
    result: Backtest,
    method: str,
    unit: Tensor,
    series: Tensor,
    strata: list[NDArray[np.int64]],
    resamples: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Each measure over everything, then over every resample. series [U]: of each unit. -> [1 + resamples]."""
    sums = {term: each.sum(1) for term, each in _sums(result, method, unit, len(series), errors_only=True).items()}
    count, random = len(result.ids), np.random.default_rng(seed)

    def by_series_of(weighted: Tensor) -> Tensor:
        return torch.zeros(len(weighted), count, dtype=torch.float64).index_add(1, series, weighted)

    units_of = by_series_of(torch.ones(1, len(series), dtype=torch.float64))
    found: dict[str, list[Tensor]] = {name: [] for name in ERRORS}
    at_once = max(1, NUMBERS_AT_ONCE // len(series))
    for size in [0] + [min(at_once, resamples - done) for done in range(0, resamples, at_once)]:
        drawn = np.ones((max(size, 1), len(series)))  # size 0: all as they are
        for stratum in strata if size else ():
            drawn[:, stratum] = random.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), size)
        weight = torch.from_numpy(drawn)
        part = _measures(
            {term: by_series_of(weight * each) for term, each in sums.items()}, by_series_of(weight) / units_of
        )
        for name in ERRORS:
            found[name].append(getattr(part, name))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}
