"""`Follower.advance`: the forecaster, and all that learns from its forecasts as their truths come.

Serving, replays, what-ifs and the backtest go through this one function: what is backtested is what is served.

    settle: forecasts whose truths came leave their lines -> live scores, anomaly, calibration
    advance: the network forecasts -> the raw forecast joins the lines, with the stretch it is issued with
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.anomaly import Anomaly
from model.calibration import Calibration
from model.features import Block
from model.network import Forecast, Forecaster
from model.scoring import LiveScores
from model.state import Rows, Schema
from model.waiting import Waiting

PIECE_NUMBERS = 4_000_000
"""Numbers forecast at once where only the state after many steps is wanted: bounds its memory."""


@dataclass(frozen=True)
class Followed:
    """What T steps of B streams brought.

    raw: the forecasts as the network gave them. stretch [B, T, K, 2]: that with which they were issued. opened
    [B, T, Q] float64: what had been forecast for each step, one step before it, as issued. scores [B, T, K, 5]: the
    measures (`model.scoring.MEASURES`) of what was settled. anomaly [B, T]: how odd each value was; NaN where nobody
    can say. rows: the state after them.
    """

    raw: Forecast
    stretch: Tensor
    opened: Tensor
    scores: Tensor
    anomaly: Tensor
    rows: Rows


class Follower:
    """Follows streams with a forecaster. If not `calibrate`, forecasts are issued as the network gives them."""

    def __init__(self, forecaster: Forecaster, *, calibrate: bool = True) -> None:
        self.forecaster, self.config = forecaster, forecaster.config
        self.waiting = Waiting(self.config)
        self.calibration = Calibration(self.config, on=calibrate)
        self.scores = LiveScores(self.config, len(self.horizons))
        self.anomaly = Anomaly(self.config)
        parts = (forecaster, self.waiting, self.calibration, self.scores, self.anomaly)
        self.schema = Schema(spec for part in parts for spec in part.schema)

    @property
    def horizons(self) -> tuple[int, ...]:
        """The K horizons whose forecasts are settled."""
        return self.waiting.horizons

    @torch.no_grad()
    def advance(self, state: Rows, block: Block) -> Followed:
        """Move B streams on by T steps. T steps at once and T times one step agree to rounding; `state`, which may have
        other tensors too, is left as it is. Raises ValueError if the block does not fit it.
        """
        raw, after = self.forecaster.advance(state, block)
        base, offsets, waiting = self.waiting.pass_on(state, raw)
        counts = self._counts(state, block) & offsets.sum(-1).isfinite()
        missed = block.values[..., None] - base
        tracked = self.calibration.track(state, missed, offsets, counts)
        opened = base[..., None] + self.calibration.settled(offsets, tracked.used)
        settled = self.scores.settle(state, block.values, opened, base, counts)
        anomaly, noticed = self.anomaly.notice(state, block.values, opened[:, :, 0], counts[..., 0])
        rows = after | waiting | tracked.rows | settled.rows | noticed
        return Followed(raw, tracked.issued, opened[:, :, 0], settled.scores, anomaly, rows)

    def through(self, state: Rows, block: Block) -> Rows:
        """The state after T steps, however many, of which nothing else is wanted."""
        size = max(1, PIECE_NUMBERS // (len(block.values) * self.config.horizon * len(self.config.quantiles)))
        for start in range(0, block.steps, size):
            part = slice(start, start + size)
            piece = Block(block.values[:, part], block.ts_ms[:, part], block.covariates[:, part])
            state = self.advance(state, piece).rows
        return state

    def calibrated(self, followed: Followed) -> Forecast:
        """The forecasts as they are issued."""
        return self.calibration.calibrated(followed.raw, followed.stretch)

    def standing(self, state: Rows, *, raw: bool = False) -> Forecast:
        """The forecasts that stand open in B states, as issued or raw; without a dimension of steps."""
        forecast = Forecast(state["base"], state["scale"], state["offsets"])
        return forecast if raw else self.calibration.calibrated(forecast, self.calibration.standing(state))

    def _counts(self, state: Rows, block: Block) -> Tensor:
        """Which of the forecasts that leave their lines can be judged, [B, T, K] bool: those whose truth was observed,
        and which were issued by a stream that was warm.
        """
        horizons = torch.tensor(self.horizons)
        issued = (state["steps"][:, None] + torch.arange(block.steps))[..., None] - horizons + 1
        return (issued >= self.config.warmup) & ~block.values.isnan()[..., None]
