"""`carousel demo`: everything on this machine, from Kafka to the forecast, on real series.

The sample's held-back end, of which the model saw nothing, is replayed as if it were live. All parts are those that
production runs: a genuine broker, `carousel train`, `carousel serve` as processes of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from deploy.broker import BrokerConfig, EmbeddedBroker
from deploy.distribution import cache_dir
from deploy.java import end, spawn
from deploy.replay import ReplayConfig, replay
from model.errors import CarouselError
from training.table import Observed, read_table

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "sample" / "electricity_hourly.csv.gz"
HELD_BACK = 336
"""Steps of each series that the model never saw and that are played live: two weeks."""
WARM_UP = 336
"""Steps before those, played as fast as possible so that every stream has a past."""
TRAINING = ("--horizon", "24", "--test", str(HELD_BACK), "--seed", "0", "--name", "electricity")
START_LIMIT_S = 90.0
STOP_LIMIT_S = 15.0
REFRESH_S = 0.5
LINE_EVERY_S = 5.0


class DemoError(CarouselError):
    """The demo cannot go on; the message says which part failed and where its log is."""


@dataclass(frozen=True)
class DemoConfig:
    """How the demo runs. speed: table time per wall time."""

    for_s: float | None = None
    speed: float = 7200.0
    bootstrap_servers: str | None = None
    http_port: int = 8000


@dataclass(frozen=True)
class View:
    """What is seen of the running service at one moment."""

    elapsed_s: float
    sent: int
    forecasts: int
    streams: Sequence[dict[str, Any]]
    lag_records: int
    latency_ms: dict[float, float]

    @property
    def scored(self) -> list[dict[str, Any]]:
        return [stream for stream in self.streams if stream["scores"]["scored"]]

    def mean(self, score: str) -> float | None:
        """A score over all streams alike; None before the first truth came."""
        values = [stream["scores"][score] for stream in self.scored if stream["scores"][score] is not None]
        return sum(values) / len(values) if values else None


def run(config: DemoConfig, console: Console | None = None) -> bool:
    """The demo, until its time is over or Ctrl-C. -> whether a forecast came for every stream of the sample.

    Raises DemoError, BrokerError or ReplayError where a part fails. Whatever it started has ended when it returns.
    """
    console = console or Console(highlight=False)
    with ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())
        bundle = _bundle(console)
        servers = config.bootstrap_servers or _broker(stack, console).bootstrap_servers
        with console.status("starting the worker …"):
            url = _worker(stack, bundle, servers, config.http_port)
        console.print(
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
    raise AssertionError


def bundle_directory() -> Path:
    """Where the demo's model is kept: another sample, or another way to train it, is another model."""
    key = hashlib.sha256(SAMPLE.read_bytes() + json.dumps(TRAINING).encode()).hexdigest()[:12]
    return cache_dir() / f"demo-{key}"


def _bundle(console: Console) -> Path:
    """The trained model: the one of last time, or a new one."""
    bundle = bundle_directory()
    if not (bundle / "config.json").exists():
        console.print(f"training a model on {SAMPLE.name} (once; about a minute and a half on two cores)")
        bundle.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "carousel", "train", str(SAMPLE), "--out", str(bundle), "--resume", *TRAINING]
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
    group = f"carousel-demo-{time.time_ns()}"
    command = [sys.executable, "-m", "carousel", "serve", "--model", str(bundle), "--bootstrap-servers", servers]
    command += ["--http-port", str(http_port), "--group-id", group, "--start", "latest"]
    worker = spawn(command, Path.cwd(), output)
    stack.callback(end, worker, STOP_LIMIT_S)
    deadline = time.monotonic() + START_LIMIT_S
    while worker.poll() is None and time.monotonic() < deadline:
        url = _find_url(log_file)
        if url and _ready(url):
            return url
        time.sleep(0.1)
    last = log_file.read_text(errors="replace").strip().splitlines()[-1:]
    raise DemoError(f"the worker did not start: {''.join(last) or 'it said nothing'} (log: {log_file})")


def _find_url(log_file: Path) -> str | None:
    for line in log_file.read_text(errors="replace").splitlines():
        if "serving " in line and "http://" in line:
            return "http://" + line.split("http://")[1].split()[0]
    return None


def _ready(url: str) -> bool:
    with suppress(OSError):
        _get(f"{url}/readyz")
        return True
    return False


