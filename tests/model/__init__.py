"""The mathematics, tested. Here: the models and blocks that several of these tests build."""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from model.config import ModelConfig
from model.features import Block
from model.network import Forecaster

HOUR_MS = 3_600_000


def seeded(max_examples: int) -> settings:
    """How a property is tried: on the same examples each time, however slow the machine."""
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@functools.cache
def random_forecaster(config: ModelConfig, seed: int = 0, gain: float = 1.0) -> Forecaster:
    """A model with random weights everywhere, also where an untrained one has zeros; all of them times `gain`. With a
    rank, its regression takes part.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        forecaster = Forecaster(config)
        nn.init.normal_(forecaster.shortcut.weight, std=0.1)
        nn.init.normal_(forecaster.shortcut.bias, std=0.1)
        nn.init.normal_(forecaster.first_h, std=0.5)
        nn.init.normal_(forecaster.first_c, std=0.5)
        for weights in forecaster.parameters():
            weights.mul_(gain)
        forecaster.features.covariate_mean.normal_()
        forecaster.features.covariate_std.uniform_(0.5, 2.0)
        if config.rank:
            forecaster.regression.maps.normal_(std=0.1)
            forecaster.regression.spread.copy_(torch.tensor(config.quantiles) - 0.5)
            forecaster.regression.share.fill_(0.4)
    return forecaster.eval()


def block_of(values: Tensor, ts_ms: Tensor | None = None, covariates: Tensor | None = None) -> Block:
    """A block of values [B, T]; where not given, hours from the epoch on and no covariates."""
    if ts_ms is None:
        ts_ms = (torch.arange(values.shape[1]) * HOUR_MS).expand(values.shape)
    if covariates is None:
        covariates = torch.empty(*values.shape, 0, dtype=torch.float64)
    return Block(values, ts_ms, covariates)


def part_of(block: Block, start: int, stop: int) -> Block:
    """The steps start ... stop - 1 of a block."""
    return Block(block.values[:, start:stop], block.ts_ms[:, start:stop], block.covariates[:, start:stop])


def streams_of(block: Block, streams: Tensor) -> Block:
    """Some streams of a block, in the order named."""
    return Block(block.values[streams], block.ts_ms[streams], block.covariates[streams])
