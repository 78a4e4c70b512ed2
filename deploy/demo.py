"""`carousel demo`: everything on this machine, from Kafka to the forecast, on real series.

The sample's held-back end, of which the model saw nothing, is replayed as if it were live. All parts are those that
production runs: a genuine broker, `carousel train`, `carousel serve` as processes of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

import model
import training
from deploy import workers
from deploy.broker import BrokerConfig, EmbeddedBroker
from deploy.distribution import cache_dir
from deploy.java import end, signals_interrupt, spawn
from deploy.replay import ReplayConfig, replay
from model.errors import CarouselError
from training.table import Observed, read_table

SAMPLE = Path(__file__).parent / "sample" / "electricity_hourly.csv.gz"
HELD_BACK = 336
"""Steps of each series that the model never saw and that are played live: two weeks."""
WARM_UP = 336
"""Steps before those, played as fast as possible so that every stream has a past."""
TRAINING = ("--horizon", "24", "--test", str(HELD_BACK), "--seed", "0", "--name", "electricity")
START_LIMIT_S = 90.0
STOP_LIMIT_S = 15.0
REFRESH_S = 0.5
RATE_OVER_S = 5.0
SEASON = 24
TOPIC = "carousel.forecasts"
HTTP_PORT = 8000
LINE_EVERY_S = 5.0


class DemoError(CarouselError):
    """The demo cannot go on; the message says which part failed and where its log is."""


@dataclass(frozen=True)
class DemoConfig:
    """How the demo runs. speed: table time per wall time. http_port None: the usual one, or a free one if taken."""

    for_s: float | None = None
    speed: float = 7200.0
    bootstrap_servers: str | None = None
    http_port: int | None = None


@dataclass
class Tally:
    """What came for one stream over the forecasts topic; scored on the held-back part alone, one step ahead."""

    forecasts: int = 0
    observed: deque[float] = field(default_factory=lambda: deque(maxlen=SEASON))
    open: tuple[float, ...] = ()
    scored: int = 0
    error: float = 0.0
    naive_error: float = 0.0
    hits: int = 0

    def take(self, forecast: dict[str, Any]) -> None:
        """Settle the open forecast with what was observed, and open the next."""
        self.forecasts += 1
        value = forecast["observed"]
        if value is None:
            return
        if self.forecasts > WARM_UP and len(self.observed) == SEASON:
            low, *_, high = self.open
            self.scored += 1
            self.error += abs(value - self.open[len(self.open) // 2])
            self.naive_error += abs(value - self.observed[0])
            self.hits += low <= value <= high
        self.observed.append(value)
        self.open = tuple(steps[0] for steps in forecast["quantiles"].values())


@dataclass(frozen=True)
class View:
    """What is seen of the flow at one moment. latency_ms: by share of the records, of the live part alone."""

    elapsed_s: float
    sent: int
    forecasts: int
    per_second: float
    lag_records: int
    latency_ms: Mapping[float, float]
    error: float | None
    coverage: float | None


def run(config: DemoConfig, console: Console | None = None) -> bool:
    """The demo, until its time is over or Ctrl-C. -> whether a forecast came for every stream of the sample.

    Raises DemoError, BrokerError or ReplayError where a part fails. Whatever it started has ended when it returns.
    """
    console = console or Console(highlight=False)
    with ExitStack() as stack:
        stack.enter_context(signals_interrupt())
        bundle = _bundle(console)
        servers = config.bootstrap_servers or _broker(stack, console).bootstrap_servers
        with console.status("starting the worker …"):
            url = _worker(stack, bundle, servers, _usual_port() if config.http_port is None else config.http_port)
        console.print(
            f"[bold]look[/bold]     {url}\n"
            f"[bold]Kafka[/bold]    {servers}  carousel.observations → carousel.forecasts\n"
            f"[bold]API[/bold]      {url}/v1/streams   {url}/openapi.json\n"
            f"[bold]metrics[/bold]  {url}/metrics"
        )
        series = read_table(SAMPLE)
        flow = Flow(servers, url, series)
        try:
            with suppress(KeyboardInterrupt):
                flow.play(config, console)
        finally:
            flow.stop()
        return _summary(flow, console)
    raise AssertionError  # nothing on the stack swallows an exception; mypy cannot know


def bundle_directory() -> Path:
    """Where the demo's model is kept: another sample, or other code that learns from it, is another model."""
    key = hashlib.sha256(SAMPLE.read_bytes() + json.dumps(TRAINING).encode())
    for package in (model, training):
        for source in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            key.update(source.read_bytes())
    return cache_dir() / f"demo-{key.hexdigest()[:12]}"


