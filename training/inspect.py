"""`carousel inspect`: a trained model opened up while a series streams through it.

Each gate, C_t and h_t of every unit at every step, how long each unit remembers, and how far gradients reach back; as
numbers (JSON and Parquet), pictures, and one page that explains them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from model.bundle import Bundle
from model.cells import GATES, KEEPS, CellState, Recurrence
from model.config import ModelConfig
from model.network import Forecaster
from model.quantiles import pinball
from training.gradients import Product, Unrolled, geometric_mean, product, reach, spectral_radius, spread_lags
from training.series import Series, to_grid
from training.table import Columns, TableError, read_table
from training.windows import block_of, cut

SATURATED = 0.1
"""A gate is saturated within so much of its bounds (Karpathy, Johnson and Fei-Fei 2015: below 0.1, above 0.9)."""
LAGS_MAX = 200
"""Gradients are followed back so many steps at most, and at most half of the steps that are looked at."""
ENDS = 8
"""Steps from which gradients are followed back; what is told is their geometric mean."""


@dataclass(frozen=True)
class Trace:
    """The last T steps of a series, streamed one by one from its first, with all that went on inside.

    ts_ms [T]; values [T] and next_step [T, Q] (the quantiles forecast, at each step, for the one after it), float64;
    inside: its x, h, c and gates, of one stream (B = 1).
    """

    config: ModelConfig
    series: Series
    ts_ms: Tensor
    values: Tensor
    next_step: Tensor
    inside: Unrolled

    @property
    def steps(self) -> int:
        return len(self.values)

    @property
    def gates(self) -> dict[str, Tensor]:
        """Each gate [T, layers, hidden], by its name."""
        return {name: self.inside.gates[0, :, :, n] for n, name in enumerate(GATES[self.config.cell])}

    @property
    def h(self) -> Tensor:
        """[T, layers, hidden], after each step."""
        return self.inside.h[0, 1:]

    @property
    def c(self) -> Tensor | None:
        """[T, layers, hidden], after each step; None for a cell that has none."""
        return self.inside.c[0, 1:] if self.config.cell == "lstm" else None

    def memory_steps(self) -> Tensor | None:
        """For how many steps each unit remembers, [layers, hidden]: what it keeps of itself falls to 1/e.

        -1 / mean(ln f_t), for what is kept after k steps is the product of k gates (Tallec and Ollivier 2018 call it
        the unit's characteristic time). None for an RNN: it keeps nothing but what it writes anew.
        """
        keeps = KEEPS.get(self.config.cell)
        return -1 / self.gates[keeps].log().mean(0) if keeps else None


def trace(forecaster: Forecaster, series: Series, last: int) -> Trace:
    """Stream a series through a model, as it would be served, and record its last `last` steps."""
    block = block_of([series])
    first = max(0, block.steps - last)
    state = forecaster.initial_state(1)
    if first:
        _, state = forecaster.advance(state, block_of([cut(series, 0, first)]), last=1)
    next_step = []
    with _opened(forecaster.recurrence) as seen:
        for t in range(first, block.steps):
            forecast, state = forecaster.advance(state, block_of([cut(series, t, t + 1)]))
            next_step.append(forecast.values[0, 0, 0])
    x = torch.cat([inputs for (inputs, _, _), _ in seen], dim=1)
    after = [state for _, (_, state) in seen]
    (_, h, c), _ = seen[0]
    inside = Unrolled(
        x.double(),
        torch.stack([h, *(state.h for state in after)], dim=1).double(),
        torch.stack([c, *(state.c for state in after)], dim=1).double(),
        torch.stack([state.gates for state in after], dim=1).double(),
    )
    return Trace(
        forecaster.config, series, block.ts_ms[0, first:], block.values[0, first:], torch.stack(next_step), inside
    )


@contextmanager
def _opened(recurrence: Recurrence) -> Iterator[list[tuple[tuple[Tensor, ...], tuple[Tensor, CellState]]]]:
    """What goes into a recurrence and comes out of it, call by call, whatever stands around it."""
    seen: list[tuple[tuple[Tensor, ...], tuple[Tensor, CellState]]] = []
    hook = recurrence.register_forward_hook(lambda _, given, made: seen.append((given, made)))
    try:
        yield seen
    finally:
        hook.remove()


# --- Gradients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """How far gradients reach in a trained model, from some steps of a series back.

    loss_h, loss_c [K]: the norm of the gradient of the loss at t with respect to h_{t-k} and C_{t-k} (all layers), over
    that with respect to h_t of the last layer; k = 1 ... K. products: by layer. radius: by layer, of an RNN's U.
    """

    loss_h: Tensor
    loss_c: Tensor | None
    products: list[Product]
    radius: list[float] | None


def gradients(forecaster: Forecaster, traced: Trace) -> Gradients | None:
    """Follow gradients back through the steps of a trace; None if there is no loss to follow at any of them."""
    lags = min(LAGS_MAX, traced.steps // 2)
    toward = _loss_gradients(forecaster, traced)
    possible = toward.any(dim=-1).nonzero()[:, 0]
    possible = possible[possible >= lags - 1]
    if lags < 1 or not len(possible):
        return None
    ends = possible[torch.linspace(0, len(possible) - 1, min(ENDS, len(possible))).long()]
    inside = _before(traced.inside, ends, lags)
    recurrence, config = forecaster.recurrence, forecaster.config
    by_h, by_c = reach(recurrence, inside.x, inside.h[:, 0], inside.c[:, 0], toward[ends])
    unit = toward[ends].double().norm(dim=1, keepdim=True)
    layers = range(config.layers)
    return Gradients(
        geometric_mean(by_h / unit),
        geometric_mean(by_c / unit) if config.cell == "lstm" else None,
        [product(recurrence, inside, layer, spread_lags(lags)) for layer in layers],
        [spectral_radius(recurrence, layer) for layer in layers] if config.cell == "rnn" else None,
    )


def _loss_gradients(forecaster: Forecaster, traced: Trace) -> Tensor:
    """At each step of a trace, the derivative of its forecast's pinball loss to h_t of the last layer. [T, hidden]"""
    series, horizon = traced.series, forecaster.config.horizon
    first = len(series.y) - traced.steps
    block, state = block_of([series]), forecaster.initial_state(1)
    with torch.no_grad():
        seen, _ = forecaster.features(state, block)
        outputs = forecaster.recur(seen, state)[0][:, first:]
    outputs.requires_grad_()
    forecast = forecaster.forecast(seen.steps(first, block.steps), outputs)
    truths = pad(block.values[:, first + 1 :], (0, horizon), value=torch.nan).unfold(1, horizon, 1)
    known = ~truths.isnan()
    losses = pinball(forecast.values, truths.nan_to_num(0.0), torch.tensor(forecaster.config.quantiles)).mean(-1)
    (gradient,) = torch.autograd.grad((losses * known / forecast.scale[..., None]).sum(), outputs)
    return gradient[0]


def _before(inside: Unrolled, ends: Tensor, steps: int) -> Unrolled:
    """Of one stream, the `steps` steps up to each of B ends, each as a stream of its own."""
    spans = [(int(end) + 1 - steps, int(end) + 1) for end in ends]
    return Unrolled(
        torch.stack([inside.x[0, start:stop] for start, stop in spans]),
        torch.stack([inside.h[0, start : stop + 1] for start, stop in spans]),
        torch.stack([inside.c[0, start : stop + 1] for start, stop in spans]),
        torch.stack([inside.gates[0, start:stop] for start, stop in spans]),
    )


# --- Numbers --------------------------------------------------------------------------------------------------------


def summary(traced: Trace, found: Gradients | None) -> dict[str, Any]:
    """What the pictures show, in numbers: by layer the means and saturation of gates, and how long units remember."""
    config, memory = traced.config, traced.memory_steps()
    layers = []
    for n in range(config.layers):
        of: dict[str, Any] = {
            "gates": {name: _shares(gate[:, n], signed=name == "candidate") for name, gate in traced.gates.items()},
            "h": _shares(traced.h[:, n], signed=True),
        }
        if traced.c is not None:
            of["c"] = {"mean_abs": float(traced.c[:, n].abs().mean()), "max_abs": float(traced.c[:, n].abs().max())}
        if memory is not None:
            of["memory_steps"] = {
                "median": float(memory[n].median()),
                "longest": float(memory[n].max()),
                "unit": int(memory[n].argmax()),
                "units": memory[n].tolist(),
            }
        layers.append(of)
    return {
        "cell": config.cell,
        "stream": traced.series.unique_id,
        "steps": traced.steps,
        "step_ms": config.step_ms,
        "layers": layers,
        "gradients": None if found is None else _told(found),
    }


def _shares(values: Tensor, *, signed: bool) -> dict[str, float]:
    """The mean of a gate (0 ... 1) or of a tanh (-1 ... 1), and the shares that lie at its ends."""
    low = -1.0 if signed else 0.0
    return {
        "mean": float(values.mean()),
        "saturated_low": float((values < low + SATURATED).double().mean()),
        "saturated_high": float((values > 1 - SATURATED).double().mean()),
    }


def _told(found: Gradients) -> dict[str, Any]:
    return {
        "loss_to_h_by_lag": found.loss_h.tolist(),
        "loss_to_c_by_lag": None if found.loss_c is None else found.loss_c.tolist(),
        "spectral_radius": found.radius,
        "products": [
            {
                "lags": each.lags,
                "full": each.full.tolist(),
                "direct": None if each.direct is None else each.direct.tolist(),
                "direct_median_unit": None if each.middle is None else each.middle.tolist(),
            }
            for each in found.products
        ],
    }


def table_of(traced: Trace) -> pd.DataFrame:
    """Everything recorded: one row for each step, layer and unit. Columns: ds, layer, unit, h, c, and each gate."""
    steps, layers, hidden = traced.h.shape
    columns = {"h": traced.h, **({"c": traced.c} if traced.c is not None else {}), **traced.gates}
    return pd.DataFrame(
        {
            "ds": np.repeat(pd.to_datetime(traced.ts_ms.numpy(), unit="ms"), layers * hidden),
            "layer": np.tile(np.repeat(np.arange(layers), hidden), steps),
            "unit": np.tile(np.arange(hidden), steps * layers),
            **{name: values.flatten().float().numpy() for name, values in columns.items()},
        }
    )


# --- The command ----------------------------------------------------------------------------------------------------


def find_series(series: Sequence[Series], stream: str, table: Path) -> Series:
    """The series of that name; where gaps broke it, its last part. Raises TableError, naming some, if there is none."""
    parts = [each for each in series if each.unique_id == stream]
    if not parts:
        names = list(dict.fromkeys(each.unique_id for each in series))
        near = difflib.get_close_matches(stream, names, n=5) or names[:5]
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        raise TableError(f"{table}: there is no series {stream!r}; there are {', '.join(map(repr, near))}{more}")
    return parts[-1]


def run(bundle: Bundle, table: Path, columns: Columns, stream: str, *, last: int, out: Path) -> Trace:
    """`carousel inspect`: write `index.html`, its pictures, `summary.json` and `trace.parquet` to `out`.

    Covariates are those of the bundle, whatever `columns` says. Raises TableError if the table cannot be read or has no
    such series, OSError if a file cannot be written.
    """
    from training.inspect_page import page_of

    config = bundle.config
    columns = dataclasses.replace(columns, covariates=config.covariates)
    series = find_series(to_grid(read_table(table, columns), config.grid, config.max_gap), stream, table)
    traced = trace(bundle.forecaster, series, last)
    found = gradients(bundle.forecaster, traced)
    told = {"model": bundle.model_id, **summary(traced, found)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(told, indent=2) + "\n")
    table_of(traced).to_parquet(out / "trace.parquet", index=False)
    page = page_of(out, bundle.model_id, traced, found)
    console = Console()
    console.print(_table(told), f"written to {page}", sep="\n", highlight=False)
    return traced


def _table(told: dict[str, Any]) -> Table:
    """The summary, one row a layer."""
    keeps = KEEPS.get(told["cell"])
    table = Table("layer")
    headings = ["|h| near 1", *([f"mean {keeps} gate", "near 1", "memory: median", "longest"] if keeps else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for n, layer in enumerate(told["layers"]):
        row = [f"{layer['h']['saturated_low'] + layer['h']['saturated_high']:.0%}"]
        if keeps:
            gate, memory = layer["gates"][keeps], layer["memory_steps"]
            row += [f"{gate['mean']:.2f}", f"{gate['saturated_high']:.0%}"]
            row += [f"{memory['median']:.1f} steps", f"{memory['longest']:.1f} (unit {memory['unit']})"]
        table.add_row(str(n), *row)
    return table
