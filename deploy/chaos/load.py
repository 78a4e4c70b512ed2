"""What the streams say during a run, good and bad, drawn from the seed; and the thread that says it, come what may."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kafka import KafkaProducer
from kafka.errors import KafkaError

from deploy.chaos.bundle import HOUR_MS
from deploy.chaos.plan import ChaosConfig

START_MS = 1_700_000_000_000 // HOUR_MS * HOUR_MS
FORGETTING_GAP = 200
"""Steps that are more than the model bridges: the stream starts afresh."""
ABORTED_MAX = 20
TURN_S = 0.02
BURST_S = 0.2
"""How much of what was not sent in time is made up for at once."""
AHEAD_MAX = 500
"""Observations that may wait to be done with, at most: enough for bursts, and for whom a fault did not hit to go on."""
TRICKLE = 5.0
"""Observations a second that come whatever happens: who is fenced finds out when there is something to commit."""
DELIVERY_TIMEOUT_MS = 600_000
"""Longer than any outage: nothing is given up, and so nothing is sent again under another number."""
ABORT_ATTEMPTS = 5
CLOSE_S = 3.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A record as it is sent."""

    partition: int
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Aborted:
    """Records of a transaction that is aborted: whoever forecasts one of them reads what was never said."""

    records: tuple[Sent, ...]


Item = Sent | Aborted


@dataclass
class Series:
    """One stream, as its source sees it."""

    name: str
    level: float
    partition: int
    step: int = 0

    @property
    def end(self) -> Sent:
        """The tombstone."""
        return Sent(self.partition, self.name.encode(), None)

    def value(self, dice: random.Random) -> float:
        return round(self.level * (1 + 0.3 * math.sin(self.step / 24 * math.tau) + dice.gauss(0, 0.05)), 3)


def items(config: ChaosConfig) -> list[Item]:
    """All that is sent, in order. The seed alone decides it."""
    dice = random.Random(f"load {config.seed}")
    streams = [_series(dice, n, config.partitions) for n in range(config.streams)]
    sent: list[Item] = []
    for _ in range(config.observations):
        series = dice.choice(streams)
        sent += _observed(dice, series)
        if sent[-1] == series.end and dice.random() < 0.5 and len(streams) > 1:
            streams.remove(series)  # for good; the others begin anew
    for _ in range(config.aborts):  # these take nothing from the streams, so they may stand anywhere
        some = dice.choices(streams, k=dice.randint(1, ABORTED_MAX))
        never = tuple(_record(each, each.step, 10 * each.value(dice)) for each in some)
        sent.insert(dice.randrange(len(sent)), Aborted(never))
    return sent


def _series(dice: random.Random, n: int, partitions: int) -> Series:
    name = f"s{n}"
    return Series(name, 10 ** dice.uniform(-2, 6), zlib.crc32(name.encode()) % partitions)


def _observed(dice: random.Random, series: Series) -> Iterator[Sent]:
    """The next observation of a stream, and what may come with it."""
    luck = dice.random()
    series.step += FORGETTING_GAP if luck < 0.002 else dice.randint(2, 6) if luck < 0.02 else 1
    value = None if dice.random() < 0.03 else series.value(dice)
    yield _record(series, series.step, value, keyed=dice.random() > 0.01)
    luck = dice.random()
    if luck < 0.01:  # a duplicate, which may even differ
        yield _record(series, series.step, series.value(dice))
    elif luck < 0.02:
        yield _record(series, series.step - dice.randint(1, 5), series.value(dice))
    elif luck < 0.025:
        yield series.end
    elif luck < 0.047:
        yield _garbage(dice, series)


def _record(series: Series, step: int, value: float | None, keyed: bool = True) -> Sent:
    body = {"ts": START_MS + step * HOUR_MS, "value": value}
    if keyed:
        return Sent(series.partition, series.name.encode(), json.dumps(body).encode())
    return Sent(series.partition, None, json.dumps(body | {"stream": series.name}).encode())


