"""What a session with Kafka needs, whichever client it is on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from model.errors import CarouselError
from service.errors import DisconnectedError, ServiceError
from service.settings import Settings

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 120
DEADLINE_S = 60.0
"""No call that a client lets wait for ever may wait longer."""
UNSETTLED_S = 45.0
"""Nor may this worker be without a settled membership."""
ANSWER_TIMEOUT_MS = 1_000
BOOTSTRAP_TIMEOUT_MS = 5_000
READ_POLL_MS = 100
READ_RECORDS = 5_000
METADATA_AGE_MS = 10_000
"""Time in which partitions that were added are noticed."""
FETCH_BYTES = 1 << 18
FETCH_SHARE = 0.1
EXIT_RESTART = 75
"""EX_TEMPFAIL: start me again."""


def fetch_wait_ms(settings: Settings) -> int:
    """How long Kafka may wait until a fetch has FETCH_BYTES. Where forecasts go once in a commit interval, a fetch for
    each observation brings nobody's forecast sooner, and is half of a worker's work at low rates. At least once: 0.
    """
    return round(FETCH_SHARE * settings.commit_interval_ms) if settings.guarantee == "exactly_once" else 0


def taken(settings: Settings) -> ServiceError:
    """What to tell the operator of the older one of two workers of one slot."""
    return ServiceError(f"another worker has taken slot {settings.slot!r} of group {settings.group_id}: this one ends")


def fenced(settings: Settings, began_s: float, told: str) -> CarouselError:
    """What it means that Kafka takes no more of a transaction that began then, by `time.monotonic`: right away only
    another worker of the same slot can be why.
    """
    if settings.slot and time.monotonic() < began_s + settings.transaction_timeout_ms / 2000:
        return taken(settings)
    return DisconnectedError(f"Kafka aborted a transaction that took too long: {told}")


def late(topics: Iterable[str], limit_s: float) -> DisconnectedError:
    """What to tell of records that are not with the broker in time."""
    return DisconnectedError(f"records for {', '.join(sorted(topics))} could not be delivered within {limit_s:g} s")


def note_of(metadata: str | None) -> str:
    """What was noted beside an offset, by whichever client: librdkafka's ends each with a zero byte."""
    return (metadata or "").rstrip("\0")


def unanswered(settings: Settings) -> DisconnectedError:
    return DisconnectedError(f"no Kafka broker answers at {settings.bootstrap_servers}")


def refused(settings: Settings, told: str, retriable: bool) -> CarouselError:
    """What an error means that has no meaning of its own."""
    return (
        DisconnectedError(told) if retriable else ServiceError(f"Kafka at {settings.bootstrap_servers} refused {told}")
    )


def line(error: Exception) -> str:
    """An error in one line, however many it takes itself."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Watchdog(threading.Thread):
    """Ends the process when a call into a client does not come back: of kafka-python, a transactional call may hang for
    ever after the coordinator refused a connection (trap 3), or offsets were sent for a topic that is gone (trap 8); of
    librdkafka, not all calls take a limit, nor keep it (trap 19). What became of it, only the next life can find out.
    """

    def __init__(self, deadline_s: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._deadline_s = deadline_s
        self._over: tuple[str, float, float] | None = None
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(0.2):
            over = self._over
            if over and time.monotonic() > over[2]:
                log.critical("%s did not end within %g s: exit, to be started again", *over[:2])
                logging.shutdown()
                os._exit(EXIT_RESTART)

    @contextmanager
    def over(self, what: str, deadline_s: float | None = None) -> Iterator[None]:
        """End the process if this block takes longer than the deadline, or this one of its own."""
        limit_s = deadline_s or self._deadline_s
        self._over = what, limit_s, time.monotonic() + limit_s
        try:
            yield
        finally:
            self._over = None

    def stop(self) -> None:
        self._stopped.set()
