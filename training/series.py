"""Rows -> series: the step, its regular holes and the season found, and each series placed on its grid.

An observation is placed exactly as the live worker places it (`service/grid.py`); a test holds both together.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.grid import HOLE, Grid, Int64s
from training.table import Floats, Observed

log = logging.getLogger(__name__)

SECOND, MINUTE, HOUR, DAY, WEEK = 1_000, 60_000, 3_600_000, 86_400_000, 604_800_000

ROUND_STEPS_MS = tuple(
    sorted(
        [1, 2, 5, 10, 20, 50, 100, 200, 250, 500]
        + [n * unit for unit in (SECOND, MINUTE) for n in (1, 2, 5, 10, 15, 20, 30)]
        + [n * HOUR for n in (1, 2, 3, 4, 6, 8, 12)]
        + [DAY, WEEK]
    )
)
"""The steps that people choose: what a jittering clock is taken to mean."""


@dataclass(frozen=True, eq=False)
class Series:
    """A series on its grid without a break: T slots, the gaps filled with NaN."""

    unique_id: str
    first_slot: int
    ts_ms: Int64s
    """int64[T], epoch ms: where the slots stand; without a grid the times observed."""
    y: Floats
    """float64[T]; NaN: missing."""
    covariates: Floats
    """float64[T, K]; NaN: missing."""


# --- The grid ---------------------------------------------------------------------------------------------------

_UNITS_MS = {"ms": 1, "s": SECOND, "min": MINUTE, "h": HOUR, "d": DAY, "w": WEEK}


def parse_step(text: str) -> int | None:
    """A step as people write it, in ms; None for "none": no clock, each observation is one step.

    Raises ValueError on anything else.

    >>> parse_step("1h"), parse_step("15min"), parse_step("0.5 d"), parse_step("none")
    (3600000, 900000, 43200000, None)
    >>> parse_step("1 month")
    Traceback (most recent call last):
    ...
    ValueError: a step is a number and a unit (ms, s, min, h, d, w) such as 15min, or none; not '1 month'
    """
    if text.strip().lower() == "none":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|h|d|w)\s*", text.lower())
    step_ms = float(match[1]) * _UNITS_MS[match[2]] if match else 0.0
    if step_ms < 1 or step_ms != int(step_ms):
        raise ValueError(f"a step is a number and a unit ({', '.join(_UNITS_MS)}) such as 15min, or none; not {text!r}")
    return int(step_ms)


def infer_grid(series: Sequence[Observed], step_ms: int | None = None) -> Grid | None:
    """The grid on which the series stand: step, offset and regular holes (nights, weekends).

    The step is the commonest difference, or the round step that a jittering clock means; None if the times have
    none: events, months. With `step_ms` given, only offset and holes are found and there always is a grid.

    >>> day = np.arange(0, 40) * 86_400_000
    >>> weekdays = np.array([t for t in day if (t // 86_400_000) % 7 not in (2, 3)])
    >>> infer_grid([Observed("EUR", weekdays, np.ones(len(weekdays)), np.empty((len(weekdays), 0)))])
    Grid(step_ms=86400000, offset_ms=0, period=7, phases=(0, 1, 4, 5, 6))
    """
    if step_ms is not None:
        return _grid_with(series, step_ms)[0]
    differences = np.concatenate([np.diff(each.ts_ms) for each in series] or [np.empty(0, np.int64)])
    if not len(differences):
        return None
    for candidate in _likely_steps(differences):
        grid, share_on_grid = _grid_with(series, candidate)
        if share_on_grid >= 0.5 and _share_of_neighbours(series, grid) >= 0.2:
            return grid
    return None


def _likely_steps(differences: Int64s) -> Iterator[int]:
    """Months and years are no steps: they differ in length, so anything that long must be whole weeks."""
    median = float(np.median(differences))
    nearest = min(ROUND_STEPS_MS, key=lambda step: abs(step - median))
    jittering = [nearest] if abs(nearest - median) <= 0.05 * nearest else []
    for step in [_commonest(differences)[0], *jittering]:
        if step <= 27 * DAY or step % WEEK == 0:
            yield step


def _commonest(values: Int64s) -> tuple[int, float]:
    """The commonest of the values (the smallest, if several are) and its share."""
    unique, count = np.unique(values, return_counts=True)
    return int(unique[np.argmax(count)]), float(count.max() / len(values))


def _grid_with(series: Sequence[Observed], step_ms: int) -> tuple[Grid, float]:
    """The best grid of that step, and the share of the times that are within a tenth of a step of it."""
    times = np.concatenate([each.ts_ms for each in series] or [np.empty(0, np.int64)])
    if not len(times):
        return Grid(step_ms), 0.0
    offset_ms = _offset(times, step_ms)
    away = (times - offset_ms + step_ms // 2) % step_ms - step_ms // 2
    period, phases = _regular_holes(series, Grid(step_ms, offset_ms))
    return Grid(step_ms, offset_ms, period, phases), float(np.mean(np.abs(away) <= step_ms / 10))


def _offset(times: Int64s, step_ms: int) -> int:
    """The commonest phase; if the clocks jitter so that none is common, the middle of the densest fifth, rounded."""
    phase = times % step_ms
    exact, share = _commonest(phase)
    if share >= 0.5:
        return exact
    bins = 40
    counts = np.bincount(phase * bins // step_ms, minlength=bins)
    window = np.convolve(np.concatenate([counts, counts[:8]]), np.ones(8), "valid")[:bins]
    start_ms = int(np.argmax(window)) * step_ms // bins
    cloud = np.sort((phase - start_ms) % step_ms)
    cloud = cloud[: max(int(window.max()), 1)]
    middle = start_ms + int(cloud[len(cloud) // 2])
    for unit in reversed([unit for unit in ROUND_STEPS_MS if unit <= step_ms]):
        rounded = (middle + unit // 2) // unit * unit
        if abs(rounded - middle) <= step_ms / 50:
            return rounded % step_ms
    return middle % step_ms


def _share_of_neighbours(series: Sequence[Observed], grid: Grid) -> float:
    """The share of the observations that follow in the very next slot: low if a step fits, but only by being tiny."""
    follows = [np.diff(slots[slots != HOLE]) == 1 for slots in (grid.slot_of(each.ts_ms) for each in series)]
    return float(np.mean(np.concatenate(follows)))


def _regular_holes(series: Sequence[Observed], grid: Grid) -> tuple[int, tuple[int, ...]]:
    """Period and phases of the grid: those of a week only if they say more than those of a day."""
    ticks = [np.unique(grid.slot_of(each.ts_ms)) for each in series if len(each.ts_ms)]
    daily, weekly = (_kept_phases(ticks, grid.step_ms, unit) for unit in (DAY, WEEK))
    if weekly and len(weekly) < 7 * len(daily or range(max(DAY // grid.step_ms, 1))):
        return WEEK // grid.step_ms, weekly
    return (DAY // grid.step_ms, daily) if daily else (1, (0,))


def _kept_phases(ticks: list[Int64s], step_ms: int, unit_ms: int) -> tuple[int, ...] | None:
    """The slots of a day or a week that occur; None if all do, or too little was seen to say that some never do."""
    period = unit_ms // step_ms
    if unit_ms % step_ms or not 2 <= period <= WEEK // MINUTE:
        return None
    kept = np.zeros(period, dtype=bool)
    seen, chances, most_turns = np.zeros(period), np.zeros(period), 0
    for tick in ticks:
        count = np.bincount(tick % period, minlength=period)
        span = int(tick[-1] - tick[0]) + 1
        chance = np.full(period, span // period)
        chance[(tick[0] + np.arange(span % period)) % period] += 1
        kept |= count > np.maximum(0.02 * chance, chance >= 10)  # one stray of ten, or one of fifty, is a stray
        seen, chances, most_turns = seen + count, chances + chance, max(most_turns, span // period)
    if kept.all() or most_turns < 4:
        return None
    # Where values go missing at random, would some phase by chance never be seen?
    missing = 1 - float(np.median(seen[kept] / chances[kept])) if kept.any() else 1.0
    if missing**most_turns * period > 1e-4:
        return None
    return tuple(int(phase) for phase in np.flatnonzero(kept))


# --- The season -------------------------------------------------------------------------------------------------


def infer_season(series: Sequence[Series], grid: Grid | None) -> int:
    """The season in slots: of those natural to the step, the shortest that the series show; 1 if they show none.

    A season shows if, its own moving average taken off, a series resembles itself one season later: the median over
    series of that autocorrelation is at least 0.3. A longer season is taken only if it is better by 0.2.

    >>> hours = np.arange(24 * 20)
    >>> wave = Series("a", 0, hours * 3_600_000, np.sin(2 * np.pi * hours / 24), np.empty((len(hours), 0)))
    >>> infer_season([wave], Grid(step_ms=3_600_000))
    24
    """
    some = series[:: max(1, len(series) // 100)]  # a hundred series tell as much as all
    season, best = 1, 0.1
    for candidate in _natural_seasons(grid, some):
        score = _resemblance([each.y[-20_000:] for each in some], candidate)
        if score >= best + 0.2:
            season, best = candidate, score
    return season


def _natural_seasons(grid: Grid | None, series: Sequence[Series]) -> list[int]:
    """Slots in a minute, an hour, a day, a week and a year, as far as they are whole.

    An hour of fewer than twelve slots is no season, only a fraction.


    >>> _natural_seasons(Grid(step_ms=1_800_000), []), _natural_seasons(Grid(86_400_000, 0, 7, (0, 1, 4, 5, 6)), [])
    ([48, 336], [5])
    """
    if grid is None:
        return _seasons_by_calendar(series)
    step, kept = grid.step_ms, np.zeros(grid.period, dtype=int)
    kept[list(grid.phases)] = 1
    seasons = []
    for unit in (MINUTE, HOUR, DAY, WEEK):
        if unit % step:
            continue
        ticks = np.resize(kept, max(grid.period, unit // step))  # one turn of the longer of unit and period
        slots = ticks.reshape(-1, unit // step).sum(axis=1) if len(ticks) % (unit // step) == 0 else ticks[:0]
        if slots.any() and (unit >= DAY or unit // step >= 12):
            seasons.append(_commonest(slots[slots > 0])[0])
    if step == WEEK:
        seasons.append(52)
    return sorted({season for season in seasons if 2 <= season <= 4096})


def _seasons_by_calendar(series: Sequence[Series]) -> list[int]:
    """Months and quarters have no grid but do have a year."""
    days = [float(np.median(np.diff(each.ts_ms))) / DAY for each in series if len(each.ts_ms) > 1]
    middle = float(np.median(days)) if days else 0.0
    return [12] if 28 <= middle <= 31 else [4] if 90 <= middle <= 92 else []


def _resemblance(values: list[Floats], season: int) -> float:
    """The median autocorrelation at one season; 0 if chance explains it, or no series spans three seasons."""
    found = [_autocorrelation(_without_trend(y, season), season) for y in values if len(y) >= 3 * season]
    found = [(r, pairs) for r, pairs in found if pairs > season]
    if not found:
        return 0.0
    score, pairs = np.median(np.array(found), axis=0)
    return float(score) if score > 2.5 / np.sqrt(pairs) else 0.0


def _without_trend(y: Floats, season: int) -> Floats:
    """float64[T - season + 1]: y, its extremes drawn in, less its moving average over one season."""
    there = np.isfinite(y)
    if there.any():  # before the average, which an outlier would carry on for a season
        y = np.clip(y, np.nanquantile(y, 0.01, method="higher"), np.nanquantile(y, 0.99, method="lower"))

    def windows(x: Floats) -> Floats:
        total: Floats = np.concatenate([[0.0], np.cumsum(x)])
        return np.asarray(total[season:] - total[:-season])

    count = windows(there.astype(np.float64))
    level = windows(np.where(there, y, 0.0)) / np.maximum(count, 1)
    start = (season - 1) // 2
    return y[start : start + len(level)] - np.where(count >= season / 2, level, np.nan)


def _autocorrelation(x: Floats, lag: int) -> tuple[float, int]:
    """The autocorrelation over the pairs that are both there, and how many these are."""
    a, b = x[:-lag], x[lag:]
    there = np.isfinite(a) & np.isfinite(b)
    a, b = a[there], b[there]
    power = float(np.sqrt(np.mean(a**2) * np.mean(b**2))) if len(a) else 0.0
    return (float(np.mean(a * b)) / power if power > 0 else 0.0), len(a)


# --- On the grid ------------------------------------------------------------------------------------------------


def to_grid(observed: Sequence[Observed], grid: Grid | None, max_gap: int) -> list[Series]:
    """Places each series on the grid exactly as the live worker does.

    Each observation goes to the nearest slot; the first of a slot counts; what falls into a hole is dropped. More
    than `max_gap` missing steps in a row end the series, and a new one of the same id starts afresh. With no grid
    each observation is a slot. What was dropped is logged as one warning.

    >>> late = Observed("a", np.array([0, 10, 12, 40, 80]), np.arange(5.0), np.empty((5, 0)))
    >>> [(s.first_slot, s.y.tolist()) for s in to_grid([late], Grid(step_ms=10), max_gap=2)]
    [(0, [0.0, 1.0, nan, nan, 3.0]), (8, [4.0])]
    """
    if grid is None:
        return [Series(each.unique_id, 0, each.ts_ms, each.y, each.covariates) for each in observed]
    placed: list[Series] = []
    in_holes = repeated = 0
    for each in observed:
        slots = grid.slot_of(each.ts_ms)
        there = np.flatnonzero(slots != HOLE)
        first = np.ones(len(there), dtype=bool)
        first[1:] = np.diff(slots[there]) > 0  # times increase, so slots never go back
        in_holes += len(slots) - len(there)
        repeated += len(first) - int(first.sum())
        rows = there[first]
        breaks = np.flatnonzero(np.diff(slots[rows]) - 1 > max_gap) + 1
        placed += [_unbroken(each, part, slots[part], grid) for part in np.split(rows, breaks) if len(part)]
    if in_holes or repeated:
        log.warning("dropped: %d observations in holes of the grid, %d in a slot taken already", in_holes, repeated)
    return placed


def _unbroken(observed: Observed, rows: NDArray[np.intp], slots: Int64s, grid: Grid) -> Series:
    first_slot = int(slots[0])
    length = int(slots[-1]) - first_slot + 1
    y = np.full(length, np.nan)
    covariates = np.full((length, observed.covariates.shape[1]), np.nan)
    y[slots - first_slot] = observed.y[rows]
    covariates[slots - first_slot] = observed.covariates[rows]
    return Series(observed.unique_id, first_slot, grid.time_of(first_slot + np.arange(length)), y, covariates)
