"""The recent past of each stream, for people who look: what was observed, and what had been forecast for it."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.scoring import middle, next_quantiles
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
        )

    def append(self, state: Rows, values: Tensor, ts_ms: Tensor) -> Rows:
        """The rows of this part after B observations: values, ts_ms [B]. `state` is the one before them."""
        open_forecast = next_quantiles(state)[:, self.kept]
        open_forecast[state["steps"] == 0] = torch.nan  # a stream's first observation was forecast by nobody
        return {
            "history_ts_ms": _push(state["history_ts_ms"], ts_ms),
            "history_value": _push(state["history_value"], values),
            "history_forecast": _push(state["history_forecast"], open_forecast),
        }


def _push(register: Tensor, newest: Tensor) -> Tensor:
    return torch.cat((register, newest[:, None]), dim=1)[:, 1:]
