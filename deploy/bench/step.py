"""What a step of the model costs a row, beside a bare LSTM and head of the same sizes; and what each part adds."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from deploy.bench.figures import Probe, Sample
from deploy.bench.load import START_MS, Bench
from deploy.chaos.bundle import HOUR_MS
from model.bundle import load_bundle
from model.features import Block
from model.follow import Follower
from model.network import Forecaster
from model.state import Rows

UNIT = "us a row"
WAVES = (1, 256, 1_000, 4_096)
TIMED_S = 0.3
"""Each is repeated for about so long, and at least `REPEATS` times; the median counts."""
REPEATS = 5
WARM_STREAMS = 60
"""So many different streams are followed until they are warm, each from another step on; a wave is of their copies."""


def probes(bench: Bench) -> Iterator[Probe]:
    """For a model with a regression beside the network, as trained ones have, and for the network by itself."""
    models = {"as trained": bench.model}
    if not bench.config.model:
        models["no regression"] = bench.made("no-regression", rank=0)
    for told, path in models.items():
        forecaster = load_bundle(path).forecaster
        for wave in WAVES:
            yield Probe(f"step, {told}, wave of {wave:,}", partial(_measure, told, forecaster, wave))


def _measure(told: str, forecaster: Forecaster, wave: int) -> Iterator[Sample]:
    name = f"wave of {wave:,}, {told}"
    limit = f"{name}: bare LSTM and head"
    follower = Follower(forecaster)
    rows = _warm(follower, wave)
    steps = [_bare(forecaster, wave), _network(forecaster, rows), _follower(follower, rows)]
    if has_numba():
        steps.append(_compiled(follower, rows))
    bare, network, whole, *compiled = _per_row(wave, steps)
    yield Sample(limit, bare, UNIT, "limit")
    for took in compiled:
        yield Sample(f"{name}: carousel's step, compiled", took, UNIT, limit=limit)
    yield Sample(f"{name}: carousel's step, by torch", whole, UNIT, limit=limit)
    yield Sample(f"{name}: of that, features and blending", network - bare, UNIT, limit=limit)
    yield Sample(f"{name}: of that, scoring and calibration", whole - network, UNIT, limit=limit)


def bare_step(forecaster: Forecaster, wave: int) -> float:
    """Microseconds a row of `_bare`."""
    (bare,) = _per_row(wave, [_bare(forecaster, wave)])
    return bare


def _bare(forecaster: Forecaster, wave: int) -> Callable[[], None]:
    """Torch's own LSTM and a linear head of the model's sizes: no less can be done."""
    config = forecaster.config
    inputs = forecaster.features.inputs
    lstm = nn.LSTM(inputs, config.hidden_size, config.layers, batch_first=True)
    head = nn.Linear(config.hidden_size, config.horizon * len(config.quantiles))
    x = torch.randn(wave, 1, inputs)
    state = (torch.zeros(config.layers, wave, config.hidden_size), torch.zeros(config.layers, wave, config.hidden_size))

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        outputs, state = lstm(x, state)
        head(outputs[:, -1])

    return step


def _warm(follower: Follower, wave: int) -> Rows:
    """States of streams that learn all there is to be learnt. They began at different steps, as not each step is learnt
    from.
    """
    state, most = follower.schema.initial(WARM_STREAMS), follower.config.past + follower.config.warmup + WARM_STREAMS
    for stream in range(WARM_STREAMS):
        one = {name: tensor[stream : stream + 1] for name, tensor in state.items()}
        values, ts_ms = _day(torch.arange(stream - most, 0))
        block = Block(values[None], ts_ms[None], torch.zeros(1, most - stream, 0, dtype=torch.float64))
        for name, tensor in follower.through(one, block).items():
            state[name][stream] = tensor[0]
    return {name: tensor[torch.arange(wave) % WARM_STREAMS] for name, tensor in state.items()}


def _day(number: Tensor) -> tuple[Tensor, Tensor]:
    """Values and times as days have them, of these steps."""
    return 1.0 + (number % 24).double(), START_MS + number * HOUR_MS


def _network(forecaster: Forecaster, rows: Rows) -> Callable[[], None]:
    return _stepping(rows, lambda rows, block: forecaster.advance(rows, block)[1])


def _follower(follower: Follower, rows: Rows) -> Callable[[], None]:
    return _stepping(rows, lambda rows, block: follower.advance(rows, block).rows)


def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _compiled(follower: Follower, rows: Rows) -> Callable[[], None]:
    """In place, on rows that lie among others in any order."""
    from model.fused import FusedStep

    wave = len(rows["steps"])
    fused, block, places = FusedStep(follower, follower.schema), follower.schema.block(wave), torch.randperm(wave)
    for name, view in follower.schema.views(block).items():
        view.copy_(rows[name])
    nothing, number = torch.zeros(wave, 0, dtype=torch.float64), torch.tensor(0)

    def step() -> None:
        nonlocal number
        value, ts_ms = _day(number)
        fused.advance(block, places, value.expand(wave).contiguous(), ts_ms.expand(wave).contiguous(), nothing)
        number = number + 1

    return step


def _stepping(rows: Rows, advance: Callable[[Rows, Block], Rows]) -> Callable[[], None]:
    """Observations as a day has them, for a state that goes on."""
    wave, number = len(rows["steps"]), torch.tensor(0)
    nothing = torch.zeros(wave, 1, 0, dtype=torch.float64)

    def step() -> None:
        nonlocal rows, number
        value, ts_ms = _day(number)
        rows = {**rows, **advance(rows, Block(value.expand(wave, 1), ts_ms.expand(wave, 1), nothing))}
        number = number + 1

    return step


def _per_row(wave: int, steps: Sequence[Callable[[], None]]) -> list[float]:
    """Microseconds a row of each of these, which are made in turn: what disturbs one disturbs the others, too."""
    for step in steps:
        step()  # once to warm up
    took: list[list[float]] = [[] for _ in steps]
    while len(took[0]) < REPEATS or sum(map(sum, took)) < TIMED_S * len(steps):
        for step, times in zip(steps, took, strict=True):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
    return [statistics.median(times) / wave * 1e6 for times in took]
