"""Forecasts, pushed to whoever listens: from the worker's thread to the readers of `/v1/events`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress

import orjson

from service.errors import Refused
from service.metrics import Metrics
from service.records import Outgoing

READERS_MAX = 64
QUEUE_MAX = 512
"""Events that wait for a reader; more push out the oldest."""
AT_ONCE = 32
"""Events that are written together; so many more may be on their way to a reader who does not read."""
SILENCE_S = 15.0

Event = tuple[int, bytes]
"""A forecast record's JSON and its number. Each reader's count from 1; a gap tells how many were dropped."""


class Subscription:
    """What one reader still has to read. Made, and iterated over, on an event loop; offered to from one thread."""

    def __init__(self, streams: frozenset[str]) -> None:
        self.streams = streams
        self._queue: deque[Event] = deque(maxlen=QUEUE_MAX)  # appending and popping need no lock
        self._count = 0
        self._ended = False
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def offer(self, forecasts: Sequence[tuple[str, bytes]]) -> int:
        """Queue those of `forecasts` (stream, value) that were asked for. -> how many events had to go for them."""
        chosen = [value for stream, value in forecasts if not self.streams or stream in self.streams]
        dropped = max(0, len(self._queue) + len(chosen) - QUEUE_MAX)
        self._queue.extend(enumerate(chosen, start=self._count + 1))
        self._count += len(chosen)
        if chosen:
            self._wake()
        return dropped

    def end(self) -> None:
        """Let the iteration end; from any thread."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._woken.set)

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        """Some events at a time; none where there were none for SILENCE_S."""
        while not self._ended:
            try:
                async with asyncio.timeout(SILENCE_S):
                    await self._woken.wait()
            except TimeoutError:
                yield ()
            self._woken.clear()
            while self._queue and not self._ended:
                yield [self._queue.popleft() for _ in range(min(len(self._queue), AT_ONCE))]


class EventHub:
    """Hands each committed forecast to every reader who asked for its stream. May be used from any thread."""

    def __init__(self, topic: str, metrics: Metrics) -> None:
        """topic: the one that forecasts are written to; what goes to others is no event."""
        self.topic, self.metrics = topic, metrics
        self._lock = threading.Lock()
        self._readers: set[Subscription] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the service is stopping."""
        return self._closed

    def publish(self, outgoing: Sequence[Outgoing]) -> None:
        """Offer the forecasts among `outgoing`. Never waits for a reader; costs nothing while there is none."""
        if not self._readers:
            return
        forecasts = [(_stream_of(o), o.value) for o in outgoing if o.topic == self.topic and o.value]
        with self._lock:
            dropped = sum(reader.offer(forecasts) for reader in self._readers)
        self.metrics.events_dropped.inc(dropped)

    @contextmanager
    def subscribe(self, streams: frozenset[str]) -> Iterator[Subscription]:
        """The events of these streams (none named: of all) from now on, until `close`.

        Raises Refused (503) if there are too many readers already, or the service is stopping.
        """
        reader = Subscription(streams)
        with self._lock:
            if self._closed or len(self._readers) >= READERS_MAX:
                raise Refused(503, "stopping" if self._closed else f"{READERS_MAX} readers listen already, the most")
            self._readers.add(reader)
            self.metrics.event_readers.set(len(self._readers))
        try:
            yield reader
        finally:
            with self._lock:
                self._readers.discard(reader)
                self.metrics.event_readers.set(len(self._readers))

    def close(self) -> None:
        """End all subscriptions, and take no new ones."""
        with self._lock:
            self._closed = True
            for reader in self._readers:
                reader.end()


def _stream_of(record: Outgoing) -> str:
    return record.key.decode() if record.key else str(orjson.loads(record.value or b"")["stream"])
