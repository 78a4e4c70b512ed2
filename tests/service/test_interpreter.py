"""Python's own search for garbage, which stops all threads."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from service import interpreter


@pytest.fixture
def searches() -> Iterator[list[int]]:
    """The generations that were looked through."""
    searched: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            searched.append(info["generation"])

    threshold = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(note)
    yield searched
    gc.callbacks.remove(note)
    gc.set_threshold(*threshold)


def leave(cycles: int) -> None:
    """So many objects that do not go by themselves."""
    for _ in range(cycles):
        one: list[Any] = []
        one.append(one)


def test_a_large_batch_is_not_looked_through(searches: list[int]) -> None:
    interpreter.expect(10_000)
    leave(20_000)
    assert not searches


def test_while_batches_are_small_little_is_looked_at_at_a_time(searches: list[int]) -> None:
    """Of some 10,000 objects a second, which kafka-python leaves: at once they would be felt in 1 of 100 answers."""
    interpreter.expect(10_000)
    interpreter.expect(3)
    leave(20_000)
    assert len(searches) >= 8
