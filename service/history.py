"""The recent past of each stream, for people who look: what was observed, and what had been forecast for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import ModelConfig
from model.grid import Int64s
from model.scoring import middle
from model.state import Rows, TensorSpec
from service.forecasts import quantile_key
from service.grid import NO_SLOT
from service.waves import turns


class History:
    """The last `steps` observations of a stream, each beside the one-step forecast that had been open for it.

    Of the quantiles, the outermost and the middle one are kept. The n-th observation stands in place n mod `steps`, so
    that noting one moves no other.
    """

    def __init__(self, config: ModelConfig, steps: int) -> None:
        self.steps = steps
        self.kept = sorted({0, middle(config), len(config.quantiles) - 1})
        self.keys = [quantile_key(config.quantiles[k]) for k in self.kept]
        self.schema = (
            TensorSpec("history_ts_ms", (steps,), torch.int64, NO_SLOT),
            TensorSpec("history_value", (steps,), torch.float64, torch.nan),
            TensorSpec("history_forecast", (steps, len(self.kept)), torch.float64, torch.nan),
            TensorSpec("history_anomaly", (steps,), torch.float32, torch.nan),
        )

    def note(
        self,
        columns: Mapping[str, NDArray[Any]],
        row: Int64s,
        count: Int64s,
        ts_ms: Int64s,
        values: NDArray[np.float64],
        opened: NDArray[np.float64],
        anomaly: NDArray[np.float64],
    ) -> None:
        """Write observations [n] into rows of the columns of a block, each row's in order.

        count [n]: which observation of its stream each is, from 1 on. opened [n, Q]: what had been forecast for it;
        NaN where nothing had.
        """
        if not self.steps:
            return
        last: Int64s | slice = slice(None)
        if len(row) > self.steps:  # of a row that has more than that, the first ones would be written over
            last = np.flatnonzero(turns(row[::-1])[::-1] < self.steps)
        at = row[last], (count[last] - 1) % self.steps
        columns["history_ts_ms"][at], columns["history_value"][at] = ts_ms[last], values[last]
        columns["history_forecast"][at] = opened[last][:, self.kept]
        columns["history_anomaly"][at] = anomaly[last]

    def last(self, state: Rows, row: int) -> tuple[float, NDArray[np.float64]]:
        """Of the last observation of a row the value, and by quantile kept what had been forecast for it; NaN where
        there is none.
        """
        place = (int(state["count"][row]) - 1) % self.steps
        return float(state["history_value"][row, place]), state["history_forecast"][row, place].numpy()

    def places(self, count: int) -> Int64s:
        """Where the observations of a stream that had so many stand, the oldest first.

        >>> History(ModelConfig(), steps=3).places(5).tolist()
        [2, 0, 1]
        """
        return np.arange(max(0, count - self.steps), count) % max(self.steps, 1)
