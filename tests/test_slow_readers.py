"""Whoever reads the events slowly, not at all, or a thousand times: what is written to Kafka does not wait for them."""

from __future__ import annotations

import re
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from service.events import QUEUE_MAX, READERS_MAX
from tests.served import Served, observation, random_bundle, serving, until

READERS = 1_000
ANSWER_S = 20.0
STREAMS, STEPS = 40, 50


@pytest.fixture
def served(bootstrap_servers: str, tmp_path: Path) -> Iterator[Served]:
    """A service that was allowed few files at first, as most are."""
    bundle = random_bundle(tmp_path / "model")
    with ExitStack() as stack:
        with few_files():
            served = stack.enter_context(serving(bundle, bootstrap_servers, tmp_path))
        yield served


@contextmanager
def few_files() -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ask_for_events(served: Served) -> socket.socket:
    """A reader with little room for what it does not read."""
    host, port = served.url.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    reader.settimeout(ANSWER_S)
    reader.connect((host, int(port)))
    reader.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    return reader


def steps(first: int, count: int) -> list[tuple[bytes | None, bytes | None]]:
    return [(b"s%d" % n, observation(first + step, 1.0)) for step in range(count) for n in range(STREAMS)]


def read_byte_by_byte(reader: socket.socket, ended: threading.Event) -> None:
    with suppress(OSError):  # it vanishes in the end, as the others do
        while not ended.wait(1) and reader.recv(1):
            pass


def test_a_thousand_readers_who_do_not_read_keep_nobody_waiting(served: Served) -> None:
    ended = threading.Event()
    with ExitStack() as stack:
        stack.callback(ended.set)
        readers = [stack.enter_context(ask_for_events(served)) for _ in range(READERS)]
        refused = [reader for reader in readers if reader.recv(12) == b"HTTP/1.1 503"]
        assert len(refused) == READERS - READERS_MAX
        for reader in refused:
            while reader.recv(4_096):  # until it is closed, long before it would be for being idle
                pass
        assert served.metrics()["carousel_event_readers"] == READERS_MAX, "whoever was refused holds no place"
        assert re.search(r"Max open files +[1-9][0-9]{3}", Path(f"/proc/{served.process.pid}/limits").read_text())
        for reader in set(readers[:8]) - set(refused):
            threading.Thread(target=read_byte_by_byte, args=(reader, ended), daemon=True).start()
        served.produce(steps(0, STEPS))
        assert len(served.read(served.forecasts, STREAMS * STEPS)) == STREAMS * STEPS
        until("what they do not read to be dropped", lambda: served.metrics()["carousel_events_dropped_total"] > 0)
        assert STREAMS * STEPS > QUEUE_MAX
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # they just vanish
            reader.close()
    until("their places to be free", lambda: served.metrics()["carousel_event_readers"] == 0)
    with httpx.stream("GET", f"{served.url}/v1/events", timeout=60) as answer:
        until("one to listen", lambda: served.metrics()["carousel_event_readers"] == 1)
        served.produce(steps(STEPS, 1))
        assert next(line for line in answer.iter_lines() if line.startswith("event")) == "event: forecast"
    assert len(served.read(served.forecasts, STREAMS * (STEPS + 1))) == STREAMS * (STEPS + 1)
