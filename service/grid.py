"""Where an observation falls on its stream's grid, and what that means for the stream.

The next slot is a normal step. A gap is that many missing steps, up to a bound past which the stream starts afresh.
The same slot again is a duplicate, an older one is late: neither moves the state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import ModelConfig
from model.grid import HOLE, Int64s
from model.state import TensorSpec

NO_SLOT = np.iinfo(np.int64).min
"""The slot of a stream that was never heard."""

SCHEMA = (
    TensorSpec("slot", (), torch.int64, NO_SLOT),
    TensorSpec("ts_ms", (), torch.int64, NO_SLOT),
    TensorSpec("count", (), torch.int64),
    TensorSpec("offset", (), torch.int64, -1),
    TensorSpec("heard_ms", (), torch.int64, NO_SLOT),
)
"""A stream's place on the grid: its last slot, the time of its last observation and how many it had. Its place among
its partition's streams: the offset of its last record, and what the partition's clock showed then."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Placed:
    """Where B observations fall. slot [B] int64; of the masks [B], at most one is true of an observation.

    hole: its time is no slot of the grid. late, duplicate: it changes nothing. afresh: its stream forgets and begins
    anew. missing [B]: steps between the stream's last slot and this one, to be made up first.
    """

    slot: Int64s
    hole: Bools
    late: Bools
    duplicate: Bools
    afresh: Bools
    missing: Int64s

    @property
    def fresh(self) -> Bools:
        """Those that move their stream on."""
        return ~(self.hole | self.late | self.duplicate)


def place(config: ModelConfig, ts_ms: Int64s, last_slot: Int64s, last_ts_ms: Int64s) -> Placed:
    """Place observations at `ts_ms` [B] of streams whose last ones stood at `last_slot` and `last_ts_ms` [B]."""
    new = last_slot == NO_SLOT
    if config.grid is None:  # no clock: each observation is the next step, as long as time does not run back
        slot = np.where(new, 0, last_slot + 1)
        nothing = np.zeros(len(ts_ms), dtype=np.bool_)
        late, duplicate = ~new & (ts_ms < last_ts_ms), ~new & (ts_ms == last_ts_ms)
        return Placed(slot, nothing, late, duplicate, nothing, np.zeros(len(ts_ms), dtype=np.int64))
    slot = config.grid.slot_of(ts_ms)
    hole = slot == HOLE
    known = ~new & ~hole
    ahead = np.where(known, slot - np.where(known, last_slot, slot), 1)
    afresh = ahead - 1 > config.max_gap
    missing = np.where((ahead > 1) & ~afresh, ahead - 1, 0)
    return Placed(slot, hole, known & (ahead < 0), known & (ahead == 0), afresh, missing)


def place_in_turn(config: ModelConfig, ts_ms: Int64s, last_slot: int, last_ts_ms: int) -> Placed:
    """Place n observations at `ts_ms` [n] of one stream, each after those before it."""
    order = ts_ms if config.grid is None else config.grid.slot_of(ts_ms)
    before = np.maximum.accumulate(np.append(last_slot, order))[:-1]
    before_ms = np.maximum.accumulate(np.append(last_ts_ms, ts_ms))[:-1]
    placed = place(config, ts_ms, before, before_ms)
    if config.grid is None:
        first = 0 if last_slot == NO_SLOT else last_slot + 1
        placed = dataclasses.replace(placed, slot=first - 1 + np.cumsum(placed.fresh))
    return placed


def times_of(config: ModelConfig, slot: Int64s, ts_ms: Int64s) -> Int64s:
    """The time of each slot on the grid; without a clock, the observation's own."""
    return config.grid.time_of(slot) if config.grid else ts_ms
