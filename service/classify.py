"""What a classifier answers: the class, or the value, of a history. It follows no stream and needs no Kafka."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model.bundle import ClassifierBundle
from model.features import Block
from service import grid
from service.predict import check_holes, read_history, steps_of
from service.records import Limits
from service.schemas import ClassifyRequest
from service.settings import Settings


class Judge:
    """Answers predict requests with a classifier. May be used from any thread."""

    unready = ""
    alive = True
    live: frozenset[int] = frozenset()

    def __init__(self, bundle: ClassifierBundle, settings: Settings) -> None:
        self.bundle, self.config, self.max_steps = bundle, bundle.config, settings.max_history_steps
        series = self.config.series
        self.limits = Limits(
            series.covariates, settings.max_record_bytes, settings.max_abs_value, settings.earliest_ts_ms
        )

    def answer(self, request: ClassifyRequest) -> dict[str, Any]:
        """What the history is, and how many of its observations counted. Raises Refused."""
        given = read_history(request.history, self.limits, self.max_steps)
        series = self.config.series
        placed = grid.place_in_turn(series, given.ts_ms, grid.NO_SLOT, grid.NO_SLOT)
        check_holes(placed)
        chosen = np.flatnonzero(placed.fresh)
        restarts = chosen[placed.afresh[chosen]]
        if len(restarts):  # as in training: after a gap too long, what lies before it is forgotten
            chosen = chosen[chosen >= restarts[-1]]
        slot = placed.slot[chosen]
        block = _last(steps_of(given, series, chosen, slot, int(slot[0]), self.max_steps), self.config.steps)
        told = self.bundle.classifier.answer(block, torch.tensor([block.steps]))[0]
        known = {"model": self.bundle.model_id, "ts": int(given.ts_ms[chosen[-1]]), "count": len(chosen)}
        if not self.config.labels:
            return {**known, "value": float(told)}
        label = self.config.labels[int(told.argmax())]
        return {**known, "label": label, "probabilities": dict(zip(self.config.labels, told.tolist(), strict=True))}

    def model(self) -> dict[str, Any]:
        """The model that is served."""
        series = self.config.series
        return {
            "id": self.bundle.model_id,
            "labels": list(self.config.labels),
            "steps": self.config.steps,
            "step_ms": series.step_ms,
            "season": series.season,
            "covariates": list(series.covariates),
            "max_gap": series.max_gap,
            "training": dict(self.bundle.training),
            "scores": {method: dict(row) for method, row in self.bundle.scores.items()},
        }


def _last(block: Block, steps: int) -> Block:
    return Block(block.values[:, -steps:], block.ts_ms[:, -steps:], block.covariates[:, -steps:])
