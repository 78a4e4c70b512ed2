"""The recent past of each stream, for people who look: what was observed, and what had been forecast for it."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.follow import Followed
from model.scoring import middle
from model.state import Rows, TensorSpec
from service.grid import NO_SLOT


class History:
    """The last `steps` observations of a stream, each beside the one-step forecast that had been open for it.

    Of the quantiles, the outermost and the middle one are kept.
    """

    def __init__(self, config: ModelConfig, steps: int) -> None:
        self.steps = steps
        self.kept = sorted({0, middle(config), len(config.quantiles) - 1})
        self.quantiles = [config.quantiles[k] for k in self.kept]
        self.schema = (
            TensorSpec("history_ts_ms", (steps,), torch.int64, NO_SLOT),
            TensorSpec("history_value", (steps,), torch.float64, torch.nan),
            TensorSpec("history_forecast", (steps, len(self.kept)), torch.float64, torch.nan),
            TensorSpec("history_anomaly", (steps,), torch.float32, torch.nan),
        )

    def append(self, state: Rows, values: Tensor, ts_ms: Tensor, seen: Tensor, followed: Followed) -> Rows:
        """The rows of this part after T steps of B streams: values, ts_ms [B, T], and what was found of them. seen
        [B, T]: which steps have an observation. `state` is that before the first step.
        """
        forecast = followed.opened[..., self.kept]
        before = state["steps"][:, None] + torch.arange(values.shape[1])
        forecast[before == 0] = torch.nan  # a stream's first observation was forecast by nobody
        new = {
            "history_ts_ms": ts_ms,
            "history_value": values,
            "history_forecast": forecast,
            "history_anomaly": followed.anomaly.float(),
        }
        both = {name: torch.cat((state[name], some), dim=1) for name, some in new.items()}
        if seen.all():
            return {name: some[:, values.shape[1] :] for name, some in both.items()}
        # The last ones of old and new together, passing over steps without an observation.
        is_there = torch.cat((torch.ones_like(state["history_ts_ms"], dtype=torch.bool), seen), dim=1)
        last = is_there.int().argsort(dim=1, stable=True)[:, is_there.shape[1] - self.steps :]
        rows = torch.arange(len(values))[:, None]
        return {name: some[rows, last] for name, some in both.items()}
