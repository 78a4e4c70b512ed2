"""Follows streams in a process of its own and tells, as JSON, what they took.

python -m deploy.bench.follow BUNDLE STREAMS
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import generate_latest

from deploy.bench.load import each_record, new_engine, process
from deploy.bench.programs import usage
from service.engine import Engine
from service.metrics import Metrics
from service.settings import Settings

POLL = 5_000
SCRAPES = 20
COPIED_BYTES_MAX = 1 << 31
"""The bare copy goes over no more: it is far more than any cache holds, and has to be there beside the streams."""


def run_in_turn(engine: Engine, step: int, order: NDArray[np.int64]) -> float:
    """One observation of every stream, in this order. -> records a second, making the records left out."""
    took_s, streams = 0.0, len(order)
    for start in range(0, streams, POLL):
        polled = list(each_record(streams, (step * streams + order[start : start + POLL]).tolist()))
        began = time.perf_counter()
        process(engine, polled)
        engine.commit({record.partition: record.offset + 1 for record in polled})
        took_s += time.perf_counter() - began
    return streams / took_s


def copy_in_turn(row_bytes: int, order: NDArray[np.int64]) -> float:
    """Rows a second that can be taken out and put back, whole and a poll at a time, with nothing done between."""
    rows = min(len(order), max(1, COPIED_BYTES_MAX // row_bytes))
    memory, some = np.ones((rows, row_bytes), dtype=np.uint8), order[order < rows]
    out = np.ones((min(POLL, rows), row_bytes), dtype=np.uint8)
    began = time.perf_counter()
    for start in range(0, rows, POLL):
        chosen = some[start : start + POLL]
        np.take(memory, chosen, axis=0, out=out[: len(chosen)])
        memory[chosen] = out[: len(chosen)]
    return rows / (time.perf_counter() - began)


def scrape(metrics: Metrics) -> tuple[float, int]:
    """What Prometheus asks for, written out: the ms that it takes, and its bytes."""
    took_s, size = [], 0
    for _ in range(SCRAPES):
        began = time.perf_counter()
        size = len(generate_latest(metrics.registry))
        took_s.append(time.perf_counter() - began)
    return 1000 * median(took_s), size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("streams", type=int)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    engine = new_engine(Settings.load({"model": given.bundle, "max_streams": 10_000_000}))
    in_order = np.arange(given.streams)
    at_random = np.random.default_rng(0).permutation(given.streams)
    bare_ms, _ = scrape(engine.metrics)
    before = usage(os.getpid()).rss
    run_in_turn(engine, 0, in_order)
    resident, peak = usage(os.getpid()).rss - before, _peak() - before
    followed = run_in_turn(engine, 1, at_random)
    scrape_ms, scrape_bytes = scrape(engine.metrics)
    row_bytes = engine.arena.schema.row_bytes
    found = {
        "row_bytes": row_bytes,
        "resident": resident,
        "peak": peak,
        "followed_per_second": followed,
        "bare_scrape_ms": bare_ms,
        "scrape_ms": scrape_ms,
        "scrape_bytes": scrape_bytes,
        "copied_per_second": copy_in_turn(row_bytes, at_random),
    }
    print(json.dumps(found))  # noqa: T201


def _peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
