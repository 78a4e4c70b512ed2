"""fit -> backtest -> bundle: from a table of history to a model that can be served."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import pickle
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    WeightAveraging,
)
from rich.console import Console
from torch import Tensor

from model.bundle import Bundle, bundle_name, save_bundle
from model.config import Cell, ModelConfig
from model.errors import CarouselError
from model.features import YEAR_MS
from model.grid import Grid
from model.network import Forecaster
from model.scoring import Scores
from training.backtest import backtest, summary
from training.module import TrainingModule
from training.regression import fit_regression, rank_of
from training.series import Series, infer_grid, infer_season, parse_step, to_grid
from training.table import Columns, Observed, read_table
from training.threads import threads
from training.windows import Split, WindowData, WindowOptions, cut, find_split

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
AVERAGE = 0.99
"""What is kept, a step, of the average of the weights."""
BEST, LAST, RUN = "best.ckpt", "last.ckpt", "run.json"


class TrainError(CarouselError):
    """No model can be trained; the message is one line that says why."""


class TrainInterrupted(TrainError):
    """Training was stopped from outside; it can be resumed."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, how long, and where to put it. Raises TrainError, naming the field, if a value makes no sense.

    >>> TrainConfig(out=Path("models/load"), epochs=0)
    Traceback (most recent call last):
    ...
    training.fit.TrainError: epochs must be at least 1, not 0
    """

    out: Path
    """The bundle's directory; checkpoints go to `checkpoints` inside it."""
    name: str = ""
    """The bundle's name; empty: that of its directory."""

    step: str | None = None
    """Such as "15min", or "none"; None: found from the table."""
    season: int | None = None
    """In steps; None: found from the table."""
    horizon: int = 24
    quantiles: tuple[float, ...] = ModelConfig.quantiles
    test_steps: int | None = None
    """Steps at the end of each series that are held back for the backtest; None: a tenth."""

    cell: Cell = "lstm"
    hidden_size: int = 64
    layers: int = 2
    dropout: float = 0.2

    seed: int = 0
    epochs: int = 20
    """Of a fixed number of batches each: the learning rate's cycle ends with the last."""
    patience: int = 10
    """Epochs without a better validation loss after which training ends."""
    max_seconds: float | None = None
    """A guard: no epoch begins later than this."""
    windows: WindowOptions = field(default_factory=WindowOptions)
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    """The largest norm of a gradient."""
    threads: int | None = 1
    """Of torch; None: its own choice. A second one makes an idle machine a third quicker and a busy one many times
    slower, for each step is short and threads wait for each other in a busy loop."""
    resume: bool = False
    """Go on where an interrupted training with the same options stood."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "threads", "test_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"{name} must be at least 1, not {value}")
        for name in ("learning_rate", "clip", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TrainError(f"{name} must be above 0, not {value}")
        if self.test_steps is not None and self.test_steps < self.horizon:
            raise TrainError(f"test_steps must hold a horizon ({self.horizon}), not {self.test_steps}")


@dataclass(frozen=True)
class Prepared:
    """What a training learns from, and when it began. table: of a file its name and columns, as a bundle tells them."""

    model_config: ModelConfig
    series: Sequence[Series]
    split: Split
    table: Mapping[str, str]
    started_s: float


@dataclass(frozen=True)
class Trained:
    """A forecaster with the best weights of its training, which had this validation loss."""

    forecaster: Forecaster
    epochs: int
    validation_loss: float


def fit(table: Path | Sequence[Observed], columns: Columns, config: TrainConfig) -> Bundle:
    """Train a model on a table, backtest it on the end that was held back, and write its bundle to `config.out`.

    table: a file, or series read already. Equal seeds give equal weights (on equal machines and threads). Raises
    TableError if the table cannot be read, TrainError if it cannot be learned from or the options make no sense,
    TrainInterrupted if stopped by Ctrl-C or SIGTERM. Then there is no new bundle, but a training to resume.
    """
    prepared = prepare(table, columns, config)
    return finish(prepared, train(prepared, config), config)


def prepare(table: Path | Sequence[Observed], columns: Columns, config: TrainConfig) -> Prepared:
    """Read a table and find what is to be trained on it."""
    started_s = time.monotonic()
    observed = read_table(table, columns) if isinstance(table, Path) else table
    told = {"table": table.name, **columns.as_options()} if isinstance(table, Path) else {}
    return Prepared(*_plan(observed, columns, config), told, started_s)


def train(prepared: Prepared, config: TrainConfig, callbacks: Sequence[Callback] = ()) -> Trained:
    """Train; the part that is held back changes nothing of what comes out."""
    with threads(config.threads):
        torch.manual_seed(config.seed)
        forecaster = Forecaster(prepared.model_config)
        data = WindowData(forecaster, prepared.series, prepared.split, config.windows, config.seed)
        return _train(forecaster, data, config, callbacks)


def finish(prepared: Prepared, trained: Trained, config: TrainConfig, more: Mapping[str, Any] | None = None) -> Bundle:
    """Fit the regression beside what was trained, backtest and write the bundle. more: what else to tell of it."""
    series, split, forecaster = prepared.series, prepared.split, trained.forecaster
    with threads(config.threads):
        share = fit_regression(forecaster, series, split, config.seed)
        result = backtest(forecaster, series, [split.test_start(len(each.y)) for each in series])
    seconds = time.monotonic() - prepared.started_s
    bundle = save_bundle(
        config.out,
        forecaster,
        name=bundle_name(config.name or config.out.resolve().name),
        training={
            **prepared.table,
            "series": len({each.unique_id for each in series}),
            "observations": sum(int((~np.isnan(each.y)).sum()) for each in series),
            "test_steps": split.test,
            "epochs": trained.epochs,
            "regression_share": share,
            "seconds": round(seconds, 1),
            **options(config),
            **(more or {}),
        },
        scores={method: _finite(row) for method, row in result.scores().items()},
    )
    told = f"{bundle.model_id}: trained in {seconds:.0f} s; {len(result.of):,} forecasts of the held-back end"
    Console().print(told, summary(result.scores()), sep="\n", highlight=False)
    return bundle


def _finite(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(scores).items() if math.isfinite(value)}


def options(config: TrainConfig) -> dict[str, Any]:
    """The options that decide what comes out of a training, beside what the model's own configuration tells."""
    kept = ("seed", "learning_rate", "weight_decay", "clip", "patience")
    windows = {f"window_{name}": value for name, value in dataclasses.asdict(config.windows).items()}
    return {**{name: getattr(config, name) for name in kept}, **windows}


