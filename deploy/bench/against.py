"""Any other program, as `--against` names it: what it reads and writes is told by its environment."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from kafka import KafkaConsumer, TopicPartition

from deploy.bench.clients import open_reader
from deploy.bench.figures import BenchError, Probe, Sample
from deploy.bench.load import Bench, load
from deploy.bench.programs import Program, environment, running
from deploy.java import ending
from service.records import Record
from service.settings import Settings

PATIENCE_S = 60.0
"""Whoever says nothing new for so long is ended."""
LOOK_S = 0.25
READ_S = 2.0
"""And what is not committed so long after the last is not counted."""


def probe(bench: Bench, command: str, number: int, records: Sequence[Record], beside: str) -> Probe:
    """Its records a second. Raises BenchError for a command that is none."""
    return Probe(f"{command} …", partial(_measure, bench, command, number, records, beside))


def split(command: str) -> list[str]:
    """A command as the shell would take it apart. Raises BenchError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BenchError(f"--against {command!r}: {error}") from error
    if not words:
        raise BenchError("--against takes the command of a program")
    return words


def _measure(bench: Bench, command: str, number: int, records: Sequence[Record], beside: str) -> Iterator[Sample]:
    settings = bench.settings()
    load(settings, records)
    log_file = bench.directory / f"against-{number}.log"
    with running(command, split(command), log_file, environment(settings)) as program:
        ended = _wait(program, settings, len(records), bench.config.seconds)
        appended_ms = _answers(settings, len(records))
    note = f"answered {len(appended_ms):,} of {len(records):,}, then {ended}" if ended else ""
    yield Sample(command, rate_of(appended_ms), "records/s", "rival", beside, note)


def rate_of(appended_ms: Sequence[int]) -> float:
    """Records a second from the first to the last that was appended, of those after the first: its start, and how it
    found its partitions, do not count against it. 0: nothing came, or all at once.

    >>> rate_of([1_000, 1_000, 1_500, 2_000])
    2.0
    """
    if not appended_ms:
        return 0.0
    first, last = min(appended_ms), max(appended_ms)
    after = sum(time_ms > first for time_ms in appended_ms)
    return after * 1_000 / (last - first) if after else float(len(appended_ms)) * 1_000


def _wait(program: Program, settings: Settings, count: int, seconds: float) -> str:
    """From its first answer on for `seconds`, or until all is answered. -> why no more is to be had, if so."""
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap_servers)
    partitions = [TopicPartition(settings.forecasts_topic, p) for p in range(settings.partitions)]
    written, since_s, until_s = 0, time.monotonic(), math.inf
    try:
        while written < count and time.monotonic() < until_s:
            if program.process.poll() is not None:
                return f"{ending(program.process.returncode)}: {_last(program.log_file)}"
            time.sleep(LOOK_S)
            now = sum(consumer.end_offsets(partitions).values())
            if now > written:
                until_s = min(until_s, time.monotonic() + seconds)
                written, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > PATIENCE_S:
                return f"was silent for {PATIENCE_S:g} s"
    finally:
        consumer.close()
    return ""


def _last(log_file: Path) -> str:
    return (log_file.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def _answers(settings: Settings, count: int) -> list[int]:
    """When each committed answer was appended; waits for those whose transaction is still open."""
    appended_ms: list[int] = []
    with open_reader(settings.bootstrap_servers, settings.forecasts_topic, settings.partitions) as reader:
        heard_s = time.monotonic()
        while len(appended_ms) < count and time.monotonic() - heard_s < READ_S:
            if polled := reader.poll(0.1):
                appended_ms += [time_ms for _, time_ms in polled]
                heard_s = time.monotonic()
    return appended_ms
