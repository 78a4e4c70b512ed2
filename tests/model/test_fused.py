"""The fused step is `Follower.advance`, in place: held beside it, for every kind of model and of series."""

from __future__ import annotations

import copy
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

if not os.environ.get("CI"):  # there it must be
    pytest.importorskip("numba")

from model import kernels
from model.config import ModelConfig
from model.features import Block
from model.follow import Follower
from model.fused import PIECE_ROWS, FusedStep, Stepped
from model.grid import Grid
from model.state import Rows, Schema, TensorSpec
from tests.model import HOUR_MS, random_forecaster
from tests.model.test_parity import DAYTIME, GAPS, KINDS, make_block

HOURS = Grid(HOUR_MS)
CONFIGS = {
    "as the default": ModelConfig(grid=HOURS, season=24, hidden_size=16, rank=6),
    "gru without a grid": ModelConfig(season=5, horizon=3, cell="gru", layers=1, hidden_size=8, covariates=("a", "b")),
    "deep gru": ModelConfig(grid=HOURS, season=5, horizon=6, cell="gru", layers=3, hidden_size=5, rank=1),
    "rnn without a season": ModelConfig(grid=HOURS, horizon=4, cell="rnn", layers=3, hidden_size=7, rank=2),
    "holes": ModelConfig(grid=DAYTIME, season=16, horizon=20, hidden_size=8, layers=1, rank=3, covariates=("a",)),
    "one step, one quantile": ModelConfig(horizon=1, quantiles=(0.5,), hidden_size=4, layers=1, rank=2),
    "no median": ModelConfig(grid=HOURS, season=3, horizon=2, quantiles=(0.6, 0.7, 0.95), hidden_size=8, yearly=False),
    "two quantiles": ModelConfig(season=2, horizon=9, quantiles=(0.2, 0.5), hidden_size=8, covariates=("a", "b", "c")),
    "a long season": ModelConfig(grid=Grid(600_000), season=60, horizon=5, hidden_size=8, layers=1, rank=2),
}
OTHERS = (TensorSpec("slot", (), torch.int64, 7), TensorSpec("history", (5, 3), torch.float32, math.nan))
STREAMS = len(KINDS)


def follower_of(config: ModelConfig, *, share: float | None = None, calibrate: bool = True) -> Follower:
    forecaster = copy.deepcopy(random_forecaster(config))
    if share is not None:
        forecaster.regression.share.fill_(share)
        forecaster.regression.maps.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return Follower(forecaster, calibrate=calibrate)


def schema_of(follower: Follower) -> Schema:
    """That of rows with other tensors before, between and after the follower's, in another order."""
    first, *rest = reversed(follower.schema)
    return Schema((OTHERS[0], first, OTHERS[1], *rest))


def series_of(config: ModelConfig, seed: int, steps: int) -> Block:
    random = np.random.default_rng(seed)
    gaps = [GAPS[k] for k in random.integers(len(GAPS), size=STREAMS)]
    return make_block(config, seed, list(zip(KINDS, gaps, strict=True)), steps)


def step_of(block: Block, streams: Tensor, step: int) -> Block:
    """One step of some streams."""
    parts = (block.values, block.ts_ms, block.covariates)
    return Block(*(part[streams, step : step + 1].contiguous() for part in parts))


def stepped(fused: FusedStep, rows: Tensor, streams: Tensor, block: Block) -> Stepped:
    return fused.advance(rows, streams, block.values[:, 0], block.ts_ms[:, 0], block.covariates[:, 0].contiguous())


def close(found: Tensor, expected: Tensor, name: str, tolerance: float, unit: Tensor | float = 1.0) -> None:
    """Whether they differ by less than the tolerance, relative to themselves or, where they are less, to the unit."""
    assert torch.equal(found.isnan(), expected.isnan()), name
    found, expected = found.double().nan_to_num(0.0), expected.double().nan_to_num(0.0)
    allowed = torch.maximum(expected.abs(), torch.as_tensor(unit, dtype=torch.float64).expand_as(expected))
    odd = (found - expected).abs() / allowed
    assert odd.numel() == 0 or odd.max() < tolerance, f"{name}: {odd.max():.2e}"


EXACT = ("steps", "gap", "values", "base", "waiting_base")
SUMS = ("weight", "value_sum", "deviation_sum", "naive_weight", "naive_sum", "scale")


def assert_same_states(found: Rows, expected: Rows, tolerance: float) -> None:
    scale = expected["scale"]
    units: dict[str, Tensor | float] = {
        "waiting_offsets": scale,
        "gates": 50.0,  # a float16 is one of 1,024 steps
        # Sums of products of either sign: their rounding is that of the largest.
        **dict.fromkeys(("gram", "moment"), 1 + expected["gram"].flatten(1).amax(1) if "gram" in expected else 1.0),
    }
    for name, rows in expected.items():
        unit = units.get(name, 1.0)
        unit = unit.view(-1, *[1] * (rows.ndim - 1)) if isinstance(unit, Tensor) else unit
        if name in EXACT:
            close(found[name], rows, name, 1e-12, 1e-300)
        elif name in SUMS:
            # A value that jumps by 1e15 leaves its rounding behind.
            close(found[name], rows, name, 1e-9, 1e-4 * expected["value_sum"].abs() + 1e-300)
        else:
            close(found[name], rows, name, tolerance, unit)


