"""`carousel memory`: how far back an RNN, a GRU and an LSTM can remember, and why; measured, with a saved report."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from training.longlag import Learner, Learnt, Task, learn
from training.pages import Grid, Picture, write_page
from training.threads import threads

log = logging.getLogger(__name__)

WIDTH = 9.0
"""Of a figure, in inches."""
RNN, GRU, LSTM = ({"cell": cell} for cell in ("rnn", "gru", "lstm"))
CHRONO = {**LSTM, "remember": True}
CELLS: Sequence[dict[str, Any]] = (RNN, GRU, LSTM, CHRONO)
COLOURS = {"RNN": "#d62728", "GRU": "#2ca02c", "LSTM": "#ff7f0e", "LSTM, chrono": "#1f77b4"}


@dataclass(frozen=True)
class MemoryConfig:
    """How long the sequences are, and how long each cell may learn."""

    steps: int = 400
    """Of the adding problem."""
    needle_steps: tuple[int, ...] = (50, 100, 200, 500, 1000)
    updates: int = 1000
    needle_updates: int = 600
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What was measured: by learner, by length and learner, and an explosive RNN without and with clipping."""

    adding: list[Learnt]
    needle: list[Learnt]
    clipping: list[Learnt]


def measure(config: MemoryConfig) -> Report:
    """Let every cell learn every task, one after the other on one thread. Equal seeds give equal reports."""
    torch.set_flush_denormal(True)  # else what vanishes costs the processor six times as long
    try:
        with threads(1):
            return _measure(config)
    finally:
        torch.set_flush_denormal(False)


def _measure(config: MemoryConfig) -> Report:
    adding = Learner(seed=config.seed, updates=config.updates)
    needle = dataclasses.replace(adding, updates=config.needle_updates)
    explosive = dataclasses.replace(
        adding, cell="rnn", gain=1.5, plain=True, learning_rate=0.1, updates=min(config.updates, 200)
    )
    return Report(
        [_learn(Task(config.steps), learner) for learner in _like(adding, *CELLS)],
        [
            _learn(Task(steps, needle=True), learner)
            for steps in config.needle_steps
            for learner in _like(needle, RNN, LSTM, CHRONO)
        ],
        [_learn(Task(50), dataclasses.replace(explosive, clip=clip)) for clip in (None, 1.0)],
    )


def _like(learner: Learner, *kinds: dict[str, Any]) -> list[Learner]:
    return [dataclasses.replace(learner, **kind) for kind in kinds]


def _learn(task: Task, learner: Learner) -> Learnt:
    started = time.monotonic()
    learnt = learn(task, learner)
    log.info(
        "%s of %d steps, %s: mean squared error %.4f after %d updates, %.0f s",
        "needle" if task.needle else "adding", task.steps, learner.name, learnt.mse, len(learnt.losses),
        time.monotonic() - started,
    )  # fmt: skip
    return learnt


def run(config: MemoryConfig, out: Path) -> Report:
    """Measure, print, and write `index.html`, its pictures and `memory.json` to `out`. Raises OSError if it cannot."""
    out.mkdir(parents=True, exist_ok=True)
    report = measure(config)
    (out / "memory.json").write_text(json.dumps(numbers(report, config), indent=2) + "\n")
    rows = _adding_rows(report)
    parts: list[Picture | Grid] = [
        Grid("The adding problem", _adding_text(report), rows),
        _losses(report),
        _reach(report),
        _needle(report),
        _clipping(report),
    ]
    intro = (
        "Each step shows a number in [0, 1] and whether it is marked. Adding: two are marked, and after the last step"
        " their sum is asked for; who always says 1 has a mean squared error of 0.167. Needle: the first is marked, and"
        " asked for; guessing has 0.083. All cells have 32 units in one layer and the same budget: Adam, learning rate"
        f" 0.01, clipped at 1, 32 sequences an update. Seed {config.seed}; `carousel memory` measures it again."
    )
    page = write_page(out, "How far back can it remember?", intro, parts)
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table, f"written to {page}", sep="\n", highlight=False)
    return report


