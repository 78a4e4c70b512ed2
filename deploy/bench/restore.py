"""How long a worker takes to take up its streams, beside a bare read of the same bytes, and a bare copy in memory."""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
from kafka import KafkaConsumer, TopicPartition

from deploy.bench.figures import Probe, Sample
from deploy.bench.follow import COPIED_BYTES_MAX
from deploy.bench.load import Bench, each_record, living, load, transports, turn_until
from service.settings import Settings

STREAMS = 20_000
INTERVAL_S = 60.0
"""The default `snapshot_interval_s`, over which a steady state spreads the snapshots of streams that are all heard."""
NEVER_S = 1e9
"""A `snapshot_interval_s` after which nobody waits: when snapshots are written, the bench says."""
REPLAYED = 5
"""A fifth of the streams have an observation that is in no snapshot, and is replayed."""
READ = "bare read of the snapshots, kafka-python"
COPIED = "bare copy of the states into memory not used before"


def probes(bench: Bench) -> Iterator[Probe]:
    yield Probe("restore", partial(_measure, bench))


def _measure(bench: Bench) -> Iterator[Sample]:
    streams = bench.streams(STREAMS)
    settings = bench.settings(transport=transports(bench.config)[0], snapshot_interval_s=NEVER_S)
    replayed = _fill(bench, settings, streams)
    gc.collect()  # there may be no room for the states of two workers
    bench.tell("restoring")
    began_s = time.perf_counter()
    with living(settings) as worker:
        restore_s = time.perf_counter() - began_s
        row_bytes = worker.engine.arena.schema.row_bytes
    del worker
    gc.collect()
    bench.tell("reading the same bytes")
    read_s, latest, written = _bare_read(settings)
    size = sum(latest.values())
    yield Sample(READ, read_s, "s", "limit", note=f"{written / 1e6:,.0f} MB, {len(latest):,} snapshots count")
    told = f"{streams:,} streams, {replayed:,} observations replayed"
    yield Sample("restore, with joining and replay", restore_s, "s", limit=READ, note=told)
    yield Sample(COPIED, _copied_per_second() / row_bytes, "streams/s", "limit")
    yield Sample("restored", streams / restore_s, "streams/s", limit=COPIED)
    declared = "declared bytes of a stream's state"
    yield Sample(declared, row_bytes, "bytes", "limit")
    yield Sample("bytes a stream on the topic", size / streams, "bytes", limit=declared)
    steady = f"snapshots in steady state, each within {INTERVAL_S:g} s"
    yield Sample(steady, size / 1e6 / INTERVAL_S, "MB/s")


def _fill(bench: Bench, settings: Settings, streams: int) -> int:
    """Let a worker follow the streams, write all snapshots, and a fifth of the streams go on. -> how many."""
    again, skipped_s = max(1, streams // REPLAYED), 0.0
    bench.tell(f"following {streams:,} streams")
    load(settings, each_record(streams, range(streams)))
    with living(settings, lambda: time.monotonic() + skipped_s) as worker:
        turn_until(worker, streams)
        skipped_s = 2 * NEVER_S  # so each snapshot is due, once
        while unsaved := worker.unsaved:
            bench.tell(f"writing {unsaved:,} snapshots")
            worker.turn()
        load(settings, each_record(streams, range(streams, streams + again)))
        turn_until(worker, streams + again)
    return again


def _copied_per_second() -> float:
    """Bytes a second."""
    states, fresh = np.ones(COPIED_BYTES_MAX, np.uint8), np.frombuffer(mmap.mmap(-1, COPIED_BYTES_MAX), np.uint8)
    began_s = time.perf_counter()
    np.copyto(fresh, states)
    return len(states) / (time.perf_counter() - began_s)


def _bare_read(settings: Settings) -> tuple[float, dict[bytes, int], int]:
    """Seconds to read the state topic and no more; the latest snapshots' sizes by key, and that of all."""
    began_s = time.perf_counter()
    reader = KafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    partitions = [TopicPartition(settings.state_topic, p) for p in range(settings.partitions)]
    reader.assign(partitions)
    ends = reader.end_offsets(partitions)
    latest: dict[bytes, int] = {}
    total = 0
    while any(reader.position(tp) < end for tp, end in ends.items()):
        for records in reader.poll(100, max_records=5_000).values():
            for record in records:
                total += len(record.value or b"")
                latest[record.key] = len(record.value or b"")
    reader.close()
    return time.perf_counter() - began_s, {key: size for key, size in latest.items() if size}, total