def _garbage(dice: random.Random, series: Series) -> Sent:
    """A record that is none, for one of the reasons that there are; no two of them are the same."""
    n, ts = dice.randrange(10**9), START_MS + series.step * HOUR_MS
    key: bytes | None = series.name.encode()
    keyed = [
        b"no JSON %d" % n,
        b"[%d]" % n,
        b'{"ts": %d, "value": "%d"}' % (ts, n),
        b'{"ts": %d, "value": 1, "colour": %d}' % (ts, n),
        b'{"ts": %d, "value": NaN, "n": %d}' % (ts, n),
        b'{"ts": %d, "value": 1e400, "n": %d}' % (ts, n),
        b'{"ts": %d, "value": 1e%d}' % (ts, 16 + n % 200),
        b'{"ts": %d, "value": 1, "covariates": {"n": %d}}' % (ts, n),
        b'{"ts": %d, "value": %d}' % (ts // 1_000, n),
        b'{"ts": %d, "value": 1, "stream": "another %d"}' % (ts, n),
    ]
    chosen = dice.randrange(len(keyed) + 1)
    if chosen == len(keyed):
        return Sent(series.partition, None, b'{"ts": %d, "value": %d}' % (ts, n))
    return Sent(series.partition, key, keyed[chosen])


class Load(threading.Thread):
    """Sends the items at a steady rate, across all outages; where it is far ahead of `reached`, only a trickle.

    `outage` is held while the broker is away; the load holds it while it has a transaction open, since a client that
    loses the coordinator in the middle of one may wait for ever (see the transport's traps).
    """

    def __init__(
        self, config: ChaosConfig, servers: str, topic: str, reached: Callable[[], float], outage: threading.Lock
    ) -> None:
        super().__init__(name="load", daemon=True)
        self.items: Sequence[Item] = items(config)
        self.records = sum(isinstance(item, Sent) for item in self.items)
        self.ahead = min(AHEAD_MAX, len(self.items) // 10)
        self.rate, self.servers, self.topic = config.rate, servers, topic
        self.sent = 0
        self.aborted = 0
        self.failure = ""
        self._reached, self._outage = reached, outage
        self._stopping = threading.Event()

    @property
    def finished(self) -> bool:
        """Whether all is sent and acknowledged."""
        return self.sent == self.records and not self.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(2 * CLOSE_S)

    def run(self) -> None:
        """Never raises; `failure` says why it ended early."""
        try:
            self._send()
        except Exception as error:
            self.failure = f"the load could not be sent: {type(error).__name__}: {' '.join(str(error).split())}"

    def _send(self) -> None:
        producer = KafkaProducer(
            bootstrap_servers=self.servers,
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            reconnect_backoff_max_ms=1_000,
        )
        futures = []
        try:
            for item in self._paced():
                if isinstance(item, Aborted):
                    self._abort(item)
                else:
                    futures.append(producer.send(self.topic, item.value, key=item.key, partition=item.partition))
                    self.sent += 1
            if not self._stopping.is_set():
                producer.flush(DELIVERY_TIMEOUT_MS / 1_000)
                for future in futures:
                    future.get(timeout=0)  # flush() does not say that a record failed
        finally:
            if self._stopping.is_set():
                producer._sender.force_close()  # nothing is worth waiting for any more
            with suppress(KafkaError):
                producer.close(timeout=CLOSE_S)

    def _paced(self) -> Iterator[Item]:
        """The items when they are due. What a stall delayed is not made up for at once."""
        allowance, last = 0.0, time.monotonic()
        for item in self.items:
            while allowance < 1 and not self._stopping.wait(TURN_S):
                rate = self.rate if self.sent - self._reached() < self.ahead else min(self.rate, TRICKLE)
                now = time.monotonic()
                allowance, last = min(allowance + (now - last) * rate, max(1, rate * BURST_S)), now
            if self._stopping.is_set():
                return
            allowance -= 1
            yield item

    def _abort(self, item: Aborted) -> None:
        """Send records in a transaction and abort it. If that breaks off, the next attempt aborts the last one's."""
        for attempt in range(1, ABORT_ATTEMPTS + 1):
            with self._outage:
                producer = KafkaProducer(
                    bootstrap_servers=self.servers, transactional_id=f"{self.topic}-load", transaction_timeout_ms=10_000
                )
                try:
                    producer.init_transactions()
                    producer.begin_transaction()
                    for sent in item.records:
                        producer.send(self.topic, sent.value, key=sent.key, partition=sent.partition)
                    producer.flush(CLOSE_S)
                    producer.abort_transaction()
                except KafkaError:
                    if attempt == ABORT_ATTEMPTS:
                        raise
                else:
                    self.aborted += len(item.records)
                    return
                finally:
                    with suppress(KafkaError):
                        producer.close(timeout=CLOSE_S)
