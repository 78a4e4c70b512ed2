"""How long a worker takes to take up its streams, beside a bare read of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from kafka import KafkaConsumer, TopicPartition

from deploy.bench.figures import Probe, Sample
from deploy.bench.load import Bench, living, load, make_records, transports, turn_until
from service.settings import Settings

STREAMS = 20_000
INTERVAL_S = 60.0
"""The default `snapshot_interval_s`, over which a steady state spreads the snapshots of streams that are all heard."""
REPLAYED = 5
"""A fifth of the streams have an observation that is in no snapshot, and is replayed."""
READ = "bare read of the snapshots, kafka-python"


def probes(bench: Bench) -> Iterator[Probe]:
    yield Probe("restore", partial(_measure, bench))


def _measure(bench: Bench) -> Iterator[Sample]:
    streams = bench.streams(STREAMS)
    settings = bench.settings(transport=transports(bench.config)[0])
    replayed = _fill(bench, settings, streams)
    bench.tell("restoring")
    began_s = time.perf_counter()
    with living(_every(settings, 1e9)) as worker:
        restore_s = time.perf_counter() - began_s
        row_bytes = worker.engine.arena.schema.row_bytes
    bench.tell("reading the same bytes")
    read_s, latest, written = _bare_read(settings)
    size = sum(latest.values())
    yield Sample(READ, read_s, "s", "limit", note=f"{written / 1e6:,.0f} MB, {len(latest):,} snapshots count")
    told = f"{streams:,} streams, {replayed:,} observations replayed"
    yield Sample("restore, with joining and replay", restore_s, "s", limit=READ, note=told)
    yield Sample("restored", streams / restore_s, "streams/s")
    declared = "declared bytes of a stream's state"
    yield Sample(declared, row_bytes, "bytes", "limit")
    yield Sample("bytes a stream on the topic", size / streams, "bytes", limit=declared)
    steady = f"snapshots in steady state, each within {INTERVAL_S:g} s"
    yield Sample(steady, size / 1e6 / INTERVAL_S, "MB/s")


def _fill(bench: Bench, settings: Settings, streams: int) -> int:
    """Let a worker follow the streams, write all snapshots, and a fifth of the streams go on. -> how many."""
    once = make_records(streams, 1)
    again = make_records(streams, 1, first=1)[: max(1, streams // REPLAYED)]
    bench.tell(f"following {streams:,} streams and writing their snapshots")
    load(settings, once)
    with living(_every(settings, 0.001)) as worker:
        turn_until(worker, streams)
        while worker.unsaved:
            worker.turn()
    with living(_every(settings, 1e9)) as worker:
        load(settings, again)
        turn_until(worker, len(again))
    return len(again)


def _every(settings: Settings, interval_s: float) -> Settings:
    return settings.model_copy(update={"snapshot_interval_s": interval_s})


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
