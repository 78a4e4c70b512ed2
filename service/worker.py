"""The worker's loop: poll, process, commit; again, until told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from service.engine import Engine, timed
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.settings import Settings
from service.transport.contract import Transport

log = logging.getLogger(__name__)

POLL_MS = 100
LAG_EVERY_S = 1.0
STALLED_S = 180.0
"""Longer than a commit may wait for a broker that is away: a restart would not bring it back."""


class Worker:
    """One member of the consumer group. `run` on one thread; `stop` and the properties may be used from any."""

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        settings: Settings,
        metrics: Metrics,
        publish: Callable[[Sequence[Outgoing]], None],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """publish: told of what was delivered, once it is."""
        self.engine, self.transport, self.settings, self.metrics = engine, transport, settings, metrics
        self._publish, self._now_s = publish, now_s
        self._stopping = threading.Event()
        self._partitions: frozenset[int] = frozenset()
        self._consumed = metrics.consumed.labels(settings.observations_topic)
        self._turned_at = time.monotonic()
        self._lag_at = 0.0
        self._ready = False
        self._kafka_answers = True

    @property
    def ready(self) -> bool:
        """Whether Kafka answers and this worker is a settled member of its group."""
        return self._ready and not self._stopping.is_set()

    @property
    def live(self) -> frozenset[int]:
        """The partitions whose streams this worker answers for."""
        return self._partitions

    @property
    def alive(self) -> bool:
        """Whether the loop still turns."""
        return time.monotonic() - self._turned_at < STALLED_S

    def stop(self) -> None:
        """Finish the wave at hand, deliver, commit, leave the group."""
        self._stopping.set()

    def run(self) -> None:
        """Until `stop`. Raises ServiceError if it cannot go on."""
        try:
            while not self._stopping.is_set():
                self.turn()
        finally:
            self.metrics.ready.set(0)
            self._partitions = frozenset()
            self.transport.close()
            log.info("left the group %s", self.settings.group_id)

    def turn(self) -> None:
        """One turn of the loop: whatever one poll brings, all the way to its commit."""
        polled = self.transport.poll(POLL_MS)
        self._rebalanced(polled.revoked, polled.assigned)
        if polled.records:
            self._consumed.inc(len(polled.records))
            outgoing = self.engine.process(polled.records)
            with timed(self.metrics.commit_seconds):
                self.transport.commit(outgoing, next_offsets(polled.records))
            self._delivered(outgoing)
        self._turned_at = time.monotonic()
        if self._turned_at - self._lag_at > LAG_EVERY_S:
            self._lag_at = self._turned_at
            self._watch()

    def _rebalanced(self, revoked: frozenset[int], assigned: frozenset[int]) -> None:
        if revoked:
            self._partitions -= revoked  # first: streams of a live partition that are not there were never heard
            self.engine.forget_partitions(revoked)
            for partition in revoked:
                self.metrics.lag.remove(self.settings.observations_topic, str(partition))
        self._partitions |= assigned
        if revoked or assigned:
            log.info("partitions of %s: %s", self.settings.observations_topic, sorted(self._partitions))

    def _delivered(self, outgoing: Sequence[Outgoing]) -> None:
        self._publish(outgoing)
        forecasts = [o for o in outgoing if o.topic == self.settings.forecasts_topic]
        self.metrics.forecasts.inc(len(forecasts))
        causes_ms = np.array([o.cause_ms for o in forecasts if o.cause_ms >= 0], dtype=float)
        if len(causes_ms):
            self.metrics.end_to_end_seconds.observe(np.maximum(self._now_s() - causes_ms / 1000, 0))

    def _watch(self) -> None:
        lags = self.transport.lag()
        self._answered(lags is not None)
        self._ready = lags is not None and self.transport.stable
        self.metrics.ready.set(self._ready)
        for partition, lag in (lags or {}).items():
            self.metrics.lag.labels(self.settings.observations_topic, str(partition)).set(lag)

    def _answered(self, answers: bool) -> None:
        """Say it once when Kafka goes, and once when it is back."""
        if self._kafka_answers and not answers:
            log.error("Kafka at %s does not answer; waiting for it", self.settings.bootstrap_servers)
        elif answers and not self._kafka_answers:
            log.info("Kafka at %s answers again", self.settings.bootstrap_servers)
        self._kafka_answers = answers


def next_offsets(records: Sequence[Record]) -> dict[int, int]:
    """By partition, the offset of the first record that is not among these."""
    return {record.partition: record.offset + 1 for record in records}  # in order: the last one stays
