"""Series made for the tests of training: small, seeded, and with something to learn in them."""

from __future__ import annotations

import numpy as np

from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from training.series import Series
from training.table import Observed

HOUR_MS = 3_600_000
SEASON = 8


def config(**fields: object) -> ModelConfig:
    """A tiny model: context 32, horizon 4, three quantiles."""
    known: dict[str, object] = {
        "grid": Grid(HOUR_MS),
        "season": SEASON,
        "horizon": 4,
        "quantiles": (0.1, 0.5, 0.9),
        "hidden_size": 8,
        "layers": 2,
    }
    return ModelConfig(**{**known, **fields})  # type: ignore[arg-type]


def forecaster(**fields: object) -> Forecaster:
    """A tiny model with random weights, the shortcut's too."""
    import torch

    torch.manual_seed(0)
    model = Forecaster(config(**fields))
    torch.nn.init.normal_(model.shortcut.weight, std=0.1)
    return model.eval()


def values(length: int, seed: int = 0) -> np.ndarray:
    """A season, and about it a slow wandering that the seasonal naive forecast cannot follow."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=length + 1)
    wander = np.zeros(length + 1)
    for step in range(1, length + 1):
        wander[step] = 0.9 * wander[step - 1] + noise[step]
    return 50 + 10 * seed + 5 * np.sin(2 * np.pi * np.arange(length) / SEASON) + wander[1:]


def series(length: int, seed: int = 0, name: str | None = None, covariates: int = 0) -> Series:
    random = np.random.default_rng(seed + 1000)
    return Series(
        name or f"s{seed}",
        0,
        HOUR_MS * np.arange(length),
        values(length, seed),
        random.normal(size=(length, covariates)),
    )


def observed(length: int, seed: int = 0) -> Observed:
    made = series(length, seed)
    return Observed(made.unique_id, made.ts_ms, made.y, made.covariates)
