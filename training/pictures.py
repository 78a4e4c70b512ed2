"""The pictures of a report, as SVG to stand in a page: drawn by matplotlib, with the page's own letters."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from model.quantiles import median_index
from training.backtest import CAROUSEL, NAIVE, Backtest
from training.measures import by_step
from training.measures import reliability as shares_below
from training.series import Series

COLOURS = {CAROUSEL: "#0a6c74", NAIVE: "#9aa1a9", "AutoETS": "#d9822b", "AutoTheta": "#7a5ba6"}
INK, FAINT = "#1d2733", "#dfe3e8"
FANS = 5
"""Forecasts in a fan chart, one after the other."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, sharp, and to be searched
    "svg.hashsalt": "carousel",  # equal data, equal file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def colour(method: str) -> str:
    """Each method's own, the same in all pictures."""
    return COLOURS.get(method, "#5aa9b0")


def weight(method: str) -> float:
    """The width of its lines, in points."""
    return 2.2 if method == CAROUSEL else 1.3


def name(method: str) -> str:
    return "Carousel" if method == CAROUSEL else method


def _picture(width: float, height: float, draw: Callable[[Axes], None]) -> str:
    """What is drawn, as an element of a page. Size in inches of 72 points."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]


def fan(result: Backtest, series: Sequence[Series], number: int) -> str:
    """The last forecasts of a series that do not overlap, each opening from the observation at which it was issued."""
    config, middle = result.config, median_index(result.config.quantiles)
    piece, rows = _last_rows(result, series, number)
    steps = [int(np.searchsorted(piece.ts_ms, int(result.origin_ms[row]))) for row in rows]
    shown = slice(
        max(0, steps[0] - max(min(config.season, 4 * config.horizon), config.horizon)), steps[-1] + config.horizon + 1
    )
    time = pd.to_datetime(piece.ts_ms, unit="ms").to_numpy()

    def forecast(axes: Axes, row: int, step: int) -> None:
        when = time[step : step + config.horizon + 1]
        opening = np.full((1, len(config.quantiles)), piece.y[step])
        quantiles = np.concatenate((opening, result.quantiles[CAROUSEL][row].numpy()))
        for low in range(len(config.quantiles) // 2):
            ends = quantiles[:, low], quantiles[:, -1 - low]
            axes.fill_between(when, *ends, color=colour(CAROUSEL), alpha=0.13, linewidth=0)
        last = row == rows[-1]  # it alone stands in the legend
        axes.plot(when, quantiles[:, middle], color=colour(CAROUSEL), lw=1.6, label="forecast" if last else None)
        naive = result.quantiles[NAIVE][row, :, middle].numpy()
        axes.plot(when[1:], naive, color=colour(NAIVE), lw=1, ls=(0, (3, 2)), label=NAIVE if last else None)
        axes.axvline(when[0], color=FAINT, lw=1, zorder=0)

    def draw(axes: Axes) -> None:
        for row, step in zip(rows, steps, strict=True):
            forecast(axes, row, step)
        axes.plot(time[shown], piece.y[shown], color=INK, lw=1.2, label="observed")
        axes.plot(time[steps], piece.y[steps], "o", color=INK, ms=3.5)
        locator = AutoDateLocator()  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.005)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)

    return _picture(10.4, 2.9, draw)


def _last_rows(result: Backtest, series: Sequence[Series], number: int) -> tuple[Series, list[int]]:
    """The piece of the series that was forecast last, and the rows of its last origins, H steps apart or more."""
    rows = (result.of == number).nonzero()[:, 0].numpy()
    origins = result.origin_ms[rows].numpy()
    rows = rows[np.argsort(origins, kind="stable")]
    last = int(origins.max())
    piece = next(
        each for each in series if each.unique_id == result.ids[number] and each.ts_ms[0] <= last <= each.ts_ms[-1]
    )
    picked: list[int] = []
    free = len(piece.y)
    for row in map(int, rows[::-1]):
        origin = int(result.origin_ms[row])
        if origin < piece.ts_ms[0] or len(picked) == FANS:
            break
        step = int(np.searchsorted(piece.ts_ms, origin))
        if step + result.config.horizon < free or not picked:
            picked.append(row)
            free = step + 1
    return piece, picked[::-1]


def reliability(result: Backtest, shared: Backtest | None) -> str:
    """How often the truth came out below each quantile, beside how often it should have."""
    lines = {name(method): (method, share) for method, share in shares_below(result).items()}
    if shared:
        few = {method: share for method, share in shares_below(shared).items() if method not in result.quantiles}
        lines |= {f"{name(method)} ({len(shared.of):,} forecasts)": (method, share) for method, share in few.items()}

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=INK, lw=1, ls=(0, (1, 2)), label="ideal")
        for label, (method, share) in lines.items():
            axes.plot(result.config.quantiles, share, "o-", color=colour(method), lw=weight(method), ms=4, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="quantile forecast", ylabel="truths that came out below it")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(loc="upper left")

    return _picture(5, 4.4, draw)


def coverage_by_step(result: Backtest) -> str:
    """What share of the truths each central interval held, by steps ahead."""
    measures, levels = by_step(result), list(by_step(result)[CAROUSEL].coverage)

    def draw(axes: Axes) -> None:
        for level in levels:
            axes.axhline(level, color=INK, lw=1, ls=(0, (1, 2)))
            axes.annotate(f"{level:.0%}", (1, level), xycoords=("axes fraction", "data"), va="bottom", ha="right")
            for method, row in measures.items():
                label = name(method) if level == levels[0] else None
                _line(axes, method, row.coverage[level], label)
        axes.set(ylim=(0, 1.02), xlabel="steps ahead", ylabel="truths within the interval")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if levels:
            axes.legend(loc="lower left", ncols=2)

    return _picture(5, 4.4, draw)


def error_by_step(result: Backtest) -> str:
    """The weighted quantile loss by steps ahead, of each method."""

    def draw(axes: Axes) -> None:
        for method, row in by_step(result).items():
            _line(axes, method, row.wql, name(method))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="steps ahead", ylabel="weighted quantile loss")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, columnspacing=1, handlelength=1.2
        )

    return _picture(5, 3.2, draw)


def _line(axes: Axes, method: str, values: Tensor, label: str | None) -> None:
    ahead = np.arange(1, len(values) + 1)
    mark = "o-" if len(values) == 1 else "-"  # a line of one point is none
    axes.plot(ahead, values, mark, color=colour(method), lw=weight(method), label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
