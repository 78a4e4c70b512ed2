"""What a model is, in numbers: checked once, saved in its bundle, never changed after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, get_args

from model.grid import Grid

Cell = Literal["lstm", "gru", "rnn"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and of the time it lives in.

    Raises ValueError, naming the field, if a value makes no sense.

    >>> ModelConfig(grid=Grid(step_ms=3_600_000), season=24).context
    168
    >>> ModelConfig(horizon=0)
    Traceback (most recent call last):
    ...
    ValueError: horizon must be in 1 ... 1024, not 0
    """

    grid: Grid | None = None
    """None: no clock; each observation is one step."""
    season: int = 1
    """Steps after which the series resembles itself; 1: it has no season."""
    horizon: int = 24
    """H: how many steps ahead are forecast."""
    quantiles: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    covariates: tuple[str, ...] = ()
    """Names of further numbers that come with each observation."""
    cell: Cell = "lstm"
    hidden_size: int = 64
    layers: int = 2
    dropout: float = 0.0
    """Between layers and before the head, while training only."""
    yearly: bool = True
    """Whether it looks at the time of year. Who has seen no two years would only learn dates by heart."""
    rank: int = 0
    """r: how many coefficients of the regression each stream finds for itself."""
    max_gap: int = 0
    """Missing steps that are bridged; a longer gap starts the stream afresh. 0: found from the season."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("season", 1, 4096),
            ("horizon", 1, 1024),
            ("hidden_size", 1, 4096),
            ("layers", 1, 16),
            ("rank", 0, 32),
            ("max_gap", 0, 1_000_000),
        ):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and low <= int(value) <= high):
                raise ValueError(f"{name} must be in {low} ... {high}, not {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.cell not in get_args(Cell):
            raise ValueError(f"cell must be one of {', '.join(get_args(Cell))}, not {self.cell!r}")
        if not self.quantiles or not all(a < b for a, b in pairwise(self.quantiles)):
            raise ValueError(f"quantiles must increase, not {self.quantiles}")
        if not 0 < self.quantiles[0] <= self.quantiles[-1] < 1:
            raise ValueError(f"quantiles must lie between 0 and 1, not {self.quantiles}")
        if len(set(self.covariates)) != len(self.covariates):
            raise ValueError(f"covariates must differ, not {self.covariates}")
        if self.max_gap == 0:
            object.__setattr__(self, "max_gap", max(64, 7 * self.season))

    @property
    def context(self) -> int:
        """How many recent values a stream remembers as they were: a week of hours, seven seasons or 32 steps."""
        return max(self.season, min(7 * self.season, 168), 32)

    @property
    def past(self) -> int:
        """How many recent values a stream keeps: its context and, where the regression learns, that of H steps ago."""
        return self.context + (self.horizon if self.rank else 0)

    @property
    def memory(self) -> int:
        """Steps over which level and scale forget: twice the context."""
        return 2 * self.context

    @property
    def warmup(self) -> int:
        """Steps after which a forecast counts as live: two seasons, and not fewer than 16."""
        return max(2 * self.season, 16)

    @property
    def step_ms(self) -> int | None:
        return self.grid.step_ms if self.grid else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`, also after a way through JSON. Raises TypeError on unknown fields, KeyError
        on missing ones: a line that was lost must not come back as its default.
        """
        known = _complete(cls, fields)
        if known["grid"] is not None:
            grid = _complete(Grid, known["grid"])
            known["grid"] = Grid(**{**grid, "phases": tuple(grid["phases"])})
        for name in ("quantiles", "covariates"):
            known[name] = tuple(known[name])
        return cls(**known)


def _complete(kind: type[ModelConfig] | type[Grid], fields: dict[str, Any]) -> dict[str, Any]:
    """A copy of the fields of a dataclass. Raises KeyError, naming it, if one is missing."""
    known = dict(fields)
    for field in dataclasses.fields(kind):
        if field.name not in known:
            raise KeyError(field.name)
    return known
