"""What can go wrong, in three kinds.

A record that cannot be used is `Rejected` and becomes a dead letter; nothing else notices. A request over HTTP that
cannot be answered is a `Refused`. What stops the service is a `ServiceError`, and its message is the one line that
the operator reads.
"""

from __future__ import annotations

from enum import StrEnum

from model.errors import CarouselError

RETRY_AFTER_S = 5


class Reason(StrEnum):
    """Why a record became a dead letter: stable codes that producers may match on."""

    DECODE = "decode"
    """Not UTF-8, not JSON, not an object, or nested too deeply."""
    SCHEMA = "schema"
    """A field is missing, unknown, or of the wrong type."""
    VALUE = "value"
    """A number that is none: NaN, infinite, or too large for a double."""
    RANGE = "range"
    """A finite value beyond the range that the service accepts."""
    SHAPE = "shape"
    """Covariates that the model does not know."""
    KEY = "key"
    """No stream id, an unusable one, or two that differ."""
    TIME = "time"
    """A time that cannot be read, lies too far back or ahead, or in a hole of the model's grid."""
    SIZE = "size"
    """A value larger than the service reads."""
    LIMIT = "limit"
    """One stream more than its partition may hold."""
    CRASH = "crash"
    """The process ended each time it came to this record."""
    UNDECODABLE = "undecodable"
    """A header's name is not UTF-8."""


class Rejected(Exception):
    """A record that becomes a dead letter. The message says why, in one line, without the payload."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Refused(Exception):
    """An HTTP request that cannot be answered: its status, a detail that says what to do, the field at fault (422),
    and after how many seconds it is worth coming again (503).
    """

    def __init__(
        self, status: int, detail: str, loc: tuple[str | int, ...] = (), retry_after_s: int = RETRY_AFTER_S
    ) -> None:
        super().__init__(detail)
        self.status, self.loc, self.retry_after_s = status, loc, retry_after_s


class ServiceError(CarouselError):
    """The service cannot go on. The message is one line that says what is wrong and what to do."""


class LostStateError(ServiceError):
    """States cannot be restored as they were; the setting `on_lost_state` says what to do."""


class AbortedError(Exception):
    """A commit that had no effect at all: the group had moved on. Undo, and go on from the last one."""


class DisconnectedError(CarouselError):
    """What was said to Kafka may or may not have been heard: begin a new session, which finds out."""
