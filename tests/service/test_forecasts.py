"""What is told of a forecast: rounded far below its scale, and the same in every way of writing it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import repeat
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
    assert (teller.form is not None) == compiled, "without numba numbers are written by orjson"
    told = [json.loads(value) for value in teller.encode(some)]
    assert told == [plain(fields) for fields in teller.describe(some)]


@pytest.mark.parametrize("streams", [0, 1, 128, 129, 300])
def test_in_a_wave_of_any_size_each_record_has_its_own_numbers(streams: int) -> None:
    """Long ones are written in pieces, and here some records have more digits than are written at once."""
    teller, some = Teller("model@1", CONFIG, compiled=True), issued(3, streams)
    assert [json.loads(value) for value in teller.encode(some)] == [*map(plain, teller.describe(some))]


@pytest.mark.parametrize("decimals", range(9))
def test_the_digits_of_a_number_are_those_that_python_writes(decimals: int) -> None:
    """Of both signs, of all lengths that a float has digits for, and where they turn over."""
    random = np.random.default_rng(decimals)
    first = 10 ** random.integers(0, min(8, 15 - decimals) + 1, 3_000) - 1
    values = random.choice([-1, 1], 3_000) * (first * 10**decimals + random.integers(0, 9, 3_000)) / 10**decimals
    some = replace(issued(decimals, 200), values=values.reshape(200, 5, 3))
    written = Teller("m", CONFIG, decimals=decimals, compiled=True).encode(some)
    for value, numbers in zip(written, some.values, strict=True):
        for column, key in enumerate(("0.1", "0.5", "0.975")):
            told = ",".join(f"{number:.{max(decimals, 1)}f}" for number in numbers[:, column].tolist())
            assert f'"{key}":[{told}]' in value.decode()


def test_the_first_steps_and_some_quantiles_of_a_record_are_those_of_the_whole() -> None:
    teller, told = Teller("m", CONFIG, compiled=True), 0
    for one in map(issued, range(30), repeat(1)):
        (whole,) = map(plain, teller.describe(one))
        for horizon, chosen in ((5, (0, 1, 2)), (2, (0, 2)), (1, (1,))):
            if text := teller.encode_cut(one, horizon, chosen, b"[7]"):
                quantiles = {key: whole["quantiles"][key][:horizon] for key in map(teller.keys.__getitem__, chosen)}
                assert json.loads(text) == {**whole, "quantiles": quantiles, "timestamps": [7]}
                told += 1
    assert told > 20, "only what has too many digits is left to `describe`"


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
