from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import KafkaAdminClient, NewTopic

from deploy.broker import BrokerConfig, BrokerError, EmbeddedBroker
from deploy.distribution import Distribution, cache_dir, installed
from tests.served import until

LIMIT_S = 60.0


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie: in a container nobody may reap orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def produce(bootstrap_servers: str, topic: str, values: list[bytes]) -> None:
    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
    admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers)
    for value in values:
        producer.send(topic, value)
    producer.close()


def consume(bootstrap_servers: str, topic: str, count: int) -> list[bytes]:
    consumer = KafkaConsumer(
        topic, bootstrap_servers=bootstrap_servers, group_id="readers", auto_offset_reset="earliest"
    )
    values: list[bytes] = []

    def enough() -> bool:
        # Long enough to join the group in one poll: kafka-python begins a join anew that ended between two.
        values.extend(r.value for records in consumer.poll(timeout_ms=5_000).values() for r in records)
        return len(values) >= count

    until(f"{count} records of {topic}", enough)
    consumer.close()
    return sorted(values)


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A running broker with a data directory of its own."""
    with EmbeddedBroker(BrokerConfig(data_dir=tmp_path_factory.mktemp("broker") / "dätä, 1")) as broker:
        yield broker


def test_the_session_broker_takes_and_gives_records(bootstrap_servers: str) -> None:
    topic = f"test-broker-{os.getpid()}"
    produce(bootstrap_servers, topic, [b"one", b"two", b"three"])
    assert consume(bootstrap_servers, topic, 3) == [b"one", b"three", b"two"]


def test_a_restart_keeps_topics_records_and_the_port(stored: EmbeddedBroker) -> None:
    produce(stored.bootstrap_servers, "kept", [b"one", b"two"])
    before = stored.bootstrap_servers
    stored.stop()
    stored.stop()
    assert stored.log_file == stored.data_dir / "broker.log"
    assert stored.log_file.stat().st_size > 0
    stored.start()
    assert stored.bootstrap_servers == before
    assert consume(stored.bootstrap_servers, "kept", 2) == [b"one", b"two"]


def test_a_taken_port_is_named(stored: EmbeddedBroker) -> None:
    with pytest.raises(BrokerError, match=f"port {stored.port} on 127.0.0.1 is taken"):
        EmbeddedBroker(BrokerConfig(port=stored.port)).start()


def test_a_directory_in_use_is_refused_and_its_broker_unharmed(stored: EmbeddedBroker) -> None:
    with pytest.raises(BrokerError, match="another broker runs in"):
        EmbeddedBroker(BrokerConfig(data_dir=stored.data_dir)).start()
    assert stored.poll() is None
    assert f":{stored.port}," in (stored.data_dir / "server.properties").read_text()


def test_a_port_lost_in_a_race_is_replaced(stored: EmbeddedBroker, tmp_path: Path) -> None:
    class Unlucky(EmbeddedBroker):
        def _choose_ports(self) -> tuple[int, int]:
            chosen = super()._choose_ports()
            return chosen if self.pid else (stored.port, chosen[1])

    with Unlucky(BrokerConfig(data_dir=tmp_path)) as broker:
        assert broker.port != stored.port
        assert "Address already in use" in broker.log_file.read_text()


def test_a_killed_broker_is_noticed_and_its_log_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with EmbeddedBroker() as broker:
        assert broker.poll() is None
        assert broker.data_dir.is_relative_to(tmp_path)
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        with pytest.raises(BrokerError, match="was killed by SIGKILL"):
            broker.wait()
        assert broker.poll() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [broker.log_file]


def test_a_stopped_broker_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started_in_a_thread: list[EmbeddedBroker] = []

    def start() -> None:
        broker = EmbeddedBroker()
        broker.start()
        started_in_a_thread.append(broker)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (broker,) = started_in_a_thread
    produce(broker.bootstrap_servers, "outlives-its-thread", [b"one"])
    assert broker.poll() is None
    broker.stop()
    assert list(tmp_path.iterdir()) == []


def test_java_that_cannot_start_is_explained(tmp_path: Path) -> None:
    (tmp_path / "jars").mkdir()
    broker = EmbeddedBroker(BrokerConfig(data_dir=tmp_path / "data"), distribution=Distribution(tmp_path))
    with pytest.raises(BrokerError, match=r"ended with status 1.*NotFoundException: kafka.tools.Storage") as raised:
        broker.start()
    assert str(broker.log_file) in str(raised.value)


# ---------------------------------------------------------------- the jars


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and a proxy at which nobody listens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{silent.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("no_network")
def test_without_network_or_cache_it_says_what_to_do() -> None:
    torn = cache_dir() / "kafka.partial" / "jars" / "kafka.jar"  # as left by a fetch that was killed
    torn.parent.mkdir(parents=True)
    torn.touch()
    with pytest.raises(BrokerError, match=r"cannot fetch Apache Kafka.*network is needed once.*--bootstrap-servers"):
        EmbeddedBroker().start()
    assert not torn.exists()
    assert not list(cache_dir().glob("kafka-*"))


def test_java_accepts_the_startup_cache(stored: EmbeddedBroker) -> None:
    distribution = replace(installed(lambda _: None, lambda _: None), flags=("-XX:AOTMode=on",))
    assert distribution.startup_cache.exists()
    assert subprocess.run(distribution.command("-version"), check=False, capture_output=True).returncode == 0


@pytest.mark.usefixtures("no_network")
def test_of_two_starts_one_fetches_and_the_other_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir().mkdir()
    progress: list[str] = []
    found: list[Distribution] = []
    home = Path(os.environ["HOME"], ".cache", "carousel")
    with (cache_dir() / "kafka.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(installed(lambda _: None, progress.append)))
        second.start()
        until("the second start to wait", lambda: progress)
        name = next(p.name for p in home.glob("kafka-*") if p.is_dir())
        (cache_dir() / name).mkdir()
    second.join()
    assert progress == ["waiting for another process that is fetching Apache Kafka"]
    assert found == [Distribution(cache_dir() / name)]


# ---------------------------------------------------------------- in the foreground


class Foreground:
    """`carousel broker` in a process of its own."""

    def __init__(self, data_dir: Path) -> None:
        script = f"from pathlib import Path; from deploy.broker import run; run(0, Path({str(data_dir)!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.output: list[str] = []
        self.java = 0
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.output.extend(iter(self.process.stdout.readline, ""))

    def await_java(self) -> None:
        until("java", lambda: children(self.process.pid))
        (self.java,) = children(self.process.pid)

    def await_ready(self) -> None:
        until("readiness", lambda: any("Apache Kafka 4" in line for line in self.output) or self._ended())
        assert not self._ended(), self.output
        self.await_java()

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def send(self, number: signal.Signals) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[Foreground]:
    broker = Foreground(tmp_path)
    yield broker
    broker.process.kill()
    broker.process.wait()
    broker.reader.join()
    assert broker.process.stdout is not None
    broker.process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_broker_and_java(foreground: Foreground, number: signal.Signals) -> None:
    foreground.await_ready()
    assert foreground.send(number) == 0
    assert not is_running(foreground.java)


def test_ctrl_c_during_the_start_leaves_no_java(foreground: Foreground) -> None:
    foreground.await_java()
    assert foreground.send(signal.SIGINT) == 0
    assert not is_running(foreground.java)


def test_java_dies_with_a_killed_parent(foreground: Foreground) -> None:
    foreground.await_ready()
    foreground.send(signal.SIGKILL)
    until("the end of java", lambda: not is_running(foreground.java))


def test_the_foreground_tells_that_java_died(foreground: Foreground) -> None:
    foreground.await_ready()
    os.kill(foreground.java, signal.SIGKILL)
    assert foreground.process.wait(LIMIT_S) == 1
    foreground.reader.join()
    assert "BrokerError: Apache Kafka was killed by SIGKILL" in "".join(foreground.output)
