"""What will go wrong, and when: drawn from the seed before anything starts, so that a seed tells its story again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

from model.errors import CarouselError

Guarantee = Literal["exactly_once", "at_least_once"]

SLOTS = ("w0", "w1")
"""The workers that are there from the start."""
FIRST, LAST = 0.05, 0.85
"""Faults fall into this part of the run: something is there to be lost, and something left to go on with."""
TWICE = 0.25
"""Share of kills that hit the worker once more while it comes back."""
ADDED = 0.2
"""How much of the run an added worker stays."""


class ChaosError(CarouselError):
    """The run cannot go on; the message says which part failed and where to look."""


class Kind(StrEnum):
    """What can be done to a worker or to the broker."""

    KILL = "kill -9"
    TERM = "SIGTERM"
    STOP = "SIGSTOP"
    ADD = "one more"
    TWIN = "twin"
    EVICT = "evicted"
    BROKER = "broker kill -9"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    at: how many records of the input must be done with first: by progress, so that a slow machine sees the same.
    slot: which worker; "" for the broker. seconds: how long the broker is away or the worker stopped; for a kill, when
    it is killed once more, in the midst of coming back; 0: not. until: the progress at which an added one is removed.
    """

    at: int
    kind: Kind
    slot: str = ""
    seconds: float = 0.0
    until: int = 0

    def __str__(self) -> str:
        told = {
            Kind.KILL: f"kill -9 of {self.slot}"
            + (f", and {self.seconds:.1f} s after it is back" * bool(self.seconds)),
            Kind.TERM: f"SIGTERM to {self.slot}",
            Kind.STOP: f"SIGSTOP of {self.slot} for {self.seconds:.1f} s, past its session",
            Kind.ADD: f"{self.slot} is added, until record {self.until:,}",
            Kind.TWIN: f"a second process takes the slot {self.slot}",
            Kind.EVICT: f"{self.slot} is thrown out of the group",
            Kind.BROKER: f"kill -9 of the broker, away for {self.seconds:.1f} s and its start",
        }
        return told[self.kind]


@dataclass(frozen=True)
class ChaosConfig:
    """A run: the load, how often each fault comes, and what is promised. Raises ChaosError if a value makes no sense.

    rate: observations a second, while the workers keep up. aborts: transactions of the load that are aborted, and whose
    observations nobody may forecast.
    """

    seed: int = 0
    observations: int = 20_000
    streams: int = 500
    partitions: int = 4
    rate: float = 300.0
    kills: int = 20
    terms: int = 2
    stops: int = 2
    adds: int = 1
    twins: int = 1
    evictions: int = 2
    broker_kills: int = 3
    aborts: int = 12
    guarantee: Guarantee = "exactly_once"
    transport: str = "kafka-python"
    session_timeout_ms: int = 6_000
    limit_s: float = 1_800.0

    def __post_init__(self) -> None:
        for name in ("observations", "streams", "partitions", "rate", "limit_s"):
            if getattr(self, name) <= 0:
                raise ChaosError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("kills", "terms", "stops", "adds", "twins", "evictions", "broker_kills", "aborts"):
            if getattr(self, name) < 0:
                raise ChaosError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if self.adds and self.partitions < len(SLOTS) + self.adds:
            raise ChaosError(f"--adds {self.adds} needs {len(SLOTS) + self.adds} partitions: one for each worker")
        if self.guarantee not in get_args(Guarantee):
            raise ChaosError(f"--guarantee is {' or '.join(get_args(Guarantee))}, not {self.guarantee!r}")

    @property
    def counts(self) -> Mapping[Kind, int]:
        """How often each fault comes."""
        return {
            Kind.KILL: self.kills,
            Kind.TERM: self.terms,
            Kind.STOP: self.stops,
            Kind.ADD: self.adds,
            Kind.TWIN: self.twins,
            Kind.EVICT: self.evictions,
            Kind.BROKER: self.broker_kills,
        }


SHORT = ChaosConfig(
    observations=3_000,
    streams=60,
    rate=400.0,
    kills=3,
    terms=0,
    stops=1,
    twins=0,
    evictions=1,
    broker_kills=0,
    aborts=3,
)
"""What `make test` has the patience for."""


def plan(config: ChaosConfig) -> tuple[Fault, ...]:
    """The faults, in the order in which they come: all kinds mixed, spread over the run. Nothing but the seed decides.

    >>> from dataclasses import replace
    >>> [str(fault) for fault in plan(replace(SHORT, seed=1, kills=1, adds=0))]
    ['SIGSTOP of w1 for 10.0 s, past its session', 'w0 is thrown out of the group', 'kill -9 of w0']
    """
    dice = random.Random(f"faults {config.seed}")
    kinds = [kind for kind, count in config.counts.items() for _ in range(count)]
    dice.shuffle(kinds)
    first, last = FIRST * config.observations, LAST * config.observations
    apart = (last - first) / max(1, len(kinds))
    added = iter(range(len(SLOTS), len(SLOTS) + config.adds))
    faults = []
    for n, kind in enumerate(kinds):
        at = int(first + (n + dice.random()) * apart)
        slot = f"w{next(added)}" if kind is Kind.ADD else "" if kind is Kind.BROKER else dice.choice(SLOTS)
        faults.append(_drawn(config, dice, at, kind, slot))
    return tuple(faults)


def _drawn(config: ChaosConfig, dice: random.Random, at: int, kind: Kind, slot: str) -> Fault:
    if kind is Kind.KILL and dice.random() < TWICE:
        return Fault(at, kind, slot, seconds=dice.uniform(0.1, 3.0))
    if kind is Kind.STOP:
        return Fault(at, kind, slot, seconds=config.session_timeout_ms / 1_000 + dice.uniform(2.0, 5.0))
    if kind is Kind.BROKER:
        return Fault(at, kind, slot, seconds=dice.uniform(1.0, 10.0))
    if kind is Kind.ADD:
        return Fault(at, kind, slot, until=min(int(at + ADDED * config.observations), int(0.95 * config.observations)))
    return Fault(at, kind, slot)
