"""States as safetensors: as the format's own library has them, and nothing else is taken for a state."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from model.state import Schema, TensorSpec
from service.packing import Packing

SCHEMA = Schema(
    [
        TensorSpec("gates", (3,), torch.float16),
        TensorSpec("h", (2, 4), torch.float32),
        TensorSpec("base", (5,), torch.float64),
        TensorSpec("gap", (), torch.int64),
        TensorSpec("count", (), torch.int64),
    ]
)
METADATA = {"bucket": "01", "streams": '["a","\u00e9"]'}
PACKING = Packing(SCHEMA)


def states_of(streams: int) -> NDArray[np.void]:
    """No two numbers the same."""
    states = np.zeros(streams, dtype=SCHEMA.record)
    for k, name in enumerate(SCHEMA.offsets):
        states[name] = 100 * k + np.arange(states[name].size).reshape(states[name].shape)
    return states


@pytest.mark.parametrize("streams", [0, 1, 7])
def test_what_is_packed_is_what_the_library_writes(streams: int) -> None:
    states = states_of(streams)
    columns = {name: np.ascontiguousarray(states[name]) for name in SCHEMA.offsets}
    packed, written = PACKING.pack(states, {"bucket": "01"}), save(columns, {"bucket": "01"})
    assert packed == written
    assert {name: column.tolist() for name, column in load(packed).items()} == {
        name: column.tolist() for name, column in columns.items()
    }


@pytest.mark.parametrize("streams", [0, 1, 7])
def test_what_is_unpacked_is_what_was_packed(streams: int) -> None:
    states = states_of(streams)
    columns, metadata = PACKING.unpack(PACKING.pack(states, METADATA))
    assert metadata == METADATA
    assert set(columns) == set(SCHEMA.offsets)
    for name, column in columns.items():
        assert (column.dtype, column.shape) == (states[name].dtype, states[name].shape)
        assert np.array_equal(column, states[name])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (TensorSpec("h", (2, 5), torch.float32), r"\['h'\]"),
        (TensorSpec("h", (2, 4), torch.float64), r"\['h'\]"),
        (TensorSpec("c", (2, 4), torch.float32), r"\['c', 'h'\]"),
    ],
)
def test_states_of_another_schema_are_refused_by_the_tensors_name(other: TensorSpec, named: str) -> None:
    schema = Schema([other if spec.name == "h" else spec for spec in SCHEMA])
    with pytest.raises(ValueError, match=named):
        Packing(schema).unpack(PACKING.pack(states_of(3), METADATA))


def test_nothing_that_is_cut_short_or_damaged_is_taken_for_a_state() -> None:
    value = PACKING.pack(states_of(3), METADATA)
    head = 8 + int.from_bytes(value[:8], "little")
    bare = {name: told for name, told in orjson.loads(value[8:head]).items() if name != "__metadata__"}
    damaged = [value[:length] for length in range(len(value))]
    damaged += [b"\xff" * 8 + value[8:], value[:8] + b"[]".ljust(head - 8) + value[head:]]
    damaged += [value.replace(b'"shape":[3', b'"shape":[' + count) for count in (b"9", b"-", b'"')]
    damaged += [len(orjson.dumps(bare)).to_bytes(8, "little") + orjson.dumps(bare) + value[head:]]
    for one in damaged:
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            PACKING.unpack(one)
