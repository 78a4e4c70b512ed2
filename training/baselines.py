"""What users would forecast with instead: AutoETS and AutoTheta of `statsforecast`, from the same origins.

Such a model is fitted to one series and knows nothing of the others, so it must be fitted anew at every origin. That
is slow: a few origins, spread evenly, must do, and Carousel is shown on those same ones beside.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from model.config import ModelConfig
from model.errors import CarouselError
from model.features import fill_from_season
from training.backtest import NAIVE, Backtest
from training.series import Series

log = logging.getLogger(__name__)

BASELINES = {"ets": "AutoETS", "theta": "AutoTheta"}
"""By the word for it in `--baselines`: the class in `statsforecast.models`, which is also the method's name."""
ORIGINS = 120
"""From so many origins they forecast, unless told otherwise; fewer if that takes longer than"""
SECONDS = 240.0
HISTORY_SEASONS = 20
HISTORY_STEPS = (300, 1000)
"""They are fitted to so much of the history before an origin: 20 seasons, within these bounds, but three at least."""

Floats = NDArray[np.float64]


class BaselineError(CarouselError):
    """A baseline is unknown, or its library is not installed."""


@dataclass(frozen=True)
class Beside:
    """result: the backtest at some of its origins, with the baselines among its methods. stood_in: by method, at how
    many of them it could not be fitted (to three observations, say), so that the seasonal naive stands in.
    """

    result: Backtest
    stood_in: Mapping[str, int]


def parse_baselines(text: str | None) -> tuple[str, ...]:
    """The baselines to fit, from such as "naive,ets,theta" or "none"; None: those that are installed.

    The seasonal naive needs no fitting and is always there. Raises BaselineError.
    """
    installed = importlib.util.find_spec("statsforecast") is not None
    missing = "need statsforecast, which is not installed: pip install 'carousel[backtest]' (Python before 3.14)"
    if text is None:
        if not installed:
            log.warning("AutoETS and AutoTheta are left out: they %s", missing)
        return tuple(BASELINES) if installed else ()
    words = [word for word in text.replace(",", " ").split() if word not in ("none", "naive")]
    if unknown := [word for word in words if word not in BASELINES]:
        raise BaselineError(f"--baselines takes naive, {', '.join(BASELINES)} or none, not {unknown[0]!r}")
    if words and not installed:
        raise BaselineError(f"--baselines {','.join(words)}: they {missing}")
    return tuple(dict.fromkeys(words))


def beside(
    result: Backtest,
    series: Sequence[Series],
    baselines: Sequence[str],
    origins: int | None = None,
    console: Console | None = None,
) -> Beside:
    """Let the baselines forecast from `origins` of the backtest's origins (None: as many as there is time for).

    series: those that were backtested. Progress is shown on `console`, if that is a terminal.
    """
    rows = spread(len(result.of), origins or ORIGINS)
    histories = _Histories(result, series)
    stood_in = {BASELINES[word]: 0 for word in baselines}
    made: dict[str, list[Floats]] = {method: [] for method in stood_in}
    done: list[int] = []
    started = time.monotonic()
    steps = track(rows, "fitting the baselines", console=console, transient=True, disable=not _terminal(console))
    for row in steps:
        if done and not origins and time.monotonic() - started > SECONDS:
            log.warning("baselines: %d of %d origins in %.0f s, which must do", len(done), len(rows), SECONDS)
            break
        history = histories.before(row)
        for method, forecasts in made.items():
            quantiles = fitted(method, history, result.config)
            if quantiles is None:
                stood_in[method] += 1
                quantiles = result.quantiles[NAIVE][row].numpy()
            forecasts.append(quantiles)
        done.append(row)
    order = np.argsort(done)
    shared = result.at(torch.tensor(done)[order])
    forecast = {method: torch.from_numpy(np.stack(each)[order]) for method, each in made.items()}
    return Beside(dataclasses.replace(shared, quantiles={**shared.quantiles, **forecast}), stood_in)


