"""What it costs as work grows: one thing at a time, all else as by default. Of each: records a second, processor time a
record, memory, the slowest forecasts at half of its highest rate; and what bounds it.
"""

from __future__ import annotations

import math
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from deploy.bench.figures import BenchError, Probe, Sample
from deploy.bench.load import Bench, create_topics, transports
from deploy.bench.programs import Program, Usage, environment, running, serve, standing_still, usage
from deploy.bench.throughput import steady
from deploy.bench.traffic import Traffic, traffic_of

SHARE = 0.5
"""Of the highest rate, at which latency is measured."""
LEAST_STREAMS = 1_000
STEPS = 100
POLL_S = 0.05
BURST_LIMIT_S = 600.0
BACKLOG_MOST = 300_000
"""Observations that are there before any is taken: sending so many takes less than Kafka's patience with a worker that
stands still. Else whoever sends takes part of the processors, and may be the slowest of all.
"""
PARTITIONS = (1, 4, 16)
HIDDEN_SIZES = (32, 64, 128, 256)
HORIZONS = (6, 24, 96)
WORKERS = (1, 2)
SUMS = (
    "carousel_wave_duration_seconds_sum",
    "carousel_step_duration_seconds_sum",
    "carousel_commit_duration_seconds_sum",
)


@dataclass(frozen=True)
class Point:
    """One load. shape: of the model, where it is not the default one."""

    axis: str
    at: int
    streams: int
    workers: int = 1
    partitions: int = 4
    shape: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Spent:
    """What was spent until now. cpu_s, rss: of all workers; broker_s: of Kafka, where it is ours; parts: seconds of the
    workers' own time in waves, in the model's steps within them, and in commits.
    """

    cpu_s: float
    rss: int
    broker_s: float
    parts: tuple[float, ...]


def points(bench: Bench) -> Iterator[Point]:
    """All loads. With a model of one's own, its shape is as it is."""
    streams = bench.streams()
    powers = range(round(math.log10(LEAST_STREAMS)), math.floor(math.log10(bench.config.most_streams) + 1e-9) + 1)
    yield from (Point("streams", 10**power, 10**power) for power in powers)
    yield from (Point("partitions", count, streams, partitions=count) for count in PARTITIONS)
    yield from (Point("workers", count, streams, workers=count) for count in WORKERS)
    if not bench.config.model:
        yield from (Point("hidden size", size, streams, shape={"hidden_size": size}) for size in HIDDEN_SIZES)
        yield from (Point("horizon", steps, streams, shape={"horizon": steps}) for steps in HORIZONS)


def probes(bench: Bench) -> Iterator[Probe]:
    for point in points(bench):
        yield Probe(f"{point.at:,} {point.axis}", partial(_measure, bench, point))


def _measure(bench: Bench, point: Point) -> Iterator[Sample]:
    name = "-".join(f"{key}-{value}" for key, value in (point.shape or {}).items())
    shape = {"model": bench.made(name, **point.shape)} if point.shape else {}
    settings = bench.settings(partitions=point.partitions, transport=transports(bench.config)[0], **shape)
    create_topics(settings)
    told = serve(settings)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(running(f"worker {n}", told, bench.directory / f"w{n}.log", environment(settings)))
            for n in range(point.workers)
        ]

        def check() -> None:
            for worker in workers:
                worker.check()

        urls = [worker.wait_for_url() for worker in workers]
        traffic = stack.enter_context(traffic_of(settings, point.streams, check))
        until_s = time.perf_counter() + BURST_LIMIT_S
        while not all(_forecasts([url]) for url in urls):  # until each has partitions
            traffic.warm_up()
            if time.perf_counter() > until_s:
                raise BenchError(f"not each of {point.workers} workers got a partition within {BURST_LIMIT_S:g} s")
        yield from _samples(bench, point, workers, urls, traffic)


def _samples(
    bench: Bench, point: Point, workers: Sequence[Program], urls: Sequence[str], traffic: Traffic
) -> Iterator[Sample]:
    count = max(point.streams, bench.streams() * bench.steps(STEPS) * point.workers)
    made, waits = int(_forecasts(urls)), count <= BACKLOG_MOST
    if waits:
        with standing_still(workers):
            traffic.send(count)
    before, began_s = _spent(bench, workers, urls), time.perf_counter()
    if not waits:
        traffic.send(count)
    most = _rate(traffic, urls, made, count)
    wall_s, after = time.perf_counter() - began_s, _spent(bench, workers, urls)
    traffic.settle()
    latencies = traffic.paced(SHARE * most, bench.config.seconds)
    traffic.settle()
    figures = {
        "records/s": most,
        "us a record": (after.cpu_s - before.cpu_s) / count * 1e6,
        "MB": after.rss / 1e6,
        "p99 ms": latencies.ms(0.99),
    }
    note = bound(before, after, wall_s, point.workers)
    for unit, value in figures.items():
        yield Sample(f"{point.axis} {point.at:,}: {unit}", value, unit, note=note, axis=point.axis, at=point.at)


def _rate(traffic: Traffic, urls: Sequence[str], made: int, count: int) -> float:
    """Forecasts a second, until beside those made before there are so many, by the workers' own count: who reads each
    would be slower than two of them.
    """

    def turn() -> None:
        traffic.check()
        time.sleep(POLL_S)

    rate = steady(turn, lambda: int(_forecasts(urls)) - made, count, BURST_LIMIT_S)
    if (left := made + count - _forecasts(urls)) > 0:
        raise BenchError(f"{left:,.0f} observations were not answered in {BURST_LIMIT_S:g} s")
    return rate


def bound(before: Spent, after: Spent, wall_s: float, workers: int) -> str:
    """Where the time went, as shares of the workers' own, the largest first; and how busy the processors were with it.

    >>> bound(Spent(0, 0, 0, (0, 0, 0)), Spent(1.6, 0, 0.5, (1.0, 0.6, 0.8)), 2.0, 1)
    'commit 40%, model step 30%, rest of waves 20%, other 10%; worker 80%, broker 25% of a core'
    """
    waves, steps, commits = (a - b for a, b in zip(after.parts, before.parts, strict=True))
    whole_s = wall_s * workers
    parts = {"commit": commits, "model step": steps, "rest of waves": waves - steps}
    shares = {part: seconds / whole_s for part, seconds in parts.items()}
    shares = dict(sorted(shares.items(), key=lambda item: -item[1])) | {"other": max(0.0, 1 - sum(shares.values()))}
    told = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    busy, broker = (after.cpu_s - before.cpu_s) / wall_s, (after.broker_s - before.broker_s) / wall_s
    of_broker = f", broker {broker:.0%}" if broker else ""
    return f"{told}; worker{'s' * (workers > 1)} {busy:.0%}{of_broker} of a core"


def _spent(bench: Bench, workers: Sequence[Program], urls: Sequence[str]) -> Spent:
    used = [worker.usage() for worker in workers]
    broker = usage(bench.broker_pid) if bench.broker_pid else Usage(0, 0)
    parts = [_read(url, SUMS) for url in urls]
    return Spent(
        sum(u.cpu_s for u in used), sum(u.rss for u in used), broker.cpu_s, tuple(map(sum, zip(*parts, strict=True)))
    )


def _forecasts(urls: Sequence[str]) -> float:
    return sum(_read(url, ["carousel_forecasts_produced_total"])[0] for url in urls)


def _read(url: str, names: Sequence[str]) -> list[float]:
    """A worker's metrics of these names."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - ours
        text = answer.read().decode()
    return [float(found[1]) if (found := re.search(rf"^{name} (\S+)", text, re.MULTILINE)) else 0.0 for name in names]
