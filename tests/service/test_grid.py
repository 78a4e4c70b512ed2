"""Where observations fall, and what that means for their stream."""

from __future__ import annotations

import numpy as np

from model.config import ModelConfig
from model.grid import Grid
from service.grid import NO_SLOT, place

HOUR_MS = 3_600_000
HOURLY = ModelConfig(grid=Grid(HOUR_MS), max_gap=48)
BUSINESS_DAYS = ModelConfig(grid=Grid(24 * HOUR_MS, period=7, phases=(0, 1, 4, 5, 6)))


def placed(config: ModelConfig, ts_ms: int, last_slot: int, last_ts_ms: int = 0) -> dict[str, int]:
    result = place(config, np.array([ts_ms]), np.array([last_slot]), np.array([last_ts_ms]))
    return {name: int(getattr(result, name)[0]) for name in ("slot", "late", "duplicate", "hole", "afresh", "missing")}


MOVES = {"late": 0, "duplicate": 0, "hole": 0, "afresh": 0, "missing": 0}


def test_the_first_observation_is_a_step_wherever_it_falls() -> None:
    assert placed(HOURLY, 100 * HOUR_MS, NO_SLOT) == {"slot": 100} | MOVES


def test_the_next_slot_is_a_step_also_with_jitter_below_half_a_step() -> None:
    for jitter in (-HOUR_MS // 2, 0, HOUR_MS // 2 - 1):
        assert placed(HOURLY, 101 * HOUR_MS + jitter, 100) == {"slot": 101} | MOVES


def test_the_same_slot_is_a_duplicate_and_an_older_one_late() -> None:
    assert placed(HOURLY, 100 * HOUR_MS, 100) == {"slot": 100} | MOVES | {"duplicate": 1}
    assert placed(HOURLY, 99 * HOUR_MS, 100) == {"slot": 99} | MOVES | {"late": 1}


def test_a_gap_is_bridged_up_to_its_bound_and_past_it_the_stream_starts_afresh() -> None:
    assert placed(HOURLY, 149 * HOUR_MS, 100) == {"slot": 149} | MOVES | {"missing": 48}
    assert placed(HOURLY, 150 * HOUR_MS, 100) == {"slot": 150} | MOVES | {"afresh": 1}


def test_a_regular_hole_is_no_gap_and_a_time_within_it_no_slot() -> None:
    day = 24 * HOUR_MS
    friday, saturday, monday = (int(n) * day for n in (1, 2, 4))
    slot = placed(BUSINESS_DAYS, friday, NO_SLOT)["slot"]
    assert placed(BUSINESS_DAYS, monday, slot) == {"slot": slot + 1} | MOVES
    assert placed(BUSINESS_DAYS, saturday, slot)["hole"] == 1


def test_without_a_clock_each_observation_is_a_step_unless_time_runs_back() -> None:
    clockless = ModelConfig()
    assert placed(clockless, 5, NO_SLOT)["slot"] == 0
    assert placed(clockless, 10**12, 6, 5) == {"slot": 7} | MOVES
    assert placed(clockless, 5, 6, 5)["duplicate"] == 1
    assert placed(clockless, 4, 6, 5)["late"] == 1
