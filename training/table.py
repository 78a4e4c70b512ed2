"""A table -> the rows of each series in time order, as they were; what cannot be used is refused by row and reason.

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
from collections.abc import Iterator
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
from model.grid import Int64s

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

log = logging.getLogger(__name__)

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

    def as_options(self) -> dict[str, str]:
        """By the names of their options, for a bundle to tell; it knows its covariates itself."""
        named = {"id_column": self.unique_id, "time_column": self.ds, "value_column": self.y}
        return named | ({"timezone": self.timezone} if self.timezone else {})


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


def read_labels(path: Path, columns: Columns, label: str) -> dict[str, str]:
    """What the column `label` says of each series, as text. Raises TableError where it says nothing, or two things."""
    head = _head(path)
    absent = {columns.unique_id, label} - set(head.columns)
    if absent:
        lacking = ", ".join(map(repr, sorted(absent)))
        raise TableError(f"{path}: no column {lacking}; {_listed(list(head.columns))}; try --label-column NAME")
    with _readable(path):
        frame = _read(path, [columns.unique_id, label], columns.unique_id, label)
    ids = _ids(frame, path, columns)
    told: dict[str, str] = {}
    for name, value in zip(ids, frame[label].fillna("").astype(str).str.strip(), strict=True):
        if value and told.setdefault(name, value) != value:
            raise TableError(f"{path}: series {name!r} has two labels in {label!r}: {told[name]!r} and {value!r}")
    if silent := set(ids) - set(told):
        raise TableError(f"{path}: series {min(silent)!r} has no label in column {label!r}")
    return told


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


def _read(path: Path, wanted: list[str], *as_written: str) -> pd.DataFrame:
    """The wanted columns; those `as_written` stay text, so that an id 007 does."""
    if _is_parquet(path):
        return _to_frame(pq.read_table(path, columns=wanted))
    # A row with a field too many (1,234 for 1234) must not pass. pandas refuses it only if all columns are read
    # (no `usecols`), and only warns if it is the first row.
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(
            path,
            index_col=False,
            dtype=dict.fromkeys(as_written, str),
            keep_default_na=False,
            na_values={name: MISSING for name in wanted if name not in as_written},
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
        if name in absent or (found is texts and texts and name not in head)
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
