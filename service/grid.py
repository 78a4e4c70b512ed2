"""Where an observation falls on its stream's grid, and what that means for the stream.

The next slot is a normal step. A gap is that many missing steps, up to a bound past which the stream starts afresh.
The same slot again is a duplicate, an older one is late: neither moves the state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

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


def place_in_turn(
    config: ModelConfig, ts_ms: Int64s, last_slot: ArrayLike, last_ts_ms: ArrayLike, stream: Int64s | None = None
) -> Placed:
    """Place n observations at `ts_ms` [n], each after those before it of the same stream.

    stream [n]: a number for each; None: all are of one. last_slot, last_ts_ms [n]: where each one's stream stood before
    all of them.
    """
    last_slot, last_ts_ms = (np.broadcast_to(np.asarray(last), len(ts_ms)) for last in (last_slot, last_ts_ms))
    turns = np.zeros(len(ts_ms), dtype=np.int64) if stream is None else stream
    order = np.argsort(turns, kind="stable")
    turns = turns[order]
    first = np.append(True, turns[1:] != turns[:-1])
    slot = ts_ms if config.grid is None else config.grid.slot_of(ts_ms)
    before, before_ms = (
        _most_before(now[order], last[order], first) for now, last in ((slot, last_slot), (ts_ms, last_ts_ms))
    )
    placed = place(config, ts_ms[order], before, before_ms)
    if config.grid is None:
        moved = np.cumsum(placed.fresh)
        start = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        moved = moved - (moved - placed.fresh)[start]
        base = np.where(last_slot[order] == NO_SLOT, 0, last_slot[order] + 1)
        placed = dataclasses.replace(placed, slot=base - 1 + moved)
    back = np.argsort(order)
    return Placed(*(getattr(placed, field.name)[back] for field in dataclasses.fields(Placed)))


def _most_before(now: Int64s, last: Int64s, first: Bools) -> Int64s:
    """Of each, the largest of those before it since the last `first`, and of what stood before all of them."""
    values, rank = np.unique(np.where(first, last, np.append(NO_SLOT, now[:-1])), return_inverse=True)
    stretch = np.cumsum(first) * len(values)  # so that one stretch's ranks all lie above those of the one before it
    return np.asarray(values[np.maximum.accumulate(stretch + rank) - stretch])


def times_of(config: ModelConfig, slot: Int64s, ts_ms: Int64s) -> Int64s:
    """The time of each slot on the grid; without a clock, the observation's own."""
    return config.grid.time_of(slot) if config.grid else ts_ms
