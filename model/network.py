"""`Forecaster.advance`: the one function that is trained, served and tested.

A forecast is the seasonal naive one, corrected: the recurrence's h_t and a linear look at the recent values give
H x Q quantiles of what the naive forecast will miss, in the stream's own scale. There is a forecast at every step
(forking sequences, as in the MQ-RNN of Wen et al. 2017), so no step ever waits for a decoder. That is the network's
forecast, and what is trained; what is served is its mean, quantile by quantile, with a linear regression's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.cells import GATES, CellState, Recurrence
from model.config import ModelConfig
from model.features import Block, Features, Seen, scaled
from model.quantiles import OrderedQuantiles
from model.regression import Regression
from model.state import Rows, Schema, TensorSpec


@dataclass(frozen=True)
class Forecast:
    """Quantile forecasts of B streams, issued at each of T steps for the H steps after it.

    base [B, T, H] float64: the seasonal naive forecast. scale [B, T] float64. offsets [B, T, H, Q] float32, increasing
    over Q: what is added to the base, in units of the scale.
    """

    base: Tensor
    scale: Tensor
    offsets: Tensor

    @property
    def values(self) -> Tensor:
        """The quantiles in the series' own units, [B, T, H, Q] float64."""
        return self.base[..., None] + self.scale[..., None, None] * self.offsets


class Forecaster(nn.Module):
    """The whole of a model: scaling, lags, calendar, mask, recurrence and head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.features = Features(config)
        self.recurrence = Recurrence(
            config.cell, self.features.inputs, config.hidden_size, config.layers, config.dropout
        )
        # Where the recurrence begins with a stream never heard before; learned as all else is.
        self.first_h = nn.Parameter(torch.zeros(config.layers, config.hidden_size))
        self.first_c = nn.Parameter(torch.zeros(config.layers, config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.head = OrderedQuantiles(config.hidden_size, config.horizon, config.quantiles)
        self.shortcut = nn.Linear(config.context + config.horizon, config.horizon)
        nn.init.zeros_(self.shortcut.weight)  # an untrained model is the seasonal naive one
        nn.init.zeros_(self.shortcut.bias)
        self.regression = Regression(config)
        layers, hidden = config.layers, config.hidden_size
        self.schema = Schema(
            (
                *self.features.schema,
                *self.regression.schema,
                TensorSpec("h", (layers, hidden), torch.float32),
                TensorSpec("c", (layers, hidden), torch.float32),
                # For those who look inside; half precision is more than an eye can tell.
                TensorSpec("gates", (layers, len(GATES[config.cell]), hidden), torch.float16),
                # The forecast that waits for its truth.
                TensorSpec("scale", (), torch.float64, 1.0),
                TensorSpec("base", (config.horizon,), torch.float64),
                TensorSpec("offsets", (config.horizon, len(config.quantiles)), torch.float32),
            )
        )

    def initial_state(self, streams: int) -> Rows:
        """The state of `streams` streams of which nothing was seen."""
        return self.schema.initial(streams)

    @torch.no_grad()
    def advance(self, state: Rows, block: Block, last: int | None = None) -> tuple[Forecast, Rows]:
        """Move B streams on by T steps. -> the forecasts at the last `last` steps (None: at all T), the new state.

        T steps at once and T times one step agree to rounding. `state` is left as it is. Raises ValueError if the
        block's shapes do not fit the state or the model, or there are no `last` steps.
        """
        self._check(state, block)
        if last is not None and not 1 <= last <= block.steps:
            raise ValueError(f"last must be in 1 ... {block.steps}, not {last}")
        seen, after = self.features(state, block)
        outputs, recurrent = self.recur(seen, state)
        first = block.steps - last if last else 0
        forecast = self.forecast(seen.steps(first, block.steps), outputs[:, first:])
        forecast, learnt = self.blend(forecast, state, seen, block)
        return forecast, {
            **after,
            **learnt,
            "h": recurrent.h,
            "c": recurrent.c,
            "gates": recurrent.gates.half(),
            "scale": forecast.scale[:, -1],
            "base": forecast.base[:, -1],
            "offsets": forecast.offsets[:, -1],
        }

    def recur(self, seen: Seen, state: Rows) -> tuple[Tensor, CellState]:
        """The recurrence over T steps from h and C of `state`, or from those learned where it is that of a new stream.
        -> outputs [B, T, hidden], the last state.
        """
        new = (state["steps"] == 0)[:, None, None]
        h, c = torch.where(new, self.first_h, state["h"]), torch.where(new, self.first_c, state["c"])
        return self.recurrence(seen.inputs, h, c)  # type: ignore[no-any-return]

    def forecast(self, seen: Seen, outputs: Tensor) -> Forecast:
        """The network's own forecasts at T steps from what was seen and the recurrence's outputs [B, T, hidden]."""
        base = self.features.base(seen)
        curve = scaled(base, seen.level[..., None], seen.scale[..., None])
        location = self.shortcut(torch.cat((self.features.recent(seen), curve), dim=-1))
        return Forecast(base, seen.scale, self.head(self.dropout(outputs), location))

    def blend(self, forecast: Forecast, state: Rows, seen: Seen, block: Block) -> tuple[Forecast, Rows]:
        """The network's forecasts at the last steps of a block blended with the regression's, and the rows of that.

        Both are quantiles in increasing order, so their mean is. A stream that has not filled its context yet is the
        network's alone: the regression was fitted to whole ones.
        """
        regression = self.regression
        if not regression.share > 0:  # not fitted, or of no use
            return forecast, {spec.name: state[spec.name].clone() for spec in regression.schema}
        first = block.steps - forecast.scale.shape[1]
        ahead, learnt = regression(state, seen, block, first)
        location = ((ahead - forecast.base) / forecast.scale[..., None]).float()
        steps = state["steps"][:, None] + torch.arange(first + 1, block.steps + 1)
        share = (regression.share * (steps >= self.config.context))[..., None, None]
        offsets = (1 - share) * forecast.offsets + share * (location[..., None] + regression.spread)
        return Forecast(forecast.base, forecast.scale, offsets), learnt

    def _check(self, state: Rows, block: Block) -> None:
        streams, known = state["h"].shape[0], len(self.config.covariates)
        if block.values.ndim != 2 or len(block.values) != streams or block.steps < 1:
            raise ValueError(f"values must be [{streams}, T >= 1], not {list(block.values.shape)}")
        if block.ts_ms.shape != block.values.shape:
            raise ValueError(f"ts_ms must be {list(block.values.shape)}, not {list(block.ts_ms.shape)}")
        if block.covariates.shape != (*block.values.shape, known):
            raise ValueError(f"covariates must be [..., {known}], not {list(block.covariates.shape)}")