class Flow:
    """Plays the sample into Kafka and watches what comes of it, over Kafka and HTTP as any user would."""

    def __init__(self, servers: str, url: str, series: Sequence[Observed]) -> None:
        self.servers, self.url, self.series = servers, url, series
        self.sent = 0
        self.forecasts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._stopping = threading.Event()
        self._failure: CarouselError | None = None
        self._consumer = KafkaConsumer(bootstrap_servers=servers, group_id=None, auto_offset_reset="latest")
        topic = "carousel.forecasts"
        partitions = [TopicPartition(topic, p) for p in sorted(self._consumer.partitions_for_topic(topic))]
        self._consumer.assign(partitions)
        self._consumer.seek_to_end(*partitions)
        for partition in partitions:
            self._consumer.position(partition)  # from here on, before the first observation is sent
        self._last: View | None = None

    def play(self, config: DemoConfig, console: Console) -> None:
        """Replay and show, until the time is over; without a limit, until Ctrl-C."""
        player = threading.Thread(target=self._replay, args=(config.speed,), daemon=True)
        player.start()
        printed = self._started
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while not self._failure:
                self._consume()
                view = self.view()
                live.update(_picture(view), refresh=True)
                if not console.is_terminal and time.monotonic() - printed > LINE_EVERY_S:
                    printed = time.monotonic()
                    console.print(_line(view))
                if config.for_s is not None and view.elapsed_s > config.for_s:
                    break
        self._stopping.set()
        player.join(STOP_LIMIT_S)
        if self._failure:
            raise self._failure
        self._consume()

    def stop(self) -> None:
        self._stopping.set()
        self._consumer.close()

    def _replay(self, speed: float) -> None:
        """The recent past at once, then the held-back end at speed."""
        past = [_rows(each, -HELD_BACK - WARM_UP, -HELD_BACK) for each in self.series]
        live = [_rows(each, -HELD_BACK, None) for each in self.series]
        sent = 0

        def note(count: int) -> None:
            self.sent = sent + count

        try:
            for part, pace in ((past, 0.0), (live, speed)):
                plan = ReplayConfig(self.servers, speed=pace, align=True)
                sent += replay(part, plan, note, self._stopping)
        except CarouselError as error:
            self._failure = error

    def _consume(self) -> None:
        for records in self._consumer.poll(int(REFRESH_S * 1000)).values():
            self.forecasts.update(record.key.decode() for record in records)

    def view(self) -> View:
        """What is to be seen now; the last view if the service does not answer any more."""
        try:
            streams = json.loads(_get(f"{self.url}/v1/streams?limit=1000"))["streams"]
            families = {f.name: f for f in text_string_to_metric_families(_get(f"{self.url}/metrics").decode())}
        except OSError as error:
            if self._last is None:
                raise DemoError(f"the worker at {self.url} does not answer: {error}") from error
            return self._last
        lag = sum(sample.value for sample in families["carousel_consumer_lag_records"].samples)
        buckets = {
            float(sample.labels["le"]): sample.value
            for sample in families["carousel_end_to_end_latency_seconds"].samples
            if sample.name.endswith("_bucket")
        }
        self._last = View(
            time.monotonic() - self._started,
            self.sent,
            sum(self.forecasts.values()),
            streams,
            int(lag),
            {share: 1000 * quantile(buckets, share) for share in (0.5, 0.99)},
        )
        return self._last


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


def _picture(view: View) -> RenderableType:
    table = Table("stream", "status", *_RIGHT)
    for stream in view.streams:
        scores = stream["scores"]
        table.add_row(
            stream["stream"],
            stream["status"],
            f"{stream['count']:,}",
            _number(stream["observed"], ",.1f"),
            _number(scores["mase"], ".3f"),
            _number(scores["coverage"], ".0%"),
        )
    return Group(_line(view), table)


_RIGHT = ("observations", "last value", "error / naive", "in interval")


def _line(view: View) -> str:
    rate = view.forecasts / max(view.elapsed_s, 1e-9)
    return (
        f"{view.elapsed_s:4.0f} s  sent {view.sent:,}  forecasts {view.forecasts:,} ({rate:,.0f}/s)"
        f"  lag {view.lag_records:,}  end to end p50 {view.latency_ms[0.5]:.0f} ms p99 {view.latency_ms[0.99]:.0f} ms"
        f"  error beside seasonal naive {_number(view.mean('mase'), '.3f')}"
        f"  within 80% interval {_number(view.mean('coverage'), '.0%')}"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _summary(flow: Flow, console: Console) -> bool:
    """Say what was counted. -> whether each stream's forecasts came over Kafka."""
    console.print(_picture(flow.view()))
    silent = sorted({each.unique_id for each in flow.series} - set(flow.forecasts))
    if silent:
        console.print(f"[red]no forecast came for {len(silent)} streams: {', '.join(silent)}[/red]")
        return False
    console.print(f"[green]forecasts flowed for all {len(flow.series)} streams[/green]")
    return True


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own, on this machine
        return bytes(answer.read())


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: in order."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
