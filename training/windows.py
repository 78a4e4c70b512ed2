"""Series -> windows, split by time; the Lightning data module.

What the network sees of a series is computed once over the whole of it, from its first step, exactly as when it is
served. A window is a slice of that: it has the scale, the level and the lags that it will have live. Only the
recurrence starts at zero in it, so its first steps go without loss, unless they are the series' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler

from model.features import Block, Features, Seen
from model.network import Forecaster
from training.series import Series

LEAD_STEPS = 2048
"""Validation starts as many steps before its part: enough for a state that drifts, as it might when served for
weeks, to have drifted; and no more, so that long tables do not spend their time here."""
COLD_STARTS = 256
"""So many streams are made to start afresh somewhere in the history."""
COLD_SHARE = 0.1
"""The share of windows that show one of them."""
VALIDATION_STREAMS = 32
"""Series validated side by side."""


@dataclass(frozen=True)
class Split:
    """How each series is cut by time: fit | validation | test.

    test, validation: steps at its end, but never more than a quarter of a series (or of what is left of it), so
    that a short one is still of use.

    >>> split = Split(test=100, validation=50)
    >>> split.fit_stop(1000), split.test_start(1000)
    (850, 900)
    >>> split.fit_stop(16), split.test_start(16)
    (9, 12)
    """

    test: int
    validation: int

    def test_start(self, length: int) -> int:
        """The first step of the test part of a series of so many steps."""
        return length - min(self.test, length // 4)

    def fit_stop(self, length: int) -> int:
        """The first step of its validation part."""
        history = self.test_start(length)
        return history - min(self.validation, history // 4)


def find_split(lengths: Sequence[int], horizon: int, test: int | None = None) -> Split:
    """A tenth of a series of median length for validation, and for the test unless its steps are given; not fewer
    than two horizons.

    >>> find_split([1000, 4000, 4000], horizon=24)
    Split(test=400, validation=400)
    """
    share = max(2 * horizon, int(np.median(lengths)) // 10 if lengths else 0)
    return Split(test=share if test is None else test, validation=share)


def cut(series: Series, start: int, stop: int) -> Series:
    """The steps start ... stop - 1 of a series, as if it had no others."""
    part = slice(start, stop)
    return dataclasses.replace(
        series,
        first_slot=series.first_slot + start,
        ts_ms=series.ts_ms[part],
        y=series.y[part],
        covariates=series.covariates[part],
    )


def block_of(series: Sequence[Series]) -> Block:
    """Series of equal length side by side. -> B streams by T steps."""
    return Block(
        torch.from_numpy(np.stack([each.y for each in series])),
        torch.from_numpy(np.stack([each.ts_ms for each in series])),
        torch.from_numpy(np.stack([each.covariates for each in series])),
    )


def fit_covariates(features: Features, fitted: Sequence[Series]) -> None:
    """Set the means and deviations of the covariates to those of the series given."""
    table = torch.from_numpy(np.concatenate([series.covariates for series in fitted]))
    count = (~table.isnan()).sum(0).clamp_min(1)
    mean = table.nansum(0) / count
    deviation = ((table - mean).square().nansum(0) / count).sqrt()
    features.covariate_mean.copy_(mean)
    # What never changed has no deviation to divide by; should it change one day, then by its own units.
    features.covariate_std.copy_(torch.where(deviation > 0, deviation, 1.0))


@dataclass(frozen=True)
class Replay:
    """What the network sees of a series (one stream by T steps), and its values [T] float64.

    fit_stop: the step before which the truths lie that are fitted to.
    """

    seen: Seen
    values: Tensor
    fit_stop: int


def replay(forecaster: Forecaster, series: Series, fit_stop: int) -> Replay:
    """Show a series to a model, from the state of a new stream."""
    block = block_of([series])
    with torch.no_grad():
        seen, _ = forecaster.features(forecaster.initial_state(1), block)
    return Replay(seen, block.values[0], fit_stop)


@dataclass(frozen=True)
class Window:
    """Steps start ... stop - 1 of a replay. Loss counts at every `every`-th step from `counted` on, for truths before
    step `limit`.
    """

    replay: Replay
    start: int
    stop: int
    counted: int
    limit: int
    every: int = 1


@dataclass(frozen=True)
class Batch:
    """B windows side by side, T steps long, shorter ones padded at their end.

    seen: of B streams by T steps. truths [B, T, H] float64: the values of the H steps after each step, NaN where
    they are missing or must not count.
    """

    seen: Seen
    truths: Tensor


def gather(windows: Sequence[Window], horizon: int) -> Batch:
    """Cut windows out of their replays."""
    steps = max(window.stop - window.start for window in windows)
    seen = [_padded(window.replay.seen.steps(window.start, window.stop), steps) for window in windows]
    return Batch(
        Seen(
            torch.cat([each.inputs for each in seen]),
            torch.cat([each.filled for each in seen]),
            torch.cat([each.level for each in seen]),
            torch.cat([each.scale for each in seen]),
        ),
        torch.stack([_truths(window, steps, horizon) for window in windows]),
    )


def _padded(seen: Seen, steps: int) -> Seen:
    missing = steps - seen.level.shape[1]
    return Seen(
        pad(seen.inputs, (0, 0, 0, missing)),
        pad(seen.filled, (0, missing)),
        pad(seen.level, (0, missing)),
        pad(seen.scale, (0, missing), value=1.0),
    )


def _truths(window: Window, steps: int, horizon: int) -> Tensor:
    after = window.replay.values[window.start + 1 : min(window.stop + horizon, window.limit)]
    truths = pad(after, (0, steps + horizon - len(after)), value=torch.nan).unfold(0, horizon, 1)[:steps].clone()
    counts = torch.zeros(steps, dtype=torch.bool)
    counts[window.counted - window.start : window.stop - window.start : window.every] = True
    truths[~counts] = torch.nan
    return truths


@dataclass(frozen=True)
class WindowOptions:
    """How a series is cut into windows, and how many of them make an epoch."""

    steps: int = 192
    """The length of a window."""
    burn_in: int = 48
    """Its first steps, without loss: there the recurrence comes from zero to where it will be when served."""
    loss_every: int = 3
    """Of the steps after them, one in so many has a loss: what its neighbours would say, it says already."""
    batch_size: int = 32
    batches: int = 30
    """An epoch is so many batches, whatever the table: the time that a training takes is known beforehand."""


class RandomWindows(Sampler[list[Window]]):
    """Batches of windows at random places, the same ones for the same seed and epoch.

    A series comes up by the root of its length: a long one has more to tell, and still leaves the short ones a word.
    """

    def __init__(self, replays: Sequence[Replay], cold: Sequence[Replay], options: WindowOptions, seed: int) -> None:
        self.replays, self.cold, self.options, self.seed = replays, cold, options, seed
        self.weights = _weights([each.fit_stop for each in replays])
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch, so that a resumed training sees what it would have seen."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.options.batches

    def __iter__(self) -> Iterator[list[Window]]:
        random = np.random.default_rng((self.seed, self.epoch))
        for _ in range(self.options.batches):
            yield [self._window(random) for _ in range(self.options.batch_size)]

    def _window(self, random: np.random.Generator) -> Window:
        steps, burn_in, every = self.options.steps, self.options.burn_in, self.options.loss_every
        if random.random() < COLD_SHARE:
            chosen = self.cold[int(random.integers(len(self.cold)))]
            start = 0
        else:
            chosen = self.replays[int(random.choice(len(self.replays), p=self.weights))]
            # Reaching as far before the first step as the burn-in does: so the first steps count as often as others.
            start = max(0, int(random.integers(-burn_in, max(chosen.fit_stop - steps, 0) + 1)))
        stop = min(start + steps, chosen.fit_stop)
        counted = (start + burn_in if start else 0) + int(random.integers(every))  # else a season's phase might never
        return Window(chosen, start, stop, counted, limit=chosen.fit_stop, every=every)


def _weights(lengths: Sequence[int]) -> NDArray[np.float64]:
    roots: NDArray[np.float64] = np.sqrt(np.asarray(lengths, dtype=np.float64))
    return roots / float(roots.sum())


class _Gathered(Dataset[Batch]):
    """Batches by the windows that make them."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon

    def __getitem__(self, windows: list[Window]) -> Batch:
        return gather(windows, self.horizon)


