"""A thousand readers of a worker's events who hardly read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from deploy.bench.figures import BenchError
from service.server import allow_files

READERS = 1_000
EVERY_S = 1.0
OPEN_S = 30.0


@contextmanager
def slow_readers(url: str, count: int = READERS) -> Iterator[None]:
    """As many readers of `/v1/events`, each of whom reads a byte a second, until the end of the block; whoever is
    refused comes again.

    Raises BenchError where they cannot come.
    """
    allow_files(2 * count)
    parts = urlsplit(url)
    ended, opened = threading.Event(), threading.Barrier(2)

    async def read(asked: asyncio.Semaphore) -> None:
        while not ended.is_set():
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1)
                writer.write(b"GET /v1/events HTTP/1.1\r\nHost: bench\r\n\r\n")
                asked.release()
                while not ended.is_set() and await reader.read(1):
                    await asyncio.sleep(EVERY_S)
                writer.transport.abort()
            await asyncio.sleep(EVERY_S)

    async def read_all() -> None:
        asked = asyncio.Semaphore(0)
        reading = [asyncio.create_task(read(asked)) for _ in range(count)]
        for _ in range(count):
            await asked.acquire()
        opened.wait()
        await asyncio.gather(*reading)

    thread = threading.Thread(target=asyncio.run, args=(read_all(),), name="readers", daemon=True)
    thread.start()
    try:
        opened.wait(OPEN_S)
        yield
    except threading.BrokenBarrierError as error:
        raise BenchError(f"{count} readers of {url}/v1/events could not be opened within {OPEN_S:g} s") from error
    finally:
        ended.set()
        thread.join()
