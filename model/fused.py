"""`Follower.advance` for one step, in place on rows of a block, as fast as the matrix products in it allow.

`Follower` is the definition, and what this is held to by a test: the same stages in the same order, to rounding. There
each stage is some torch operations over the whole wave, most of whose time goes into carrying small numbers to and from
memory. Here a wave goes through in pieces small enough for the processor's cache, each in turns of

    perceive    the new value joins what is known; features; the operands of the products
    multiply    a layer's sums
    lstm        its gates, C and h; and so on for each layer
    multiply    head, shortcut, regression
    follow      quantiles, blend, waiting lines, calibration, scores, anomaly; the forecast as issued

with loops that numba compiles and every buffer kept: one call for a wave, which leaves Python to other threads until
its end. It needs numba, the extra `fast`; nothing else of ours does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import anomaly, calibration, features, kernels, regression, scoring
from model.cells import Recurrence
from model.features import DAY_MS
from model.follow import Follower
from model.kernels import Array
from model.scoring import MEASURES
from model.state import Schema

PIECE_ROWS = 128
"""Rows that go through at once, at most. Their states and all operands are some MB."""


@dataclass(frozen=True)
class Stepped:
    """What one step of B streams brought. The tensors are the step's own and stand until the next: clone what is kept.

    issued [B, H, Q] float64: the forecasts as issued, in the series' own units. scores [K, 5] float64: the measures
    (`model.scoring.MEASURES`) of what was settled, summed over the streams. anomaly [B] float64: how odd each value
    was; NaN where nobody can say. opened [B, Q] float64: what had been forecast for this step one step before, as
    issued. scale [B] float64, steps [B] int64: the stream's scale then, and how many steps it had made.
    """

    issued: Tensor
    scores: Tensor
    anomaly: Tensor
    opened: Tensor
    scale: Tensor
    steps: Tensor


class FusedStep:
    """`Follower.advance` for one step, in place on rows of a block of a schema that contains the follower's.

    The model's weights are copied: who changes them makes a new one. One thread at a time may step. Raises ValueError
    if the schema lacks a tensor of the follower's.
    """

    widest = PIECE_ROWS
    """The most rows that go through at once."""

    @torch.no_grad()
    def __init__(self, follower: Follower, schema: Schema) -> None:
        self.schema, self.config = schema, follower.config
        if missing := set(follower.schema) - set(schema):
            raise ValueError(f"the rows lack the tensors {sorted(spec.name for spec in missing)}")
        self._at, self._model = _offsets(follower, schema), _model(follower)
        forecaster, config = follower.forecaster, follower.config
        blends, learns = bool(self._model["blends"][0]), bool(self._model["blends"][0] and config.rank)

        # The buffers of a piece, and the matrices that they are multiplied by.
        hidden, inputs, count = config.hidden_size, forecaster.features.inputs, len(config.quantiles)
        layers = [_layer(forecaster.recurrence, config.cell, number) for number in range(config.layers)]
        gates = layers[0][0].shape[1]
        maps, lags = forecaster.regression.maps.flatten(1), forecaster.regression.lags
        regressed = PIECE_ROWS * (1 + learns) if blends else 0
        standard = torch.stack((forecaster.features.covariate_mean, forecaster.features.covariate_std))
        self._begin = (
            standard.numpy(),
            torch.stack((forecaster.first_h.flatten(), forecaster.first_c.flatten())).numpy(),
        )
        self._seen = (
            _rows(inputs + hidden),
            np.zeros((config.layers, PIECE_ROWS, 2 * hidden), np.float32),
            _rows(config.context + config.horizon),
            _rows(lags, regressed),
            np.empty(PIECE_ROWS),
            np.zeros(6, np.float32),
        )
        head = forecaster.head.linear  # by quantile, not by horizon
        by_quantile = head.weight.view(config.horizon, count, hidden).transpose(0, 1).flatten(0, 1)
        upper = [weights for weights, _ in layers[1:]] or [torch.zeros(0, gates)]
        matrices = (layers[0][0], torch.stack(upper), by_quantile.T, forecaster.shortcut.weight.T, maps[:lags])
        self._weights = tuple(kernels.panels(matrix.detach().numpy()) for matrix in matrices)
        self._biases = torch.stack([bias for _, bias in layers]).numpy()
        self._sums, self._top = _products(gates), _rows(hidden)
        self._heard = (
            _products(count * config.horizon),
            _products(config.horizon),
            _products(maps.shape[1], regressed),
        )
        self._head = (
            *(
                _kept(bias).numpy()
                for bias in (head.bias.view(config.horizon, count).T.flatten(), forecaster.shortcut.bias)
            ),
            _kept(maps[lags:]).numpy(),
            _kept(forecaster.regression.spread.T).numpy(),
        )
        self._lines = _lines(follower)
        self._scratch = _scratch(follower)
        self._found = _found(0, self)

    def advance(
        self,
        block: Tensor,
        rows: Tensor,
        values: Tensor,
        ts_ms: Tensor,
        covariates: Tensor,
        ends: Tensor | None = None,
    ) -> Stepped:
        """Move the streams in these rows on by one step.

        block [R, row_bytes] uint8; rows [B] int64; values [B] float64, NaN where missing; ts_ms [B] int64; covariates
        [B, K] float64. ends [P] int64: where each of P pieces ends, of PIECE_ROWS rows at most; None: as wide as can
        be. Within a piece all rows must be different, but a row may come again in a later one, for its next step.
        Raises ValueError, with nothing changed, if one is of another shape or dtype, or a row is not of the block.
        """
        if ends is None:
            ends = torch.arange(PIECE_ROWS, len(rows) + PIECE_ROWS, PIECE_ROWS).clamp(max=len(rows))
        self._check(block, rows, values, ts_ms, covariates, ends)
        streams = len(rows)
        if streams > len(self._found[2]):
            self._found = _found(streams, self)
        memory = block.numpy()
        wave = (rows.numpy(), values.numpy(), ts_ms.numpy(), covariates.numpy(), ends.numpy())
        if not kernels.inside(wave[0], len(memory)):
            raise ValueError(f"rows must be of the block's 0 ... {len(memory) - 1}")
        issued, sums, anomalies, opened, scales, steps = self._found
        sums[:] = 0
        kernels.step(
            *(self._at, self._model, memory, wave, self._begin, self._seen, self._weights, self._biases),
            *(self._sums, self._top, self._heard, self._head, self._lines, self._scratch, self._found),
        )
        return Stepped(
            torch.from_numpy(issued[:streams]).transpose(1, 2),
            torch.from_numpy(sums),
            torch.from_numpy(anomalies[:streams]),
            torch.from_numpy(opened[:streams]),
            torch.from_numpy(scales[:streams]),
            torch.from_numpy(steps[:streams]),
        )

    def warm(self) -> None:
        """Have all loops compiled now, rather than at the first step."""
        block, one = self.schema.block(1), torch.zeros(1, dtype=torch.int64)
        covariates = torch.zeros(1, len(self.config.covariates), dtype=torch.float64)
        self.advance(block, one, torch.zeros(1, dtype=torch.float64), one, covariates)

    def _check(
        self, block: Tensor, rows: Tensor, values: Tensor, ts_ms: Tensor, covariates: Tensor, ends: Tensor
    ) -> None:
        streams = len(rows)
        for name, tensor, dtype, shape in (
            ("block", block, torch.uint8, (len(block), self.schema.row_bytes)),
            ("rows", rows, torch.int64, (streams,)),
            ("values", values, torch.float64, (streams,)),
            ("ts_ms", ts_ms, torch.int64, (streams,)),
            ("covariates", covariates, torch.float64, (streams, len(self.config.covariates))),
            ("ends", ends, torch.int64, (len(ends),)),
        ):
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
                )
        widths = np.diff(ends.numpy(), prepend=0, append=streams)
        if (widths < 0).any() or widths.max() > PIECE_ROWS or widths[-1]:
            raise ValueError(f"ends must be of pieces of at most {PIECE_ROWS} rows, the last one at {streams}")


def _offsets(follower: Follower, schema: Schema) -> Array:
    at, offsets = np.zeros(1, kernels.OFFSETS), schema.offsets
    for spec in follower.schema:
        at[spec.name] = offsets[spec.name] // spec.dtype.itemsize
    return at


def _model(follower: Follower) -> Array:
    """The sizes of a model and the constants of its parts, as the kernels take them."""
    config, forecaster, calibrated = follower.config, follower.forecaster, follower.calibration
    share = float(forecaster.regression.share)
    sizes = {
        "past": config.past,
        "season": config.season,
        "context": config.context,
        "horizon": config.horizon,
        "count": len(config.quantiles),
        "warmup": config.warmup,
        "yearly": config.yearly,
        "cell": kernels.CELLS.index(config.cell),
        "hidden": config.hidden_size,
        "layers": config.layers,
        "inputs": forecaster.features.inputs,
        "middle": calibrated.middle,
        "low": calibrated.outer[0],
        "high": calibrated.outer[1],
        "calibrates": calibrated.on,
        "blends": share > 0,
        "rank": config.rank,
        "lags": forecaster.regression.lags,
        "every": forecaster.regression.every,
        "phases": forecaster.regression.phases,
        "step_ms": config.step_ms or 0,
        "day_ms": DAY_MS,
        "week_shift_ms": 3 * DAY_MS,
    }
    constants = {
        "memory": config.memory,
        "year_ms": features.YEAR_MS,
        "clip": features.CLIP,
        "prior": features.PRIOR,
        "floor": features.FLOOR,
        "tiny": torch.finfo(torch.float32).tiny,
        "share": share,
        "learning_memory": regression.MEMORY,
        "learning_prior": regression.PRIOR,
        "mood": calibration.MOOD,
        "mood_steps": calibration.MOOD_STEPS,
        "absurd": calibration.ABSURD,
        "smooth": calibration.SMOOTH,
        "limit": calibration.LIMIT,
        "soft": calibration.SOFT,
        "usual": calibrated.usual,
        "forget_steps": scoring.FORGET_STEPS,
        "tail": anomaly.TAIL,
        "certain": anomaly.CERTAIN,
    }
    model = np.zeros(1, kernels.MODEL)
    for name, value in (sizes | constants).items():
        model[name] = value
    return model


def _kept(weights: Tensor) -> Tensor:
    """A copy, row by row."""
    return weights.detach().clone(memory_format=torch.contiguous_format)


def _rows(numbers: int, rows: int = PIECE_ROWS) -> Array:
    """A buffer of rows of so many numbers."""
    return np.zeros((rows, numbers), np.float32)


def _products(numbers: int, rows: int = PIECE_ROWS) -> Array:
    """A buffer of rows for what is multiplied by a matrix of so many columns."""
    return _rows(kernels.padded(numbers), rows)


def _layer(recurrence: Recurrence, cell: str, number: int) -> tuple[Tensor, Tensor]:
    """Of a layer, one matrix for x and h behind it [inputs + hidden, sums], and the bias of the sums."""
    w, u, b_w, b_u = (each.detach() for each in recurrence.layer(number))
    if cell != "gru":
        return _kept(torch.cat((w, u), dim=1).T), b_w + b_u
    # The reset gate acts on what h says to the candidate, so that is a sum apart from what x says.
    hidden = u.shape[1]
    both = 2 * hidden
    from_x = torch.cat((w, torch.zeros_like(w[both:])))
    from_h = torch.cat((u[:both], torch.zeros_like(u[both:]), u[both:]))
    return _kept(torch.cat((from_x, from_h), dim=1).T), torch.cat((b_w[:both] + b_u[:both], b_w[both:], b_u[both:]))


def _lines(follower: Follower) -> tuple[Array, ...]:
    """The waiting lines and what is learned from them, as `kernels.follow` takes them."""
    calibrated = follower.calibration
    horizons = np.array(follower.horizons, dtype=np.int64)
    ends = horizons.cumsum()
    tails = anomaly.WEIGHTS / anomaly.WEIGHTS.sum()
    return (
        np.stack((ends - horizons, ends - 1)),
        horizons,
        calibrated.gain.float().numpy(),
        calibrated.share.numpy(),
        np.ascontiguousarray(calibrated.weights.numpy().T),
        np.array(follower.config.quantiles),
        tails.numpy(),
    )


def _scratch(follower: Follower) -> tuple[Array, ...]:
    """What `kernels.follow` works in: a row's numbers, by the names that they have there."""
    config, lines = follower.config, len(follower.horizons)
    count, horizon, rank, single = len(config.quantiles), config.horizon, config.rank, np.float32
    scratch: dict[str, Array] = {
        "quantiles": np.empty((count, horizon), single),
        "softened": np.empty(count * horizon, single),
        "missed": np.empty(horizon, single),
        "factor": np.empty((rank, rank)),
        "own": np.empty(rank),
        "left_base": np.empty((lines, 1)),
        "left": np.empty((lines, count), single),
        "used": np.empty((lines, 2), single),
        "stretch": np.zeros((lines, 2), single),
        "counts": np.empty(lines, np.bool_),
        "off": np.empty(lines),
        "spare": np.ones(-(-2 * lines // 8) * 8, single),  # as many as the processor takes at once
        "factors": np.empty((2, horizon), single),
        "curve": np.empty(count),
    }
    return tuple(scratch.values())


def _found(streams: int, step: FusedStep) -> tuple[Array, ...]:
    config, lines = step.config, len(step._lines[1])
    count = len(config.quantiles)
    return (
        np.empty((streams, count, config.horizon)),
        np.zeros((lines, len(MEASURES))),
        np.empty(streams),
        np.empty((streams, count)),
        np.empty(streams),
        np.empty(streams, dtype=np.int64),
    )
