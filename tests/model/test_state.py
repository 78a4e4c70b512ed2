"""The schema of a stream's state: what a new stream starts from, how large it is, and what is not of it."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import ModelConfig
from model.state import Rows, Schema, TensorSpec
from tests.model import block_of, random_forecaster

SCHEMA = Schema(
    [
        TensorSpec("h", (2, 4), torch.float32),
        TensorSpec("count", (), torch.int64, 7),
        TensorSpec("values", (3,), torch.float64, math.nan),
    ]
)


def test_new_streams_start_from_the_initial_values() -> None:
    rows = SCHEMA.initial(5)
    assert list(rows) == ["h", "count", "values"]
    assert torch.equal(rows["h"], torch.zeros(5, 2, 4))
    assert torch.equal(rows["count"], torch.full((5,), 7))
    assert rows["values"].dtype == torch.float64
    assert rows["values"].isnan().all()


def test_a_row_is_as_large_as_its_tensors() -> None:
    assert [spec.row_bytes for spec in SCHEMA] == [32, 8, 24]
    assert SCHEMA.row_bytes == 64
    assert SCHEMA.row_bytes * 5 == sum(rows.nbytes for rows in SCHEMA.initial(5).values())


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'h', 'h'"):
        Schema([TensorSpec("h", (), torch.float32), TensorSpec("h", (2,), torch.float32)])


@pytest.mark.parametrize("streams", [0, 1, 5])
def test_a_state_of_the_schema_passes_and_is_counted(streams: int) -> None:
    assert SCHEMA.check(SCHEMA.initial(streams)) == streams


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"h": torch.zeros(5, 2, 3)}, "h must be"),
        ({"h": torch.zeros(5, 2, 4, dtype=torch.float64)}, "h must be"),
        ({"count": torch.zeros(5, 1, dtype=torch.int64)}, "count must be"),
        ({"count": torch.tensor(5)}, "count must be"),
        ({"values": torch.zeros(4, 3, dtype=torch.float64)}, "as many rows"),
        ({"other": torch.zeros(5)}, "odd: .*other"),
    ],
)
def test_a_state_of_another_schema_is_refused_by_the_tensors_name(change: Rows, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SCHEMA.check(SCHEMA.initial(5) | change)


def test_a_state_that_lacks_a_tensor_is_refused() -> None:
    rows = SCHEMA.initial(5)
    del rows["count"]
    with pytest.raises(ValueError, match=r"odd: \['count'\]"):
        SCHEMA.check(rows)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("steps", [1, 4])
def test_what_a_model_gives_back_is_of_the_schema_that_it_declares(cell: str, steps: int) -> None:
    forecaster = random_forecaster(ModelConfig(season=2, horizon=3, hidden_size=8, cell=cell))
    state = forecaster.initial_state(3)
    assert forecaster.schema.check(state) == 3
    _, after = forecaster.advance(state, block_of(torch.ones(3, steps, dtype=torch.float64)))
    assert forecaster.schema.check(after) == 3
    assert [*after] == [spec.name for spec in forecaster.schema]