class WindowData(pl.LightningDataModule):
    """The fit and the validation parts of some series as batches of windows.

    The test part is cut off before anything else looks. Also sets the covariates' scaling in `forecaster`.
    """

    def __init__(
        self, forecaster: Forecaster, series: Sequence[Series], split: Split, options: WindowOptions, seed: int
    ) -> None:
        super().__init__()
        self.horizon = forecaster.config.horizon
        self.options, self.seed = options, seed
        fit_stops = [split.fit_stop(len(each.y)) for each in series]
        histories = [cut(each, 0, split.test_start(len(each.y))) for each in series]
        fitted = [cut(each, 0, stop) for each, stop in zip(histories, fit_stops, strict=True)]
        fit_covariates(forecaster.features, fitted)
        self.replays = [replay(forecaster, each, stop) for each, stop in zip(histories, fit_stops, strict=True)]
        self.cold = self._cold_starts(forecaster, fitted)

    def _cold_starts(self, forecaster: Forecaster, fitted: Sequence[Series]) -> list[Replay]:
        """Series that begin at random places, as new streams do: all they know is what little they have seen."""
        random = np.random.default_rng(self.seed)
        cold = []
        for number in random.choice(len(fitted), COLD_STARTS, p=_weights([len(each.y) for each in fitted])):
            whole = fitted[number]
            start = int(random.integers(max(len(whole.y) - self.options.steps, 0) + 1))
            part = cut(whole, start, start + self.options.steps)
            cold.append(replay(forecaster, part, len(part.y)))
        return cold

    def validation_windows(self) -> list[Window]:
        """The validation part of each series, as one window with a long lead."""
        return [
            Window(each, max(0, each.fit_stop - LEAD_STEPS), stop, counted=each.fit_stop - 1, limit=stop)
            for each in self.replays
            if (stop := len(each.values)) > each.fit_stop > 0
        ]

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(RandomWindows(self.replays, self.cold, self.options, self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        windows = sorted(self.validation_windows(), key=lambda window: window.stop - window.start)
        groups = [windows[k : k + VALIDATION_STREAMS] for k in range(0, len(windows), VALIDATION_STREAMS)]
        return self._loader(groups)

    def _loader(self, batches: Sampler[list[Window]] | list[list[Window]]) -> DataLoader[Batch]:
        # Cutting is quick, and worker processes would copy the series: they are not wanted.
        return DataLoader(_Gathered(self.horizon), batch_size=None, sampler=batches, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch
