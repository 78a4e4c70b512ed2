"""Rows become series: the grid and the season found, and each slot as the live worker has it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.grid import Grid
from service.grid import NO_SLOT, place
from training.series import DAY, HOUR, MINUTE, WEEK, Series, infer_grid, infer_season, parse_step, to_grid
from training.table import Observed


def observed(ts_ms: np.ndarray, y: np.ndarray | None = None, unique_id: str = "a") -> Observed:
    ts_ms = np.asarray(ts_ms, dtype=np.int64)
    return Observed(unique_id, ts_ms, np.ones(len(ts_ms)) if y is None else y, np.empty((len(ts_ms), 0)))


def between(start: str, end: str, freq: str, tz: str = "UTC") -> np.ndarray:
    times = pd.date_range(start, end, freq=freq, tz=tz).tz_convert("UTC").tz_localize(None)
    return times.as_unit("ms").to_numpy().astype(np.int64)


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