def numbers(report: Report, config: MemoryConfig) -> dict[str, Any]:
    """The report for JSON: what has no end (an exploded gradient) is null."""
    return {
        "config": dataclasses.asdict(config),
        **{
            part: [
                {
                    "learner": each.learner.name,
                    **dataclasses.asdict(each.learner),
                    "steps": each.task.steps,
                    "guess": each.task.guess,
                    "mse": _finite(each.mse),
                    "solved": each.solved,
                    "updates_taken": len(each.losses),
                    "losses": [_finite(loss) for loss in each.losses],
                    "gradient_norms": [_finite(norm) for norm in each.norms],
                    "reach_before_by_lag": [_finite(norm) for norm in each.reach_before.tolist()],
                    "reach_after_by_lag": [_finite(norm) for norm in each.reach_after.tolist()],
                }
                for each in getattr(report, part)
            ]
            for part in ("adding", "needle", "clipping")
        },
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


# --- The page -------------------------------------------------------------------------------------------------------


def _adding_rows(report: Report) -> list[list[str]]:
    heading = ["cell", "mean squared error", "updates", "gradient at the first step, untrained", "trained"]
    return [
        heading,
        *(
            [
                each.learner.name,
                f"{each.mse:.4f}" + (" (solved)" if each.solved else ""),
                str(len(each.losses)),
                f"{float(each.reach_before[-1]):.0e}",
                f"{float(each.reach_after[-1]):.0e}",
            ]
            for each in report.adding
        ),
    ]


def _adding_text(report: Report) -> str:
    steps = report.adding[0].task.steps
    return (
        f"{steps} steps; solved means below 0.01 on 1,000 sequences never seen. The gradient at the first step is that"
        f" with respect to what the cell carries (C of an LSTM, h of the others) {steps} steps before the answer, over"
        " that with respect to the last h. Chrono (Tallec and Ollivier 2018): gates begin with memories of 1 to"
        f" {steps} steps, where torch's own initialisation begins with a forget gate near 1/2."
    )


def _losses(report: Report) -> Picture:
    figure, axes = _figure()
    for each in report.adding:
        axes.plot(_smooth(each.losses), label=each.learner.name, color=COLOURS[each.learner.name], lw=1.3)
    axes.axhline(report.adding[0].task.guess, color="grey", ls="--", lw=0.8, label="guessing")
    axes.set_ylim(0, 0.3)
    axes.set_xlabel("update")
    axes.set_ylabel("mean squared error")
    axes.legend(fontsize=8)
    text = (
        "For a while no cell does better than guessing; a cell whose gradient reaches the marks then finds out within a"
        " few dozen updates. One whose gradient does not reach them gets no hint, however long it learns."
    )
    return Picture("adding", "Learning to add", text, figure)


def _reach(report: Report) -> Picture:
    figure, axes = _figure()
    for each in report.adding:
        colour = COLOURS[each.learner.name]
        lags = range(1, each.task.steps + 1)
        axes.plot(lags, each.reach_before.numpy(), color=colour, ls=":", lw=1)
        axes.plot(lags, each.reach_after.numpy(), color=colour, lw=1.5, label=each.learner.name)
    axes.set_yscale("log")
    axes.set_ylim(1e-20, max(100.0, *(float(each.reach_after.max()) for each in report.adding)))
    axes.set_xlabel("lag in steps")
    axes.set_ylabel("gradient norm, over that at lag 0")
    axes.legend(fontsize=8)
    text = (
        "The norm of the gradient with respect to the state k steps before the answer: dotted as initialised, solid"
        " after training. In the RNN each step multiplies by diag(1 - h²) U: a straight line down on this scale, and no"
        " training lifts what it cannot feel. In the LSTM it is carried by C, times a forget gate that may stay open:"
        " the constant error carousel."
    )
    return Picture("reach", "Why: how far the gradient reaches", text, figure)


def _needle(report: Report) -> Picture:
    figure, axes = _figure()
    names = list(dict.fromkeys(each.learner.name for each in report.needle))
    for name in names:
        of = [each for each in report.needle if each.learner.name == name]
        errors = [each.mse / each.task.guess for each in of]
        axes.plot([each.task.steps for each in of], errors, marker="o", label=name, color=COLOURS[name])
    axes.axhline(1, color="grey", ls="--", lw=0.8, label="guessing")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("steps to remember it")
    axes.set_ylabel("error, over that of guessing")
    axes.legend(fontsize=8)
    solved = {name: [e.task.steps for e in report.needle if e.learner.name == name and e.solved] for name in names}
    told = "; ".join(f"{name}: {f'up to {max(steps)} steps' if steps else 'none'}" for name, steps in solved.items())
    text = f"One value, shown at the first step, is asked for at the end. Solved by {told}."
    return Picture("needle", "A needle remembered", text, figure)


def _clipping(report: Report) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for each, colour in zip(report.clipping, ("#d62728", "#1f77b4"), strict=True):
        label = "clipped at 1" if each.learner.clip else "not clipped"
        for panel, values in zip(axes, (each.norms, each.losses), strict=True):
            panel.plot(np.clip(values, None, 1e12), label=label, color=colour, lw=1)
    for panel, title in zip(axes, ("gradient norm, before clipping", "mean squared error"), strict=True):
        panel.set_yscale("log")
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlabel("update")
    axes[0].axhline(1, color="grey", ls="--", lw=0.8)
    axes[0].legend(fontsize=8)
    free, clipped = report.clipping
    ended = "the weights are lost" if not math.isfinite(free.norms[-1]) else "the error jumps"
    text = (
        "An RNN that begins with an orthogonal U times 1.5, plain gradient descent, 50 steps. Its gradient explodes:"
        f" unclipped, one step of it throws the weights far out, and by update {len(free.norms)} {ended}. Scaled to"
        " a norm of 1 (Pascanu, Mikolov and Bengio 2013) the direction stays and the step is small: the error ends at"
        f" {clipped.mse:.2f}. Clipping mends what explodes, not what vanishes: for that there is the carousel."
    )
    return Picture("clipping", "Clipping at work", text, figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    return figure, figure.subplots()


def _smooth(values: Sequence[float], over: int = 20) -> list[float]:
    """The mean of the last `over` values, at each."""
    return [float(np.mean(values[max(0, n + 1 - over) : n + 1])) for n in range(len(values))]
