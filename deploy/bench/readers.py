"""Readers of a worker's events who hardly read: a byte a second each. A process, lest they keep the bench busy.

    python -m deploy.bench.readers http://127.0.0.1:8000 --readers 1000

It says so once all have asked.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

from service.server import allow_files

READERS = 1_000
READY = "all have asked"
EVERY_S = 1.0


async def read(host: str, port: int, asked: asyncio.Semaphore) -> None:
    """One reader, who goes when it is refused."""
    reader, writer = await asyncio.open_connection(host, port, limit=1)
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: bench\r\n\r\n")
    asked.release()
    with suppress(OSError):
        if (await reader.readexactly(12)).endswith(b"200"):
            while await reader.read(1):
                await asyncio.sleep(EVERY_S)
    writer.transport.abort()


async def read_all(url: str, readers: int) -> None:
    parts, asked = urlsplit(url), asyncio.Semaphore(0)
    reading = [asyncio.create_task(read(parts.hostname or "", parts.port or 80, asked)) for _ in range(readers)]
    for _ in reading:
        await asked.acquire()
    print(READY, flush=True)  # noqa: T201
    await asyncio.gather(*reading)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--readers", type=int, default=READERS)
    given = parser.parse_args()
    allow_files(2 * given.readers)
    asyncio.run(read_all(given.url, given.readers))


if __name__ == "__main__":
    main()
