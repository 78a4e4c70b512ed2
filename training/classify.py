"""`carousel train --task classify | regress`: a table whose series carry a label -> a bundle that tells it.

Many-to-one: train, validation and test are different *series*, whole each, not different times.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import pad

from model.bundle import ClassifierBundle, bundle_name, save_classifier
from model.classifier import Classifier, ClassifierConfig, units_of
from model.config import Cell, ModelConfig
from model.features import Block
from training.fit import TrainError
from training.series import Series, infer_grid, infer_season, parse_step, to_grid
from training.table import Columns, read_labels, read_table
from training.threads import threads
from training.windows import block_of, cut, fit_covariates

log = logging.getLogger(__name__)

Task = Literal["classify", "regress"]
CAROUSEL, NAIVE = "carousel", "naive"
"""The methods, by the names that bundles give them. The naive one tells the commonest class, or the mean."""
PARTS = ("fit", "fit", "validation", "fit", "test")
"""Of five series with like labels, three are fitted to."""


@dataclass(frozen=True)
class ClassifyConfig:
    """What to train, how long, and where to put it. Raises TrainError, naming the field, if a value makes no sense."""

    out: Path
    label: str
    """The column with the class, or the value, of each series: the same in all its rows."""
    task: Task = "classify"
    name: str = ""
    step: str | None = None
    season: int | None = None
    steps: int = ClassifierConfig.steps
    cell: Cell = "lstm"
    hidden_size: int = 64
    layers: int = 2
    dropout: float = 0.0
    seed: int = 0
    epochs: int = 60
    """The learning rate's cycle ends with the last; the weights of the best are kept."""
    max_seconds: float | None = None
    batch: int = 8
    learning_rate: float = 5e-3
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.task not in ("classify", "regress"):
            raise TrainError(f"task must be forecast, classify or regress, not {self.task!r}")
        for name in ("epochs", "batch", "steps", "learning_rate", "clip", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TrainError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Example:
    """A series and what is to be told of it: the number of its class, or its value."""

    series: Series
    truth: float


def fit_classifier(table: Path, columns: Columns, config: ClassifyConfig) -> ClassifierBundle:
    """Train a classifier on a table, score it on series held back, write its bundle to `config.out`.

    Equal seeds give equal weights. Raises TableError if the table cannot be read, TrainError if it cannot be learned
    from or the options make no sense.
    """
    started = time.monotonic()
    examples, model_config = _plan(table, columns, config)
    parts = split(examples, config.seed)
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = Classifier(model_config)
        _fit_scaling(classifier, parts["fit"])
        epochs = _train(classifier, parts["fit"], parts["validation"], config)
        answers = torch.cat([classifier.answer(*gather(part)) for part in _batches(parts["test"], config.batch)])
    truths = torch.tensor([each.truth for each in parts["test"]], dtype=torch.float64)
    known = torch.tensor([each.truth for each in parts["fit"]], dtype=torch.float64)
    measure = class_scores if model_config.labels else value_scores
    scores = {CAROUSEL: measure(answers, truths), NAIVE: measure(_naive(known, model_config, len(truths)), truths)}
    seconds = time.monotonic() - started
    bundle = save_classifier(
        config.out,
        classifier,
        name=bundle_name(config.name or config.out.resolve().name),
        training={
            "table": table.name,
            "label": config.label,
            "task": config.task,
            "series": len(examples),
            "test_series": len(truths),
            "epochs": epochs,
            "seconds": round(seconds, 1),
            "seed": config.seed,
            "learning_rate": config.learning_rate,
        },
        scores=scores,
    )
    told = f"{bundle.model_id}: trained in {seconds:.0f} s on {len(parts['fit'])} series; {len(truths)} held back"
    Console().print(told, _summary(scores), sep="\n", highlight=False)
    return bundle


def _plan(table: Path, columns: Columns, config: ClassifyConfig) -> tuple[list[Example], ClassifierConfig]:
    observed, told = read_table(table, columns), read_labels(table, columns, config.label)
    try:
        step_ms = parse_step(config.step) if config.step else None
        grid = None if config.step and step_ms is None else infer_grid(observed, step_ms)
        on_grid = to_grid(observed, grid, ModelConfig().max_gap)
        season = config.season or infer_season(on_grid, grid)
        series_config = ModelConfig(
            grid=grid,
            season=season,
            covariates=columns.covariates,
            cell=config.cell,
            hidden_size=config.hidden_size,
            layers=config.layers,
            dropout=config.dropout,
        )
        labels = tuple(sorted(set(told.values()))) if config.task == "classify" else ()
        model_config = ClassifierConfig(series_config, labels, config.steps)
    except ValueError as error:
        raise TrainError(str(error)) from error
    truth_of = {name: float(labels.index(label)) if labels else _number(name, label) for name, label in told.items()}
    # Where a gap broke a series, its last part stands for it, as it would for a stream that is served.
    whole = {each.unique_id: each for each in to_grid(observed, grid, series_config.max_gap)}
    examples = [
        Example(cut(each, max(0, len(each.y) - config.steps), len(each.y)), truth_of[name])
        for name, each in whole.items()
    ]
    if len(examples) < len(PARTS):
        raise TrainError(f"{len(examples)} series are too few: three of five are fitted to, so {len(PARTS)} are needed")
    log.info("%d series, %s", len(examples), f"{len(labels)} classes" if labels else "a value each")
    return examples, model_config


def _number(name: str, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TrainError(f"series {name!r} has the label {label!r}, which is no number: --task classify takes words")
    return value


def split(examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    """Fit, validation and test: in the order of labels (ties drawn by seed) each fifth series is held back for test."""
    order = np.random.default_rng(seed).permutation(len(examples))
    order = order[np.argsort([examples[n].truth for n in order], kind="stable")]
    return {
        part: [examples[n] for place, n in enumerate(order) if PARTS[place % len(PARTS)] == part]
        for part in ("fit", "validation", "test")
    }


def gather(examples: Sequence[Example]) -> tuple[Block, Tensor]:
    """Series side by side, shorter ones padded at their ends. -> B streams by T steps, and their lengths [B]."""
    lengths = torch.tensor([len(each.series.y) for each in examples])
    steps = int(lengths.max())
    blocks = [(block_of([each.series]), steps - len(each.series.y)) for each in examples]
    return Block(
        torch.cat([pad(block.values, (0, missing), value=math.nan) for block, missing in blocks]),
        torch.cat([pad(block.ts_ms, (0, missing)) for block, missing in blocks]),
        torch.cat([pad(block.covariates, (0, 0, 0, missing), value=math.nan) for block, missing in blocks]),
    ), lengths


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[first : first + size] for first in range(0, len(examples), size)]


def _fit_scaling(classifier: Classifier, fitted: Sequence[Example]) -> None:
    """What the series that are fitted to say of usual covariates, levels, scales and values."""
    fit_covariates(classifier.features, [each.series for each in fitted])
    block, lengths = gather(fitted)
    seen, _ = classifier.features(classifier.schema.initial(len(fitted)), block)
    units = units_of(seen)[torch.arange(len(fitted)), lengths - 1]
    truths = torch.tensor([each.truth for each in fitted])
    for name, values in (("units", units), ("value", truths)):
        deviation = values.std(0, correction=0)
        getattr(classifier, f"{name}_mean").copy_(values.mean(0))
        getattr(classifier, f"{name}_std").copy_(torch.where(deviation > 0, deviation, 1.0))


def _train(classifier: Classifier, fitted: list[Example], validated: list[Example], config: ClassifyConfig) -> int:
    """Train, and leave the best weights in `classifier`. -> the number of epochs that it took."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate)
    updates = config.epochs * math.ceil(len(fitted) / config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, updates, pct_start=0.1)
    random = np.random.default_rng(config.seed)
    best, weights, epoch = math.inf, copy.deepcopy(classifier.state_dict()), 0
    started = time.monotonic()
    for epoch in range(1, config.epochs + 1):
        classifier.train()
        order = [fitted[n] for n in random.permutation(len(fitted))]
        for batch in _batches(order, config.batch):
            loss = _loss(classifier, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(classifier.parameters(), config.clip)
            optimizer.step()
            schedule.step()
        classifier.eval()
        with torch.no_grad():
            losses = [float(_loss(classifier, part)) * len(part) for part in _batches(validated, config.batch)]
        validation = sum(losses) / len(validated)
        log.info("epoch %d of %d: loss %.5f, validation %.5f", epoch, config.epochs, loss.item(), validation)
        if validation < best:
            best, weights = validation, copy.deepcopy(classifier.state_dict())
        if time.monotonic() - started > (config.max_seconds or math.inf):
            break
    classifier.load_state_dict(weights)
    return epoch


def _loss(classifier: Classifier, batch: Sequence[Example]) -> Tensor:
    raw = classifier(*gather(batch))
    truths = torch.tensor([each.truth for each in batch])
    if classifier.config.labels:
        return nn.functional.cross_entropy(raw, truths.long())
    return nn.functional.smooth_l1_loss(raw[:, 0], (truths - classifier.value_mean) / classifier.value_std)


# --- Scores ---------------------------------------------------------------------------------------------------------


def _naive(known: Tensor, config: ClassifierConfig, count: int) -> Tensor:
    """What can be said without looking: how common the classes are, or the mean."""
    if not config.labels:
        return known.mean().expand(count)
    share = torch.bincount(known.long(), minlength=len(config.labels)) / len(known)
    return share.double().expand(count, -1)


def class_scores(probabilities: Tensor, truths: Tensor) -> dict[str, float]:
    """accuracy; macro_f1: the mean over classes that occur of 2 TP / (2 TP + FP + FN); log_loss: - mean ln p(truth).

    probabilities [n, classes], truths [n].

    >>> class_scores(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), torch.tensor([0.0, 1.0, 1.0]))["accuracy"]
    0.6666666666666666
    """
    truth, told = truths.long(), probabilities.argmax(-1)
    f1 = []
    for each in range(probabilities.shape[1]):
        right = int(((told == each) & (truth == each)).sum())
        claimed, there = int((told == each).sum()), int((truth == each).sum())
        if claimed + there:
            f1.append(2 * right / (claimed + there))
    given = probabilities.double().gather(1, truth[:, None]).clamp_min(1e-15)
    return {
        "accuracy": int((told == truth).sum()) / len(truth),
        "macro_f1": sum(f1) / len(f1),
        "log_loss": float(-given.log().mean()),
    }


def value_scores(values: Tensor, truths: Tensor) -> dict[str, float]:
    """mae and rmse. values, truths [n]."""
    missed = values.double() - truths
    return {"mae": float(missed.abs().mean()), "rmse": float(missed.square().mean().sqrt())}


def _summary(scores: dict[str, dict[str, float]]) -> Table:
    table = Table("method", *scores[CAROUSEL])
    for method, row in scores.items():
        table.add_row(method, *(f"{value:.4f}" for value in row.values()))
    return table
