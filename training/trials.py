"""`carousel train --trials N`: search for better options, with Optuna.

Each trial is a training; the validation loss alone says how good it was, and stops early what promises nothing. The
first trial takes the options as given, so the search never ends with worse ones. What was tried stands in a journal
beside the bundle, which Optuna's own tools can open, and from which an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytorch_lightning as pl
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file, save_file

from model.bundle import Bundle
from model.network import Forecaster
from training.fit import Prepared, TrainConfig, Trained, TrainError, TrainInterrupted, finish, options, prepare, train
from training.table import Columns, Observed

log = logging.getLogger(__name__)

FOLDER, STUDY, NAME = "trials", "study.journal", "carousel"
STARTUP_TRIALS = 5
"""So many are drawn at random, and run to their end, before the search learns from them."""
IN_MODEL = ("hidden_size", "layers", "dropout")
"""What is searched for of the model itself; the rest is of its training."""


def space(config: TrainConfig) -> dict[str, BaseDistribution]:
    """What is searched: some around what is usual, and in it what `config` has."""
    given = values(config)

    def reach(low: float, high: float, name: str) -> tuple[float, float]:
        return min(low, given[name]), max(high, given[name])

    return {
        "hidden_size": CategoricalDistribution(sorted({32, 64, 96, 128, given["hidden_size"]})),
        "layers": IntDistribution(1, max(3, given["layers"])),
        "dropout": FloatDistribution(*reach(0.0, 0.4, "dropout")),
        "learning_rate": FloatDistribution(*reach(5e-4, 1e-2, "learning_rate"), log=True),
        "weight_decay": FloatDistribution(*reach(1e-4, 1e-1, "weight_decay"), log=True),
        "window_steps": CategoricalDistribution(sorted({96, 192, 384, given["window_steps"]})),
    }


def values(config: TrainConfig) -> dict[str, Any]:
    """What `config` has of that."""
    kept = {name: getattr(config, name) for name in (*IN_MODEL, "learning_rate")}
    least = 1e-6  # no weight decay at all has no logarithm
    return {**kept, "weight_decay": max(config.weight_decay, least), "window_steps": config.windows.steps}


def applied(config: TrainConfig, found: Mapping[str, Any]) -> TrainConfig:
    """`config` with other values; a longer window has a burn-in longer by as much."""
    rest = {name: value for name, value in found.items() if name != "window_steps"}
    steps = found["window_steps"]
    burn_in = round(steps * config.windows.burn_in / config.windows.steps)
    return dataclasses.replace(
        config, **rest, windows=dataclasses.replace(config.windows, steps=steps, burn_in=burn_in)
    )


def search(table: Path | Sequence[Observed], columns: Columns, config: TrainConfig, trials: int) -> Bundle:
    """Train `trials` times in all, and write the bundle of the best. Equal seeds give equal bundles.

    With `config.resume` an earlier search in the same directory goes on, be it that it was interrupted or that more
    trials are wanted. Raises as `fit` does; where TrainInterrupted, the best so far was written.
    """
    prepared = prepare(table, columns, config)
    folder = config.out / FOLDER
    study = _study(folder, _run(prepared, config), wanted=config.resume)
    try:
        while (done := len(_done(study))) < trials:
            _trial(study, prepared, config, folder, done, trials)
    except (TrainInterrupted, KeyboardInterrupt) as stop:
        if not _complete(study):
            raise TrainInterrupted("the search was stopped before its first trial was done; no bundle") from stop
        _finish(study, prepared, config, folder)
        raise TrainInterrupted(
            f"the search was stopped after {len(_done(study))} of {trials} trials: the best of them is in"
            f" {config.out}, and --resume goes on"
        ) from stop
    if not _complete(study):
        raise TrainError(f"none of {trials} trials came to a validation loss that is a number")
    return _finish(study, prepared, config, folder)


def _trial(study: optuna.Study, prepared: Prepared, config: TrainConfig, folder: Path, done: int, trials: int) -> None:
    # Drawn by its place in the search and what was found before: resumed, a search is as if never interrupted.
    seed = int(np.random.SeedSequence((config.seed, done)).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    if not done and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(values(config))
    trial = study.ask(space(config))
    tried = applied(config, trial.params)
    pruning = _Pruning(trial)
    try:
        trained = train(_shaped(prepared, tried), dataclasses.replace(tried, out=folder, resume=False), [pruning])
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    trial.set_user_attr("epochs", trained.epochs)
    if pruning.pruned or not math.isfinite(trained.validation_loss):
        study.tell(trial, state=TrialState.PRUNED)
        outcome = f"given up after {trained.epochs} epochs"
    else:
        if _better(study, trained.validation_loss):
            save_file(trained.forecaster.state_dict(), _weights(folder, trial.number))
        study.tell(trial, trained.validation_loss)
        outcome = f"validation loss {trained.validation_loss:.5f}"
    _clean(study, folder)
    best = f"; best so far {study.best_value:.5f}" if _complete(study) else ""
    told = ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    )
    log.info("trial %d of %d: %s%s (%s)", done + 1, trials, outcome, best, told)


class _Pruning(Callback):
    """Ends a training whose validation loss is, at the same epoch, worse than the median of those before."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.pruned = trial, False

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        self.trial.report(float(trainer.callback_metrics["validation_loss"]), trainer.current_epoch)
        if self.trial.should_prune():
            self.pruned = trainer.should_stop = True


