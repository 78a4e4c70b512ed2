"""`carousel bench --training`: how fast training is, beside torch's bare LSTM and, if installed, NeuralForecast's.

All see windows of the same length from the same series, with networks of the same size, in turns on the same machine.
A window is not the same work, though: Carousel learns from a forecast at every step of it after the burn-in, and
NeuralForecast's LSTM from the one at its end.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from training.module import TrainingModule
from training.series import Series
from training.windows import Split, WindowData, WindowOptions

HOUR_MS = 3_600_000
SERIES, STEPS = 50, 2_000
CAROUSEL = "carousel: windows cut, network, loss, optimiser"
BARE = "limit: torch's LSTM alone, forward and backward, on tensors at hand"
RIVAL = "rival: NeuralForecast's LSTM with MQLoss, {} series a batch"
RIVAL_SERIES = (32, 4)
"""Its default, and few: it cuts all windows of the series of a batch, and throws away all but those it trains on."""
MODEL = ModelConfig(grid=Grid(HOUR_MS), season=24)
WINDOWS = WindowOptions()
WARM_BATCHES = 3
"""Not timed: the first ones allocate."""


@dataclass(frozen=True)
class TrainingFigure:
    """windows_per_second: the median of the rounds. forecasts: how many are learned from in a window."""

    what: str
    windows_per_second: float
    forecasts: int


def run(batches: int = 40, rounds: int = 3, threads: int = 1, console: Console | None = None) -> list[TrainingFigure]:
    """Measure in turns, and print. `batches` are timed in each round."""
    console = console or Console(highlight=False)
    torch.set_num_threads(threads)
    series = _series()
    measured: dict[str, Callable[[int], float]] = {BARE: _bare, CAROUSEL: partial(_carousel, series)}
    if importlib.util.find_spec("neuralforecast"):
        frame = _frame(series)
        for count in RIVAL_SERIES:
            measured[RIVAL.format(count)] = partial(_neuralforecast, frame, count, threads)
    rates: dict[str, list[float]] = {what: [] for what in measured}
    with console.status("measuring …") as status:
        for number in range(rounds):
            for what, measure in measured.items():
                status.update(f"round {number + 1} of {rounds}: {what} …")
                rates[what].append(measure(batches))
    forecasts = {BARE: 0, CAROUSEL: WINDOWS.steps - WINDOWS.burn_in}
    figures = [TrainingFigure(what, statistics.median(each), forecasts.get(what, 1)) for what, each in rates.items()]
    console.print(_table(figures, threads))
    if len(measured) == 2:
        console.print("NeuralForecast is not installed; `pip install neuralforecast`, and it stands beside")
    return figures


def _table(figures: list[TrainingFigure], threads: int) -> Table:
    ours = next(figure.windows_per_second for figure in figures if figure.what == CAROUSEL)
    title = (
        f"batches of {WINDOWS.batch_size} windows of {WINDOWS.steps} steps, LSTM {MODEL.hidden_size} x {MODEL.layers},"
        f" {MODEL.horizon} x {len(MODEL.quantiles)} quantiles, {threads} thread{'s' if threads > 1 else ''}"
    )
    table = Table("measured", "windows/s", "carousel beside it", "forecasts learned from/s", title=title)
    table.title_justify = "left"
    for figure in figures:
        rate = figure.windows_per_second
        learned = f"{rate * figure.forecasts:,.0f}" if figure.forecasts else ""
        table.add_row(figure.what, f"{rate:,.0f}", f"{ours / rate:.2f} x", learned)
    return table


def _series() -> list[Series]:
    random = np.random.default_rng(0)
    hours = np.arange(STEPS)
    day = 10 * np.sin(2 * np.pi * hours / MODEL.season)
    nothing = np.empty((STEPS, 0))
    return [
        Series(f"s{number}", 0, hours * HOUR_MS, 100 + day + random.normal(size=STEPS).cumsum() / 10, nothing)
        for number in range(SERIES)
    ]


def _frame(series: list[Series]) -> pd.DataFrame:
    return pd.concat(
        pd.DataFrame({"unique_id": each.unique_id, "ds": pd.to_datetime(each.ts_ms, unit="ms"), "y": each.y})
        for each in series
    )


class _Clock(Callback):
    """Times all batches of a training but the first few, with what lies between them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __deepcopy__(self, _: object) -> _Clock:
        return self  # NeuralForecast trains copies, of whose clock nobody would know

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def windows_per_second(self) -> float:
        timed = self.ends[WARM_BATCHES - 1 :]
        return (len(timed) - 1) * WINDOWS.batch_size / (timed[-1] - timed[0])


def _carousel(series: list[Series], batches: int) -> float:
    torch.manual_seed(0)
    forecaster, clock = Forecaster(MODEL), _Clock()
    steps = batches + WARM_BATCHES
    options = WindowOptions(batches=steps)
    data = WindowData(forecaster, series, Split(test=200, validation=200), options, seed=0)
    module = TrainingModule(forecaster, learning_rate=1e-3, weight_decay=1e-2, total_steps=steps, seed=0)
    with _quiet():
        trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, gradient_clip_val=1.0, callbacks=[clock], **_plain())
        trainer.fit(module, datamodule=data)
    return clock.windows_per_second()


def _neuralforecast(frame: pd.DataFrame, series: int, threads: int, batches: int) -> float:
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import LSTM

    clock = _Clock()
    model = LSTM(
        h=MODEL.horizon,
        input_size=WINDOWS.steps,
        encoder_hidden_size=MODEL.hidden_size,
        encoder_n_layers=MODEL.layers,
        loss=MQLoss(quantiles=list(MODEL.quantiles)),
        max_steps=batches + WARM_BATCHES,
        batch_size=series,
        windows_batch_size=WINDOWS.batch_size,
        callbacks=[clock],
        **_plain(),
    )
    with _quiet():
        torch.set_num_threads(threads)
        NeuralForecast(models=[model], freq="h").fit(frame)
    return clock.windows_per_second()


def _bare(batches: int) -> float:
    inputs = Forecaster(MODEL).features.inputs
    lstm = nn.LSTM(inputs, MODEL.hidden_size, MODEL.layers, batch_first=True)
    x = torch.randn(WINDOWS.batch_size, WINDOWS.steps, inputs)
    clock = _Clock()
    for _ in range(batches + WARM_BATCHES):
        outputs, _ = lstm(x)
        outputs.sum().backward()
        clock.on_train_batch_end()
    return clock.windows_per_second()


def _plain() -> dict[str, Any]:
    """Of Lightning no more than training."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


class _quiet(warnings.catch_warnings):  # noqa: N801  # used as the context manager that it is
    """Without what Lightning has to say."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