CASES = [
    *[pytest.param(config, {}, id=name) for name, config in CONFIGS.items()],
    pytest.param(dataclasses.replace(CONFIGS["as the default"], rank=0), {}, id="without a regression"),
    pytest.param(CONFIGS["as the default"], {"share": 0.0}, id="a regression of no use"),
    pytest.param(dataclasses.replace(CONFIGS["a long season"], rank=0), {"share": 0.7}, id="a regression of no rank"),
    pytest.param(CONFIGS["as the default"], {"calibrate": False}, id="uncalibrated"),
]


@pytest.mark.parametrize(("config", "options"), CASES)
@pytest.mark.parametrize("together", [True, False], ids=["each step", "each on its own"])
def test_a_step_in_place_is_that_of_the_follower(config: ModelConfig, options: dict, together: bool) -> None:
    """Waves of some streams in any order, so that old and new ones meet. together: both start each step from the state
    of the follower; else each goes all the way by itself.
    """
    one = follower_of(config, **options)
    schema = schema_of(one)
    fused, rows, state = FusedStep(one, schema), schema.block(STREAMS + 2), one.schema.initial(STREAMS + 2)
    views = schema.views(rows)
    steps = config.past + config.warmup + 3 * config.horizon + 40
    series, random = series_of(config, 3, steps), np.random.default_rng(4)
    tolerance = 2e-5 if together else 2e-3
    at = torch.zeros(STREAMS, dtype=torch.int64)
    for turn in range(steps):
        often = random.permutation(STREAMS)[: max(1, STREAMS - turn % 3)]
        for step in at[often].unique().tolist():  # streams that are equally far go together
            wave = torch.from_numpy(often)[at[often] == step]
            before, block = rows.clone(), step_of(series, wave, step)
            found = stepped(fused, rows, wave, block)
            expected = one.advance({name: state[name][wave] for name in state}, block)
            after = {name: views[name][wave] for name in state}
            assert_same_states(after, expected.rows, tolerance)
            scale, issued = expected.rows["scale"][:, None], one.standing(expected.rows)
            close(found.issued, issued.values, "issued", tolerance, scale[..., None].expand_as(issued.values))
            close(found.opened, expected.opened[:, 0], "opened", tolerance, scale.expand_as(found.opened))
            close(found.anomaly, expected.anomaly[:, 0], "anomaly", 10 * tolerance)
            sums = expected.scores.sum((0, 1))
            close(found.scores, sums, "scores", tolerance, scale.max().expand_as(sums))
            for name, each in expected.rows.items():
                state[name][wave] = each
                if together:
                    views[name][wave] = each
            untouched = np.setdiff1d(np.arange(STREAMS + 2), wave.numpy())
            assert torch.equal(rows[untouched], before[untouched])
            for spec in OTHERS:
                place = slice(schema.offsets[spec.name], schema.offsets[spec.name] + spec.row_bytes)
                assert torch.equal(rows[:, place], before[:, place])
            at[wave] += 1
    assert at.min() > steps / 2


