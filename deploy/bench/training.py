"""How fast training is, beside torch's bare LSTM and, if installed, NeuralForecast's.

All see windows of the same length from the same series, with networks of the same size, in turns on the same machine.
A window is not the same work, though: Carousel learns from a forecast at every step of it after the burn-in, and
NeuralForecast's LSTM from the one at its end.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from deploy.bench.figures import Probe, Sample
from deploy.bench.load import Bench
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from training.module import TrainingModule
from training.series import Series
from training.windows import Split, WindowData, WindowOptions

HOUR_MS = 3_600_000
SERIES, STEPS = 50, 2_000
CAROUSEL = "carousel: windows cut, network, loss, optimiser"
BARE = "torch's LSTM alone, forward and backward, on tensors at hand"
RIVAL = "NeuralForecast's LSTM with MQLoss, {} series a batch"
RIVAL_SERIES = (32, 4)
"""Its default, and few: it cuts all windows of the series of a batch, and throws away all but those it trains on."""
MODEL = ModelConfig(grid=Grid(HOUR_MS), season=24)
WINDOWS = WindowOptions()
BATCHES = 40
"""Timed in each round."""
WARM_BATCHES = 3
"""Not timed: the first ones allocate."""


def probes(bench: Bench) -> Iterator[Probe]:
    """Batches in turn, with networks of the same size, from the same series."""
    series, threads = _series(), bench.config.threads
    yield _probe(BARE, _bare, 0, role="limit")
    yield _probe(CAROUSEL, partial(_carousel, series), WINDOWS.steps - WINDOWS.burn_in, limit=BARE)
    if not importlib.util.find_spec("neuralforecast"):
        bench.tell("NeuralForecast is not installed; `pip install neuralforecast`, and it stands beside")
        return
    frame = _frame(series)
    for count in RIVAL_SERIES:
        rival = partial(_neuralforecast, frame, count, threads)
        yield _probe(RIVAL.format(count), rival, 1, role="rival", limit=CAROUSEL)


def _probe(name: str, measure: Callable[[int], float], forecasts: int, **told: Any) -> Probe:
    """forecasts: how many are learned from in a window."""

    def samples() -> Iterator[Sample]:
        rate = measure(BATCHES)
        note = f"{rate * forecasts:,.0f} forecasts learned from/s" if forecasts else ""
        yield Sample(name, rate, "windows/s", note=note, **told)

    return Probe(name, samples)


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