def _bundle(console: Console) -> Path:
    """The trained model: the one of last time, or a new one."""
    bundle = bundle_directory()
    if not (bundle / "config.json").exists():
        console.print(f"training a model on {SAMPLE.name} (once; about a minute and a half on two cores)")
        bundle.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "carousel", "train", str(SAMPLE), "--out", str(bundle), *TRAINING]
        trainer = subprocess.Popen(command)  # noqa: S603 - ours; it shares the terminal, and its Ctrl-C
        try:
            status = trainer.wait()
        finally:
            end(trainer, STOP_LIMIT_S)
        if status:
            raise DemoError(f"training ended with status {status}; what it said stands above")
    console.print(f"[bold]model[/bold]    {bundle}")
    return bundle


def _broker(stack: ExitStack, console: Console) -> EmbeddedBroker:
    with console.status("starting Apache Kafka …") as status:
        broker = EmbeddedBroker(BrokerConfig(), lambda text: status.update(f"{text} …"))
        return stack.enter_context(broker)


def _worker(stack: ExitStack, bundle: Path, servers: str, http_port: int) -> str:
    """Start `carousel serve` and wait until it is ready. -> its URL."""
    log_file = bundle / "serve.log"
    output = stack.enter_context(log_file.open("wb"))
    settings = {
        "model": bundle,
        "bootstrap_servers": servers,
        "http_port": http_port,
        "group_id": f"carousel-demo-{time.time_ns()}",
        "start": "latest",
    }
    worker = spawn(workers.command(settings), Path.cwd(), output)
    stack.callback(end, worker, STOP_LIMIT_S)
    deadline = time.monotonic() + START_LIMIT_S
    while worker.poll() is None and time.monotonic() < deadline:
        url = workers.url(log_file.read_text(errors="replace"))
        if url and _ready(url):
            return url
        time.sleep(0.1)
    last = log_file.read_text(errors="replace").strip().splitlines()[-1:]
    raise DemoError(f"the worker did not start: {''.join(last) or 'it said nothing'} (log: {log_file})")


def _usual_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", HTTP_PORT))
        except OSError:
            return 0
    return HTTP_PORT


def _ready(url: str) -> bool:
    with suppress(OSError):
        _get(f"{url}/readyz")
        return True
    return False


class Flow:
    """Plays the sample into Kafka and watches what comes of it, over Kafka and HTTP as any user would."""

    def __init__(self, servers: str, url: str, series: Sequence[Observed]) -> None:
        self.servers, self.url, self.series = servers, url, series
        self.tallies = {each.unique_id: Tally() for each in series}
        self._sent = 0
        self._started = time.monotonic()
        self._live = threading.Event()
        self._stopping = threading.Event()
        self._failure: CarouselError | None = None
        self._before_live: dict[float, float] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=int(RATE_OVER_S / REFRESH_S))
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, group_id=None, auto_offset_reset="latest", isolation_level="read_committed"
        )
        partitions = [TopicPartition(TOPIC, p) for p in sorted(self._consumer.partitions_for_topic(TOPIC))]
        self._consumer.assign(partitions)
        self._consumer.seek_to_end(*partitions)
        for partition in partitions:
            self._consumer.position(partition)  # from here on, before the first observation is sent

    def play(self, config: DemoConfig, console: Console) -> None:
        """Replay and show, until the time is over; without a limit, until Ctrl-C."""
        player = threading.Thread(target=self._replay, args=(config.speed,), daemon=True)
        player.start()
        printed, played = self._started, False
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while not self._failure:
                self._consume()
                view = self.view()
                if console.is_terminal:
                    live.update(picture(view, self.tallies), refresh=True)
                elif time.monotonic() - printed > LINE_EVERY_S:
                    printed = time.monotonic()
                    console.print(line(view), soft_wrap=True)
                if config.for_s is not None and view.elapsed_s > config.for_s:
                    break
                if not (played or player.is_alive()):
                    played = True
                    console.print("the table is played to its end; all goes on, to be asked, until Ctrl-C")
        self._stopping.set()
        player.join(STOP_LIMIT_S)
        if self._failure:
            raise self._failure
        self._consume()

    def stop(self) -> None:
        self._stopping.set()
        self._consumer.close()

    def _replay(self, speed: float) -> None:
        """The recent past at once; when it is through, the held-back end at speed."""
        past = [_rows(each, -HELD_BACK - WARM_UP, -HELD_BACK) for each in self.series]
        live = [_rows(each, -HELD_BACK, None) for each in self.series]
        try:
            self._send(past, 0.0)
            while self._forecasts() < self._sent and not self._stopping.wait(REFRESH_S):
                pass
            self._before_live = self._latencies(self._scrape())
            self._live.set()
            self._send(live, speed)
        except CarouselError as error:
            self._failure = error

    def _send(self, series: Sequence[Observed], speed: float) -> None:
        before = self._sent

        def note(count: int) -> None:
            self._sent = before + count

        replay(series, ReplayConfig(self.servers, speed=speed, align=True), note, self._stopping)

    def _consume(self) -> None:
        for records in self._consumer.poll(int(REFRESH_S * 1000)).values():
            for record in records:
                forecast = json.loads(record.value)
                if tally := self.tallies.get(forecast["stream"]):  # a Kafka that was named may have others' too
                    tally.take(forecast)

    def _forecasts(self) -> int:
        return sum(tally.forecasts for tally in self.tallies.values())

    def _scrape(self) -> dict[str, Metric]:
        try:
            text = _get(f"{self.url}/metrics").decode()
        except OSError as error:
            raise DemoError(f"the worker at {self.url} does not answer: {error}") from error
        return {family.name: family for family in text_string_to_metric_families(text)}

    def _latencies(self, families: dict[str, Metric]) -> dict[float, float]:
        """The cumulative buckets of the end-to-end latency, less those from before the live part."""
        return {
            bound: sample.value - self._before_live.get(bound, 0.0)
            for sample in families["carousel_end_to_end_latency_seconds"].samples
            if sample.name.endswith("_bucket")
            for bound in [float(sample.labels["le"])]
        }

    def view(self) -> View:
        """What is to be seen now. Raises DemoError if the worker does not answer."""
        families = self._scrape()
        now, forecasts = time.monotonic(), self._forecasts()
        self._marks.append((now, forecasts))
        seconds = max(now - self._marks[0][0], REFRESH_S)
        latencies = self._latencies(families) if self._live.is_set() else {}
        tallies = self.tallies.values()
        ratios = [tally.error / tally.naive_error for tally in tallies if tally.naive_error]
        scored = sum(tally.scored for tally in tallies)
        return View(
            elapsed_s=now - self._started,
            sent=self._sent,
            forecasts=forecasts,
            per_second=(forecasts - self._marks[0][1]) / seconds,
            lag_records=int(sum(sample.value for sample in families["carousel_consumer_lag_records"].samples)),
            latency_ms={share: 1000 * quantile(latencies, share) for share in (0.5, 0.99)},
            error=sum(ratios) / len(ratios) if ratios else None,
            coverage=sum(tally.hits for tally in tallies) / scored if scored else None,
        )


