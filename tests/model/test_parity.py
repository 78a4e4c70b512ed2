"""The central promise: one step at a time, in bursts, or all at once; alone or in a crowd: the same forecasts.

`Forecaster.advance` is trained on whole windows and served one observation at a time. Everything else rests on that
being one function; so it is held here for every kind of model, of series and of split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.bundle import load_bundle, save_bundle
from model.config import Cell, ModelConfig
from model.features import Block
from model.grid import Grid
from model.network import Forecast, Forecaster
from model.quantiles import pinball
from model.state import Rows
from tests.model import HOUR_MS, block_of, part_of, random_forecaster, seeded, streams_of

Series = NDArray[np.float64]

TOLERANCE = 1e-4
"""Of the scale: how far apart the same forecast may come out."""


# --- Series of all kinds --------------------------------------------------------------------------------------------


def seasonal(random: np.random.Generator, steps: int) -> Series:
    return 20 + 5 * np.sin(np.arange(steps) * 2 * np.pi / 24) + random.normal(size=steps)


def walk(random: np.random.Generator, steps: int) -> Series:
    return random.normal(size=steps).cumsum()


def negative(random: np.random.Generator, steps: int) -> Series:
    return -300 + random.normal(size=steps)


def huge_level(random: np.random.Generator, steps: int) -> Series:
    return 1e9 + random.choice([-1.0, 1.0], size=steps)


def tiny(random: np.random.Generator, steps: int) -> Series:
    return 1e-9 * random.normal(size=steps)


def constant(random: np.random.Generator, steps: int) -> Series:
    return np.full(steps, random.choice([7.3, -1e9, 1e-9]))


def zeros(random: np.random.Generator, steps: int) -> Series:
    return np.zeros(steps)


def outliers(random: np.random.Generator, steps: int) -> Series:
    return np.where(random.random(steps) < 0.05, random.choice([-1e15, 1e15], size=steps), random.normal(size=steps))


def jump(random: np.random.Generator, steps: int) -> Series:
    return np.where(np.arange(steps) < steps // 2, constant(random, steps), walk(random, steps))


KINDS = (seasonal, walk, negative, huge_level, tiny, constant, zeros, outliers, jump)


def none_missing(random: np.random.Generator, steps: int) -> NDArray[np.bool_]:
    return np.zeros(steps, dtype=bool)


def late_start(random: np.random.Generator, steps: int) -> NDArray[np.bool_]:
    return np.arange(steps) < random.integers(steps)


def long_gap(random: np.random.Generator, steps: int) -> NDArray[np.bool_]:
    start, end = sorted(random.integers(steps + 1, size=2))
    return (start <= np.arange(steps)) & (np.arange(steps) < end)


def scattered(random: np.random.Generator, steps: int) -> NDArray[np.bool_]:
    return random.random(steps) < 0.3


def nearly_all(random: np.random.Generator, steps: int) -> NDArray[np.bool_]:
    return random.random(steps) < 0.95


GAPS = (none_missing, late_start, long_gap, scattered, nearly_all)


def make_block(config: ModelConfig, seed: int, kinds: list[tuple[Callable, Callable]], steps: int) -> Block:
    """One stream of each kind, with the times and covariates that the model expects."""
    random = np.random.default_rng(seed)
    values = np.stack([np.where(gaps(random, steps), np.nan, kind(random, steps)) for kind, gaps in kinds])
    if config.grid:
        first = random.integers(-1_000_000, 1_000_000, size=(len(kinds), 1))
        ts_ms = config.grid.time_of(first + np.arange(steps))
    else:
        ts_ms = random.integers(1, 5 * HOUR_MS, size=values.shape).cumsum(axis=1)
    covariates = random.normal(size=(*values.shape, len(config.covariates)))
    covariates[random.random(covariates.shape) < 0.2] = np.nan
    return Block(torch.from_numpy(values), torch.from_numpy(ts_ms), torch.from_numpy(covariates))


DAYTIME = Grid(step_ms=HOUR_MS, offset_ms=900_000, period=24, phases=tuple(range(6, 22)))


def configs(
    cells: tuple[Cell, ...] = ("lstm", "gru", "rnn"), seasons: tuple[int, ...] = (1, 5, 24)
) -> st.SearchStrategy[ModelConfig]:
    def build(
        cell: Cell, season: int, long: bool, covariates: tuple[str, ...], grid: Grid | None, layers: int, rank: int
    ) -> ModelConfig:
        return ModelConfig(
            grid=grid,
            season=season,
            horizon=season + 3 if long else max(1, season // 2),
            quantiles=(0.1, 0.5, 0.75, 0.9),
            covariates=covariates,
            cell=cell,
            hidden_size=8,
            layers=layers,
            rank=rank,
        )

    return st.builds(
        build,
        st.sampled_from(cells),
        st.sampled_from(seasons),
        st.booleans(),
        st.sampled_from([(), ("temperature", "holiday")]),
        st.sampled_from([None, DAYTIME, Grid(HOUR_MS)]),
        st.sampled_from([2, 1]),
        st.sampled_from([0, 3]),
    )


@st.composite
def blocks(draw: st.DrawFn, config: ModelConfig, streams: int = 3) -> Block:
    # Some longer than the 128 steps in which the sums are taken, and than what a stream remembers.
    steps = draw(st.integers(2, 40) | st.integers(41, 400))
    stream = st.tuples(st.sampled_from(KINDS), st.sampled_from(GAPS))
    kinds = draw(st.lists(stream, min_size=1, max_size=streams))
    return make_block(config, draw(st.integers(0, 1000)), kinds, steps)


# --- What "the same" means ------------------------------------------------------------------------------------------


def assert_same_forecasts(ours: Forecast, theirs: Forecast) -> None:
    scale = theirs.scale[..., None, None]
    assert theirs.values.isfinite().all()
    assert (ours.values - theirs.values).abs().div(scale).max() <= TOLERANCE
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=TOLERANCE, atol=0)


def assert_same_states(ours: Rows, theirs: Rows) -> None:
    assert ours.keys() == theirs.keys()
    for name in ("values", "steps", "gap"):  # carried, not computed
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    for name in ("weight", "naive_weight", "scale"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=0)
    for name in {"gram", "moment"} & ours.keys():
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE * (1 + theirs[name].abs().max())
        )
    scale, weight = theirs["scale"], theirs["weight"].clamp_min(1)
    for name in ("value_sum", "deviation_sum", "naive_sum"):
        assert (ours[name] - theirs[name]).div(scale * weight).abs().max() <= TOLERANCE, name
    assert (ours["base"] - theirs["base"]).div(scale[:, None]).abs().max() <= TOLERANCE
    for name in ("h", "c", "offsets"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(ours["gates"], theirs["gates"], rtol=0, atol=2e-3)  # in half precision


def joined(forecasts: list[Forecast]) -> Forecast:
    return Forecast(
        torch.cat([forecast.base for forecast in forecasts], dim=1),
        torch.cat([forecast.scale for forecast in forecasts], dim=1),
        torch.cat([forecast.offsets for forecast in forecasts], dim=1),
    )


def in_parts(forecaster: Forecaster, block: Block, cuts: list[int]) -> tuple[Forecast, Rows]:
    """The block part by part, cut before each of the steps in `cuts`."""
    state = forecaster.initial_state(len(block.values))
    forecasts = []
    edges = [0, *cuts, block.steps]
    for start, stop in pairwise(edges):
        forecast, state = forecaster.advance(state, part_of(block, start, stop))
        forecasts.append(forecast)
    return joined(forecasts), state


def at_once(forecaster: Forecaster, block: Block) -> tuple[Forecast, Rows]:
    return forecaster.advance(forecaster.initial_state(len(block.values)), block)


# --- Parity ---------------------------------------------------------------------------------------------------------


@seeded(max_examples=150)
@given(st.data())
def test_a_series_in_blocks_is_forecast_as_in_one_pass(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config, seed=data.draw(st.integers(0, 2)))
    block = data.draw(blocks(config))
    cuts = sorted(data.draw(st.sets(st.integers(1, block.steps - 1), max_size=12)))
    forecast, state = in_parts(forecaster, block, cuts)
    whole, final = at_once(forecaster, block)
    assert_same_forecasts(forecast, whole)
    assert_same_states(state, final)


@seeded(max_examples=40)
@given(st.data())
def test_streams_that_advance_in_waves_are_forecast_as_if_each_were_alone(data: st.DataObject) -> None:
    """As the worker has it: rows of an arena, of which each wave takes some, in any order."""
    config = data.draw(configs())
    forecaster = random_forecaster(config)
    kinds = [(kind, GAPS[number % len(GAPS)]) for number, kind in enumerate(KINDS)]
    block = make_block(config, data.draw(st.integers(0, 1000)), kinds, steps=12)
    waves = data.draw(st.lists(st.permutations(range(len(KINDS))), min_size=1, max_size=12))
    arena = forecaster.initial_state(len(KINDS))
    seen = [0] * len(KINDS)
    for order in waves:
        wave = torch.tensor(order[: data.draw(st.integers(1, len(order)))])
        now = torch.tensor([seen[stream] for stream in wave.tolist()])
        one_step = Block(block.values[wave, now], block.ts_ms[wave, now], block.covariates[wave, now])
        one_step = Block(one_step.values[:, None], one_step.ts_ms[:, None], one_step.covariates[:, None])
        _, after = forecaster.advance({name: rows[wave] for name, rows in arena.items()}, one_step)
        for name, rows in after.items():
            arena[name][wave] = rows
        for stream in wave.tolist():
            seen[stream] += 1
    for stream, steps in enumerate(seen):
        row = {name: rows[stream : stream + 1] for name, rows in arena.items()}
        expected = forecaster.initial_state(1)
        if steps:
            alone = part_of(streams_of(block, torch.tensor([stream])), 0, steps)
            _, expected = at_once(forecaster, alone)
        assert_same_states(row, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_stream_alone_is_forecast_as_among_999_others(cell: Cell) -> None:
    config = ModelConfig(season=5, horizon=7, covariates=("temperature",), cell=cell, hidden_size=8, rank=3)
    forecaster = random_forecaster(config)
    kinds = [(KINDS[number % len(KINDS)], GAPS[number % len(GAPS)]) for number in range(1000)]
    block = make_block(config, 1, kinds, steps=30)
    crowd, crowd_state = in_parts(forecaster, block, [10, 11, 12, 25])
    for stream in range(0, 1000, 29):
        one = torch.tensor([stream])
        alone, state = at_once(forecaster, streams_of(block, one))
        assert_same_forecasts(Forecast(crowd.base[one], crowd.scale[one], crowd.offsets[one]), alone)
        assert_same_states({name: rows[one] for name, rows in crowd_state.items()}, state)


@pytest.mark.parametrize(("cell", "steps"), [("lstm", 5000), ("gru", 1000), ("rnn", 1000)])
def test_thousands_of_steps_one_by_one_are_as_one_pass(cell: Cell, steps: int) -> None:
    """Long enough for rounding to pile up, if it could."""
    config = ModelConfig(grid=DAYTIME, season=5, horizon=3, cell=cell, hidden_size=8, layers=1, rank=3)
    forecaster = random_forecaster(config)
    block = make_block(config, 1, [(kind, scattered) for kind in KINDS], steps=steps)
    forecast, state = in_parts(forecaster, block, list(range(1, steps)))
    whole, final = at_once(forecaster, block)
    assert_same_forecasts(forecast, whole)
    assert_same_states(state, final)


# --- The same for models that come from a bundle ---------------------------------------------------------------------


def random_bundle(directory: Path) -> Path:
    save_bundle(
        directory, random_forecaster(ModelConfig(season=24, horizon=12, rank=3)), name="random", training={}, scores={}
    )
    return directory


def trained_bundle(directory: Path) -> Path:
    """A model that has learnt for a moment, with gradients through the same parts."""
    config = ModelConfig(season=24, horizon=12, hidden_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        forecaster = Forecaster(config)
    block = make_block(config, 0, [(seasonal, none_missing), (walk, scattered), (huge_level, long_gap)], steps=200)
    truths = block.values.unfold(1, 12, 1)[:, 1:]
    optimizer = torch.optim.Adam(forecaster.parameters(), lr=0.02)
    for _ in range(15):
        state = forecaster.initial_state(3)
        seen, _ = forecaster.features(state, block)
        forecast = forecaster.forecast(seen, forecaster.recur(seen, state)[0])
        misses = ((truths - forecast.base[:, :188]) / forecast.scale[:, :188, None]).clamp(-12, 12).float()
        loss = pinball(forecast.offsets[:, :188], misses, torch.tensor(config.quantiles)).nanmean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_bundle(directory, forecaster, name="trained", training={}, scores={})
    return directory


BUNDLES: dict[str, Callable[[Path], Path]] = {"random": random_bundle, "trained": trained_bundle}
"""Each puts a bundle into a directory. A bundle that is shipped can stand here too."""


@pytest.fixture(scope="module", params=BUNDLES.values(), ids=BUNDLES)
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forecaster]:
    return load_bundle(request.param(tmp_path_factory.mktemp("bundle"))).forecaster


def test_a_bundle_is_served_as_it_was_trained(bundled: Forecaster) -> None:
    kinds = [(kind, gaps) for kind in KINDS for gaps in GAPS]
    block = make_block(bundled.config, 2, kinds, steps=300)
    whole, final = at_once(bundled, block)
    forecast, state = in_parts(bundled, block, [*range(1, 100), 105, 230, *range(240, 300)])
    assert_same_forecasts(forecast, whole)
    assert_same_states(state, final)


# --- What else every forecast keeps to -------------------------------------------------------------------------------


@seeded(max_examples=40)
@given(st.data())
def test_the_state_passed_in_is_left_bit_for_bit_as_it_was(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config)
    block = data.draw(blocks(config))
    middle = block.steps // 2
    _, state = at_once(forecaster, part_of(block, 0, middle))
    before = {name: rows.clone() for name, rows in state.items()}
    forecast, after = forecaster.advance(state, part_of(block, middle, block.steps))
    for rows in after.values():  # what comes back is the caller's own, to write on as it likes
        rows.zero_()
    for name, rows in state.items():
        assert rows.numpy().tobytes() == before[name].numpy().tobytes(), name
    again, _ = forecaster.advance(state, part_of(block, middle, block.steps))
    assert torch.equal(again.offsets[:, :-1], forecast.offsets[:, :-1])


@seeded(max_examples=60)
@given(st.data())
def test_what_comes_after_t_changes_nothing_at_or_before_t(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config)
    block = data.draw(blocks(config))
    t = data.draw(st.integers(0, block.steps - 2))
    other = Block(block.values.clone(), block.ts_ms.clone(), block.covariates.clone())
    future = other.values[:, t + 1 :]
    future.copy_(torch.where(future.isnan(), 1e6, torch.where(future > 0, torch.nan, 3 * future - 1)))
    other.ts_ms[:, t + 1 :] += 7 * HOUR_MS
    other.covariates[:, t + 1 :] = -other.covariates[:, t + 1 :].nan_to_num(1.0)
    forecast, _ = at_once(forecaster, block)
    changed, _ = at_once(forecaster, other)
    assert torch.equal(changed.values[:, : t + 1], forecast.values[:, : t + 1])
    assert not torch.equal(changed.values[:, t + 1 :], forecast.values[:, t + 1 :])


@seeded(max_examples=60)
@given(st.data())
def test_a_series_in_other_units_has_its_forecasts_in_other_units(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config)
    block = data.draw(blocks(config))
    factor = data.draw(st.sampled_from([1e6, 1e-6, 1000.0, 0.3048, 2.0]))
    forecast, _ = at_once(forecaster, block)
    rescaled, _ = at_once(forecaster, Block(factor * block.values, block.ts_ms, block.covariates))
    scale = factor * forecast.scale[..., None, None]
    moves = (block.values.nan_to_num(0.0) != 0).cumsum(1) > 0  # nothing but zeros has no units
    error = (rescaled.values - factor * forecast.values).abs() / scale
    assert (error[moves] <= TOLERANCE).all()


@pytest.mark.parametrize("level", [0.0, 300.0, 1e4, 1e8])
def test_a_level_however_high_does_not_hide_the_changes(level: float) -> None:
    """A stream is forecast in units of its changes: the same ones, whatever they are added to."""
    forecaster = random_forecaster(ModelConfig(horizon=2, hidden_size=8))
    changes = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2000)))
    at_level, _ = at_once(forecaster, block_of(level + changes))
    at_zero, _ = at_once(forecaster, block_of(changes))
    torch.testing.assert_close(at_level.scale[:, -1], at_zero.scale[:, -1], rtol=0.2, atol=0)
    torch.testing.assert_close(at_level.values[:, -1] - level, at_zero.values[:, -1], rtol=0, atol=0.5)


@seeded(max_examples=80)
@given(st.data())
def test_quantiles_never_cross_and_all_is_finite_whatever_the_weights(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config, gain=data.draw(st.sampled_from([0.1, 1.0, 30.0, 1e3, 1e6])))
    block = data.draw(blocks(config))
    absurd = torch.where(block.covariates > 0, 1e15 * block.covariates, block.covariates)
    forecast, state = at_once(forecaster, Block(block.values, block.ts_ms, absurd))
    assert (forecast.values.diff(dim=-1) >= 0).all()
    assert forecast.values.isfinite().all()
    assert (forecast.scale > 0).all()
    for name, rows in state.items():
        if name != "values":  # where NaN is what was never seen
            assert rows.isfinite().all(), name


def test_before_anything_is_seen_there_is_a_forecast_of_zero() -> None:
    config = ModelConfig(season=5, horizon=3, hidden_size=8)
    forecast, _ = at_once(random_forecaster(config), block_of(torch.full((1, 40), torch.nan, dtype=torch.float64)))
    torch.testing.assert_close(forecast.values, torch.zeros_like(forecast.values))


@seeded(max_examples=40)
@given(st.data())
def test_with_nothing_learnt_the_middle_is_the_seasonal_naive_forecast(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = Forecaster(config).eval()
    torch.nn.init.zeros_(forecaster.head.linear.weight)
    torch.nn.init.zeros_(forecaster.head.linear.bias)
    block = data.draw(blocks(config))
    forecast, _ = at_once(forecaster, block)
    middle = forecast.values[..., config.quantiles.index(0.5)]
    assert torch.equal(middle, forecast.base)
    # Written out: the value a season before the step that is forecast, or the season before that ...
    for stream, values in enumerate(block.values.tolist()):
        for ahead in range(1, config.horizon + 1):
            for t in range(block.steps):
                known = values[: t + 1][(t + ahead) % config.season :: config.season]
                naive = next((value for value in reversed(known) if value == value), None)
                if naive is not None:
                    assert middle[stream, t, ahead - 1] == naive


@seeded(max_examples=40)
@given(st.data())
def test_the_last_forecasts_alone_are_the_tail_of_all(data: st.DataObject) -> None:
    config = data.draw(configs())
    forecaster = random_forecaster(config)
    block = data.draw(blocks(config))
    last = data.draw(st.integers(1, block.steps))
    whole, final = at_once(forecaster, block)
    state = forecaster.initial_state(len(block.values))
    tail, after = forecaster.advance(state, block, last=last)
    assert tail.values.shape[1] == last
    assert_same_forecasts(tail, Forecast(whole.base[:, -last:], whole.scale[:, -last:], whole.offsets[:, -last:]))
    assert_same_states(after, final)


# --- Refusals -------------------------------------------------------------------------------------------------------

TWO_COVARIATES = ModelConfig(horizon=3, hidden_size=8, covariates=("temperature", "holiday"))


@pytest.mark.parametrize(
    ("field", "values", "ts_ms", "covariates"),
    [
        ("values", (3, 4), (3, 4), (3, 4, 2)),
        ("values", (2, 0), (2, 0), (2, 0, 2)),
        ("values", (2,), (2,), (2, 2)),
        ("values", (2, 4, 1), (2, 4, 1), (2, 4, 1, 2)),
        ("ts_ms", (2, 4), (2, 3), (2, 4, 2)),
        ("ts_ms", (2, 4), (4,), (2, 4, 2)),
        ("covariates", (2, 4), (2, 4), (2, 4, 0)),
        ("covariates", (2, 4), (2, 4), (2, 4, 3)),
        ("covariates", (2, 4), (2, 4), (2, 4)),
    ],
)
def test_a_block_that_does_not_fit_is_refused_by_name(
    field: str, values: tuple[int, ...], ts_ms: tuple[int, ...], covariates: tuple[int, ...]
) -> None:
    forecaster = random_forecaster(TWO_COVARIATES)
    block = Block(
        torch.zeros(values, dtype=torch.float64),
        torch.zeros(ts_ms, dtype=torch.int64),
        torch.zeros(covariates, dtype=torch.float64),
    )
    with pytest.raises(ValueError, match=f"^{field} must be "):
        forecaster.advance(forecaster.initial_state(2), block)


@pytest.mark.parametrize("last", [0, -1, 6])
def test_more_or_fewer_forecasts_than_steps_are_refused(last: int) -> None:
    forecaster = random_forecaster(ModelConfig(horizon=3, hidden_size=8))
    with pytest.raises(ValueError, match=r"^last must be in 1 \.\.\. 5, not"):
        forecaster.advance(forecaster.initial_state(2), block_of(torch.zeros(2, 5, dtype=torch.float64)), last=last)
