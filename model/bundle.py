"""A model on disk, in Hugging Face's layout: config.json, model.safetensors, README.md (its card).

Loading runs no code from the bundle and refuses, with the reason, what is damaged or of another format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from model.classifier import Classifier, ClassifierConfig
from model.config import ModelConfig
from model.errors import CarouselError
from model.network import Forecaster

FORMAT = 2
FORECASTER, CLASSIFIER = "forecaster", "classifier"
"""The kinds of models; a bundle that names none is a forecaster."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class BundleError(CarouselError):
    """A bundle cannot be read; the message says which file and why."""


@dataclass(frozen=True)
class Bundle:
    """A trained model with what is known about it.

    training: how it came to be (table, seed, options). scores: by method, then by measure, from its backtest.
    """

    forecaster: Forecaster
    name: str
    weights_sha256: str
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.forecaster.config

    @property
    def model_id(self) -> str:
        """The name and the first digits of the weights' checksum: equal ids forecast equally."""
        return f"{self.name}-{self.weights_sha256[:8]}"


@dataclass(frozen=True)
class ClassifierBundle:
    """A trained classifier (or regressor) with what is known about it, as `Bundle` has it of a forecaster."""

    classifier: Classifier
    name: str
    weights_sha256: str
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def config(self) -> ClassifierConfig:
        return self.classifier.config

    @property
    def model_id(self) -> str:
        return f"{self.name}-{self.weights_sha256[:8]}"


def save_bundle(
    directory: Path,
    forecaster: Forecaster,
    *,
    name: str,
    training: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
) -> Bundle:
    """Write a bundle; each file appears whole or not at all. Raises OSError where the directory cannot be written."""
    weights = _weights(name, forecaster)
    bundle = Bundle(forecaster.eval(), name, hashlib.sha256(weights).hexdigest(), training, scores)
    _save(directory, bundle, weights, FORECASTER, card(bundle))
    return bundle


def save_classifier(
    directory: Path,
    classifier: Classifier,
    *,
    name: str,
    training: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
) -> ClassifierBundle:
    """`save_bundle` for a classifier."""
    weights = _weights(name, classifier)
    bundle = ClassifierBundle(classifier.eval(), name, hashlib.sha256(weights).hexdigest(), training, scores)
    _save(directory, bundle, weights, CLASSIFIER, classifier_card(bundle))
    return bundle


