"""The run: load, workers and broker set up, tormented by the plan, and what came out compared."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from deploy.broker import BrokerConfig, EmbeddedBroker
from deploy.chaos.bundle import random_bundle
from deploy.chaos.faults import Faults, advance
from deploy.chaos.fleet import Fleet, Worker
from deploy.chaos.load import Load, Sent
from deploy.chaos.plan import SLOTS, ChaosConfig, ChaosError, plan
from deploy.chaos.report import Outcome, listed, tell
from deploy.chaos.verify import State, Undisturbed, forecasts_differ, letters_differ, states_differ, undisturbed
from deploy.chaos.watch import Watch, read
from deploy.java import signals_interrupt
from model.bundle import load_bundle
from service.records import Record
from service.settings import Settings

TICK_S = 0.05
STALL_LIMIT_S = 120.0
ANSWER_LIMIT_S = 60.0
NAME = "chaos"
PORTS = range(20_000, 32_000)
"""Below those that clients are given: while the broker is away, none may take its port by chance."""


def run(config: ChaosConfig, console: Console | None = None) -> bool:
    """The run, told as it goes. -> whether all was as if nothing had happened.

    Raises ChaosError or BrokerError where it cannot go on. Whatever it started has ended when it returns; where
    something failed, its directory with all logs is kept.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    directory, keep = Path(tempfile.mkdtemp(prefix="carousel-chaos-")), True
    try:
        with ExitStack() as stack:
            stack.enter_context(signals_interrupt())
            chaos = Chaos(stack, config, directory, console)
            try:
                chaos.play()
                outcome = chaos.outcome()
            except ChaosError:
                console.print(listed("failures until then", chaos.failures), markup=False, end="")
                chaos.fleet.abort()
                raise
        tell(outcome, console)
        keep = not outcome.equal
    except KeyboardInterrupt:
        keep = False
        raise
    finally:
        if keep:
            console.print(f"logs and Kafka's data are kept in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return not keep


class Chaos:
    """One run. `play`, then `outcome`."""

    def __init__(self, stack: ExitStack, config: ChaosConfig, directory: Path, console: Console) -> None:
        """Start everything; what was started is ended by `stack`."""
        self.config, self.console = config, console
        self.plan = plan(config)
        self.bundle = random_bundle(directory / "model")
        with console.status("starting Apache Kafka …"):
            kafka = BrokerConfig(_port(), directory / "kafka", stop_s=5)
            self.broker = stack.enter_context(EmbeddedBroker(kafka, lambda _: None))
        self.servers = self.broker.bootstrap_servers
        self.flags = _flags(config, self.bundle, self.servers)
        self._create_input()
        self.fleet = Fleet(self.flags, directory, self._note)
        stack.callback(self.fleet.close)
        self.watch = Watch(self.servers, self.flags["group_id"])
        stack.callback(self.watch.stop)
        self.faults = Faults(self.fleet, self.broker, self.watch, self._note)
        topic = self.flags["observations_topic"]
        self.load = Load(config, self.servers, topic, self._reached, self.faults.outage)
        stack.callback(self.load.stop)
        self.input: list[Record] = []
        self._progressed_at = self._started_at = time.monotonic()
        self._done = 0
        self._ends: dict[int, int] = {}

    def _create_input(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            admin.create_topics([NewTopic(self.flags["observations_topic"], self.config.partitions, 1)])
            admin.wait_for_topics([self.flags["observations_topic"]])
        finally:
            admin.close()

    def _note(self, text: str) -> None:
        """Say what happens: at what time, to be looked up in the logs, and at which record."""
        when = f"{time.strftime('%H:%M:%S')} {self.watch.seen.done:>7,}"
        self.console.print(Text.assemble((when, "dim"), "  ", text))

    def play(self) -> None:
        """All faults of the plan, and on until the whole input is done with."""
        config, told = self.config, self.config.guarantee.replace("_", " ")
        self.console.print(
            f"seed {config.seed}: {config.observations:,} observations of {config.streams:,} streams, {len(self.plan)}"
            f" faults, {told}, on {config.transport}"
        )
        for slot in SLOTS:
            self.fleet.add(slot)
        self.watch.start()
        self._await_workers()
        self.load.start()
        pending, running = deque(self.plan), list[Iterator[None]]()
        with self._progress() as show:
            while pending or running or not self._finished():
                self._turn()
                show()
                while pending and pending[0].at <= self.watch.seen.done:
                    running.append(self.faults.begin(pending.popleft()))
                running = advance(running)
                time.sleep(TICK_S)

    def _await_workers(self) -> None:
        """Until the partitions are shared out: who starts is no fault, and what comes of it no part of the plan."""
        with self.console.status("starting the workers …"):
            while not all(self.faults.owned(worker) for worker in self.fleet.workers.values()):
                self._turn()
                time.sleep(TICK_S)
        self._started_at = self._progressed_at = time.monotonic()

    def _turn(self) -> None:
        """Look after the workers, see who recovered, and that the run still goes on."""
        self.fleet.tick()
        seen, now = self.watch.seen, time.monotonic()
        for recovery in self.faults.recoveries:
            if recovery.took_s is None and recovery.take(seen):
                self._note(f"  went on {recovery.took_s:.1f} s after: {recovery.what}")
        if seen.done > self._done:
            self._done, self._progressed_at = seen.done, now
        if self.load.failure:
            raise ChaosError(self.load.failure)
        if self.broker.poll() is not None and not self.faults.outage.locked():
            raise ChaosError(f"Apache Kafka ended by itself ({self.broker.log_file})")
        if now - self._progressed_at > STALL_LIMIT_S:
            raise ChaosError(f"nothing was committed for {STALL_LIMIT_S:g} s; {self._whereabouts()}")
        if now - self._started_at > self.config.limit_s:
            raise ChaosError(f"not done after {self.config.limit_s:g} s (--limit-s); {self._whereabouts()}")

    def _reached(self) -> float:
        """How far the run is, for the load to keep up with: no fault that is due is left without load to hit."""
        return min(self.watch.seen.done, self.faults.overdue_at)

    def _whereabouts(self) -> str:
        offsets = ", ".join(f"{p} at {offset}" for p, offset in sorted(self.watch.seen.offsets.items()))
        return f"partitions {offsets or 'none'}; sent {self.load.sent:,} of {self.load.records:,}"

    def _finished(self) -> bool:
        """Whether all is sent, and the group has committed the end of it."""
        if not self.load.finished:
            return False
        if not self.input:
            self.input = read(self.servers, self.flags["observations_topic"])
            self._ends = {record.partition: record.offset + 1 for record in self.input}  # in order: the last one stays
        return all(self.watch.seen.offsets.get(partition, 0) >= end for partition, end in self._ends.items())

    @contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        with bar:
            sent, done = (
                bar.add_task("sent", total=self.load.records),
                bar.add_task("done with", total=self.load.records),
            )

            def show() -> None:
                bar.update(sent, completed=self.load.sent)
                bar.update(done, completed=min(self.watch.seen.done, self.load.records))

            yield show

    def outcome(self) -> Outcome:
        """Ask for the final states, end the workers in order, and compare all with the undisturbed run."""
        flags, guarantee = self.flags, self.config.guarantee
        with self.console.status("comparing with an undisturbed run …"):
            wanted = undisturbed(load_bundle(self.bundle), Settings.load(flags), self.input)
            states = self._states(wanted)
            stopping = [self.fleet.stop(worker) for worker in self.fleet.workers.values() if worker.wanted]
            while stopping := advance(stopping):
                time.sleep(TICK_S)
            forecasts, letters = (read(self.servers, flags[f"{role}_topic"]) for role in ("forecasts", "dead_letters"))
            differences = [
                *forecasts_differ(wanted, forecasts, guarantee),
                *letters_differ(wanted, letters, guarantee),
                *states_differ(wanted, states),
            ]
        return Outcome(
            config=self.config,
            recoveries=self.faults.recoveries,
            restarts=self.fleet.restarts,
            records=len(self.input),
            aborted=self.load.aborted,
            wanted=wanted,
            differences=differences,
            failures=[*self._load_differs(), *self.failures],
        )

    @property
    def failures(self) -> list[str]:
        """What workers did that they must not do, whatever comes of it."""
        return [*self.fleet.failures, *self.faults.failures]

    def _states(self, wanted: Undisturbed) -> dict[str, list[State]]:
        """What the workers say of each stream."""
        workers = [worker for worker in self.fleet.workers.values() if worker.wanted]
        self._await_owners(workers)
        told: dict[str, list[State]] = {}
        for stream in [*wanted.states, *wanted.ended]:
            for worker in workers:
                if state := self._ask(worker, f"/v1/streams/{stream}/state"):
                    detail = self._ask(worker, f"/v1/streams/{stream}")
                    told.setdefault(stream, []).append({**state, "count": detail and detail["count"]})
        return told

    def _await_owners(self, workers: Sequence[Worker]) -> None:
        """Until they have all partitions and are ready: before, who does not know a stream may not know it yet."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        partitions = frozenset(range(self.config.partitions))
        while frozenset().union(*map(self.faults.owned, workers)) != partitions:
            if time.monotonic() > deadline:
                raise ChaosError(f"not all partitions had an owner {ANSWER_LIMIT_S:g} s after the end")
            self._turn()
            time.sleep(TICK_S)
        for worker in workers:
            self._ask(worker, "/readyz")

    def _ask(self, worker: Worker, path: str) -> Any:
        """What a worker answers; None: no such thing. Raises ChaosError if it does not answer in time."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while True:
            try:
                return worker.life.get(path)
            except (OSError, ValueError) as error:  # no answer, or no URL yet
                if time.monotonic() > deadline:
                    why = f"did not answer {path} for {ANSWER_LIMIT_S:g} s after the end: {error}"
                    raise ChaosError(f"{worker.slot} {why} ({worker.life.log_file})") from error
            self._turn()
            time.sleep(TICK_S)

    def _load_differs(self) -> Iterator[str]:
        """Where the input is not what was sent. It is the truth all the same, but then the load is not what it says."""
        sent = [(item.partition, item.key, item.value) for item in self.load.items if isinstance(item, Sent)]
        got = [(record.partition, record.key, record.value) for record in self.input]
        for partition in range(self.config.partitions):
            some, others = ([each for each in all_ if each[0] == partition] for all_ in (sent, got))
            if some != others:
                yield f"the load: of {len(some)} records sent to partition {partition}, {len(others)} are there"


def _flags(config: ChaosConfig, bundle: Path, servers: str) -> dict[str, Any]:
    """The settings of all workers."""
    return {
        "model": bundle,
        "transport": config.transport,
        "bootstrap_servers": servers,
        "group_id": NAME,
        "observations_topic": f"{NAME}.observations",
        "forecasts_topic": f"{NAME}.forecasts",
        "dead_letters_topic": f"{NAME}.dlq",
        "state_topic": f"{NAME}.state",
        "partitions": config.partitions,
        "http_port": 0,
        "slot": "",
        "guarantee": config.guarantee,
        "commit_interval_ms": 100,
        "transaction_timeout_ms": 10_000,
        "snapshot_interval_s": 3,
        "session_timeout_ms": config.session_timeout_ms,
    }


def _port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ChaosError(f"no port is free between {PORTS.start} and {PORTS.stop}")