# --- What is trained --------------------------------------------------------------------------------------------


def _plan(
    observed: Sequence[Observed], columns: Columns, config: TrainConfig
) -> tuple[ModelConfig, list[Series], Split]:
    """The shape of the model, the series on its grid and how they are split; step and season found if need be."""
    try:
        step_ms = parse_step(config.step) if config.step else None
        grid = None if config.step and step_ms is None else infer_grid(observed, step_ms)
        season = config.season or _season(observed, grid, config)
        model_config = ModelConfig(
            grid=grid,
            season=season,
            horizon=config.horizon,
            quantiles=config.quantiles,
            covariates=columns.covariates,
            cell=config.cell,
            hidden_size=config.hidden_size,
            layers=config.layers,
            dropout=config.dropout,
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
    series = to_grid(observed, grid, model_config.max_gap)
    split = find_split([len(each.y) for each in series], config.horizon, config.test_steps)
    rank = rank_of(model_config, [split.fit_stop(len(each.y)) for each in series])
    model_config = dataclasses.replace(model_config, rank=rank)
    _check(series, split, config.horizon)
    yearly = any(_span_ms(each, split) >= 2 * YEAR_MS for each in series)
    model_config = dataclasses.replace(model_config, yearly=yearly)
    log.info(
        "%d series, %s steps in all; step %s, season %d%s; the last %d steps of each are held back",
        len(series),
        f"{sum(len(each.y) for each in series):,}",
        timedelta(milliseconds=grid.step_ms) if grid else "none",
        season,
        "" if config.season else " (found)",
        split.test,
    )
    return model_config, series, split


def _span_ms(series: Series, split: Split) -> int:
    """How long the history before the test part is."""
    history_ms = series.ts_ms[: split.test_start(len(series.y))]
    return int(history_ms[-1] - history_ms[0]) if len(history_ms) else 0


def _season(observed: Sequence[Observed], grid: Grid | None, config: TrainConfig) -> int:
    series = to_grid(observed, grid, ModelConfig().max_gap)
    split = find_split([len(each.y) for each in series], config.horizon, config.test_steps)
    return infer_season([cut(each, 0, split.test_start(len(each.y))) for each in series], grid)


def _check(series: Sequence[Series], split: Split, horizon: int) -> None:
    longest = max((len(each.y) for each in series), default=0)
    needed = max(4 * horizon, 16)
    if longest < needed:
        raise TrainError(
            f"the longest series has {longest} steps; a horizon of {horizon} needs {needed}, for no more than a"
            " quarter of a series is held back: a longer table or a shorter --horizon would do"
        )
    histories = [each.y[: split.test_start(len(each.y))] for each in series]
    known = [history[~np.isnan(history)] for history in histories]
    if not any(len(np.unique(values)) > 1 for values in known):
        raise TrainError("no series ever changes in its history: there is nothing to learn")


# --- Training ---------------------------------------------------------------------------------------------------


def _train(forecaster: Forecaster, data: WindowData, config: TrainConfig, callbacks: Sequence[Callback]) -> Trained:
    """Train, and leave the best weights in `forecaster`."""
    folder = config.out / CHECKPOINTS
    resumed = _checkpoint(folder, _run(forecaster.config, config, data), wanted=config.resume)
    total_steps = config.epochs * config.windows.batches
    module = TrainingModule(forecaster, config.learning_rate, config.weight_decay, total_steps, config.seed)
    # Written when an epoch is done with, so that a resumed training begins with the next. Two of them, for the `last`
    # of Lightning's own is only written with a best.
    best, last = (
        ModelCheckpoint(
            folder,
            name.removesuffix(".ckpt"),
            monitor=monitor,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        for name, monitor in ((BEST, "validation_loss"), (LAST, None))
    )
    with _quiet(), _interruptible(folder):
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            deterministic=True,
            max_epochs=config.epochs,
            gradient_clip_val=config.clip,
            callbacks=[
                WeightAveraging(avg_fn=_average),
                best,
                last,
                EarlyStopping("validation_loss", patience=config.patience),
                *_callbacks(config),
                *callbacks,
            ],
            logger=False,
            enable_progress_bar=Console().is_terminal,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data, ckpt_path=resumed)
    weights = torch.load(folder / BEST, weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    log.info("the best of %d epochs had a validation loss of %.5f", trainer.current_epoch, best.best_model_score)
    return Trained(forecaster, trainer.current_epoch, float(best.best_model_score))  # type: ignore[arg-type]


def _average(average: Tensor, weights: Tensor, updates: Tensor) -> Tensor:
    """An exponential moving average (Polyak and Juditsky 1992): over the last 100 steps, fewer at first."""
    return torch.lerp(weights, average, min(AVERAGE, int(updates) / (int(updates) + 10)))


def _callbacks(config: TrainConfig) -> list[Callback]:
    bar = RichProgressBar(leave=False) if Console().is_terminal else _EpochLines()
    if config.max_seconds is None:
        return [bar]
    return [bar, Timer(timedelta(seconds=config.max_seconds), interval="epoch", verbose=False)]


class _EpochLines(Callback):
    """One line of log an epoch, where no terminal can show a bar."""

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        done = f"{trainer.current_epoch + 1} of {trainer.max_epochs}"
        log.info("epoch %s: loss %.5f, validation %.5f", done, metrics["loss"], metrics["validation_loss"])


def _run(model_config: ModelConfig, config: TrainConfig, data: WindowData) -> dict[str, Any]:
    """Which training this is: all that must be as it was for it to be resumed."""
    digest = hashlib.sha256()
    for each in data.replays:
        digest.update(each.values.numpy().tobytes())
    run = {"table": digest.hexdigest()[:12], "epochs": config.epochs, **options(config), **model_config.to_json()}
    return dict(json.loads(json.dumps(run)))  # as it comes back from its file


def _checkpoint(folder: Path, run: dict[str, Any], *, wanted: bool) -> Path | None:
    """The checkpoint to go on from, if one is wanted and there is one; otherwise an empty folder for new ones.

    Raises TrainError if it cannot be read or comes from another training.
    """
    last = folder / LAST
    if not (wanted and last.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / RUN).write_text(json.dumps(run))
        return None
    try:
        before = json.loads((folder / RUN).read_text())
        torch.load(last, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise TrainError(f"{last} is damaged: train again without --resume") from error
    if other := [key for key in run if run[key] != before.get(key)]:
        was = ", ".join(f"{key} was {before.get(key)} and is {run[key]}" for key in other)
        raise TrainError(f"cannot resume the training in {folder}: {was}")
    return last


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Lightning ends the process on Ctrl-C, and leaves the signal ignored; callers of a function expect neither."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        again = "--resume goes on with it" if (folder / LAST).exists() else "no epoch was finished"
        raise TrainInterrupted(f"training was stopped; {again}") from stop
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on graphics cards, worker processes and its own products."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch\.optim).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
