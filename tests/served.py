"""A genuine `carousel serve` as a process, and the producers and readers that its users would be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from deploy import workers
from deploy.chaos.bundle import HOUR_MS
from deploy.chaos.bundle import random_bundle as random_bundle

START_MS = 1_700_000_000_000 // HOUR_MS * HOUR_MS
LIMIT_S = 90.0


def until(what: str, condition: Callable[[], Any], limit_s: float = LIMIT_S, log: Path | None = None) -> Any:
    """The first truth that `condition` gives; fails after `limit_s`, with the log's end, naming `what` was due."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}\n{log.read_text()[-2000:] if log else ''}"
        time.sleep(0.05)
    return value


@dataclass
class Served:
    """A running service, with topics and a group of its own."""

    servers: str
    settings: Mapping[str, Any]
    log_file: Path
    program: Sequence[str] = (sys.executable, "-m", "carousel")
    compiled: bool = False
    """By numba, which takes longer to load than most tests take."""
    process: subprocess.Popen[bytes] = field(init=False)
    url: str = field(init=False)

    @property
    def observations(self) -> str:
        return str(self.settings["observations_topic"])

    @property
    def forecasts(self) -> str:
        return str(self.settings["forecasts_topic"])

    @property
    def dead_letters(self) -> str:
        return str(self.settings["dead_letters_topic"])

    def start(self, wait: bool = True) -> None:
        """wait: until it is ready."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        with self.log_file.open("ab") as log:
            since = log.tell()
            environment = os.environ | {"CAROUSEL_COMPILED": str(self.compiled)}
            command = [*self.program, "serve", *flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.url = until("the URL in the log", lambda: self._said(since))
        if wait:
            until("readiness", self.ready)

    def _said(self, since: int) -> str:
        text = self.log_file.read_text()[since:]
        assert self.process.poll() is None, text
        return workers.url(text)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def get(self, path: str) -> Any:
        answer = httpx.get(self.url + path)
        answer.raise_for_status()
        return answer.json()

    def predict(self, **body: Any) -> Any:
        answer = httpx.post(f"{self.url}/v1/predict", json=body)
        answer.raise_for_status()
        return answer.json()

    def metrics(self) -> dict[str, float]:
        """Samples as they are written: name{labels} -> value."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def produce(self, records: Sequence[tuple[bytes | None, bytes | None]], **options: Any) -> None:
        """Records of (key, value), in this order within a partition."""
        producer = KafkaProducer(bootstrap_servers=self.servers)
        futures = [producer.send(self.observations, value, key=key, **options) for key, value in records]
        producer.flush()
        for future in futures:
            future.get(timeout=0)
        producer.close()

    def read(self, topic: str, count: int) -> list[Any]:
        """The topic's records from its beginning, once there are `count`; those of a partition in order."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.servers, auto_offset_reset="earliest", isolation_level="read_committed"
        )
        consumer.assign([TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))])
        records: list[Any] = []
        deadline = time.monotonic() + LIMIT_S
        while len(records) < count:
            for batch in consumer.poll(200).values():
                records += batch
            assert time.monotonic() < deadline, f"{len(records)} of {count} records in {topic}"
        for batch in consumer.poll(500).values():  # one more look: there must not be more
            records += batch
        consumer.close()
        return records


@contextmanager
def serving(
    bundle: Path,
    servers: str,
    directory: Path,
    partitions: int = 4,
    wait: bool = True,
    compiled: bool = False,
    **settings: Any,
) -> Iterator[Served]:
    """`carousel serve` with topics of its own, until the end of the block."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    topics = {f"{role}_topic": f"{name}.{role}" for role in ("observations", "forecasts", "dead_letters", "state")}
    own = {"model": bundle, "bootstrap_servers": servers, "group_id": name, "http_port": 0, "partitions": partitions}
    served = Served(servers, own | topics | settings, directory / f"{name}.log", compiled=compiled)
    served.start(wait)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


def group_members(servers: str, group: str) -> int:
    """How many members Kafka thinks the group has."""
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        return len(admin.describe_groups([group])[group]["members"])
    finally:
        admin.close()


def observation(step: int, value: float | None) -> bytes:
    """The observation of the `step`-th hour."""
    return json.dumps({"ts": START_MS + step * HOUR_MS, "value": value}).encode()


def running_with(entry: str) -> list[str]:
    """Commands of the processes that have this entry, NAME=VALUE, in their environment: who was started with it, and
    all that came from it.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found
