"""The pictures of `carousel inspect`, each with a sentence or two on what one sees in it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from torch import Tensor

from model.cells import KEEPS
from training.inspect import Gradients, Trace
from training.pages import Picture, write_page
from training.series import DAY
from training.table import Floats

WIDTH = 11.0
"""Of a figure, in inches."""
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn": "plain RNN"}
GATE_SAYS = {
    "forget": "forget gate f: what is kept of C",
    "input": "input gate i: how much of the candidate is written",
    "candidate": "candidate: what would be written",
    "output": "output gate o: how much of the cell is shown",
    "reset": "reset gate r: how much of h the candidate sees",
    "update": "update gate z: what is kept of h",
}


def page_of(out: Path, model_id: str, traced: Trace, found: Gradients | None) -> Path:
    """Write the page and its pictures. Raises OSError where that cannot be done."""
    config = traced.config
    intro = (
        f"Model {model_id}: {config.layers} layers of {config.hidden_size} units ({NAMES[config.cell]}). It read the"
        f" series {traced.series.unique_id!r} one observation at a time, from its first; here are the last"
        f" {traced.steps} steps. In the heat maps time runs to the right, and each row is one unit"
        + (", those that remember the longest on top." if config.cell in KEEPS else ".")
    )
    parts = [_stream(traced)]
    parts += [_layer(traced, layer) for layer in range(config.layers)]
    if config.cell in KEEPS:
        parts.append(_memory(traced))
    if found:
        parts += [_loss_reach(traced, found), _products(traced, found)]
    return write_page(out, f"Inside {model_id}", intro, parts)


def _order(traced: Trace, layer: int) -> Tensor:
    """The units of a layer, those that remember longest first."""
    memory = traced.memory_steps()
    return torch.arange(traced.config.hidden_size) if memory is None else memory[layer].argsort(descending=True)


def _times(traced: Trace) -> Floats:
    """In days since the epoch, which is matplotlib's date."""
    return np.asarray(traced.ts_ms.numpy() / DAY)


def _heat(axes: Axes, traced: Trace, values: Tensor, title: str, *, signed: bool) -> None:
    """A heat map, units by time. values [T, hidden]; signed: centred at 0, else from 0 to 1."""
    most = max(float(values.abs().quantile(0.99)), 1e-9)  # one unit far out must not pale the others
    times = _times(traced)
    extent = (float(times[0]), float(times[-1]), values.shape[1] - 0.5, -0.5)
    limits = (-most, most) if signed else (0.0, 1.0)
    image = axes.imshow(
        values.T.numpy(), aspect="auto", interpolation="nearest", extent=extent,
        cmap="RdBu_r" if signed else "viridis", vmin=limits[0], vmax=limits[1],
    )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_yticks([])
    figure = axes.get_figure()
    assert figure is not None  # noqa: S101
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)


