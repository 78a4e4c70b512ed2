"""Plays a table into Kafka as if it were live.

What was observed an hour apart is sent an hour apart, or `speed` times faster: a schedule says when each row is due,
and the player waits for it. Late rows are sent at once, so that a slow broker delays the play but never thins it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import orjson
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model.errors import CarouselError
from training.table import Columns, Observed, read_table

IN_FLIGHT_MAX = 4_096
"""Records handed over and not yet acknowledged. The client itself would buffer without end."""
CHUNK = 512
"""Records sent between two looks at the clock and at `stop`."""
CONNECT_TIMEOUT_MS = 8_000
DELIVERY_TIMEOUT_MS = 60_000
"""Long enough for a broker to restart."""


class ReplayError(CarouselError):
    """The table cannot be played; the message is one line."""


@dataclass(frozen=True)
class ReplayConfig:
    """Where a table is played to, and how. Raises ReplayError if a value makes no sense."""

    bootstrap_servers: str
    topic: str = "carousel.observations"
    speed: float = 1.0
    """Table time per wall time; 0: as fast as the broker takes it."""
    align: bool = False
    """All series begin at once, each at its own first row that is played."""
    last: int | None = None
    """Only the last so many rows of each series."""
    limit_s: float | None = None
    """Stop after so much wall time."""
    covariates: tuple[str, ...] = ()
    """Names of the covariates of the series, in their order."""

    def __post_init__(self) -> None:
        if not 0 <= self.speed < float("inf"):
            raise ReplayError(f"--speed must be 0 or more, not {self.speed}")
        if self.last is not None and self.last < 1:
            raise ReplayError(f"--last must be at least 1, not {self.last}")
        if self.limit_s is not None and not self.limit_s > 0:
            raise ReplayError(f"the time limit must be above 0 s, not {self.limit_s}")


@dataclass(frozen=True)
class Clock:
    """Time as the player sees it; tests give another."""

    monotonic_s: Callable[[], float] = time.monotonic
    epoch_s: Callable[[], float] = time.time
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    """wait(stop, seconds): returns early, with True, if `stop` is set."""


class Sender(Protocol):
    """Where records go."""

    def send(self, key: bytes, value: bytes, timestamp_ms: int) -> None:
        """May block; raises ReplayError if this record or an earlier one is lost."""

    def check(self) -> None:
        """Raises ReplayError if a record sent before is lost. Does not block."""

    def flush(self) -> None:
        """Returns when all records are acknowledged; raises ReplayError if one is lost."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """When each row is due, in the order of sending: N rows of any of the series."""

    due_s: NDArray[np.float64]
    """float64[N], never falling: seconds after the start."""
    series: NDArray[np.int64]
    """int64[N]: index of the series."""
    row: NDArray[np.int64]
    """int64[N]: index of the row within it."""

    def __len__(self) -> int:
        return len(self.due_s)


def schedule(series: Sequence[Observed], config: ReplayConfig) -> Schedule:
    """All rows that are played, by time; rows of the same time in the order of the series.

    >>> hourly = Observed("a", np.array([0, 3_600_000, 7_200_000]), np.arange(3.0), np.empty((3, 0)))
    >>> schedule([hourly], ReplayConfig("localhost", speed=3600)).due_s.tolist()
    [0.0, 1.0, 2.0]
    """
    played = [each.ts_ms[-config.last :] if config.last else each.ts_ms for each in series]
    starts = [int(times[0]) for times in played if len(times)]
    if not starts:
        nothing = np.empty(0, dtype=np.int64)
        return Schedule(np.empty(0), nothing, nothing)
    zeros = starts if config.align else [min(starts)] * len(starts)
    after_ms = np.concatenate([t - zero for t, zero in zip([t for t in played if len(t)], zeros, strict=True)])
    which = np.repeat(np.arange(len(series)), [len(times) for times in played])
    row = np.concatenate([np.arange(len(e.ts_ms) - len(t), len(e.ts_ms)) for e, t in zip(series, played, strict=True)])
    order = np.argsort(after_ms, kind="stable")
    due_s = after_ms[order] / 1_000 / config.speed if config.speed else np.zeros(len(order))
    return Schedule(due_s, which[order], row[order])


def encode(observed: Observed, row: int, covariates: Sequence[str] = ()) -> bytes:
    """The value of the record of one row. A covariate that is missing is left out.

    >>> encode(Observed("a", np.array([5]), np.array([np.nan]), np.array([[1.5, np.nan]])), 0, ("temp", "wind"))
    b'{"ts":5,"value":null,"covariates":{"temp":1.5}}'
    """
    fields: dict[str, Any] = {"ts": int(observed.ts_ms[row]), "value": float(observed.y[row])}  # orjson: NaN is null
    if covariates:
        values = observed.covariates[row].tolist()
        known = zip(covariates, values, strict=True)
        fields["covariates"] = {name: value for name, value in known if not math.isnan(value)}
    return orjson.dumps(fields)


class KafkaSender:
    """Writes to a topic, acknowledged by all replicas; a context manager. At most IN_FLIGHT_MAX are on their way.

    Raises ReplayError if the broker does not answer or has no such topic.
    """

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._where, self._topic = bootstrap_servers, topic
        self._in_flight: deque[Any] = deque()
        self._require_topic()
        self._producer = KafkaProducer(
            bootstrap_servers=bootstrap_servers.split(","),
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=262_144,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            request_timeout_ms=10_000,
        )

    def _require_topic(self) -> None:
        """By the list of topics: to ask for the one would create it, on brokers that create what is asked for."""
        try:
            admin = KafkaAdminClient(bootstrap_servers=self._where.split(","), bootstrap_timeout_ms=CONNECT_TIMEOUT_MS)
        except (KafkaError, OSError, ValueError) as error:
            within = f"within {CONNECT_TIMEOUT_MS // 1_000} s; --bootstrap-servers names another"
            raise ReplayError(f"no Kafka broker answers at {self._where} {within}") from error
        try:
            topics = admin.list_topics()
        except KafkaError as error:
            raise ReplayError(f"Kafka at {self._where} does not list its topics: {_one_line(error)}") from error
        finally:
            admin.close()
        if self._topic not in topics:
            raise ReplayError(
                f"Kafka at {self._where} has no topic {self._topic!r}; `carousel serve` creates it when it starts"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # nothing is worth waiting for; close() alone would, and fail again when collected
            self._producer._sender.force_close()
        with _lost_is_error(self._where, raising=kind is None):
            self._producer.close(timeout=DELIVERY_TIMEOUT_MS / 1_000 if kind is None else 1)

    def send(self, key: bytes, value: bytes, timestamp_ms: int) -> None:
        with _lost_is_error(self._where):
            if len(self._in_flight) >= IN_FLIGHT_MAX:
                self._in_flight.popleft().get(timeout=DELIVERY_TIMEOUT_MS / 1_000)
            record = self._producer.send(self._topic, key=key, value=value, timestamp_ms=timestamp_ms)
            self._in_flight.append(record)

    def check(self) -> None:
        with _lost_is_error(self._where):
            while self._in_flight and self._in_flight[0].is_done:
                self._in_flight.popleft().get(timeout=0)

    def flush(self) -> None:
        with _lost_is_error(self._where):
            self._producer.flush(timeout=DELIVERY_TIMEOUT_MS / 1_000)
        self.check()  # flush does not raise for records that failed


@contextmanager
def _lost_is_error(where: str, *, raising: bool = True) -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        if raising:
            raise ReplayError(f"Kafka at {where} did not take all records: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def replay(
    series: Sequence[Observed],
    config: ReplayConfig,
    on_sent: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
) -> int:
    """Plays the series into Kafka; returns how many records were sent, all of them acknowledged.

    `on_sent` is called with the count so far, at least once a chunk of records; setting `stop`, from any thread, ends
    the play at once. Raises ReplayError if the broker or the topic is not there, or records are lost.
    """
    plan = schedule(series, config)
    with KafkaSender(config.bootstrap_servers, config.topic) as sender:
        return play(series, plan, config, sender, on_sent, stop, clock)


def play(
    series: Sequence[Observed],
    plan: Schedule,
    config: ReplayConfig,
    sender: Sender,
    on_sent: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
) -> int:
    """`replay` into any sender."""
    stop, clock = stop or threading.Event(), clock or Clock()
    keys = [each.unique_id.encode() for each in series]
    start_s = clock.monotonic_s()
    limit_s = config.limit_s if config.limit_s is not None else float("inf")
    sent = 0
    while sent < len(plan) and not stop.is_set():
        sender.check()
        elapsed_s = clock.monotonic_s() - start_s
        if elapsed_s >= limit_s:
            break
        due = int(np.searchsorted(plan.due_s, elapsed_s, side="right"))
        if due <= sent:
            # Not longer than a second, so that a record lost meanwhile is noticed.
            clock.wait(stop, min(float(plan.due_s[sent]) - elapsed_s, limit_s - elapsed_s, 1.0))
            continue
        for k in range(sent, min(due, sent + CHUNK)):
            which, row = int(plan.series[k]), int(plan.row[k])
            value = encode(series[which], row, config.covariates)
            sender.send(keys[which], value, int(clock.epoch_s() * 1_000))
        sent = min(due, sent + CHUNK)
        if on_sent:
            on_sent(sent)
    sender.flush()
    return sent


def run(path: Path, columns: Columns, config: ReplayConfig, console: Console | None = None) -> int:
    """The command: reads the table, plays it with a progress bar where there is a terminal, says how many were sent.

    Ctrl-C and SIGTERM end the play in order: what was sent is flushed and counted; a second one ends it at once.
    `columns` names the covariates that are sent. Raises TableError or ReplayError.
    """
    console = console or Console()
    config = replace(config, covariates=columns.covariates)
    series = read_table(path, columns)
    total = len(schedule(series, config))
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with _stopped_by_signals() as stop, bar:
        task = bar.add_task(f"{path.name} → {config.topic}", total=total)
        sent = replay(series, config, lambda count: bar.update(task, completed=count), stop)
    ended = " (interrupted)" if stop.is_set() else ""
    counted = f"sent {sent:,} of {total:,} records of {len(series):,} series to {config.topic}{ended}"
    console.print(counted, highlight=False, markup=False, soft_wrap=True)
    return sent


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, once; the next one acts as usual."""
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
