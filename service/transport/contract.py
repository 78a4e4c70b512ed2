"""What the worker needs of Kafka, and no more: poll, commit, pause, read what was, lag; and who else is in its group.

A transport is one session with Kafka and belongs to one thread. It never raises out of `poll` for a record's sake.
Where Kafka goes away and may have missed something, any of its methods raises DisconnectedError: then begin a new
session. A group may be asked from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.records import Outgoing, Record


@dataclass(frozen=True)
class Polled:
    """What a poll brought. Partitions come and go only here: `revoked` ones before `assigned` ones, then records.

    An assigned partition is silent until `start`.
    """

    records: Sequence[Record] = ()
    assigned: frozenset[int] = field(default_factory=frozenset)
    revoked: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Offset:
    """Where a group stands in a partition: the input before `offset` is done with; and what it noted beside it."""

    offset: int
    note: str = ""


@dataclass(frozen=True)
class Bounds:
    """The offsets that a partition holds: from `first` to before `end`, whether committed to be read or not."""

    first: int
    end: int


class Transport(Protocol):
    """One worker's side of the observations topic and of those it writes."""

    @property
    def partitions(self) -> int:
        """How many partitions the observations topic has."""

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        """Wait at most `timeout_ms` for records of the started partitions."""

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        """Begin to deliver what belongs before the next commit, and do not wait for it. Exactly once this opens a
        transaction: whatever the next `commit` or the session's end makes of that, becomes of these records.

        Raises what `commit` raises but AbortedError, which is left to it.
        """

    def commit(self, before: Sequence[Outgoing], offsets: Mapping[int, Offset], after: Sequence[Outgoing]) -> None:
        """Deliver what was sent since the last commit and `before`, note that the input before `offsets` (by partition)
        is done with, deliver `after`.

        Exactly once: all of it in one transaction. At least once: in this order. When it returns, all is with the
        broker. Raises AbortedError where nothing was done, because the group has moved on; ServiceError for a record
        that Kafka will never take, or if another worker has taken this one's place.
        """

    def committed(self, partition: int) -> Offset | None:
        """Where the group stands, None if nowhere yet. Raises TimeoutError if that is not settled yet: ask again."""

    def bounds(self, topic: str, partition: int) -> Bounds:
        """What there is of a partition."""

    def read(self, topic: str, partition: int, first: int, end: int) -> Iterator[Sequence[Record]]:
        """The committed records from `first` to before `end`, in batches, some of them empty: each takes a moment."""

    def start(self, partition: int, offset: int) -> None:
        """Let a partition speak, from this offset on."""

    def rewind(self, offsets: Mapping[int, int]) -> None:
        """Go back to these offsets (by partition), where the partitions are still there."""

    def pause(self, partitions: Iterable[int]) -> None:
        """Bring no records of these partitions until `resume`."""

    def resume(self, partitions: Iterable[int]) -> None:
        """Undo `pause`."""

    @property
    def stable(self) -> bool:
        """Whether this worker is a settled member of its group."""

    def lag(self) -> Mapping[int, int] | None:
        """Records not yet polled, by assigned partition; None if Kafka does not answer."""

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
