"""What the worker needs of Kafka, and no more: poll, commit, pause, lag; and who else is in its group.

A transport belongs to one thread. It never raises out of `poll` for a record's sake. A group may be asked from any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.records import Outgoing, Record


@dataclass(frozen=True)
class Polled:
    """What a poll brought. Partitions come and go only here: `revoked` ones before `assigned` ones, then records."""

    records: Sequence[Record] = ()
    assigned: frozenset[int] = field(default_factory=frozenset)
    revoked: frozenset[int] = field(default_factory=frozenset)


class Transport(Protocol):
    """One worker's side of the observations topic and of those it writes."""

    def poll(self, timeout_ms: int) -> Polled:
        """Wait at most `timeout_ms` for records of the assigned partitions."""

    def commit(self, outgoing: Sequence[Outgoing], offsets: Mapping[int, int]) -> None:
        """Deliver `outgoing`, then note that the input before `offsets` (by partition) is done with.

        When it returns, all is with the broker. Raises TransportError if it is not, and it is unknown how much.
        """

    def pause(self, partitions: Iterable[int]) -> None:
        """Bring no records of these partitions until `resume`."""

    def resume(self, partitions: Iterable[int]) -> None:
        """Undo `pause`."""

    @property
    def stable(self) -> bool:
        """Whether this worker is a settled member of its group."""

    def lag(self) -> Mapping[int, int] | None:
        """Records not yet polled, by assigned partition; None if Kafka does not answer within a second."""

    def close(self) -> None:
        """Leave the group and hang up, in bounded time."""


@dataclass(frozen=True)
class Described:
    """The group as Kafka describes it. partitions: how many the observations topic has; owners: by partition, the URL
    of the worker that has it, where there is one; stable: whether partitions are not just being shared out anew.
    """

    partitions: int
    owners: Mapping[int, str]
    stable: bool


class Group(Protocol):
    """All workers of the group, as Kafka knows them."""

    def describe(self) -> Described | None:
        """As it is now; None where Kafka does not say within two seconds."""

    def candidates(self, key: bytes, partitions: int) -> tuple[int, ...]:
        """Where producers' own partitioners put a key, the most common one first, each partition once."""

    def close(self) -> None:
        """Hang up, in bounded time."""
