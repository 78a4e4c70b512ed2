"""Time to slots and back, whatever the holes, the jitter and the side of 1970."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.grid import HOLE, Grid
from tests.model import HOUR_MS, seeded

DAY_MS = 24 * HOUR_MS


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    period = draw(st.integers(1, 30))
    phases = draw(st.sets(st.integers(0, period - 1), min_size=1))
    step_ms = draw(st.integers(1, 5) | st.sampled_from([250, 1_000, 1_001, HOUR_MS, DAY_MS]))
    return Grid(step_ms, draw(st.integers(-(10**13), 10**13)), period, tuple(sorted(phases)))


some_slots = st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=20).map(lambda slots: np.array(slots))


@seeded(max_examples=200)
@given(grids(), some_slots)
def test_a_slots_time_belongs_to_the_slot(grid: Grid, slots: np.ndarray) -> None:
    times = grid.time_of(slots)
    assert times.dtype == np.int64
    np.testing.assert_array_equal(grid.slot_of(times), slots)


@seeded(max_examples=200)
@given(grids(), some_slots, st.floats(-0.999, 0.999))
def test_jitter_under_half_a_step_changes_no_slot(grid: Grid, slots: np.ndarray, share: float) -> None:
    jitter = int(share * grid.step_ms / 2)  # towards zero, so under half a step also where the step is odd
    np.testing.assert_array_equal(grid.slot_of(grid.time_of(slots) + jitter), slots)


@seeded(max_examples=200)
@given(grids(), st.integers(-(10**6), 10**6))
def test_slots_follow_each_other_with_no_tick_between_that_is_no_hole(grid: Grid, slot: int) -> None:
    here, there = grid.time_of(np.array([slot, slot + 1]))
    assert (there - here) % grid.step_ms == 0
    between = np.arange(here + grid.step_ms, there, grid.step_ms)
    assert len(between) < grid.period
    assert (grid.slot_of(between) == HOLE).all()


@seeded(max_examples=100)
@given(grids())
def test_slot_0_is_the_first_of_the_turn_that_starts_at_the_offset(grid: Grid) -> None:
    assert grid.time_of(np.array(0)) == grid.offset_ms + grid.phases[0] * grid.step_ms


def test_a_time_goes_to_the_nearest_slot() -> None:
    grid = Grid(step_ms=1000, offset_ms=300)
    assert grid.slot_of(np.array([300, 799, 801, 1300, -199, -201, -700])).tolist() == [0, 0, 1, 1, 0, -1, -1]


def test_nights_left_out_are_no_slots() -> None:
    daytime = Grid(HOUR_MS, period=24, phases=tuple(range(6, 22)))
    hours = np.array([5, 6, 21, 22, 30, -3, -18, -19]) * HOUR_MS
    assert daytime.slot_of(hours).tolist() == [HOLE, 0, 15, HOLE, 16, -1, -16, HOLE]


def test_shapes_are_kept() -> None:
    grid = Grid(HOUR_MS, period=7, phases=(1, 2))
    slots = np.arange(6).reshape(2, 3)
    assert grid.time_of(slots).shape == (2, 3)
    assert grid.slot_of(grid.time_of(slots)).tolist() == slots.tolist()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"step_ms": 0}, "step_ms"),
        ({"step_ms": -5}, "step_ms"),
        ({"step_ms": 1, "phases": ()}, "phases"),
        ({"step_ms": 1, "period": 3, "phases": (1, 0)}, "phases"),
        ({"step_ms": 1, "period": 3, "phases": (1, 1)}, "phases"),
        ({"step_ms": 1, "period": 3, "phases": (0, 3)}, "phases"),
        ({"step_ms": 1, "period": 3, "phases": (-1, 2)}, "phases"),
        ({"step_ms": 1, "period": 0}, "phases"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must "):
        Grid(**fields)
