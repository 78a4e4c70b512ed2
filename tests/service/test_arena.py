"""Rows of state: given, grown, reset, freed with their partition."""

from __future__ import annotations

import pytest
import torch

from model.state import Schema, TensorSpec
from service.arena import FIRST_ROWS, Arena, Full, StreamKey

SCHEMA = Schema([TensorSpec("slot", (), torch.int64, -1), TensorSpec("h", (2,), torch.float32, 0.5)])


def test_a_new_stream_starts_from_the_initial_state_and_keeps_what_is_scattered() -> None:
    arena = Arena(SCHEMA, max_streams=10)
    row = torch.tensor([arena.row(StreamKey(0, "a"))])
    assert arena.gather(row)["h"].tolist() == [[0.5, 0.5]]
    arena.scatter(row, {"h": torch.tensor([[1.0, 2.0]])})
    assert arena.row(StreamKey(0, "a")) == row.item()
    state = arena.gather(row)
    assert (state["h"].tolist(), state["slot"].tolist()) == ([[1.0, 2.0]], [-1])


def test_what_is_gathered_is_a_copy() -> None:
    arena = Arena(SCHEMA, max_streams=10)
    row = torch.tensor([arena.row(StreamKey(0, "a"))])
    arena.gather(row)["h"][:] = 9.0
    assert arena.gather(row)["h"].tolist() == [[0.5, 0.5]]


def test_growing_keeps_every_row() -> None:
    arena = Arena(SCHEMA, max_streams=5 * FIRST_ROWS)
    rows = []
    for n in range(5 * FIRST_ROWS):
        rows.append(arena.row(StreamKey(n % 3, f"s{n}")))
        arena.scatter(torch.tensor(rows[-1:]), {"slot": torch.tensor([n])})
    assert len(set(rows)) == len(rows)
    assert arena.gather(torch.tensor(rows))["slot"].tolist() == list(range(len(rows)))
    assert arena.state_bytes == len(rows) * 16


def test_no_stream_more_than_the_limit_until_one_ends() -> None:
    arena = Arena(SCHEMA, max_streams=2)
    arena.row(StreamKey(0, "a"))
    arena.row(StreamKey(0, "b"))
    with pytest.raises(Full):
        arena.row(StreamKey(0, "c"))
    assert arena.forget([StreamKey(0, "a"), StreamKey(0, "z")]) == 1
    assert arena.forget([StreamKey(0, "a")]) == 0
    arena.row(StreamKey(0, "c"))


def test_a_row_that_is_given_again_remembers_nothing() -> None:
    arena = Arena(SCHEMA, max_streams=1)
    row = torch.tensor([arena.row(StreamKey(0, "a"))])
    arena.scatter(row, {"h": torch.full((1, 2), 9.0)})
    arena.forget([StreamKey(0, "a")])
    assert arena.gather(torch.tensor([arena.row(StreamKey(0, "b"))]))["h"].tolist() == [[0.5, 0.5]]


def test_streams_go_with_their_partition_and_the_same_id_elsewhere_stays() -> None:
    arena = Arena(SCHEMA, max_streams=10)
    for partition, stream in ((0, "a"), (1, "a"), (0, "b")):
        arena.row(StreamKey(partition, stream))
    assert arena.forget_partition(0) == 2
    assert list(arena) == [StreamKey(1, "a")]