def _terminal(console: Console | None) -> bool:
    return console is not None and console.is_terminal


def spread(count: int, wanted: int) -> list[int]:
    """Some of `count` rows: one out of each of `wanted` equal parts, but not always its first, or all might be of one
    hour of the day. In such an order that the first few are spread over everything too.

    >>> sorted(spread(3, 5)), len(spread(1000, 5))
    ([0, 1, 2], 5)
    """
    random = np.random.default_rng(0)
    bounds = np.linspace(0, count, min(count, wanted) + 1).astype(int)
    return [int(row) for row in random.permutation(random.integers(bounds[:-1], bounds[1:]))]


class _Histories:
    """The values up to an origin, and not one beyond."""

    def __init__(self, result: Backtest, series: Sequence[Series]) -> None:
        self.result = result
        self.pieces: dict[str, list[Series]] = {}
        for each in series:
            self.pieces.setdefault(each.unique_id, []).append(each)

    def before(self, row: int) -> Floats:
        """As far back as a baseline looks, without gaps."""
        origin = int(self.result.origin_ms[row])
        pieces = self.pieces[self.result.ids[int(self.result.of[row])]]
        piece = next(each for each in pieces if each.ts_ms[0] <= origin <= each.ts_ms[-1])
        stop = int(np.searchsorted(piece.ts_ms, origin, side="right"))
        season = self.result.config.season
        return without_gaps(piece.y[max(0, stop - history_steps(season)) : stop], season)


def history_steps(season: int) -> int:
    """How far back from an origin a baseline looks.

    >>> history_steps(1), history_steps(24), history_steps(168), history_steps(1440)
    (300, 480, 1000, 4320)
    """
    return max(int(np.clip(HISTORY_SEASONS * season, *HISTORY_STEPS)), 3 * season)


def without_gaps(y: Floats, season: int) -> Floats:
    """Fill what is missing with the value a season before, else with the next one a season after, else with the mean.

    >>> without_gaps(np.array([np.nan, 2.0, 3.0, np.nan]), season=2)
    array([3., 2., 3., 2.])
    """

    def carried(values: Floats) -> Floats:
        nothing = torch.full((1, season), torch.nan, dtype=torch.float64)
        return fill_from_season(nothing, torch.from_numpy(values.copy())[None], season)[0].numpy()

    filled = carried(carried(y)[::-1])[::-1]
    return np.where(np.isnan(filled), np.nanmean(y), filled)


def fitted(method: str, history: Floats, config: ModelConfig) -> Floats | None:
    """Quantiles [H, Q] of a model fitted to a history [T]; None if it is too short for it.

    Its median is what it calls the mean; the other quantiles are ends of its prediction intervals.
    """
    from statsforecast import models

    # Any may be an interval's end: that of level 80 reaches from quantile 0.1 to 0.9.
    levels = [round(100 * abs(2 * quantile - 1), 6) for quantile in config.quantiles]
    wanted = sorted({level for level in levels if level})
    make: Callable[..., Any] = getattr(models, method)
    options: dict[str, Any] = {"season_length": config.season if len(history) > 2 * config.season else 1}
    if method == "AutoETS" and options["season_length"] > 1:
        # Left free, it often finds that no season is likelier, and its error trebles: it shall be at its best.
        options["model"] = "ZZA"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forecast = make(**options).forecast(y=history.copy(), h=config.horizon, level=wanted)
    except (NotImplementedError, IndexError, ValueError, ZeroDivisionError):  # "tiny datasets" and their like
        return None
    ends = [
        forecast["mean" if not level else f"{'lo' if quantile < 0.5 else 'hi'}-{level}"]
        for quantile, level in zip(config.quantiles, levels, strict=True)
    ]
    quantiles = np.sort(np.stack(ends, axis=1).astype(np.float64), axis=1)  # a simulated one may cross another
    return quantiles if np.isfinite(quantiles).all() else None