def moved(config: ModelConfig, order: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Many streams moved by some steps, in this order and in waves of these sizes. -> rows, their issued forecasts by
    stream, the summed scores of each step.
    """
    one = follower_of(config)
    fused, rows, streams = FusedStep(one, one.schema), one.schema.block(len(order)), len(order)
    random, scores = np.random.default_rng(0), []
    values = torch.from_numpy(10 + random.normal(size=(streams, 60)))
    issued = torch.empty(streams, config.horizon, len(config.quantiles), dtype=torch.float64)
    for step in range(60):
        scores.append(torch.zeros(len(one.horizons), 5, dtype=torch.float64))
        for wave in order.split(sizes):
            ts_ms = torch.full((len(wave),), step * HOUR_MS)
            block = Block(values[wave, step : step + 1], ts_ms[:, None], torch.empty(len(wave), 1, 0).double())
            found = stepped(fused, rows, wave, block)
            issued[wave] = found.issued
            scores[-1] += found.scores
    return rows, issued, scores


def test_neither_order_nor_size_of_waves_matters() -> None:
    config = ModelConfig(grid=HOURS, season=5, horizon=6, hidden_size=8, rank=2)
    streams = 2 * PIECE_ROWS + 7
    one = follower_of(config)
    once, issued, scores = moved(config, torch.arange(streams), [streams])
    order = torch.from_numpy(np.random.default_rng(1).permutation(streams))
    again, issued_again, scores_again = moved(config, order, [1, 2, PIECE_ROWS, streams - PIECE_ROWS - 3])
    assert_same_states(one.schema.views(again), one.schema.views(once), 1e-4)
    close(issued_again, issued, "issued", 1e-5)
    close(torch.stack(scores_again), torch.stack(scores), "scores", 1e-5)


def test_an_empty_wave_moves_nobody() -> None:
    one = follower_of(CONFIGS["as the default"])
    rows = one.schema.block(2)
    before, none = rows.clone(), torch.empty(0, dtype=torch.int64)
    found = FusedStep(one, one.schema).advance(rows, none, none.double(), none, torch.empty(0, 0).double())
    assert torch.equal(rows, before)
    assert found.issued.shape == (0, 24, 9)
    assert not found.scores.any()


def test_a_row_may_come_again_in_a_later_piece_for_its_next_step() -> None:
    """What comes out is bit for bit that of a call for each piece."""
    config = CONFIGS["as the default"]
    one = follower_of(config)
    fused, once = FusedStep(one, one.schema), one.schema.block(STREAMS)
    series, piece_of = series_of(config, 5, 40), np.random.default_rng(6)
    again, alone, wave, ends = once.clone(), list[Stepped](), list[tuple[Tensor, Block]](), list[int]()
    for step in range(40):
        streams = torch.from_numpy(piece_of.permutation(STREAMS)[: piece_of.integers(1, STREAMS + 1)])
        wave.append((streams, step_of(series, streams, step)))
        ends.append((ends[-1] if ends else 0) + len(streams))
        found = stepped(fused, once, *wave[-1])
        alone.append(Stepped(*(tensor.clone() for tensor in dataclasses.astuple(found))))
    columns = [torch.cat(parts) for parts in zip(*[(s, b.values[:, 0], b.ts_ms[:, 0]) for s, b in wave], strict=True)]
    together = fused.advance(again, *columns, torch.empty(len(columns[0]), 0).double(), torch.tensor(ends))
    assert torch.equal(again, once)
    for name in ("issued", "anomaly", "opened", "scale", "steps"):
        expected = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    one = follower_of(CONFIGS["gru without a grid"])
    fused, rows = FusedStep(one, one.schema), one.schema.block(3)
    before = rows.clone()
    fits = {
        "block": rows,
        "rows": torch.tensor([0, 2]),
        "values": torch.zeros(2).double(),
        "ts_ms": torch.tensor([0, 1]),
        "covariates": torch.zeros(2, 2).double(),
    }
    for name, odd in (
        ("block", rows[:, :-8].contiguous()),
        ("block", rows[:, ::2]),
        ("rows", torch.tensor([0, 3])),
        ("rows", torch.tensor([-1, 0])),
        ("rows", torch.tensor([0.0, 1.0])),
        ("values", torch.zeros(2)),
        ("values", torch.zeros(3).double()),
        ("ts_ms", torch.zeros(2).double()),
        ("covariates", torch.zeros(2, 1).double()),
        ("ends", torch.tensor([1])),
        ("ends", torch.tensor([2, 1, 2])),
        ("ends", torch.tensor([1.0, 2.0])),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            fused.advance(**{**fits, name: odd})
    assert torch.equal(rows, before)
    with pytest.raises(ValueError, match=r"lack the tensors \['surprise'\]"):
        FusedStep(one, Schema(spec for spec in one.schema if spec.name != "surprise"))


@pytest.mark.parametrize(
    ("name", "plain", "low", "high", "tolerance"),
    [
        ("exp", np.exp, -80, 80, 2e-7),
        ("softplus", lambda x: np.logaddexp(0, x), -14, 60, 5e-7),
        ("tanh", np.tanh, -20, 20, 5e-7),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), -1, 30, 2e-7),
    ],
)
def test_functions_of_one_number(name: str, plain: np.ufunc, low: float, high: float, tolerance: float) -> None:
    x = np.linspace(low, high, 5001, dtype=np.float32)
    found = [float(getattr(kernels, name)(each)) for each in x]
    np.testing.assert_allclose(found, plain(x.astype(np.float64)), rtol=tolerance, atol=1e-30)


def test_logarithms_of_tiny_and_huge_numbers() -> None:
    x = np.concatenate([np.geomspace(1e-37, 1e38, 5001), np.linspace(0.5, 2, 5001)]).astype(np.float32)
    found = [float(kernels.log(each)) for each in x]
    np.testing.assert_allclose(found, np.log(x.astype(np.float64)), rtol=3e-7, atol=1e-7)
    assert kernels.log(np.float32(0)) < -80
    assert kernels.log(np.float32(np.inf)) > 80


def test_half_precision_is_numpys() -> None:
    random = np.random.default_rng(0)
    x = np.concatenate(
        [random.uniform(-1, 1, 5000), 10 ** random.uniform(-9, 0, 5000), [0, -0.0, 1, -1, 2**-14, 2**-24]]
    )
    x = x.astype(np.float32)
    ties = (np.arange(1000, dtype=np.float16).view(np.uint16)[:, None] + [0, 1]).astype(np.uint16).view(np.float16)
    x = np.concatenate([x, ties.astype(np.float32).mean(1)])
    found = np.array([kernels.half(each) for each in x], dtype=np.uint16)
    np.testing.assert_array_equal(found, x.astype(np.float16).view(np.uint16))
