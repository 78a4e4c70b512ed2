"""A table -> series: read, the grid and the season found, and each series placed on its grid as the worker does it.

A table is long: one row an observation, with the columns `unique_id, ds, y` and any covariates. Rows are numbered
from 1 after the header, in errors too.
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.errors import CarouselError
from model.grid import HOLE, Grid, Int64s

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

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

MISSING = ["", "NA", "N/A", "#N/A", "NaN", "nan", "-nan", "null", "NULL", "Null", "None", "<NA>"]
"""What stands in a CSV for a missing number; never for a missing id, or Namibia's would be lost."""


class TableError(CarouselError):
    """The table cannot be used; the message is one line that says why and, where one helps, which option."""


@dataclass(frozen=True)
class Columns:
    """Which column of the table is what. Raises TableError if one is named twice or there is no such time zone."""

    unique_id: str = "unique_id"
    ds: str = "ds"
    y: str = "y"
    covariates: tuple[str, ...] = ()
    timezone: str | None = None
    """IANA name of the zone of times that carry no offset; None: UTC."""

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise TableError(f"column {twice[0]!r} is named twice")
        try:
            ZoneInfo(self.timezone or "UTC")
        except (KeyError, ValueError, OSError):
            raise TableError(f"--timezone: {self.timezone!r} is no time zone such as Europe/Berlin") from None

    @property
    def names(self) -> list[str]:
        return [self.unique_id, self.ds, self.y, *self.covariates]


@dataclass(frozen=True, eq=False)
class Observed:
    """The rows of one series in time order, as they were; N of them, with K covariates."""

    unique_id: str
    ts_ms: Int64s
    """int64[N], epoch ms, strictly increasing."""
    y: Floats
    """float64[N]; NaN: missing."""
    covariates: Floats
    """float64[N, K]; NaN: missing."""


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


# --- Reading ----------------------------------------------------------------------------------------------------


def read_table(path: Path | str, columns: Columns | None = None) -> list[Observed]:
    """The series of a long table, in the order in which they first appear.

    CSV, also compressed (.gz, .bz2, .zip, .zst), or Parquet. Times without an offset are UTC unless
    `columns.timezone` says otherwise; whole numbers are epoch s, ms, µs or ns by their magnitude, or dates
    (20240131). Of two rows of a series with the same time the first counts. Without an id column the table is one
    series, named after the file.

    Raises TableError, in one line, if the file cannot be read or a row makes no sense.
    """
    path, columns = Path(path), columns or Columns()
    frame = _load(path, columns)
    ids = _ids(frame, path, columns)
    code, names = pd.factorize(ids)
    ts_ms, known = _times(frame[columns.ds], code, path, columns)
    y = _numbers(frame[columns.y], path)
    covariates = np.empty((len(frame), len(columns.covariates)))
    for k, name in enumerate(columns.covariates):
        covariates[:, k] = _numbers(frame[name], path)

    order = np.lexsort((ts_ms, code))  # stable: of equal times the first row stays the first
    order = order[known[order]]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (np.diff(code[order]) == 0) & (np.diff(ts_ms[order]) == 0)
    if again.any():
        log.warning("%s: %d rows repeat a time of their series: the first of each counts", path, again.sum())
    order = order[~again]
    rows_of = np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(order) else []
    return [Observed(str(names[code[rows[0]]]), ts_ms[rows], y[rows], covariates[rows]) for rows in rows_of]


def _load(path: Path, columns: Columns) -> pd.DataFrame:
    """The columns that are asked for and there; the id's may be absent where one series is meant."""
    head = _head(path)
    absent = set(columns.names) - set(head.columns)
    if columns.unique_id == Columns.unique_id:
        absent -= {columns.unique_id}
    if absent:
        raise TableError(f"{path}: {_what_is_absent(absent, columns, head)}")
    with _readable(path):
        frame = _read(path, [name for name in columns.names if name in head], columns.unique_id)
    if frame.empty:
        raise TableError(f"{path}: the table has no rows")
    return frame


