"""Many-to-one: a class, or a value, of a whole series. The features and the recurrence are those of a forecaster.

A forecaster is many-to-many: it answers at every step. This one reads a series to its end and answers once, from the
last h_t and the units (level and scale) that the series was seen in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.cells import Recurrence
from model.config import ModelConfig
from model.features import Block, Features, Seen
from model.state import Schema


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of a model that says what a whole series is. Raises ValueError if a value makes no sense."""

    series: ModelConfig
    """How a series is read. Its horizon and quantiles mean nothing here."""
    labels: tuple[str, ...] = ()
    """The classes; empty: it tells a value."""
    steps: int = 1000
    """Of a longer series the last so many steps are read."""

    def __post_init__(self) -> None:
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more, and differ, not {self.labels}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "series": self.series.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ClassifierConfig:
        """Raises KeyError if a field is missing, TypeError or ValueError if one makes no sense."""
        return cls(ModelConfig.from_json(fields["series"]), tuple(fields["labels"]), int(fields["steps"]))


class Classifier(nn.Module):
    """A whole series -> the logits of its classes, or its value."""

    units_mean: Tensor
    units_std: Tensor
    value_mean: Tensor
    value_std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        series = config.series
        self.features = Features(series)
        self.schema = Schema(self.features.schema)
        self.recurrence = Recurrence(
            series.cell, self.features.inputs, series.hidden_size, series.layers, series.dropout
        )
        self.head = nn.Linear(series.hidden_size + 2, len(config.labels) or 1)
        # Fitted to the series that it is trained on: what level and scale are usual, and which values.
        self.register_buffer("units_mean", torch.zeros(2))
        self.register_buffer("units_std", torch.ones(2))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_std", torch.ones(()))

    def forward(self, block: Block, lengths: Tensor) -> Tensor:
        """B series, padded at their ends to T steps, lengths [B] int64 -> [B, classes] logits, or [B, 1]: the value,
        standardised. What stands behind a series' end changes nothing, for nothing here looks ahead.
        """
        seen, _ = self.features(self.schema.initial(len(lengths)), block)
        series = self.config.series
        nothing = torch.zeros(len(lengths), series.layers, series.hidden_size)
        outputs, _ = self.recurrence(seen.inputs, nothing, nothing)
        last = (torch.arange(len(lengths)), lengths - 1)
        units = (units_of(seen)[last] - self.units_mean) / self.units_std
        answer: Tensor = self.head(torch.cat((outputs[last], units.clamp(-10, 10)), dim=-1))
        return answer

    @torch.no_grad()
    def answer(self, block: Block, lengths: Tensor) -> Tensor:
        """The probabilities of the classes [B, classes], or the values [B]. Both float64."""
        raw: Tensor = self(block, lengths).double()
        if self.config.labels:
            return raw.softmax(dim=-1)
        return self.value_mean.double() + self.value_std.double() * raw[:, 0]


def units_of(seen: Seen) -> Tensor:
    """Level and scale of each step, [B, T, 2] float32, so that any magnitude is a small number."""
    return torch.stack((seen.level.asinh(), seen.scale.log()), dim=-1).float()
