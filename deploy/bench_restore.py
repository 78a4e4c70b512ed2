"""`carousel bench --restore N`: how long a worker takes to take up N streams, beside a bare read of the same bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kafka import KafkaConsumer, TopicPartition
from rich.console import Console
from rich.table import Table

from deploy.bench import (
    PARTITIONS,
    BenchConfig,
    living,
    load,
    make_bundle,
    make_records,
    own_settings,
    servers_of,
    turn_until,
)
from model.bundle import Bundle
from service.settings import Settings

INTERVAL_S = 60.0
"""The default `snapshot_interval_s`, over which a steady state spreads the snapshots of streams that are all heard."""
REPLAYED = 5
"""A fifth of the streams have an observation that is in no snapshot, and is replayed."""


@dataclass(frozen=True)
class Restored:
    """What was measured. snapshots, snapshot_bytes: the latest of each bucket; read_bytes: of all that a restore reads,
    older ones that were not compacted yet among them.
    """

    streams: int
    replayed: int
    restore_s: float
    bare_read_s: float
    snapshots: int
    snapshot_bytes: int
    read_bytes: int
    row_bytes: int


def run(streams: int, config: BenchConfig, console: Console | None = None) -> Restored:
    """Measure and print. Raises BrokerError or ServiceError where Kafka cannot be had."""
    console = console or Console(highlight=False)
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as directory, console.status("starting Apache Kafka …") as status:
        bundle = make_bundle(Path(directory))
        with servers_of(config) as servers:
            settings = own_settings(servers, Path(directory), max_streams=streams)
            measured = _measure(streams, bundle, settings, lambda what: status.update(f"{what} …"))
    console.print(_table(measured))
    return measured


def _measure(streams: int, bundle: Bundle, settings: Settings, tell: Callable[[str], None]) -> Restored:
    records = make_records(BenchConfig(streams=streams, steps=2))
    once, again = records[:streams], records[streams : streams + streams // REPLAYED]
    tell(f"following {streams:,} streams and writing their snapshots")
    load(settings, once)
    at_once, never = (settings.model_copy(update={"snapshot_interval_s": interval_s}) for interval_s in (0.001, 1e9))
    with living(bundle, at_once) as worker:
        turn_until(worker, streams)
        while worker.unsaved:
            worker.turn()
    with living(bundle, never) as worker:
        load(settings, again)
        turn_until(worker, len(again))
    tell("restoring")
    started_s = time.perf_counter()
    with living(bundle, never) as worker:
        restore_s = time.perf_counter() - started_s
        row_bytes = worker.engine.arena.schema.row_bytes
    tell("reading the same bytes")
    bare_read_s, latest, written = _bare_read(settings)
    return Restored(streams, len(again), restore_s, bare_read_s, len(latest), sum(latest.values()), written, row_bytes)


def _bare_read(settings: Settings) -> tuple[float, dict[bytes, int], int]:
    """Seconds to read the state topic and no more; the latest snapshots' sizes by key, and that of all."""
    started_s = time.perf_counter()
    reader = KafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    partitions = [TopicPartition(settings.state_topic, p) for p in range(PARTITIONS)]
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
    return time.perf_counter() - started_s, {key: size for key, size in latest.items() if size}, total


def _table(measured: Restored) -> Table:
    title = f"{measured.streams:,} streams, LSTM 64 x 2, 24 x 9 quantiles, {PARTITIONS} partitions, one process"
    table = Table("measured", "", title=title, title_justify="left")
    megabytes = measured.snapshot_bytes / 1e6
    for what, figure in (
        ("restore: session, snapshots, replay", f"{measured.restore_s:.1f} s"),
        ("limit: a bare read of the snapshots by kafka-python", f"{measured.bare_read_s:.1f} s"),
        ("restored", f"{measured.streams / measured.restore_s:,.0f} streams/s"),
        ("observations replayed in it", f"{measured.replayed:,}"),
        ("snapshots", f"{measured.snapshots:,}, {megabytes:,.0f} MB; read: {measured.read_bytes / 1e6:,.0f} MB"),
        ("bytes a stream on the topic", f"{measured.snapshot_bytes / measured.streams:,.0f}"),
        ("bytes a stream in memory (its declared rows)", f"{measured.row_bytes:,}"),
        (f"written in steady state, each within {INTERVAL_S:g} s", f"{megabytes / INTERVAL_S:,.1f} MB/s"),
    ):
        table.add_row(what, figure)
    return table
