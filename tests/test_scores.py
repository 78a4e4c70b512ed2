"""What is backtested is what is served: the engine, fed record by record, has the scores that the backtest tells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.scoring import Scores, score
from service.engine import Engine
from service.metrics import Metrics
from service.records import Record
from service.settings import Settings
from tests.training.synthetic import HOUR_MS, forecaster, series
from training.backtest import CAROUSEL, RAW, backtest, naive_mae
from training.series import Series

LENGTH, START = 260, 150
HORIZON = 12
FIRST_MS = 500_000 * HOUR_MS
MODEL = forecaster(horizon=HORIZON)
TABLE = [dataclasses.replace(each, ts_ms=FIRST_MS + each.ts_ms) for each in (series(LENGTH, seed) for seed in range(3))]


def served(many: Sequence[Series], *, calibrate: bool) -> Scores:
    """The scores of what the engine puts out from the step before START on, where all truths are known."""
    settings = Settings.load({"model": "unused", "intervals": "calibrated" if calibrate else "raw"})
    engine = Engine(Bundle(MODEL, "tiny", "0" * 64), settings, Metrics())
    issued, truths, scales = [], [], []
    for step in range(LENGTH - HORIZON):
        poll = []
        for each in many:
            ts_ms = int(each.ts_ms[step])
            body = json.dumps({"ts": ts_ms, "value": each.y[step]})
            poll.append(Record("in", 0, step, ts_ms, each.unique_id.encode(), body.encode()))
        told = [json.loads(outgoing.value or b"") for outgoing in engine.process(poll)]
        for each, forecast in zip(many, told, strict=True):
            if step >= START - 1:
                issued.append(np.array(list(forecast["quantiles"].values())).T)
                truths.append(each.y[step + 1 : step + 1 + HORIZON])
                scales += [naive_mae(each.y[:START], MODEL.config.season)] * HORIZON
    quantiles, truth = torch.from_numpy(np.concatenate(issued)), torch.from_numpy(np.concatenate(truths))
    return score(quantiles, truth, torch.tensor(scales).double(), MODEL.config)


@pytest.mark.parametrize(("calibrate", "method"), [(True, CAROUSEL), (False, RAW)])
def test_the_engine_has_the_scores_of_the_backtest(calibrate: bool, method: str) -> None:
    told = backtest(MODEL, TABLE, [START] * len(TABLE), every=1).scores()[method]
    found = served(TABLE, calibrate=calibrate)
    assert found.count == told.count
    for measure in ("wql", "mase", "coverage"):
        assert getattr(found, measure) == pytest.approx(getattr(told, measure), abs=1e-4), measure


def test_calibration_makes_a_difference_there() -> None:
    scores = backtest(MODEL, TABLE, [START] * len(TABLE), every=1).scores()
    assert abs(scores[CAROUSEL].coverage - 0.8) < abs(scores[RAW].coverage - 0.8) - 0.05
