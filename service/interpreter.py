"""Python itself, as a worker wants it: its threads take turns quickly, and its search for garbage stops nobody."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.002
"""After so long the worker's thread lets that of HTTP go on, which asks for it several times a request; Python's own
5 ms would be felt in each answer. Sooner, and kafka-python's threads would spend a tenth of theirs on taking turns.
"""
RECORD_OBJECTS = 5
"""So many a record has at a time in a batch, and all of them go by themselves when it ends. By default, each 700, the
search for those that do not took a quarter of a worker's time.
"""
YOUNG_LEAST = 2_000
"""kafka-python leaves some 10,000 a second that do not go by themselves. The search stops all for 1 ms in 1,000."""
YOUNG_MOST = 50_000


def prepare() -> None:
    """Before anything else."""
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(YOUNG_MOST)


def expect(records: int) -> None:
    """Of a batch of so many, hardly any object is to be looked at; where batches are small, few are at a time."""
    gc.set_threshold(min(max(RECORD_OBJECTS * records, YOUNG_LEAST), YOUNG_MOST))


def settle() -> None:
    """Once all is there that stays: torch and the like need not be looked through, which would stop all for 0.15 s."""
    gc.collect()
    gc.freeze()