def _dated(axes: Axes) -> None:
    locator = AutoDateLocator()  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def _stream(traced: Trace) -> Picture:
    """The series with what was forecast for each step one step before, over h of the last layer."""
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    times, forecast = _times(traced), traced.next_step.numpy()
    quantiles = traced.config.quantiles
    above.fill_between(times[1:], forecast[:-1, 0], forecast[:-1, -1], color="#9ecae1", lw=0)
    above.plot(times[1:], forecast[:-1, len(quantiles) // 2], color="#3182bd", lw=1)
    above.plot(times, traced.values.numpy(), color="black", lw=1)
    above.margins(x=0)
    above.set_title("the series, and what was forecast for each step one step before", loc="left", fontsize=9)
    top = traced.config.layers - 1
    _heat(below, traced, traced.h[:, top, _order(traced, top)], "h of the last layer", signed=True)
    _dated(below)
    inside = _inside_share(traced)
    text = (
        f"Black: what was observed; blue: the forecast for it, with the quantiles {quantiles[0]} to {quantiles[-1]}"
        f" ({inside:.0%} of the truths lie within). Below, h of the last layer, from which each forecast is made: units"
        " that follow the series rise and fall with it, others mark a time of day or a turn."
    )
    return Picture("stream", "The series and the hidden state", text, figure)


def _inside_share(traced: Trace) -> float:
    truth, forecast = traced.values[1:], traced.next_step[:-1]
    known = ~truth.isnan()
    within = (forecast[:, 0] <= truth) & (truth <= forecast[:, -1])
    return float(within[known].double().mean()) if known.any() else float("nan")


def _layer(traced: Trace, layer: int) -> Picture:
    order = _order(traced, layer)
    maps = [(GATE_SAYS[name], gate, name == "candidate") for name, gate in traced.gates.items()]
    maps += [("C: the cell state, carried from step to step", traced.c, True)] if traced.c is not None else []
    maps += [("h: the hidden state, what is shown of it" if maps else "h: the hidden state", traced.h, True)]
    figure = Figure(figsize=(WIDTH, 1.7 * len(maps) + 0.4), layout="constrained")
    for axes, (title, values, signed) in zip(
        figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0], maps, strict=True
    ):
        _heat(axes, traced, values[:, layer, order], title, signed=signed)
    _dated(axes)
    return Picture(f"layer{layer}", f"Layer {layer}", _layer_text(traced, layer), figure)


def _layer_text(traced: Trace, layer: int) -> str:
    keeps = KEEPS.get(traced.config.cell)
    if keeps is None:
        near = float((traced.h[:, layer].abs() > 0.9).double().mean())
        return (
            "A plain RNN has no gates: h is written anew at every step, and what it remembers must pass through"
            f" tanh(U h) each time. {near:.0%} of h lies beyond ±0.9, where its derivative is below 0.19."
        )
    gate, memory = traced.gates[keeps][:, layer], traced.memory_steps()
    assert memory is not None  # noqa: S101
    longest, middle = (_span(traced, float(steps)) for steps in (memory[layer].max(), memory[layer].median()))
    return (
        f"The {keeps} gate is {gate.mean():.2f} on average; {float((gate > 0.9).double().mean()):.0%} of the time it is"
        f" above 0.9 and keeps nearly all. Unit {int(memory[layer].argmax())} remembers the longest, {longest};"
        f" the median unit {middle}. A horizontal band in {'C' if traced.c is not None else 'h'} is something"
        " remembered; vertical stripes are something read."
    )


def _span(traced: Trace, steps: float) -> str:
    step_ms = traced.config.step_ms
    told = f"{steps:.1f} steps" if steps < 100 else f"{steps:,.0f} steps"
    return told if step_ms is None or steps > 1e6 else f"{told} ({_duration(timedelta(milliseconds=steps * step_ms))})"


def _duration(time: timedelta) -> str:
    for unit, seconds in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if time.total_seconds() >= 2 * seconds:
            return f"{time.total_seconds() / seconds:.0f} {unit}"
    return f"{time.total_seconds():.0f} s"


def _memory(traced: Trace) -> Picture:
    memory = traced.memory_steps()
    assert memory is not None  # noqa: S101
    keeps = KEEPS[traced.config.cell]
    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    axes = figure.subplots()
    for layer in range(traced.config.layers):
        axes.plot(memory[layer].sort(descending=True).values.numpy(), marker=".", label=f"layer {layer}")
    axes.set_yscale("log")
    axes.set_xlabel("unit, the longest memory first")
    axes.set_ylabel("steps until 1/e is left")
    if traced.config.season > 1:
        axes.axhline(traced.config.season, color="grey", lw=0.8, ls="--", label="season")
    axes.legend(fontsize=8)
    text = (
        f"What is kept of a unit after k steps is the product of k {keeps} gates; it falls to 1/e after"
        f" -1 / mean(ln {keeps}) steps. So a stack spreads its units over many time scales, from one step on; the"
        " longest ones carry level and trend."
    )
    return Picture("memory", "How long each unit remembers", text, figure)


def _loss_reach(traced: Trace, found: Gradients) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    far = len(found.loss_h)
    axes.plot(range(1, far + 1), found.loss_h.numpy(), label="with respect to h")
    if found.loss_c is not None:
        axes.plot(range(1, far + 1), found.loss_c.numpy(), label="with respect to C")
    if traced.config.season > 1:
        axes.axvline(traced.config.season, color="grey", lw=0.8, ls="--", label="season")
    _logarithmic(axes)
    axes.set_xlabel("lag k in steps")
    axes.set_ylabel("norm, over that at lag 0")
    axes.legend(fontsize=8)
    carried = found.loss_h if found.loss_c is None else found.loss_c
    text = (
        "The gradient of the loss at step t with respect to the state k steps earlier, all layers together, as autograd"
        f" finds it. {far} steps back it is {float(carried[-1]):.1e} of what it is at step t;"
        f" it falls below a hundredth {_below(carried)}."
        " What lies further back can hardly be learnt from this loss."
    )
    return Picture("loss_gradient", "How far the loss reaches back", text, figure)


def _below(carried: Tensor) -> str:
    low = (carried < 0.01).nonzero()
    return f"at lag {int(low[0]) + 1}" if len(low) else f"nowhere within {len(carried)} steps"


def _logarithmic(axes: Axes) -> None:
    """Far enough down to see a gradient vanish, no further."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-12))


def _products(traced: Trace, found: Gradients) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found.products), sharey=True, squeeze=False)[0]
    carried = "C" if traced.c is not None else "h"
    for layer, (axes, each) in enumerate(zip(panels, found.products, strict=True)):
        axes.plot(each.lags, each.full.numpy(), label=f"all paths: ‖∂{carried}ₜ/∂{carried}ₜ₋ₖ‖")
        if each.direct is not None and each.middle is not None:
            axes.plot(each.lags, each.direct.numpy(), ls="--", label="the carousel alone, its best unit")
            axes.plot(each.lags, each.middle.numpy(), ls=":", label="its median unit")
        axes.set_xscale("log")
        _logarithmic(axes)
        axes.set_title(f"layer {layer}", loc="left", fontsize=9)
        axes.set_xlabel("lag k in steps")
        axes.legend(fontsize=8)
    last = found.products[0].lags[-1]
    if traced.config.cell == "rnn":
        radius = ", ".join(f"{each:.2f}" for each in found.radius or [])
        text = (
            "In a plain RNN the derivative of h to an earlier h is the product of diag(1 - h²) U over the steps"
            f" between. The spectral radius of U is {radius} (by layer), and tanh takes its share: so the product"
            f" {_trend(found)} exponentially, to {_ends(found)} at lag {last}."
        )
    else:
        keeps = KEEPS[traced.config.cell]
        text = (
            f"Along {carried} the derivative is a product of {keeps} gates (dashed: of the unit that keeps most): no"
            " weight, no tanh, nothing that must shrink it where the gate stays open. The solid line takes the paths"
            f" through the other gates in too. At lag {last} it is {_ends(found)}."
        )
    return Picture("products", "The product of derivatives", text, figure)


def _trend(found: Gradients) -> str:
    grows = [float(each.full[-1]) > 1 for each in found.products]
    return "grows" if all(grows) else "shrinks" if not any(grows) else "shrinks or grows"


def _ends(found: Gradients) -> str:
    return ", ".join(f"{float(each.full[-1]):.1e}" for each in found.products)
