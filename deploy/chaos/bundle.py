"""A model that was never trained: what is tested is what becomes of its forecasts, not whether they are good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.bundle import save_bundle
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster

HOUR_MS = 3_600_000


def random_bundle(directory: Path, **config: Any) -> Path:
    """A bundle of random weights, small and the same every time; hourly with a daily season unless told."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "grid": Grid(HOUR_MS),
        "season": 24,
        "horizon": 6,
        "hidden_size": 16,
        "quantiles": (0.1, 0.5, 0.9),
        "rank": 2,
    } | config
    forecaster = Forecaster(ModelConfig(**shape))
    for parameter in forecaster.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(forecaster.regression.maps, std=0.05)
    forecaster.regression.share.fill_(0.4)
    save_bundle(directory, forecaster, name="random", training={}, scores={})
    return directory
