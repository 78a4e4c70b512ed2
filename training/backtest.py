"""Backtest: replay as served, beside the seasonal naive forecast.

Each series is fed to `Follower.advance` from its first step, as its observations would come live, and the
forecasts issued over its last part are kept. So the scores are those of the streaming model, warm-up, scaling,
carried state and calibration included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from model.config import ModelConfig
from model.follow import Follower
from model.network import Forecast, Forecaster
from model.scoring import Scores, score
from training.series import Series
from training.table import TableError
from training.windows import block_of, cut

CAROUSEL, RAW, NAIVE = "carousel", "carousel, raw", "seasonal naive"
"""The methods, by the names that tables and bundles give them."""
NUMBERS_MAX = 16_000_000
"""Where K is not given, origins are thinned until the forecasts are no more numbers than these."""
BLOCK_NUMBERS = 4_000_000
"""And so many at most are in work at once."""
GROUP_STREAMS = 512
"""Series replayed side by side."""


@dataclass(frozen=True)
class Backtest:
    """Forecasts from N origins for the H steps after each, with what came true. All tensors float64.

    series: by its unique_id; of [N]: the index of each origin's in `ids`. origin_ms [N] int64: the time of the last
    observation seen. truth [N, H], NaN where missing. quantiles [N, H, Q], by method. naive_mae, naive_rmse [N]: the
    mean absolute and the root mean squared error of the seasonal naive point in the series' history before its first
    origin.
    """

    config: ModelConfig
    ids: Sequence[str]
    of: Tensor
    origin_ms: Tensor
    truth: Tensor
    quantiles: Mapping[str, Tensor]
    naive_mae: Tensor
    naive_rmse: Tensor

    def scores(self) -> dict[str, Scores]:
        """Over everything, by method: the few measures that a live stream has too."""
        truth = self.truth.flatten()
        naive_mae = self.naive_mae[:, None].expand_as(self.truth).flatten()
        return {
            method: score(quantiles.flatten(0, 1), truth, naive_mae, self.config)
            for method, quantiles in self.quantiles.items()
        }

    def at(self, rows: Tensor) -> Backtest:
        """The forecasts from some of the origins alone. rows: indices [n] int64; series left without any go too."""
        kept, of = torch.unique(self.of[rows], return_inverse=True)
        return dataclasses.replace(
            self,
            ids=[self.ids[number] for number in kept],
            of=of,
            origin_ms=self.origin_ms[rows],
            truth=self.truth[rows],
            quantiles={method: quantiles[rows] for method, quantiles in self.quantiles.items()},
            naive_mae=self.naive_mae[rows],
            naive_rmse=self.naive_rmse[rows],
        )

    def write_forecasts(self, path: Path) -> None:
        """Write the forecasts as Parquet, one row for each origin and step ahead.

        Columns: unique_id, origin (the ds of the last observation seen, in UTC), step (1 ... H), y, and a column
        q0.1 ... q0.9 for each quantile. Raises OSError where the file cannot be written.
        """
        horizon = self.config.horizon
        names = np.asarray(self.ids, dtype=object)[self.of.numpy()]
        origins = pd.to_datetime(self.origin_ms.numpy(), unit="ms")  # UTC, and like most tables without saying so
        frame = pd.DataFrame(
            {
                "unique_id": np.repeat(names, horizon),
                "origin": origins.repeat(horizon),
                "step": np.tile(np.arange(1, horizon + 1), len(names)),
                "y": self.truth.flatten().numpy(),
            }
        )
        forecasts = self.quantiles[CAROUSEL].flatten(0, 1).numpy()
        for number, quantile in enumerate(self.config.quantiles):
            frame[f"q{quantile:g}"] = forecasts[:, number]
        frame.to_parquet(path, index=False)


def backtest(
    forecaster: Forecaster, series: Sequence[Series], starts: Sequence[int], every: int | None = None
) -> Backtest:
    """Forecast the part from step `starts[i]` on of each series, from every `every`-th origin (None: as many as fit).

    The first origin is the step before `starts[i]`, the last is H steps before the end, so that all truths lie in
    the table. No forecast is issued where nothing was observed. Raises TableError if that leaves no origin at all.
    """
    config = forecaster.config
    whole = [_origins(each, start, 1, config.horizon) for each, start in zip(series, starts, strict=True)]
    if every is None:
        numbers = sum(map(len, whole)) * config.horizon * len(config.quantiles)
        every = max(1, math.ceil(numbers / NUMBERS_MAX))
    chosen = [
        _Chosen(each, start, origins)
        for each, start in zip(series, starts, strict=True)
        if len(origins := _origins(each, start, every, config.horizon))
    ]
    if not chosen:
        longest = max((len(each.y) for each in series), default=0)
        raise TableError(
            f"nothing to backtest on: no series holds {config.horizon} steps (the horizon) in its held-back end, and"
            f" the longest has {longest} in all; a longer table, a shorter horizon or more steps held back would help"
        )
    chosen.sort(key=lambda each: each.length, reverse=True)
    forecaster.eval()
    replayed: list[_Issued] = []
    for first in range(0, len(chosen), GROUP_STREAMS):
        replayed += _replay(forecaster, chosen[first : first + GROUP_STREAMS])
    return _assembled(config, chosen, replayed)


@dataclass(frozen=True)
class _Chosen:
    """A series to forecast from step `start` on, and the steps at which forecasts are issued."""

    series: Series
    start: int
    origins: NDArray[np.int64]

    @property
    def length(self) -> int:
        return len(self.series.y)


def _origins(series: Series, start: int, every: int, horizon: int) -> NDArray[np.int64]:
    steps = np.arange(max(start, 1) - 1, len(series.y) - horizon, every)
    return steps[~np.isnan(series.y[steps])]


@dataclass(frozen=True)
class _Issued:
    """What was forecast from n origins: base [n, H], quantiles as issued and raw [n, H, Q]."""

    base: Tensor
    calibrated: Tensor
    raw: Tensor


def _replay(forecaster: Forecaster, group: Sequence[_Chosen]) -> list[_Issued]:
    """Feed series, the longest first, to the model. -> for each, the forecasts from its origins.

    They stand aligned at their ends, for there the origins are; a shorter one joins when it begins. Where we are is
    counted in steps before the end.
    """
    config, follower = forecaster.config, Follower(forecaster)
    first_origin = max(each.length - int(each.origins[0]) for each in group)
    numbers = max(config.horizon * len(config.quantiles), config.context)
    forecasts: list[list[_Issued]] = [[] for _ in group]
    state = follower.schema.initial(0)
    at = group[0].length
    while at > config.horizon:
        present = [each for each in group if each.length >= at]
        beginning = follower.schema.initial(len(present) - len(state["h"]))
        state = {name: torch.cat((rows, beginning[name])) for name, rows in state.items()}
        emit = at <= first_origin
        later = [each.length for each in group[len(present) :]] + ([] if emit else [first_origin])
        stop = max(0, at - max(1, BLOCK_NUMBERS // (len(present) * numbers)), *later)
        block = block_of([cut(each.series, each.length - at, each.length - stop) for each in present])
        followed = follower.advance(state, block)
        state, raw = followed.rows, followed.raw
        for row, each in enumerate(present if emit else ()):
            column = each.origins - (each.length - at)
            column = column[(column >= 0) & (column < at - stop)]
            chosen = Forecast(raw.base[row, column], raw.scale[row, column], raw.offsets[row, column])
            issued = follower.calibration.calibrated(chosen, followed.stretch[row, column])
            forecasts[row].append(_Issued(chosen.base, issued.values, chosen.values))
        at = stop
    return [
        _Issued(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(_Issued)))
        for parts in forecasts
    ]


def _assembled(config: ModelConfig, chosen: Sequence[_Chosen], replayed: Sequence[_Issued]) -> Backtest:
    number = {name: k for k, name in enumerate(dict.fromkeys(each.series.unique_id for each in chosen))}
    ahead = np.arange(1, config.horizon + 1)
    counts = torch.tensor([len(each.origins) for each in chosen])
    naive = [
        issued.base[..., None] + _naive_spread(each.series.y[: each.start], config)
        for each, issued in zip(chosen, replayed, strict=True)
    ]

    def of_history(error: Callable[[NDArray[np.float64], int], float]) -> Tensor:
        errors = [error(each.series.y[: each.start], config.season) for each in chosen]
        return torch.tensor(errors, dtype=torch.float64).repeat_interleave(counts)

    return Backtest(
        config=config,
        ids=list(number),
        of=torch.tensor([number[each.series.unique_id] for each in chosen]).repeat_interleave(counts),
        origin_ms=torch.cat([torch.from_numpy(each.series.ts_ms[each.origins]) for each in chosen]),
        truth=torch.cat([torch.from_numpy(each.series.y[each.origins[:, None] + ahead]) for each in chosen]),
        quantiles={
            CAROUSEL: torch.cat([issued.calibrated for issued in replayed]),
            RAW: torch.cat([issued.raw for issued in replayed]),
            NAIVE: torch.cat(naive),
        },
        naive_mae=of_history(naive_mae),
        naive_rmse=of_history(naive_rmse),
    )


def naive_mae(history: NDArray[np.float64], season: int) -> float:
    """The mean absolute error of "as a season ago" over a history; NaN if it is shorter than that.

    >>> naive_mae(np.array([1.0, 2.0, 3.0, np.nan, 6.0]), season=2)
    2.5
    """
    errors = np.abs(history[season:] - history[:-season])
    return float(np.nanmean(errors)) if (~np.isnan(errors)).any() else math.nan


def naive_rmse(history: NDArray[np.float64], season: int) -> float:
    """Its root mean squared error; NaN likewise.

    >>> naive_rmse(np.array([1.0, 2.0, 2.0, np.nan, 9.0]), season=2)
    5.0
    """
    squares = np.square(history[season:] - history[:-season])
    return math.sqrt(np.nanmean(squares)) if (~np.isnan(squares)).any() else math.nan


def _naive_spread(history: NDArray[np.float64], config: ModelConfig) -> Tensor:
    """Quantiles about the seasonal naive point, [H, Q]: of what it missed, as many seasons ahead, in the history."""
    spread = torch.zeros(config.horizon, len(config.quantiles), dtype=torch.float64)
    for first in range(0, config.horizon, config.season):
        lag = first + config.season
        misses = history[lag:] - history[:-lag]
        misses = misses[~np.isnan(misses)]
        if len(misses):
            spread[first:lag] = torch.from_numpy(np.quantile(misses, config.quantiles))
    return spread


def summary(scores: Mapping[str, Scores]) -> Table:
    """The overall scores, one row a method."""
    table = Table("method")
    for measure in ("wql", "mase", "coverage"):
        table.add_column(measure, justify="right")
    for method, row in scores.items():
        table.add_row(method, f"{row.wql:.4f}", f"{row.mase:.3f}", f"{row.coverage:.1%}")
    return table
