"""What is told of a forecast: rounded far below its scale, and the same in every way of writing it."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.grid import Grid
from service.forecasts import Issued, Teller, decimals_of, rounded

CONFIG = ModelConfig(grid=Grid(3_600_000), horizon=5, quantiles=(0.1, 0.5, 0.975))


@given(st.floats(1e-9, 1e12), st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_rounding_is_far_below_the_scale_and_keeps_the_order(scale: float, offsets: list[float]) -> None:
    values = scale * np.sort(np.array(offsets))[None, None]
    got = rounded(values, decimals_of(np.array([scale])))
    assert np.abs(got - values).max() <= 1e-5 * scale
    assert (np.diff(got) >= 0).all()


@given(st.floats(1e-8, 1e19))
def test_of_a_scale_five_digits_behind_its_first_are_told(scale: float) -> None:
    (decimals,) = decimals_of(np.array([scale])).tolist()
    assert 10**5 <= Fraction(scale) * Fraction(10) ** decimals < 10**6


def issued(seed: int, streams: int = 40) -> Issued:
    """Forecasts of all sizes: some of changes that are nothing beside their level, or of numbers that are all 0."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-12, 12, streams)
    level = scale * 10.0 ** random.uniform(-2, 9, streams) * random.choice([-1, 0, 1], streams)
    values = level[:, None, None] + scale[:, None, None] * random.standard_normal((streams, 5, 3)).cumsum(2)
    values[random.random(streams) < 0.1] = 0.0
    observed, anomaly = (np.where(random.random(streams) < 0.2, np.nan, random.random(streams)) for _ in range(2))
    numbers = [random.integers(0, 2**45, streams) for _ in range(3)]
    names = [f'sensor "{n}" \u00fc/\\' for n in range(streams)]
    return Issued(names, *numbers, random.random(streams) < 0.5, observed, anomaly, scale, values)  # type: ignore[arg-type]


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "quantiles": {key: values.tolist() for key, values in fields["quantiles"].items()}}


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_bytes_of_a_record_hold_the_fields_that_http_tells(compiled: bool, seed: int) -> None:
    teller, some = Teller("model@1", CONFIG, compiled=compiled), issued(seed)
    assert (teller.write is not None) == compiled, "without numba numbers are written by orjson"
    told = [json.loads(value) for value in teller.encode(some)]
    assert told == [plain(fields) for fields in teller.describe(some)]


def test_only_the_quantiles_horizons_and_decimals_asked_for_are_told() -> None:
    some = issued(1)
    whole = [plain(fields) for fields in Teller("m", CONFIG).describe(some)]
    part = [json.loads(value) for value in Teller("m", CONFIG, (0.5, 0.1), (1, 5)).encode(some)]
    for one, other in zip(whole, part, strict=True):
        assert list(other["quantiles"]) == ["0.5", "0.1"]
        assert other["quantiles"] == {key: [one["quantiles"][key][n] for n in (0, 4)] for key in ("0.5", "0.1")}
        assert other["horizons"] == [1, 5]
    coarse = [json.loads(value) for value in Teller("m", CONFIG, decimals=1).encode(some)]
    for fields, values in zip(coarse, some.values, strict=True):
        np.testing.assert_allclose(fields["quantiles"]["0.5"], values[:, 1], atol=0.0501, rtol=1e-15)


@pytest.mark.parametrize(("asked", "named"), [({"quantiles": (0.2,)}, "0.2"), ({"horizons": (6,)}, "1 ... 5")])
def test_what_the_model_does_not_forecast_cannot_be_asked_for(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Teller("m", CONFIG, **asked)