def bundle_name(wanted: str) -> str:
    """The nearest to `wanted` that a bundle may be called.

    >>> bundle_name("my model (2)")
    'my-model-2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("._-")[:64] or "carousel"


def _weights(name: str, network: nn.Module) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"a bundle's name is up to 64 letters, digits, '.', '_' and '-', not {name!r}")
    return save({key: value.contiguous() for key, value in network.state_dict().items()})


def _save(directory: Path, bundle: Bundle | ClassifierBundle, weights: bytes, kind: str, card: str) -> None:
    config = {
        "format": FORMAT,
        "kind": kind,
        "name": bundle.name,
        "weights_sha256": bundle.weights_sha256,
        "model": bundle.config.to_json(),
        "training": dict(bundle.training),
        "scores": {method: dict(row) for method, row in bundle.scores.items()},
    }
    description = json.dumps(config, indent=2).encode() + b"\n"
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS, weights)
    _write(directory / CARD, card.encode())
    _write(directory / CONFIG, description)  # last: it vouches for the others


def load_bundle(directory: Path) -> Bundle:
    """Read a forecaster. Raises BundleError, in one line, if anything about it is not as it must be."""
    bundle = open_bundle(directory)
    if isinstance(bundle, ClassifierBundle):
        raise BundleError(f"{directory} is a classifier: it forecasts nothing; `carousel serve` answers with it")
    return bundle


def open_bundle(directory: Path) -> Bundle | ClassifierBundle:
    """Read a bundle of either kind. Raises BundleError, in one line, if anything about it is not as it must be."""
    config = _read_config(directory)
    try:
        weights = (directory / WEIGHTS).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {directory / WEIGHTS}: {error.strerror}") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config.get("weights_sha256"):
        raise BundleError(f"{directory / WEIGHTS} is damaged: its checksum is not the one in {CONFIG}")
    try:
        network = _network(directory, config)
        network.load_state_dict(load(weights))
        name = str(config["name"])
    except KeyError as error:
        raise BundleError(f"{directory / CONFIG} lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise BundleError(f"{directory / CONFIG} describes no model of this version: {error}") from error
    except RuntimeError as error:  # load_state_dict: names the tensors over several lines
        reason = " ".join(str(error).split())
        raise BundleError(f"{directory / WEIGHTS} does not match {CONFIG}: {reason}") from error
    network.eval().requires_grad_(False)
    known = (name, digest, config.get("training", {}), config.get("scores", {}))
    return ClassifierBundle(network, *known) if isinstance(network, Classifier) else Bundle(network, *known)


def _network(directory: Path, config: dict[str, Any]) -> Forecaster | Classifier:
    kind = config.get("kind", FORECASTER)
    if kind == CLASSIFIER:
        return Classifier(ClassifierConfig.from_json(config["model"]))
    if kind != FORECASTER:
        raise BundleError(f"{directory} holds a model of the kind {kind!r}; this version of Carousel knows none such")
    return Forecaster(ModelConfig.from_json(config["model"]))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise BundleError(f"there is no bundle at {directory}: `carousel train TABLE --out {directory}` makes one")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or "format" not in config:
        raise BundleError(f"{path} is not the configuration of a Carousel bundle")
    if config["format"] != FORMAT:
        raise BundleError(
            f"{directory} is a bundle of format {config['format']!r}; this version of Carousel reads format {FORMAT}:"
            " train it again, or use the version that wrote it"
        )
    return config


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def card(bundle: Bundle) -> str:
    """The bundle's README: what the model is, how it came to be, how good it was."""
    config = bundle.config
    measures = ("wql", "mase", "coverage")
    lines = [
        "---",
        "library_name: carousel",
        "pipeline_tag: time-series-forecasting",
        "---",
        f"# {bundle.name}",
        "",
        f"A Carousel forecaster: {config.layers} layers of {config.hidden_size} {config.cell.upper()} cells,"
        f" {sum(p.numel() for p in bundle.forecaster.parameters()):,} weights. After every observation it forecasts"
        f" the next {config.horizon} steps as {len(config.quantiles)} quantiles"
        f" ({config.quantiles[0]} ... {config.quantiles[-1]}).",
        "",
        f"- step: {f'{config.step_ms / 1000:g} s' if config.step_ms else 'each observation'};"
        f" season: {config.season} steps; covariates: {', '.join(config.covariates) or 'none'}",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in bundle.training.items()),
        "",
        "## Backtest",
        "Rolling origins on the held-back end of the table, fed one observation at a time as when served.",
        "",
        "| method | " + " | ".join(measures) + " |",
        "| --- |" + " --- |" * len(measures),
        *(
            f"| {method} | " + " | ".join(f"{row.get(m, float('nan')):.4f}" for m in measures) + " |"
            for method, row in bundle.scores.items()
        ),
        "",
        "wql: weighted quantile loss, lower is better. mase: error of the median over that of the seasonal naive"
        f" forecast of the history. coverage: share of truths within the quantiles {config.quantiles[0]} and"
        f" {config.quantiles[-1]}.",
        "",
    ]
    return "\n".join(lines)


def classifier_card(bundle: ClassifierBundle) -> str:
    """A classifier's README: what it tells, how it came to be, how good it was."""
    config, series = bundle.config, bundle.config.series
    measures = list(dict.fromkeys(measure for row in bundle.scores.values() for measure in row))
    rows = [[method, *(f"{row[measure]:.4f}" for measure in measures)] for method, row in bundle.scores.items()]
    told = f"one of {len(config.labels)} classes ({', '.join(config.labels[:20])})" if config.labels else "a value"
    lines = [
        "---",
        "library_name: carousel",
        f"pipeline_tag: time-series-{'classification' if config.labels else 'regression'}",
        "---",
        f"# {bundle.name}",
        "",
        f"A Carousel classifier: {series.layers} layers of {series.hidden_size} {series.cell.upper()} cells. It reads a"
        f" whole series, of at most its last {config.steps} steps, and tells {told}.",
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in bundle.training.items()),
        "",
        "## Scores",
        "On series held back from training.",
        "",
        "| method | " + " | ".join(measures) + " |",
        "| --- |" + " --- |" * len(measures),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)
