"""What operators see: Prometheus metrics, updated once a wave. Labels are few and bounded; a stream is one only
where it is watched (`watched_streams`), and few are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import isnan

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.errors import Reason

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
ANOMALY = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
FORWARDED = ("answered", "refused", "unreachable", "busy")
OUTCOMES = ("observed", "missing", "duplicate", "late", "ended", "rejected")


class BatchHistogram(Collector):
    """A histogram that takes many values at once: prometheus_client's own takes one, at 1.7 us each."""

    def __init__(self, name: str, documentation: str, buckets: Iterable[float], registry: CollectorRegistry) -> None:
        self.name, self.documentation = name, documentation
        self.bounds = np.array([*buckets, np.inf])
        self.counts = np.zeros(len(self.bounds), dtype=np.int64)
        self.sum = 0.0
        registry.register(self)

    def observe(self, values: ArrayLike) -> None:
        """Count each of `values` (a number or an array of any shape)."""
        values = np.atleast_1d(np.asarray(values, dtype=float))
        places = np.searchsorted(self.bounds, values)
        self.counts = self.counts + np.bincount(places.ravel(), minlength=len(self.bounds))
        self.sum += float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets = [
            (floatToGoString(bound), float(count))  # type: ignore[no-untyped-call]
            for bound, count in zip(self.bounds, np.cumsum(self.counts), strict=True)
        ]
        yield HistogramMetricFamily(self.name, self.documentation, buckets=buckets, sum_value=self.sum)