def _head(path: Path) -> pd.DataFrame:
    """The first rows, all columns."""
    with _readable(path):
        if not _is_parquet(path):
            return pd.read_csv(path, nrows=100)
        with pq.ParquetFile(path) as file:
            first = itertools.islice(file.iter_batches(batch_size=100), 1)
            return _to_frame(pa.Table.from_batches(first, schema=file.schema_arrow))


def _read(path: Path, wanted: list[str], as_written: str) -> pd.DataFrame:
    """The wanted columns; `as_written` stays text, so that an id 007 does."""
    if _is_parquet(path):
        return _to_frame(pq.read_table(path, columns=wanted))
    # A row with a field too many (1,234 for 1234) must not pass. pandas refuses it only if all columns are read
    # (no `usecols`), and only warns if it is the first row.
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(
            path,
            index_col=False,
            dtype={as_written: str},
            keep_default_na=False,
            na_values={name: MISSING for name in wanted if name != as_written},
            low_memory=False,
        )
    return frame[wanted]


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _to_frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, date_as_object=False)
    return frame


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns all that readers raise into one line."""
    try:
        yield
    except FileNotFoundError:
        raise TableError(f"{path}: there is no such file") from None
    except pd.errors.EmptyDataError:
        raise TableError(f"{path}: the file is empty") from None
    except pd.errors.ParserWarning:
        raise TableError(f"{path}: its rows have more fields than its header") from None
    except (
        OSError,
        EOFError,
        ValueError,
        ImportError,
        zlib.error,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise TableError(f"{path}: cannot be read as CSV or Parquet: {cause}") from None


def _what_is_absent(absent: set[str], columns: Columns, head: pd.DataFrame) -> str:
    """Names what is not there, what is, and the options that would help; nothing is guessed, only suggested."""
    free = [name for name in head.columns if name not in columns.names]
    times = [name for name in free if _looks_like_time(head[name])]
    numbers = [name for name in free if pd.api.types.is_numeric_dtype(head[name])]
    texts = [name for name in free if name not in times + numbers]
    options = [
        f"{option} {found[0] if len(found) == 1 else 'NAME'}"
        for option, name, found in (
            ("--id-column", columns.unique_id, texts),
            ("--time-column", columns.ds, times),
            ("--value-column", columns.y, numbers),
        )
        if name in absent
    ]
    if absent & set(columns.covariates):
        options.append("--covariates NAMES")
    lacking = ", ".join(repr(name) for name in columns.names if name in absent)
    return f"no column {lacking}; {_listed(list(head.columns))}; try {' '.join(options)}"


def _looks_like_time(column: pd.Series[Any]) -> bool:
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column):
        return False
    parsed = pd.to_datetime(column.astype(str), utc=True, format="ISO8601", errors="coerce")
    return len(parsed) > 0 and bool(parsed.notna().all())


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"its columns are {shown}"


def _ids(frame: pd.DataFrame, path: Path, columns: Columns) -> NDArray[np.object_]:
    if columns.unique_id not in frame:
        again = frame[columns.ds].duplicated().to_numpy()
        if again.any():
            why = f"row {_first(again)} repeats a time, so this is more than one series, but "
            raise TableError(f"{path}: {why}{_what_is_absent({columns.unique_id}, columns, _head(path))}")
        return np.full(len(frame), _stem(path), dtype=object)
    column = frame[columns.unique_id]
    ids = column.astype(str).to_numpy(dtype=object)
    blank = column.isna().to_numpy(dtype=bool) | np.array([not str(name).strip() for name in ids])
    if blank.any():
        raise TableError(f"{path}: row {_first(blank)} has no id in column {columns.unique_id!r}")
    return ids


def _first(where: Bools) -> int:
    """The number of the first row, from 1, of which something is true."""
    return int(np.argmax(where)) + 1


def _stem(path: Path) -> str:
    return re.sub(r"(\.(csv|txt|tsv|parquet|pq|gz|bz2|zip|zst|xz))+$", "", path.name) or path.name


def _numbers(column: pd.Series[Any], path: Path) -> Floats:
    """float64[N], NaN where missing."""
    if pd.api.types.is_datetime64_any_dtype(column):
        raise TableError(f"{path}: column {column.name!r} holds times, not numbers")
    values: Floats = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.isinf(values) | (np.isnan(values) & column.notna().to_numpy(dtype=bool))
    if wrong.any():
        row = _first(wrong)
        cause = "is not finite" if np.isinf(values[row - 1]) else "is not a number"
        raise TableError(f"{path}: row {row}, column {column.name!r}: {str(column.iloc[row - 1])!r} {cause}")
    return values


def _times(column: pd.Series[Any], code: NDArray[np.intp], path: Path, columns: Columns) -> tuple[Int64s, Bools]:
    """int64[N] epoch ms, and bool[N]: whether there was such a time at all (an hour is left out each spring)."""
    if column.isna().any():
        raise TableError(f"{path}: row {_first(column.isna().to_numpy(dtype=bool))} has no time in {columns.ds!r}")
    if pd.api.types.is_numeric_dtype(column):
        return _epoch_ms(column.to_numpy(), path, columns), np.ones(len(column), dtype=bool)
    if pd.api.types.is_datetime64_any_dtype(column):
        naive = np.full(len(column), getattr(column.dtype, "tz", None) is None)
        utc = pd.DatetimeIndex(pd.to_datetime(column, utc=True))
    else:
        text = column.astype(str).str.strip()
        utc = pd.DatetimeIndex(pd.to_datetime(text, utc=True, format="ISO8601", errors="coerce"))
        if utc.hasnans:
            row = _first(np.asarray(utc.isna()))
            raise TableError(
                f"{path}: row {row}, column {columns.ds!r}: {text.iloc[row - 1]!r} is no time such as "
                "2024-01-31 07:00 or 2024-01-31T07:00:00+01:00 (ISO 8601)"
            )
        naive = ~text.str.contains(r":.*(?:[Zz]|[+-]\d\d(?::?\d\d)?|UTC)$", regex=True).to_numpy(dtype=bool)
    local = pd.DatetimeIndex(utc.tz_localize(None))
    if columns.timezone and naive.any():
        utc = utc.where(~naive, _localised(local, code, columns.timezone))
    never = np.asarray(utc.isna())
    if never.any():
        log.warning(
            "%s: %d rows dropped: their times were left out when clocks in %s went forward (first: row %d, %s)",
            path, never.sum(), columns.timezone, _first(never), local[_first(never) - 1],
        )  # fmt: skip
    return np.asarray(utc.tz_localize(None).to_numpy().astype("datetime64[ms]").astype(np.int64)), ~never


def _localised(local: pd.DatetimeIndex, code: NDArray[np.intp], timezone: str) -> pd.DatetimeIndex:
    """Of an hour that came twice in autumn, the first time a series shows it is summer time, the next winter."""
    first_seen = ~pd.DataFrame({"code": code, "local": local}).duplicated().to_numpy()
    return local.tz_localize(timezone, ambiguous=first_seen, nonexistent="NaT").tz_convert("UTC")


def _epoch_ms(numbers: NDArray[Any], path: Path, columns: Columns) -> Int64s:
    """Epoch times of any unit: for the years 1973 to 5138 the magnitudes of s, ms, µs and ns do not overlap."""
    largest = float(np.max(np.abs(numbers)))
    if np.all((numbers >= 1900_01_01) & (numbers <= 2100_12_31)):
        dates = pd.to_datetime(pd.Series(numbers.astype(np.int64)).astype(str), format="%Y%m%d", errors="coerce")
        if dates.notna().all():
            return np.asarray(dates.to_numpy().astype("datetime64[ms]").astype(np.int64))
    if not 1e8 <= largest < 1e20:
        raise TableError(
            f"{path}: column {columns.ds!r}: {numbers[np.argmax(np.abs(numbers))]} is neither a date such as "
            "20240131 nor an epoch time in s, ms, µs or ns"
        )
    if largest < 1e11:
        return np.round(numbers * 1_000).astype(np.int64)
    for limit, per_ms in ((1e14, 1), (1e17, 1_000)):
        if largest < limit:
            return np.asarray(numbers // per_ms, dtype=np.int64)
    return np.asarray(numbers // 1_000_000, dtype=np.int64)


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
    if missing**most_turns * period > 0.01:
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
