"""Asks a server for forecasts over connections that stay open, as fast as it answers or at a steady rate; tells what
came of it as JSON.

    python -m deploy.bench.ask http://127.0.0.1:8000 BODIES.jsonl --seconds 5 --rate 100

No HTTP library: requests are ready bytes, and of an answer no more is read than its status and its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

CONNECTIONS = 8
WARM_SHARE = 0.2
"""Of the time, at its beginning, that does not count."""


def due_times_s(began_s: float, rate: float) -> Iterator[float]:
    """When each request is due. rate: of them a second; 0: as soon as one asks for it.

    >>> [due_s for _, due_s in zip(range(3), due_times_s(10.0, 4.0))]
    [10.0, 10.25, 10.5]
    """
    return (began_s + n / rate if rate else time.perf_counter() for n in count())


class Connection(asyncio.Protocol):
    """Asks whenever it is answered and a request is due. One that had to wait for a connection counts from when it was
    due: whoever is slow shall not be asked less.
    """

    def __init__(
        self,
        requests: Iterator[bytes],
        due_s: Iterator[float],
        answers: list[tuple[float, float]],
        failed: list[bytes],
    ) -> None:
        """answers: of each is added when its request was due, and the seconds from then on."""
        self._requests, self._due_s = requests, due_s
        self._answers, self._failed = answers, failed
        self._read = bytearray()
        self._end = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport
        self._next()

    def _next(self) -> None:
        self._asked_s = next(self._due_s)
        early_s = self._asked_s - time.perf_counter()
        if early_s > 0:
            asyncio.get_running_loop().call_later(early_s, self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._read += data
        if not self._end:
            head, found, _ = self._read.partition(b"\r\n\r\n")
            if not found:
                return
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            self._end = len(head) + 4 + length
        if len(self._read) >= self._end:
            self._answered(time.perf_counter())

    def _answered(self, now_s: float) -> None:
        if not self._read.startswith(b"HTTP/1.1 200"):
            self._failed.append(bytes(self._read[:200]))
        self._answers.append((self._asked_s, now_s - self._asked_s))
        self._read.clear()
        self._end = 0
        self._next()


def requests_of(bodies: Path, host: str) -> list[bytes]:
    """Whole requests, ready to be sent."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    return [
        head.encode() + b"%d\r\n\r\n" % len(line) + line for line in bodies.read_bytes().splitlines() if line.strip()
    ]


async def ask(url: str, bodies: Path, seconds: float, connections: int, rate: float) -> dict[str, float]:
    """-> requests a second, the times of the middle one and of one in a hundred, how many were refused; and how many
    were answered, those too that came too early to count.
    """
    parts = urlsplit(url)
    requests, loop = cycle(requests_of(bodies, parts.netloc)), asyncio.get_running_loop()
    answers: list[tuple[float, float]] = []
    failed: list[bytes] = []
    began_s = time.perf_counter()
    from_s, due_s = began_s + WARM_SHARE * seconds, due_times_s(began_s, rate)
    opened = [
        await loop.create_connection(
            lambda: Connection(requests, due_s, answers, failed), parts.hostname or "", parts.port or 80
        )
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    counted_s = time.perf_counter() - from_s
    times = np.array([took_s for asked_s, took_s in answers if asked_s >= from_s])
    for transport, _ in opened:
        transport.abort()
    p50, p99 = np.quantile(times, (0.5, 0.99)) * 1_000 if len(times) else (0.0, 0.0)
    return {
        "per_second": len(times) / counted_s,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "failed": len(failed),
        "answered": len(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: as fast as they are answered")
    given = parser.parse_args()
    told = asyncio.run(ask(given.url, given.bodies, given.seconds, given.connections, given.rate))
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
