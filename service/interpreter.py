"""Python itself, as a worker wants it: its threads take turns quickly, and its search for garbage stops nobody."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.002
"""After so long the worker's thread lets that of HTTP go on, which asks for it several times a request; Python's own
5 ms would be felt in each answer. Sooner, and kafka-python's threads would spend a tenth of theirs on taking turns.
"""
YOUNG_OBJECTS = 50_000
"""More than a batch has at a time. All of them go by themselves when it ends; by default, at 700, the search for those
that do not took a quarter of a worker's time.
"""


def prepare() -> None:
    """Before anything else."""
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(YOUNG_OBJECTS)


def settle() -> None:
    """Once all is there that stays: torch and the like need not be looked through, which would stop all for 0.15 s."""
    gc.collect()
    gc.freeze()
