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

from model.config import ModelConfig
from model.errors import CarouselError
from model.network import Forecaster

FORMAT = 2
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


def save_bundle(
    directory: Path,
    forecaster: Forecaster,
    *,
    name: str,
    training: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
) -> Bundle:
    """Write a bundle; each file appears whole or not at all. Raises OSError where the directory cannot be written."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"a bundle's name is up to 64 letters, digits, '.', '_' and '-', not {name!r}")
    weights = save({key: value.contiguous() for key, value in forecaster.state_dict().items()})
    bundle = Bundle(forecaster.eval(), name, hashlib.sha256(weights).hexdigest(), training, scores)
    config = {
        "format": FORMAT,
        "name": name,
        "weights_sha256": bundle.weights_sha256,
        "model": forecaster.config.to_json(),
        "training": dict(training),
        "scores": {method: dict(row) for method, row in scores.items()},
    }
    description = json.dumps(config, indent=2).encode() + b"\n"
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS, weights)
    _write(directory / CARD, card(bundle).encode())
    _write(directory / CONFIG, description)  # last: it vouches for the others
    return bundle


def load_bundle(directory: Path) -> Bundle:
    """Read a bundle. Raises BundleError, in one line, if anything about it is not as it must be."""
    config = _read_config(directory)
    try:
        weights = (directory / WEIGHTS).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {directory / WEIGHTS}: {error.strerror}") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config.get("weights_sha256"):
        raise BundleError(f"{directory / WEIGHTS} is damaged: its checksum is not the one in {CONFIG}")
    try:
        forecaster = Forecaster(ModelConfig.from_json(config["model"]))
        forecaster.load_state_dict(load(weights))
        name = str(config["name"])
    except KeyError as error:
        raise BundleError(f"{directory / CONFIG} lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise BundleError(f"{directory / CONFIG} describes no model of this version: {error}") from error
    except RuntimeError as error:  # load_state_dict: names the tensors over several lines
        reason = " ".join(str(error).split())
        raise BundleError(f"{directory / WEIGHTS} does not match {CONFIG}: {reason}") from error
    return Bundle(
        forecaster.eval().requires_grad_(False),
        name,
        digest,
        config.get("training", {}),
        config.get("scores", {}),
    )


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
