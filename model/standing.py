"""What stands open in a single stream's row: on so few numbers each operation of torch takes longer than all that is
done here, and lets other threads in between.

`Follower.standing` and `Anomaly.score` are the definitions; a test holds this to them. Where waves are moved by the
compiled step, numbers come from its own kernel, so that they are bit for bit those that were issued.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.anomaly import RATES, WEIGHTS
from model.follow import Follower


class Arrays(Protocol):
    """The state of B streams, or what is needed of it: name -> array [B, *shape]."""

    def __getitem__(self, name: str, /) -> Any: ...


class Standing:
    """Reads the rows of one follower's streams. compiled: whether waves are moved by the compiled step."""

    def __init__(self, follower: Follower, *, compiled: bool = False) -> None:
        calibration, config = follower.calibration, follower.config
        self._calibrates, self._middle = calibration.on, calibration.middle
        self._weights, self._ends, self._side = (
            tensor.numpy() for tensor in (calibration.weights, calibration.ends, calibration.side)
        )
        self._warmup, self._scores = config.warmup, len(config.quantiles) > 1
        self._tails = [*zip((WEIGHTS / WEIGHTS.sum()).tolist(), RATES.tolist(), strict=True)]
        self._issue = _Issue(follower) if compiled else None

    def values(self, state: Arrays, *, raw: bool = False) -> NDArray[np.float64]:
        """The forecasts as issued, or raw, in the series' own unit: [B, H, Q]."""
        offsets = state["offsets"]
        if self._calibrates and not raw:
            stretch = state["waiting_stretch"].take(self._ends, axis=1)  # a third of the time of [:, ends]
            if self._issue:
                return self._issue(state, stretch)
            factor = torch.from_numpy(self._weights @ stretch).exp().numpy()  # numpy's own is another by the last bit
            middle = offsets[..., self._middle, None]
            offsets = middle + factor[..., self._side] * (offsets - middle)
        return np.asarray(state["base"][..., None] + state["scale"][:, None, None] * offsets, dtype=np.float64)

    def anomaly(self, state: Arrays) -> NDArray[np.float64]:
        """The scores of the last observations [B]; NaN where one is missing, or came while warming."""
        rows = zip(state["gap"].tolist(), state["steps"].tolist(), state["surprise"].tolist(), strict=True)
        return np.array(
            [
                self._score(surprise) if self._scores and not gap and steps > self._warmup else math.nan
                for gap, steps, surprise in rows
            ]
        )

    def _score(self, surprise: float) -> float:
        tail = sum([weight * math.exp(-rate * surprise) for weight, rate in self._tails])
        return abs(math.log10(min(max(tail, 1e-300), 1.0)))


class _Shape(NamedTuple):
    """What `kernels.issue` asks of a model. A row of `kernels.MODEL` has it too, but is dear to hand over."""

    horizon: int
    count: int  # type: ignore[assignment]  # the kernel's word
    middle: int


class _Issue:
    """`kernels.issue`, row by row."""

    def __init__(self, follower: Follower) -> None:
        from model import kernels  # there, as its step moved the waves; and slow to load where it did not

        config = follower.config
        self._shape = _Shape(config.horizon, len(config.quantiles), follower.calibration.middle)
        self._kernel = kernels.issue
        self._weights = np.ascontiguousarray(follower.calibration.weights.numpy().T)
        first = {name: tensor.numpy() for name, tensor in follower.schema.initial(1).items()}
        self(first, first["waiting_stretch"][:, : len(self._weights)])  # compiled now, and not by a request

    def __call__(self, state: Arrays, stretch: NDArray[np.float32]) -> NDArray[np.float64]:
        """Forecasts [B, H, Q] with their stretch [B, K, 2] of the settled horizons."""
        horizon, count, _ = self._shape
        factors, issued = np.empty((2, horizon), dtype=np.float32), np.empty((len(stretch), count, horizon))
        by_quantile = np.ascontiguousarray(state["offsets"].transpose(0, 2, 1))
        for n, row in enumerate(issued):
            of_one = (state["base"][n], state["scale"][n], by_quantile[n], stretch[n])
            self._kernel(self._shape, *of_one, self._weights, factors, row)
        return issued.transpose(0, 2, 1)
