"""What a stream takes of memory, and how fast many of them go on in turn, beside a bare copy of the same bytes. And
what Prometheus' scrapes take of their worker.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from deploy.bench.figures import BenchError, Probe, Sample
from deploy.bench.load import Bench

STREAMS = 50_000
DECLARED = "declared bytes of a stream's state"
BARE_SCRAPE = "metrics written out, with no streams"
COPIED = "bare copy, each row out and back, in that order"


def probes(bench: Bench) -> Iterator[Probe]:
    yield Probe("memory", partial(_measure, bench))


def _measure(bench: Bench) -> Iterator[Sample]:
    streams = bench.streams(STREAMS)
    found = follow(bench, streams)
    told = f"{streams:,} streams"
    yield Sample(DECLARED, found["row_bytes"], "bytes", "limit")
    yield Sample("resident, a stream", found["resident"] / streams, "bytes", limit=DECLARED, note=told)
    yield Sample("resident at its peak, a stream", found["peak"] / streams, "bytes", limit=DECLARED, note=told)
    yield Sample(COPIED, found["copied_per_second"], "records/s", "limit")
    turn = "engine alone, every stream in turn, at random"
    yield Sample(turn, found["followed_per_second"], "records/s", limit=COPIED, note=told)
    yield Sample(BARE_SCRAPE, found["bare_scrape_ms"], "ms", "limit")
    size = f"{told}, {found['scrape_bytes']:,} bytes"
    yield Sample("metrics written out, for a scrape", found["scrape_ms"], "ms", limit=BARE_SCRAPE, note=size)


def follow(bench: Bench, streams: int) -> dict[str, float]:
    """In a process of its own, whose memory is that of these streams and of nothing before. Raises BenchError."""
    command = [sys.executable, "-m", "deploy.bench.follow", str(bench.model), str(streams)]
    done = subprocess.run(  # noqa: S603  # the command is ours
        [*command, "--threads", str(bench.config.threads)], capture_output=True, check=False
    )
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip()[-500:] or f"status {done.returncode}: killed for memory?"
        raise BenchError(f"following {streams:,} streams failed: {told}")
    found: dict[str, float] = json.loads(done.stdout)
    return found