def _finish(study: optuna.Study, prepared: Prepared, config: TrainConfig, folder: Path) -> Bundle:
    best = study.best_trial
    found = applied(config, best.params)
    shaped = _shaped(prepared, found)
    forecaster = Forecaster(shaped.model_config)
    forecaster.load_state_dict(load_file(_weights(folder, best.number)))
    trained = Trained(forecaster.eval(), best.user_attrs["epochs"], study.best_value)
    done = _done(study)
    return finish(
        shaped,
        trained,
        found,
        {
            "trials": len(done),
            "trials_given_up": sum(each.state == TrialState.PRUNED for each in done),
            "best_trial": 1 + [each.number for each in done].index(best.number),
            "validation_loss": round(study.best_value, 6),
            "validation_loss_as_given": round(done[0].value, 6) if done[0].value is not None else None,
            "searched": ", ".join(space(config)),
        },
    )


def _shaped(prepared: Prepared, config: TrainConfig) -> Prepared:
    sizes = {name: getattr(config, name) for name in IN_MODEL}
    return dataclasses.replace(prepared, model_config=dataclasses.replace(prepared.model_config, **sizes))


# --- What was tried ---------------------------------------------------------------------------------------------


def _study(folder: Path, run: dict[str, Any], *, wanted: bool) -> optuna.Study:
    """The study to go on with, if one is wanted and there is one; otherwise a new one in an empty folder."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / STUDY
    if not (wanted and file.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    study = optuna.create_study(
        study_name=NAME,
        storage=JournalStorage(JournalFileBackend(str(file))),
        pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=max(1, run["epochs"] // 4)),
        load_if_exists=True,
    )
    before = study.user_attrs.setdefault("run", run)
    if other := [key for key in run if run[key] != before.get(key)]:
        was = ", ".join(f"{key} was {before.get(key)} and is {run[key]}" for key in other)
        raise TrainError(f"cannot resume the search in {folder}: {was}")
    study.set_user_attr("run", run)
    for each in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(each.number, state=TrialState.FAIL)  # its process was killed
    return study


def _run(prepared: Prepared, config: TrainConfig) -> dict[str, Any]:
    """Which search this is: all that must be as it was for it to be resumed."""
    digest = hashlib.sha256()
    for each in prepared.series:
        digest.update(each.y[: prepared.split.test_start(len(each.y))].tobytes())
    told = {**prepared.model_config.to_json(), **options(config), "epochs": config.epochs}
    return dict(json.loads(json.dumps({"table": digest.hexdigest()[:12], **told})))


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _done(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _better(study: optuna.Study, loss: float) -> bool:
    return not _complete(study) or loss < study.best_value


def _weights(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _clean(study: optuna.Study, folder: Path) -> None:
    """Keep the weights of the best trial alone; they were written before it was told, so they are there."""
    for file in folder.glob("*.safetensors"):
        if not _complete(study) or file != _weights(folder, study.best_trial.number):
            file.unlink()