def quantile(buckets: dict[float, float], share: float) -> float:
    """A quantile from a histogram's cumulative buckets {upper bound: count}, linear within one, as Prometheus has it.

    >>> quantile({1.0: 5.0, 2.0: 10.0, float("inf"): 10.0}, 0.75)
    1.5
    """
    total = max(buckets.values(), default=0.0)
    below, low = 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= share * total > below:
            return low if bound == float("inf") else low + (bound - low) * (share * total - below) / (count - below)
        below, low = count, bound
    return 0.0


def _rows(series: Observed, start: int, stop: int | None) -> Observed:
    part = slice(start, stop)
    return dataclasses.replace(series, ts_ms=series.ts_ms[part], y=series.y[part], covariates=series.covariates[part])


def picture(view: View, tallies: Mapping[str, Tally]) -> RenderableType:
    """A line on the whole, and a row a stream."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stream", no_wrap=True)
    for heading in ("forecasts", "last", "next, 80%", "error/naive", "in 80%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stream, tally in sorted(tallies.items()):
        table.add_row(
            stream,
            f"{tally.forecasts:,}",
            _short(tally.observed[-1]) if tally.observed else "–",
            f"{_short(tally.open[0])}…{_short(tally.open[-1])}" if tally.open else "–",
            f"{tally.error / tally.naive_error:.2f}" if tally.naive_error else "–",
            f"{tally.hits / tally.scored:.0%}" if tally.scored else "–",
        )
    return Group(line(view), table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line(view: View) -> str:
    """The whole flow in a line. The error is the median forecast's, one step ahead, over the seasonal naive one's."""
    parts = [
        f"{view.elapsed_s:3.0f} s",
        f"sent {view.sent:,}",
        f"forecasts {view.forecasts:,} ({view.per_second:,.0f}/s)",
        f"lag {view.lag_records:,}",
        f"end to end p50 {view.latency_ms[0.5]:.0f} ms, p99 {view.latency_ms[0.99]:.0f} ms",
    ]
    if view.error is not None and view.coverage is not None:
        parts.append(f"error beside seasonal naive {view.error:.2f}, in 80% interval {view.coverage:.0%}")
    return " · ".join(parts)


def _summary(flow: Flow, console: Console) -> bool:
    """Say what was counted. -> whether each stream's forecasts came over Kafka."""
    console.print(picture(flow.view(), flow.tallies))
    silent = sorted(stream for stream, tally in flow.tallies.items() if not tally.forecasts)
    if silent:
        console.print(f"[red]no forecast came for {len(silent)} streams: {', '.join(silent)}[/red]")
        return False
    console.print(f"[green]forecasts flowed for all {len(flow.tallies)} streams[/green]")
    return True


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own, on this machine
        return bytes(answer.read())
