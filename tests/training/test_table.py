"""A table becomes series: what is read, what is refused and how, the grid and the season found, slots as live."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.grid import Grid
from service.grid import NO_SLOT, place
from training.table import (
    DAY,
    HOUR,
    MINUTE,
    WEEK,
    Columns,
    Observed,
    Series,
    TableError,
    infer_grid,
    infer_season,
    parse_step,
    read_table,
    to_grid,
)

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_csv(text: str, name: str = "load.csv") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_csv


def ms(*times: str) -> list[int]:
    return [int(pd.Timestamp(time).timestamp() * 1000) for time in times]


def observed(ts_ms: np.ndarray, y: np.ndarray | None = None, unique_id: str = "a") -> Observed:
    ts_ms = np.asarray(ts_ms, dtype=np.int64)
    return Observed(unique_id, ts_ms, np.ones(len(ts_ms)) if y is None else y, np.empty((len(ts_ms), 0)))


def between(start: str, end: str, freq: str, tz: str = "UTC") -> np.ndarray:
    times = pd.date_range(start, end, freq=freq, tz=tz).tz_convert("UTC").tz_localize(None)
    return times.as_unit("ms").to_numpy().astype(np.int64)


class TestReading:
    def test_series_come_in_order_of_appearance_and_rows_in_order_of_time(self, write: Write) -> None:
        table = read_table(
            write(
                "unique_id,ds,y\n"
                "b,2024-01-01 02:00,3\n"
                "a,2024-01-01 00:00,10\n"
                "b,2024-01-01 00:00,1\n"
                "b,2024-01-01 01:00,\n"
            )
        )
        assert [series.unique_id for series in table] == ["b", "a"]
        assert table[0].ts_ms.tolist() == ms("2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00")
        np.testing.assert_array_equal(table[0].y, [1, np.nan, 3])
        assert table[0].covariates.shape == (3, 0)

    @pytest.mark.parametrize("compression", ["gz", "bz2", "zip"])
    def test_compressed_csv(self, tmp_path: Path, compression: str) -> None:
        path = tmp_path / f"load.csv.{compression}"
        pd.DataFrame({"unique_id": ["a"], "ds": ["2024-01-01"], "y": [1.5]}).to_csv(path, index=False)
        assert read_table(path)[0].y.tolist() == [1.5]

    @pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
    def test_parquet_with_native_types(self, tmp_path: Path, zone: str | None) -> None:
        path = tmp_path / "load.parquet"
        ds = pd.to_datetime(["2024-01-01 00:00", "2024-01-01 01:00"]).tz_localize(zone)
        frame = pd.DataFrame({"unique_id": pd.Categorical([7, 7]), "ds": ds, "y": [1, 2]})
        frame.set_index("ds").to_parquet(path)  # an index is a column like any other
        (series,) = read_table(path)
        assert series.unique_id == "7"
        hours_east = 1 if zone else 0
        assert series.ts_ms.tolist() == [t - hours_east * HOUR for t in ms("2024-01-01 00:00", "2024-01-01 01:00")]
        assert series.y.dtype == np.float64

    def test_other_column_names_and_covariates_in_the_order_asked_for(self, write: Write) -> None:
        path = write("zone,time,load,wind,temp,note\nx,2024-01-01,1,2,3,hello\n")
        (series,) = read_table(path, Columns("zone", "time", "load", covariates=("temp", "wind")))
        assert series.covariates.tolist() == [[3.0, 2.0]]

    def test_ids_stay_as_they_are_written(self, write: Write) -> None:
        path = write("unique_id,ds,y\n007,2024-01-01,1\nNA,2024-01-01,2\n1.50,2024-01-01,3\n")
        assert [series.unique_id for series in read_table(path)] == ["007", "NA", "1.50"]
        path = write("unique_id,ds,y\n007,2024-01-01,1\n042,2024-01-01,2\n")
        assert [series.unique_id for series in read_table(path)] == ["007", "042"]

    def test_without_an_id_column_a_table_is_one_series_named_after_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "north.sea.csv.gz"
        path.write_bytes(gzip.compress(b"ds,y\n2024-01-01,1\n2024-01-02,2\n"))
        assert [series.unique_id for series in read_table(path)] == ["north.sea"]

    def test_of_rows_with_the_same_time_the_first_counts_and_one_warning_says_how_many(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write("unique_id,ds,y\n" + "a,2024-01-01,1\na,2024-01-01,2\na,2024-01-01,3\nb,2024-01-01,4\n")
        with caplog.at_level(logging.WARNING):
            table = read_table(path)
        assert [series.y.tolist() for series in table] == [[1], [4]]
        assert len(caplog.messages) == 1
        assert "2 rows repeat a time" in caplog.messages[0]


class TestTimes:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("2024-01-31 07:00", "2024-01-31T07:00Z"),
            ("2024-01-31T07:00:00.250Z", "2024-01-31T07:00:00.250Z"),
            ("2024-01-31T07:00+01:00", "2024-01-31T06:00Z"),
            ("2024-01-31 07:00-0530", "2024-01-31T12:30Z"),
            ("2024-01-31", "2024-01-31T00:00Z"),
            ("2024-01", "2024-01-01T00:00Z"),
            ("20240131", "2024-01-31T00:00Z"),
            ("1706684400", "2024-01-31T07:00Z"),
            ("1706684400250", "2024-01-31T07:00:00.250Z"),
            ("1706684400250000", "2024-01-31T07:00:00.250Z"),
            ("1706684400250000000", "2024-01-31T07:00:00.250Z"),
            ("1706684400.25", "2024-01-31T07:00:00.250Z"),
        ],
    )
    def test_a_time_is_read_as_it_is_meant(self, write: Write, written: str, meant: str) -> None:
        (series,) = read_table(write(f"unique_id,ds,y\na,{written},1\n"))
        assert series.ts_ms.tolist() == ms(meant)

    def test_offsets_may_differ_within_a_column_and_be_absent(self, write: Write) -> None:
        path = write(
            "unique_id,ds,y\na,2024-01-31 07:00+01:00,1\na,2024-07-31T07:00:00+02:00,2\na,2024-08-01 07:00,3\n"
        )
        (series,) = read_table(path, Columns(timezone="Europe/Berlin"))
        assert series.ts_ms.tolist() == ms("2024-01-31T06:00Z", "2024-07-31T05:00Z", "2024-08-01T05:00Z")

    def test_the_hour_that_comes_twice_in_autumn_is_two_hours(self, write: Write) -> None:
        hours = ["01:00", "02:00", "02:00", "03:00"]
        rows = [f"{name},2024-10-27 {hour},{k}" for name in "ab" for k, hour in enumerate(hours)]
        for series in read_table(write("unique_id,ds,y\n" + "\n".join(rows)), Columns(timezone="Europe/Berlin")):
            assert np.diff(series.ts_ms).tolist() == [HOUR, HOUR, HOUR]
            assert series.y.tolist() == [0, 1, 2, 3]

    def test_the_hour_left_out_in_spring_was_never_observed(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [f"a,2024-03-31 {hour},{k}" for k, hour in enumerate(["01:00", "02:00", "02:30", "03:00"])]
        (series,) = read_table(write("unique_id,ds,y\n" + "\n".join(rows)), Columns(timezone="Europe/Berlin"))
        assert series.y.tolist() == [0, 3]
        assert np.diff(series.ts_ms).tolist() == [HOUR]
        assert "2 rows dropped" in caplog.text
        assert "row 2" in caplog.text


class TestRefusals:
    """Each is one line that names the file, and the row, column or option that helps."""

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", ["the file is empty"]),
            ("unique_id,ds,y\n", ["no rows"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,inf\n", ["row 2", "'y'", "'inf' is not finite"]),
            ("unique_id,ds,y\na,2024-01-01,1e400\n", ["row 1", "'y'", "not finite"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,high\n", ["row 2", "'y'", "'high' is not a number"]),
            ("unique_id,ds,y\na,2024-01-01,1\n,2024-01-02,2\n", ["row 2", "no id", "'unique_id'"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,,2\n", ["row 2", "no time", "'ds'"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,soon,2\n", ["row 2", "'ds'", "'soon' is no time", "ISO 8601"]),
            ("unique_id,ds,y\na,1/2/2024,1\n", ["row 1", "'1/2/2024' is no time"]),
            ("unique_id,ds,y\na,17,1\n", ["'ds'", "17 is neither a date", "epoch time"]),
            ("when,ds2\n2024-01-01,1\n", ["no column 'ds', 'y'", "its columns are when, ds2", "--time-column when"]),
            ("x,y,z\n1,2,3\n", ["no column 'ds'", "--time-column NAME"]),
            ("ds,load\n2024-01-01,1\n", ["no column 'y'", "--value-column load"]),
            ("site,ds,y\na,2024-01-01,1\nb,2024-01-01,1\n", ["row 2 repeats a time", "--id-column site"]),
        ],
    )
    def test_what_is_wrong_is_named(self, write: Write, text: str, says: list[str]) -> None:
        path = write(text)
        with pytest.raises(TableError) as caught:
            read_table(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        for part in says:
            assert part in message

    def test_an_option_that_names_no_column(self, write: Write) -> None:
        path = write("site,ds,y\na,2024-01-01,1\n")
        with pytest.raises(TableError, match=r"no column 'zone'; its columns are site, ds, y; try --id-column site"):
            read_table(path, Columns(unique_id="zone"))
        with pytest.raises(TableError, match=r"no column 'wind'.*try --covariates"):
            read_table(path, Columns(unique_id="site", covariates=("wind",)))

    def test_text_in_a_covariate(self, write: Write) -> None:
        path = write("unique_id,ds,y,sky\na,2024-01-01,1,clear\n")
        with pytest.raises(TableError, match=r"row 1, column 'sky': 'clear' is not a number"):
            read_table(path, Columns(covariates=("sky",)))

    def test_a_missing_a_broken_and_a_cut_off_file(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="there is no such file"):
            read_table(tmp_path / "none.csv")
        for name, content in [
            ("broken.parquet", b"PAR1 and then nothing of the kind"),
            ("cut.csv.gz", gzip.compress(b"unique_id,ds,y\n" + b"a,2024-01-01,1\n" * 99)[:40]),
            ("text.csv.gz", b"unique_id,ds,y\n"),
            ("latin.csv", "unique_id,ds,y\nKöln,2024-01-01,1\n".encode("latin-1")),
            ("thousands.csv", b"unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,1,234\n"),
            ("thousands_at_once.csv", b"unique_id,ds,y\na,2024-01-01,1,234\na,2024-01-02,2,345\n"),
        ]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(TableError) as caught:
                read_table(tmp_path / name)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(TableError, match="cannot be read"):
            read_table(tmp_path)

    def test_columns_that_make_no_sense(self) -> None:
        with pytest.raises(TableError, match="'y' is named twice"):
            Columns(covariates=("y",))
        with pytest.raises(TableError, match="--timezone: 'Middle/Earth'"):
            Columns(timezone="Middle/Earth")


class TestGrid:
    @settings(max_examples=50, deadline=None)
    @given(
        step_ms=st.sampled_from([1_000, 7_000, MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 6 * HOUR, DAY, WEEK]),
        offset=st.floats(0, 0.999),
        start=st.integers(10_000, 20_000),
        missing=st.floats(0, 0.5),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_finds_the_grid_that_times_were_made_with(
        self, step_ms: int, offset: float, start: int, missing: float, seed: int
    ) -> None:
        offset_ms = int(offset * step_ms)
        there = np.random.default_rng(seed).random(400) >= missing
        ticks = (start + np.arange(400))[there]
        assert infer_grid([observed(ticks * step_ms + offset_ms)]) == Grid(step_ms, offset_ms)

    def test_nights_left_out(self) -> None:
        hours = between("2024-01-01", "2024-02-01", "h")
        day = hours[(hours // HOUR) % 24 >= 8]
        assert infer_grid([observed(day)]) == Grid(HOUR, 0, 24, tuple(range(8, 24)))

    def test_nights_and_weekends_left_out(self) -> None:
        times = pd.date_range("2024-01-01", "2024-04-01", freq="30min")
        trading = times[(times.day_of_week < 5) & (times.hour >= 9) & (times.hour < 17)]
        grid = infer_grid([observed(trading.as_unit("ms").to_numpy().astype(np.int64))])
        assert grid is not None
        assert (grid.step_ms, grid.period, len(grid.phases)) == (30 * MINUTE, 336, 5 * 16)
        slots = grid.slot_of(trading.as_unit("ms").to_numpy().astype(np.int64))
        assert np.all(np.diff(slots) == 1)

    def test_a_weekend_once_worked_is_still_a_weekend_but_holidays_make_no_hole(self) -> None:
        days = pd.bdate_range("2020-01-01", "2023-01-01")
        days = days[(days.month != 12) | (days.day < 24)].union(pd.DatetimeIndex(["2021-05-01"]))
        grid = infer_grid([observed(days.as_unit("ms").to_numpy().astype(np.int64))])
        assert grid == Grid(DAY, 0, 7, (0, 1, 4, 5, 6))
        few = days[
            (days >= pd.Timestamp("2021-03-01")) & (days < pd.Timestamp("2021-06-01"))
        ]  # the one is now a thirteenth of the Saturdays
        assert infer_grid([observed(few.as_unit("ms").to_numpy().astype(np.int64))]) == grid

    def test_what_one_series_leaves_out_and_another_has_is_no_hole(self) -> None:
        hours = between("2024-01-01", "2024-02-01", "h")
        night_off = observed(hours[(hours // HOUR) % 24 >= 8], unique_id="a")
        assert infer_grid([night_off, observed(hours, unique_id="b")]) == Grid(HOUR)

    def test_three_days_are_too_few_to_say_that_nights_are_left_out(self) -> None:
        hours = between("2024-01-01", "2024-01-03 23:00", "h")
        assert infer_grid([observed(hours[(hours // HOUR) % 24 >= 8])]) == Grid(HOUR)

    def test_local_midnights_keep_their_slots_over_a_change_of_the_clocks(self) -> None:
        days = between("2023-01-01", "2024-12-31", "D", tz="Europe/Berlin")
        grid = infer_grid([observed(days)])
        assert grid is not None
        assert (grid.step_ms, grid.period) == (DAY, 1)
        assert np.all(np.diff(grid.slot_of(days)) == 1)

    def test_a_jittering_clock_means_a_round_step_and_a_round_offset(self) -> None:
        rng = np.random.default_rng(1)
        times = between("2024-01-01 00:30", "2024-02-01", "h") + rng.integers(-90_000, 90_000, 744)
        assert infer_grid([observed(times)]) == Grid(HOUR, 30 * MINUTE)

    @pytest.mark.parametrize("freq", ["MS", "QS", "YS"])
    def test_months_quarters_and_years_have_no_grid(self, freq: str) -> None:
        assert infer_grid([observed(between("2000-01-01", "2020-01-01", freq))]) is None

    def test_events_have_no_grid(self) -> None:
        rng = np.random.default_rng(2)
        seconds = np.unique(np.cumsum(rng.exponential(60_000, 5_000)).astype(np.int64) // 1000 * 1000)
        assert infer_grid([observed(seconds)]) is None
        with_echoes = np.union1d(seconds, seconds[::10] + 1_000)  # one second is now the commonest difference
        assert infer_grid([observed(with_echoes)]) is None

    def test_no_differences_no_grid(self) -> None:
        assert infer_grid([]) is None
        assert infer_grid([observed(np.array([5]))]) is None

    def test_with_the_step_given_there_always_is_a_grid(self) -> None:
        quarters = between("2024-01-01 00:15", "2024-01-05", "15min")
        assert infer_grid([observed(quarters)], HOUR) == Grid(HOUR, 0)
        assert infer_grid([observed(between("2024-01-01 00:30", "2024-01-05", "h"))], HOUR) == Grid(HOUR, 30 * MINUTE)
        assert infer_grid([], HOUR) == Grid(HOUR)

    @pytest.mark.parametrize("text", ["", "h", "0h", "-1h", "1 fortnight", "0.0001s", "1h30"])
    def test_a_step_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="such as 15min, or none"):
            parse_step(text)


def periodic(season: int, length: int, seed: int, noise: float = 0.3) -> np.ndarray:
    """A random pattern repeated, on a level that walks, with noise."""
    rng = np.random.default_rng(seed)
    pattern = np.tile(rng.standard_normal(season), length // season + 1)[:length]
    return pattern + 0.1 * np.cumsum(rng.standard_normal(length)) + noise * rng.standard_normal(length)


def on(grid: Grid | None, ys: list[np.ndarray]) -> list[Series]:
    times = [grid.time_of(np.arange(len(y))) if grid else np.arange(len(y)) for y in ys]
    return [Series(str(k), 0, t, y, np.empty((len(y), 0))) for k, (t, y) in enumerate(zip(times, ys, strict=True))]


class TestSeason:
    @pytest.mark.parametrize(
        ("grid", "season"),
        [
            (Grid(HOUR), 24),
            (Grid(HOUR), 168),
            (Grid(30 * MINUTE), 48),
            (Grid(15 * MINUTE), 96),
            (Grid(DAY), 7),
            (Grid(DAY, 0, 7, (0, 1, 4, 5, 6)), 5),
            (Grid(HOUR, 0, 24, tuple(range(8, 24))), 16),
            (Grid(HOUR, 0, 168, tuple(h for h in range(168) if h % 24 >= 8 and h // 24 not in (2, 3))), 16),
            (Grid(WEEK), 52),
        ],
    )
    def test_finds_the_season_that_series_were_made_with(self, grid: Grid, season: int) -> None:
        assert infer_season(on(grid, [periodic(season, 8 * season, seed) for seed in range(5)]), grid) == season

    def test_a_day_that_weekends_flatten_somewhat_is_still_the_season_rather_than_the_week(self) -> None:
        day = periodic(24, 24 * 70, 7)
        weekend = (np.arange(len(day)) // 24) % 7 >= 5
        y = np.where(weekend, 0.7 * day, day)
        assert infer_season(on(Grid(HOUR), [y]), Grid(HOUR)) == 24

    def test_a_random_walk_has_none(self) -> None:
        rng = np.random.default_rng(3)
        walks = [np.cumsum(rng.standard_normal(2_000)) for _ in range(8)]
        assert infer_season(on(Grid(HOUR), walks), Grid(HOUR)) == 1
        assert infer_season(on(Grid(DAY), walks), Grid(DAY)) == 1

    def test_short_noise_seldom_seems_to_have_one(self) -> None:
        noise = np.random.default_rng(3).standard_normal((300, 25))
        found = [infer_season(on(Grid(DAY), [y]), Grid(DAY)) for y in noise]
        assert np.mean(np.array(found) > 1) <= 0.02

    def test_gaps_outliers_constants_and_one_odd_series_do_not_hide_it(self) -> None:
        ys = [periodic(24, 1_000, seed) for seed in range(5)]
        rng = np.random.default_rng(4)
        ys[0][rng.random(1_000) < 0.3] = np.nan
        ys[1][500] = 1e9
        ys[2][:] = np.nan
        ys[3][:] = 7.0
        assert infer_season(on(Grid(HOUR), ys[:1]), Grid(HOUR)) == 24
        assert infer_season(on(Grid(HOUR), ys[1:2]), Grid(HOUR)) == 24
        assert (
            infer_season(on(Grid(HOUR), [*ys[2:4], *(periodic(24, 1_000, s) for s in range(9, 13))]), Grid(HOUR)) == 24
        )

    @pytest.mark.parametrize(("freq", "season"), [("MS", 12), ("QS", 4), ("YS", 1)])
    def test_months_and_quarters_without_a_grid_have_a_year(self, freq: str, season: int) -> None:
        times = between("1900-01-01", "2020-01-01", freq)
        y = periodic(season, len(times), 5)
        assert infer_season([Series("a", 0, times, y, np.empty((len(y), 0)))], None) == season

    def test_too_short_to_tell(self) -> None:
        assert infer_season(on(Grid(HOUR), [periodic(24, 60, 6)]), Grid(HOUR)) == 1
        assert infer_season([], Grid(HOUR)) == 1


class TestToGrid:
    def test_gaps_are_missing_and_covariates_too(self) -> None:
        rows = Observed("a", np.array([0, 3]) * HOUR, np.array([1.0, 2.0]), np.array([[5.0], [6.0]]))
        (series,) = to_grid([rows], Grid(HOUR), max_gap=2)
        np.testing.assert_array_equal(series.y, [1, np.nan, np.nan, 2])
        np.testing.assert_array_equal(series.covariates, [[5], [np.nan], [np.nan], [6]])
        assert series.ts_ms.tolist() == [0, HOUR, 2 * HOUR, 3 * HOUR]

    def test_one_missing_step_too_many_starts_the_series_afresh(self) -> None:
        before, after = to_grid([observed(np.array([0, 4]) * HOUR)], Grid(HOUR), max_gap=2)
        assert (before.unique_id, before.first_slot, len(before.y)) == ("a", 0, 1)
        assert (after.unique_id, after.first_slot, len(after.y)) == ("a", 4, 1)

    def test_what_is_dropped_is_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        weekdays = Grid(DAY, 0, 7, (0, 1, 4, 5, 6))
        days = np.array([0, 1, 1.2, 2, 3, 4]) * DAY  # Thursday, Friday, Friday again, the weekend, Monday
        (series,) = to_grid([observed(days, np.arange(6.0))], weekdays, max_gap=5)
        assert series.y.tolist() == [0, 1, 5]
        assert caplog.messages == ["dropped: 2 observations in holes of the grid, 1 in a slot taken already"]

    def test_nothing_left_is_no_series(self) -> None:
        assert to_grid([observed(np.array([2, 3]) * DAY)], Grid(DAY, 0, 7, (0, 1, 4, 5, 6)), max_gap=5) == []

    def test_without_a_grid_each_observation_is_a_slot(self) -> None:
        (series,) = to_grid([observed(np.array([5, 6, 1_000]), np.array([1.0, np.nan, 3.0]))], None, max_gap=1)
        assert series.ts_ms.tolist() == [5, 6, 1_000]
        np.testing.assert_array_equal(series.y, [1, np.nan, 3])

    @settings(max_examples=200, deadline=None)
    @given(
        ts_ms=st.lists(st.integers(0, 600), min_size=1, max_size=60, unique=True).map(sorted),
        grid=st.sampled_from([Grid(10), Grid(7, 3), Grid(10, 4, 5, (0, 1, 3)), None]),
        max_gap=st.integers(1, 4),
    )
    def test_places_as_the_live_worker_does(self, ts_ms: list[int], grid: Grid | None, max_gap: int) -> None:
        config = ModelConfig(grid=grid, max_gap=max_gap)
        live: list[tuple[int, list[float]]] = []
        slot, last_ts_ms = NO_SLOT, NO_SLOT
        for k, ts in enumerate(ts_ms):
            placed = place(config, np.array([ts]), np.array([slot]), np.array([last_ts_ms]))
            if not placed.fresh[0]:
                continue
            if slot == NO_SLOT or placed.afresh[0]:
                live.append((int(placed.slot[0]), []))
            live[-1][1].extend([np.nan] * int(placed.missing[0]) + [float(k)])
            slot, last_ts_ms = int(placed.slot[0]), ts
        table = to_grid([observed(np.array(ts_ms), np.arange(len(ts_ms), dtype=float))], grid, max_gap)
        assert [series.first_slot for series in table] == [first for first, _ in live]
        for series, (_, y) in zip(table, live, strict=True):
            np.testing.assert_array_equal(series.y, y)