class Watched(Collector):
    """Of a few streams the last value, and what had been forecast for it: all told at once, so that whoever is gone is
    gone. NaN is not told.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.told: Mapping[str, tuple[float, Mapping[str, float]]] = {}
        """By stream: its last value, and by quantile the forecast of it, made one step before."""
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        observed = GaugeMetricFamily(
            "carousel_watched_observed", "The last value of a watched stream.", labels=["stream"]
        )
        forecast = GaugeMetricFamily(
            "carousel_watched_forecast",
            "What had been forecast for it one step before.",
            labels=["stream", "q"],  # `quantile` is for summaries, says promtool
        )
        for stream, (value, by_quantile) in self.told.items():
            if not isnan(value):
                observed.add_metric([stream], value)
            for quantile, expected in by_quantile.items():
                if not isnan(expected):
                    forecast.add_metric([stream, quantile], expected)
        yield observed
        yield forecast


class Metrics:
    """The metrics of one worker, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.build = Info("carousel_build", "Version of Carousel, and what it serves.", registry=registry)
        self.model = Info("carousel_model", "The model that is served.", registry=registry)
        self.consumed = Counter(
            "carousel_records_consumed_total", "Records read from Kafka.", ["topic"], registry=registry
        )
        observations = Counter(
            "carousel_observations_total",
            "Records by what became of them: observed and missing ones move their stream on; duplicate and late ones"
            " change nothing; ended ones end their stream; rejected ones are dead letters.",
            ["outcome"],
            registry=registry,
        )
        self.observations = {outcome: observations.labels(outcome) for outcome in OUTCOMES}
        rejected = Counter("carousel_records_rejected_total", "Dead letters by reason.", ["reason"], registry=registry)
        self.rejected = {reason: rejected.labels(reason.value) for reason in Reason}
        self.forecasts = Counter(
            "carousel_forecasts_produced_total", "Forecasts delivered to Kafka.", registry=registry
        )
        self.bridged = Counter(
            "carousel_steps_bridged_total", "Missing steps made up for gaps in streams.", registry=registry
        )
        self.restarted = Counter(
            "carousel_streams_restarted_total", "Streams that began afresh after a gap too long.", registry=registry
        )
        evicted = Counter(
            "carousel_streams_evicted_total",
            "Streams forgotten to bound the state: idle for too long, or not heard for longest in a full partition.",
            ["reason"],
            registry=registry,
        )
        self.evicted = {reason: evicted.labels(reason) for reason in ("full", "idle")}
        self.wave_rows = BatchHistogram("carousel_wave_rows", "Streams advanced together in a wave.", ROWS, registry)
        self.wave_seconds = BatchHistogram(
            "carousel_wave_duration_seconds",
            "Time of waves that go together: gather, advance, scatter, encode.",
            SECONDS,
            registry,
        )
        self.step_seconds = BatchHistogram(
            "carousel_step_duration_seconds", "Time of the model's step in waves that go together.", SECONDS, registry
        )
        self.commit_seconds = BatchHistogram(
            "carousel_commit_duration_seconds", "Time to deliver forecasts and commit offsets.", SECONDS, registry
        )
        commits = Counter(
            "carousel_commits_total", "Commits by what became of them; aborted ones are done again.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.commits = {outcome: commits.labels(outcome) for outcome in ("committed", "aborted")}
        self.snapshots = Counter(
            "carousel_snapshots_written_total", "Buckets of states written to the state topic.", registry=registry
        )
        self.snapshot_bytes = Counter(
            "carousel_snapshot_bytes_total", "Bytes of states written to the state topic.", registry=registry
        )
        self.restoring = Gauge(
            "carousel_restoring_partitions", "Partitions whose states are being restored.", registry=registry
        )
        self.restore_progress = Gauge(
            "carousel_restore_progress_ratio", "The part of the restorations' replays that is done.", registry=registry
        )
        self.restore_seconds = BatchHistogram(
            "carousel_state_restore_duration_seconds",
            "From a partition's assignment to its first observation: reading its snapshots, replaying its input.",
            (*SECONDS, 30.0, 60.0, 300.0),
            registry,
        )
        self.end_to_end_seconds = BatchHistogram(
            "carousel_end_to_end_latency_seconds",
            "From an observation record's timestamp to its forecast's delivery.",
            SECONDS,
            registry,
        )
        self.lag = Gauge(
            "carousel_consumer_lag_records",
            "Records in a partition that were not yet read.",
            ["topic", "partition"],
            registry=registry,
        )
        self.partitions = Gauge("carousel_partitions", "Partitions that the observations topic has.", registry=registry)
        self.assigned = Gauge(
            "carousel_partitions_assigned",
            "Those of them that are this worker's, with their states or still restoring them.",
            registry=registry,
        )
        self.streams = Gauge("carousel_active_streams", "Streams with a state in this worker.", registry=registry)
        self.state_bytes = Gauge("carousel_state_bytes", "Bytes of the states in use.", registry=registry)
        self.ready = Gauge(
            "carousel_ready", "1 while the worker is a member of its group and has its states.", registry=registry
        )
        judged = (
            ("intervals_scored", "Forecast intervals whose truth came, by their level.", ["level", "horizon"]),
            ("forecast_pinball", "Sum of their mean quantile losses (doubled).", ["horizon"]),
            ("forecast_error", "Sum of the absolute errors of their medians.", ["horizon"]),
            ("forecast_naive_error", "Sum of the same of the seasonal naive forecasts beside them.", ["horizon"]),
            ("intervals_hit", "Forecast intervals that held their truth, by their level.", ["level", "horizon"]),
        )
        self.judged = [
            (
                Counter(f"carousel_{name}_total", f"{says} At horizons 1, 2, 4 ... only.", names, registry=registry),
                names,
            )
            for name, says, names in judged
        ]
        self.anomaly = BatchHistogram(
            "carousel_anomaly_score",
            "How odd observations were to the forecasts that stood open for them: 2 is one in a hundred.",
            ANOMALY,
            registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from an HTTP request's headers to its answer's, by route template; unknown paths are `none`.",
            ["handler", "method", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        forwarded = Counter(
            "carousel_requests_forwarded_total",
            "Requests to other workers by what became of them: answered; refused (503: the partition moved, or is not"
            " ready); unreachable, or too slow; busy: not passed on, too many at once.",
            ["outcome"],
            registry=registry,
        )
        self.forwarded = {outcome: forwarded.labels(outcome) for outcome in FORWARDED}
        self.watched = Watched(registry)
        self.event_readers = Gauge("carousel_event_readers", "Open requests to /v1/events.", registry=registry)
        self.events_dropped = Counter(
            "carousel_events_dropped_total", "Events not sent because their reader was too slow.", registry=registry
        )

    def forget_partition(self, topic: str, partition: int) -> None:
        """What is told of a partition that this worker no longer has."""
        with suppress(KeyError):
            self.lag.remove(topic, str(partition))


class Judged:
    """The counters of settled forecasts, bound to the settled horizons of one model."""

    def __init__(self, metrics: Metrics, quantiles: Sequence[float], horizons: Sequence[int]) -> None:
        level = f"{quantiles[-1] - quantiles[0]:.6g}"
        labels = [{"level": level, "horizon": str(horizon)} for horizon in horizons]
        self.counters = [
            [counter.labels(*(known[name] for name in names)) for counter, names in metrics.judged] for known in labels
        ]

    def inc(self, measures: Sequence[Sequence[float]]) -> None:
        """Count what was settled: by horizon, the measures of `model.scoring`."""
        for counters, by in zip(self.counters, measures, strict=True):
            for counter, value in zip(counters, by, strict=True):
                counter.inc(value)
