"""Makes the measurements: all of a round in turn, then all of the next, as the machine's mood falls on each alike."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.bench import flame, report
from deploy.bench.figures import BenchError, Figure, Probe, Taken
from deploy.bench.load import Bench, BenchConfig
from deploy.broker import EmbeddedBroker
from deploy.java import signals_interrupt
from model.errors import CarouselError
from service import interpreter

WHAT = ("throughput", "step", "latency", "http", "restore", "memory", "growth", "training")
"""The measurements; of each there is a module with `probes(bench)`."""
WITHOUT_KAFKA = {"step", "memory", "training"}
WITH_RIVALS = {"throughput", "latency"}


def run(config: BenchConfig, console: Console | None = None) -> list[Figure]:
    """Measure, print, write. When it ends early, what was measured until then is told.

    Raises BenchError for what cannot be measured, BrokerError or ServiceError where Kafka cannot be had.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else report.WIDTH)
    check(config)
    interpreter.prepare()  # as a worker is, and whoever is measured beside it
    torch.set_num_threads(config.threads)
    taken = Taken()
    with signals_interrupt():
        try:
            with ExitStack() as stack:
                _measure(config, stack, taken, console)
        except (KeyboardInterrupt, CarouselError):
            if figures := taken.figures():
                console.print("it did not come to its end; measured until then:")
                report.tell(config, figures, console)
            raise
        figures = taken.figures()
        report.tell(config, figures, console)
    return figures


def check(config: BenchConfig) -> None:
    """Raises BenchError for what is known to fail before anything is measured."""
    for what in config.what:
        if what not in WHAT:
            raise BenchError(f"there is no measurement {what!r}; there are: {', '.join(WHAT)}")
    if config.against and not WITH_RIVALS & set(config.what):
        raise BenchError(f"--against goes with {' or '.join(sorted(WITH_RIVALS))}")
    if not config.rates or min(config.rates) <= 0:
        raise BenchError("--rates takes observations a second, more than none")
    if config.profile:
        flame.check(config.profile)
    if config.out:
        report.check(config.out)


def _measure(config: BenchConfig, stack: ExitStack, taken: Taken, console: Console) -> None:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carousel-bench-")))
    progress = stack.enter_context(_progress(console))
    task = progress.add_task("starting Apache Kafka", total=None)
    servers, pid = _kafka(config, stack)
    bench = Bench(config, servers, directory, pid, lambda told: progress.update(task, description=told))
    probes = [(what, probe) for what in config.what for probe in probes_of(what, bench)]
    progress.update(task, total=len(probes) * config.rounds + bool(config.profile))
    for number in range(config.rounds):
        for what, probe in probes:
            progress.update(task, description=f"round {number + 1}: {what}, {probe.title}")
            for sample in probe.measure():
                taken.add(what, number, sample)
            progress.advance(task)
    if config.profile:
        progress.update(task, description="profiling")
        import_module("deploy.bench.throughput").profile(bench, config.profile)
        progress.advance(task)
        console.print(f"flame graph: {config.profile}", markup=False)


def probes_of(what: str, bench: Bench) -> Iterable[Probe]:
    """What a measurement measures. Its module is imported now: training's needs Lightning."""
    probes: Callable[[Bench], Iterable[Probe]] = import_module(f"deploy.bench.{what}").probes
    return probes(bench)


def _kafka(config: BenchConfig, stack: ExitStack) -> tuple[str, int | None]:
    """The Kafka to measure with, where one is needed; and the process that it is, where it is ours."""
    if config.bootstrap_servers:
        return config.bootstrap_servers, None
    if not config.profile and set(config.what) <= WITHOUT_KAFKA:
        return "", None
    broker = stack.enter_context(EmbeddedBroker())
    return broker.bootstrap_servers, broker.pid


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
