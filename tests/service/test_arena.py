"""Rows of state: given, grown, reset, freed with their partition; and undone."""

from __future__ import annotations

import numpy as np
import torch

from model.state import Schema, TensorSpec
from service.arena import FIRST_ROWS, Arena, StreamKey

SCHEMA = Schema(
    [
        TensorSpec("offset", (), torch.int64, -1),
        TensorSpec("h", (2,), torch.float32, 0.5),
    ]
)
A, B, C = (StreamKey(0, stream) for stream in "abc")


def heard(arena: Arena, key: StreamKey, offset: int, h: float = 1.0) -> int:
    """Let a stream be moved by the record at `offset`."""
    row = arena.find(key)
    row = arena.add(key) if row is None else row
    arena.open(key.partition).move_to_end(key.stream)
    arena.scatter(torch.tensor([row]), {"offset": torch.tensor([offset]), "h": torch.full((1, 2), h)})
    return row


def seen(arena: Arena, partition: int = 0) -> dict[str, tuple[int, float]]:
    """Streams in the order in which they were last heard, with what stands in their rows."""
    found = {}
    for stream, row in arena.streams(partition).items():
        state = arena.gather(torch.tensor([row]))
        found[stream] = (int(state["offset"]), float(state["h"][0, 0]))
    return found


def test_a_new_stream_starts_from_the_initial_state_and_keeps_what_is_scattered() -> None:
    arena = Arena(SCHEMA)
    row = torch.tensor([arena.add(A)])
    assert arena.gather(row)["h"].tolist() == [[0.5, 0.5]]
    arena.scatter(row, {"h": torch.tensor([[1.0, 2.0]])})
    assert arena.find(A) == row.item()
    state = arena.gather(row)
    assert (state["h"].tolist(), state["offset"].tolist()) == ([[1.0, 2.0]], [-1])


def test_what_is_gathered_is_a_copy() -> None:
    arena = Arena(SCHEMA)
    row = torch.tensor([arena.add(A)])
    arena.gather(row)["h"][:] = 9.0
    assert arena.gather(row)["h"].tolist() == [[0.5, 0.5]]


def test_growing_keeps_every_row() -> None:
    arena = Arena(SCHEMA)
    rows = [heard(arena, StreamKey(n % 3, f"s{n}"), n) for n in range(5 * FIRST_ROWS)]
    assert len(set(rows)) == len(rows)
    assert arena.gather(torch.tensor(rows))["offset"].tolist() == list(range(len(rows)))
    assert arena.state_bytes == len(rows) * 16


def test_a_row_that_is_given_again_remembers_nothing() -> None:
    arena = Arena(SCHEMA)
    row = heard(arena, A, 0, h=9.0)
    assert arena.forget(A)
    assert not arena.forget(A)
    arena.commit()
    assert arena.add(B) == row
    assert seen(arena) == {"b": (-1, 0.5)}


def test_a_row_is_not_given_again_before_its_end_is_committed() -> None:
    arena = Arena(SCHEMA)
    row = heard(arena, A, 0)
    arena.forget(A)
    assert arena.add(A) != row


def test_streams_are_given_states_whether_they_were_there_or_not_and_a_rollback_leaves_them() -> None:
    arena = Arena(SCHEMA)
    row = heard(arena, A, 3)
    arena.commit()
    changes = arena.changes
    arena.load(0, ["b", "a"], {"offset": np.array([1, 2]), "h": np.full((2, 2), [[5.0], [6.0]], dtype=np.float32)})
    assert arena.changes > changes
    arena.rollback()
    assert seen(arena) == {"b": (1, 5.0), "a": (2, 6.0)}
    assert arena.find(A) == row
    assert arena.add(C) not in {row, arena.find(B)}


def test_records_are_the_rows_asked_for_copied() -> None:
    arena = Arena(SCHEMA)
    rows = np.array([heard(arena, key, offset, h) for offset, (key, h) in enumerate([(A, 1.0), (B, 2.0), (C, 3.0)])])
    records = arena.records(rows[[2, 0]])
    arena.reset(torch.from_numpy(rows))
    assert records["offset"].tolist() == [2, 0]
    assert records["h"].tolist() == [[3.0, 3.0], [1.0, 1.0]]


def test_streams_go_with_their_partition_and_the_same_id_elsewhere_stays() -> None:
    arena = Arena(SCHEMA)
    for key in (A, StreamKey(1, "a"), B):
        arena.add(key)
    arena.commit()
    assert arena.forget_partition(0) == 2
    assert list(arena) == [StreamKey(1, "a")]


def test_streams_stand_in_the_order_in_which_they_were_last_heard() -> None:
    arena = Arena(SCHEMA)
    for offset, key in enumerate((A, B, C, A)):
        heard(arena, key, offset)
    assert list(arena.streams(0)) == ["b", "c", "a"]


def test_a_rollback_undoes_all_since_the_last_commit() -> None:
    arena = Arena(SCHEMA)
    for offset, key in enumerate((A, B)):
        heard(arena, key, offset)
    arena.commit()
    before = seen(arena)
    heard(arena, A, 2, h=7.0)
    heard(arena, A, 3, h=8.0)
    arena.forget(B)
    heard(arena, B, 4, h=9.0)
    arena.reset(torch.tensor([heard(arena, C, 5)]))
    arena.rollback()
    assert seen(arena) == before
    assert list(arena.streams(0)) == ["a", "b"]


def test_what_was_rolled_back_can_be_done_again_and_then_stands() -> None:
    arena = Arena(SCHEMA)
    heard(arena, A, 0)
    arena.commit()
    for _ in range(2):
        heard(arena, A, 1, h=2.0)
        heard(arena, B, 2, h=3.0)
        arena.rollback()
    heard(arena, A, 1, h=2.0)
    heard(arena, B, 2, h=3.0)
    arena.commit()
    arena.rollback()
    assert seen(arena) == {"a": (1, 2.0), "b": (2, 3.0)}
