"""Observations as their sources would send them, and how long each waited until its forecast could be read.

The n-th forecast of a stream answers its n-th observation, so no value needs to be looked into, and any program can be
measured that answers each observation once, a stream's in their order.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.bench.clients import Reader, Sender, open_reader, open_sender
from deploy.bench.figures import BenchError
from deploy.bench.load import observation
from service.settings import Settings

POLL_S = 0.05
PATIENCE_S = 60.0
"""No program may keep silent for longer."""
LINGER_MS = 5
"""For as long a sender of many observations gathers them (librdkafka's default): a request for each would be work for
the broker alone, 0.4 ms of processor time for every record, on the same cores.
"""


@dataclass(frozen=True)
class Latencies:
    """Seconds from sending to being readable. unanswered: how many are not, and count with what they have waited."""

    seconds: NDArray[np.float64]
    unanswered: int

    def ms(self, quantile: float) -> float:
        """
        >>> Latencies(np.array([0.001, 0.002, 0.003]), 0).ms(0.5)
        2.0
        """
        return float(np.quantile(self.seconds, quantile)) * 1_000


class Traffic:
    """All streams speak in turn. Raises BenchError where nobody answers."""

    def __init__(
        self, settings: Settings, streams: int, sender: Sender, reader: Reader, check: Callable[[], None]
    ) -> None:
        """check: raises where whoever is measured has ended."""
        self.settings, self.streams, self.check = settings, streams, check
        self._sender, self._reader = sender, reader
        self._sent = self._answered = 0  # each written by one thread alone
        self._waiting: defaultdict[bytes, deque[float]] = defaultdict(deque)

    @property
    def _open(self) -> int:
        return self._sent - self._answered

    def warm_up(self) -> None:
        """One observation of each stream, all answered."""
        self.burst(self.streams)

    def burst(self, count: int) -> float:
        """As many observations as fast as they go. -> records a second, until the last answer."""
        began_s = time.perf_counter()
        self.send(count)
        self._await_all()
        return count / (time.perf_counter() - began_s)

    def send(self, count: int) -> None:
        """As many observations as fast as they go; nobody waits for their answers."""
        for _ in range(count):
            self._send()

    def paced(self, rate: float, seconds: float, until: Callable[[], bool] = lambda: False) -> Latencies:
        """Observations at a steady rate, for so long or until told; then as long again for what is not answered."""
        stopping = threading.Event()
        thread = threading.Thread(target=self._send_paced, args=(rate, seconds, stopping), name="traffic", daemon=True)
        waited: list[float] = []
        over_s = time.perf_counter() + 2 * seconds
        thread.start()
        try:
            while (thread.is_alive() or self._open) and time.perf_counter() < over_s and not until():
                waited += self._read()
        finally:
            stopping.set()
            thread.join()
        now_s = time.perf_counter()
        late = [now_s - sent_s for waiting in self._waiting.values() for sent_s in waiting]
        return Latencies(np.array([*waited, *late]), len(late))

    def settle(self) -> None:
        """Wait until all is answered."""
        self._await_all()

    def _await_all(self) -> None:
        heard_s = time.perf_counter()
        while self._open:
            if self._read():
                heard_s = time.perf_counter()
            self.check()
            if time.perf_counter() - heard_s > PATIENCE_S:
                raise BenchError(f"{self._open:,} of {self._sent:,} observations were not answered in {PATIENCE_S:g} s")

    def _read(self) -> list[float]:
        keys = [key for key, _ in self._reader.poll(POLL_S) if self._waiting[key]]  # others were answered before
        now_s = time.perf_counter()
        self._answered += len(keys)
        return [now_s - self._waiting[key].popleft() for key in keys]

    def _send(self) -> None:
        partition, key, value = observation(self._sent, self.streams, self.settings.partitions)
        self._sent += 1
        self._waiting[key].append(time.perf_counter())
        self._sender.send(self.settings.observations_topic, partition, key, value)

    def _send_paced(self, rate: float, seconds: float, stopping: threading.Event) -> None:
        began_s = time.perf_counter()
        for n in range(max(1, round(rate * seconds))):
            early_s = began_s + n / rate - time.perf_counter()
            if early_s > 0:
                time.sleep(early_s)
            if stopping.is_set():
                return
            self._send()


@contextmanager
def traffic_of(
    settings: Settings, streams: int, check: Callable[[], None], linger_ms: int = LINGER_MS
) -> Iterator[Traffic]:
    """Traffic for whoever reads and writes these topics, which must be there."""
    servers, sink = settings.bootstrap_servers, settings.forecasts_topic
    with (
        open_sender(servers, linger_ms) as sender,
        open_reader(servers, sink, settings.partitions) as reader,
    ):
        yield Traffic(settings, streams, sender, reader, check)
