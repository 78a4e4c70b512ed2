"""The anomaly score is a probability, and says so truly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.anomaly import CERTAIN, TAIL, Anomaly, surprise
from model.config import ModelConfig
from model.state import Rows

LEVELS = tuple(round(n / 10, 1) for n in range(1, 10))
CONFIG = ModelConfig(quantiles=LEVELS)
OPENED = torch.tensor(LEVELS, dtype=torch.float64)
"""Quantiles of a variable whose distribution function is, between 0.1 and 0.9, the identity."""


def drawn(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Values that follow these quantiles and tails exactly."""
    p = random.random(count)
    beyond = TAIL * ((np.minimum(p, 1 - p) / 0.1) ** (-1 / TAIL) - 1) / 10
    return np.where(p < 0.1, 0.1 - beyond, np.where(p > 0.9, 0.9 + beyond, p))


def noticed(values: torch.Tensor, counts: torch.Tensor | None = None, start: float = 2.0) -> torch.Tensor:
    """The scores after each of the values of one stream."""
    anomaly, streams = Anomaly(CONFIG), len(values)
    state: Rows = {
        "surprise": torch.full((1,), start).double(),
        "steps": torch.tensor([CONFIG.warmup + 1]),
        "gap": torch.tensor([0]),
    }
    scores = []
    for n in range(streams):
        known = torch.ones(1, 1, dtype=torch.bool) if counts is None else counts[None, n, None]
        score, rows = anomaly.notice(state, values[None, n, None], OPENED.expand(1, 1, -1), known)
        state |= rows
        scores.append(score[0])
        assert not known or torch.equal(anomaly.score(state), score[0]), "and the rows alone tell it too"
    return torch.cat(scores)


@pytest.mark.parametrize(("value", "p"), [(0.5, 1.0), (0.45, 0.9), (0.7, 0.6), (0.1, 0.2), (0.9, 0.2), (0.2, 0.4)])
def test_between_quantiles_the_tail_probability_is_linear_and_two_sided(value: float, p: float) -> None:
    assert math.exp(-surprise(torch.tensor(value).double(), OPENED, OPENED)) == pytest.approx(p)


def test_the_further_from_the_median_the_more_surprising() -> None:
    values = torch.cat((torch.linspace(0.5, -3, 100), torch.linspace(0.5, 4, 100))).double()
    found = surprise(values, OPENED, OPENED).view(2, 100)
    assert (found.diff(dim=1) > 0).all()
    torch.testing.assert_close(found[0], found[1])


def test_surprise_is_finite_whatever_comes() -> None:
    flat = torch.full((9,), 7.0).double()
    assert surprise(torch.tensor(7.0).double(), flat, OPENED) < 2, "a constant that goes on is no surprise"
    assert surprise(torch.tensor(7.1).double(), flat, OPENED) == CERTAIN
    assert surprise(torch.tensor(-1e300).double(), OPENED, OPENED) == CERTAIN


def test_of_a_right_forecast_one_score_in_ten_exceeds_1_and_one_in_a_hundred_2() -> None:
    scores = noticed(torch.from_numpy(drawn(np.random.default_rng(0), 20_000)))
    for level in (0.3, 1.0, 2.0):
        share = float((scores > level).double().mean())
        assert share == pytest.approx(10**-level, rel=0.15), level


def test_many_values_at_once_score_as_one_by_one() -> None:
    random = np.random.default_rng(1)
    values = torch.from_numpy(drawn(random, 300))
    counts = torch.from_numpy(random.random(300) < 0.8)
    anomaly, rows = Anomaly(CONFIG), {"surprise": torch.tensor([2.0]).double()}
    scores, _ = anomaly.notice(rows, values[None], OPENED.expand(1, 300, -1), counts[None])
    torch.testing.assert_close(scores[0], noticed(values, counts), equal_nan=True)
    assert torch.equal(scores[0].isnan(), ~counts)


def test_several_odd_values_in_a_row_are_odder_than_one_and_soon_forgotten() -> None:
    middling, odd = [0.5] * 20, 1.5
    alone, thrice = (noticed(torch.tensor([*middling, *([odd] * n), *middling]).double()) for n in (1, 3))
    assert alone[20] > 1
    assert thrice[22] > alone[20] + 0.5
    assert thrice[23 + 8] < 0.1


@pytest.mark.parametrize(("steps", "gap"), [(CONFIG.warmup, 0), (CONFIG.warmup + 5, 1)])
def test_no_score_while_warming_or_where_nothing_was_observed(steps: int, gap: int) -> None:
    state = {"surprise": torch.tensor([9.0]), "steps": torch.tensor([steps]), "gap": torch.tensor([gap])}
    assert Anomaly(CONFIG).score(state).isnan().all()


def test_a_model_of_one_quantile_knows_no_surprise() -> None:
    anomaly = Anomaly(ModelConfig(quantiles=(0.5,)))
    rows = {"surprise": torch.tensor([2.0]).double(), "steps": torch.tensor([99]), "gap": torch.tensor([0])}
    value = torch.tensor([[9.0]]).double()
    score, after = anomaly.notice(rows, value, torch.zeros(1, 1, 1).double(), torch.ones(1, 1, dtype=torch.bool))
    assert score.isnan().all()
    assert anomaly.score(rows | after).isnan().all()
