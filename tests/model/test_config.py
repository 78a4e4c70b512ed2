"""A model's numbers: refused by name where they make no sense, and the same after a way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from model.config import ModelConfig
from model.grid import Grid

FULL = ModelConfig(
    grid=Grid(step_ms=3_600_000, offset_ms=900_000, period=24, phases=(6, 7, 21)),
    season=24,
    horizon=48,
    quantiles=(0.05, 0.5, 0.95),
    covariates=("temperature", "holiday"),
    cell="rnn",
    hidden_size=32,
    layers=3,
    dropout=0.25,
    rank=4,
    max_gap=100,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("season", 0),
        ("season", 4097),
        ("season", 4.5),
        ("season", "24"),
        ("horizon", 0),
        ("horizon", 1025),
        ("hidden_size", 0),
        ("hidden_size", 4097),
        ("layers", 0),
        ("layers", 17),
        ("rank", -1),
        ("rank", 33),
        ("max_gap", -1),
        ("max_gap", 1_000_001),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", math.nan),
        ("cell", "transformer"),
        ("quantiles", ()),
        ("quantiles", (0.5, 0.1)),
        ("quantiles", (0.1, 0.1)),
        ("quantiles", (0.0, 0.5)),
        ("quantiles", (0.5, 1.0)),
        ("quantiles", (0.1, math.nan, 0.9)),
        ("quantiles", (math.nan,)),
        ("covariates", ("price", "price")),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must "):
        ModelConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("season", (1, 4096)),
        ("horizon", (1, 1024)),
        ("hidden_size", (1, 4096)),
        ("layers", (1, 16)),
        ("max_gap", (1, 1_000_000)),
        ("dropout", (0.0, 0.99)),
        ("quantiles", ((0.5,), (0.001, 0.999))),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field: str, values: tuple[Any, ...]) -> None:
    assert tuple(getattr(ModelConfig(**{field: value}), field) for value in values) == values


@pytest.mark.parametrize("config", [ModelConfig(), FULL], ids=["defaults", "full"])
def test_a_way_through_json_changes_nothing(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert ModelConfig.from_json(config.to_json()) == config


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="heads"):
        ModelConfig.from_json(FULL.to_json() | {"heads": 8})
    fields = FULL.to_json()
    fields["grid"]["zone"] = "UTC"
    with pytest.raises(TypeError, match="zone"):
        ModelConfig.from_json(fields)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_a_field_that_lacks_is_refused_by_name_not_guessed(field: str) -> None:
    """A model trained with a season of 4 must not be served with one of 1 because a line was lost."""
    fields = FULL.to_json()
    del fields[field]
    with pytest.raises(KeyError, match=field):
        ModelConfig.from_json(fields)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Grid)])
def test_a_field_of_the_grid_that_lacks_is_refused_by_name_too(field: str) -> None:
    fields = FULL.to_json()
    del fields["grid"][field]
    with pytest.raises(KeyError, match=field):
        ModelConfig.from_json(fields)


def test_reading_leaves_what_was_read_as_it_was() -> None:
    fields = FULL.to_json()
    ModelConfig.from_json(fields)
    assert fields == FULL.to_json()


@pytest.mark.parametrize(
    ("season", "context", "warmup", "max_gap"),
    [(1, 32, 16, 64), (5, 35, 16, 64), (24, 168, 48, 168), (168, 168, 336, 1176), (365, 365, 730, 2555)],
)
def test_what_is_remembered_follows_from_the_season(season: int, context: int, warmup: int, max_gap: int) -> None:
    config = ModelConfig(season=season)
    assert (config.context, config.memory, config.warmup, config.max_gap) == (context, 2 * context, warmup, max_gap)


def test_a_gap_that_is_given_stays() -> None:
    assert ModelConfig(season=24, max_gap=5).max_gap == 5


def test_the_step_is_that_of_the_grid() -> None:
    assert FULL.step_ms == 3_600_000
    assert ModelConfig().step_ms is None


def test_a_config_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.season = 7  # type: ignore[misc]
    assert len({FULL, dataclasses.replace(FULL)}) == 1
