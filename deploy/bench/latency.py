"""From an observation's sending to its forecast being readable (read_committed), at given rates, beside bare clients
with the same rhythm of flushes. All are processes, and all meet the same traffic. And the same while many read the
worker's events who hardly read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product

from deploy.bench import against, bare
from deploy.bench.figures import BenchError, Probe, Role, Sample
from deploy.bench.load import GUARANTEES, Bench, create_topics, forecast_values, make_records, transports
from deploy.bench.programs import Program, environment, running, serve
from deploy.bench.readers import READERS, READY
from deploy.bench.traffic import Latencies, traffic_of
from service.settings import Settings

READERS_S = 30.0
QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def probes(bench: Bench) -> Iterator[Probe]:
    """By guarantee and transport: the bare client, the worker. Then the rivals."""
    value = bench.directory / "forecast.json"
    value.write_bytes(forecast_values(bench.settings(), make_records(1, 1))[0])
    for guarantee, client in product(GUARANTEES, transports(bench.config)):
        told = f"{client}, {guarantee.replace('_', ' ')}"
        settings = partial(bench.settings, guarantee=guarantee, transport=client)
        limit = f"{told}: the client alone"
        alone = partial(bare.command, client, value=value)
        yield Probe(limit, partial(_measure, bench, limit, alone, settings, "limit", ""))
        name = f"{told}: carousel"
        yield Probe(name, partial(_measure, bench, name, serve, settings, "carousel", limit))
        crowded = f"{told}: with {READERS:,} slow readers of its events"
        yield Probe(
            crowded, partial(_measure, bench, crowded, serve, settings, "carousel", name, partial(_crowd, bench))
        )
    for command in bench.config.against:
        yield Probe(command, partial(_rival, bench, command, f"{transports(bench.config)[0]}, exactly once: carousel"))


def _rival(bench: Bench, command: str, beside: str) -> Iterator[Sample]:
    """A rival that fails is told of, and the others are measured all the same."""
    try:
        yield from _measure(bench, command, partial(_as_given, command), bench.settings, "rival", beside)
    except BenchError as error:
        yield Sample(f"{command}, at most", 0.0, "records/s", "rival", note=" ".join(str(error).split()))


@contextmanager
def _crowd(bench: Bench, program: Program) -> Iterator[None]:
    """A thousand readers; most of them are refused, and go."""
    command = [sys.executable, "-m", "deploy.bench.readers", program.wait_for_url()]
    with running("slow readers", command, bench.directory / "readers.log") as readers:
        readers.wait_for(f"open {READERS:,} of them", lambda said: READY in said, READERS_S)
        yield


def _nobody(_: Program) -> AbstractContextManager[None]:
    return nullcontext()


def _as_given(command: str, _: Settings) -> list[str]:
    return against.split(command)


def _measure(
    bench: Bench,
    name: str,
    command: Callable[[Settings], Sequence[str]],
    new_settings: Callable[[], Settings],
    role: Role,
    limit: str,
    company: Callable[[Program], AbstractContextManager[None]] = _nobody,
) -> Iterator[Sample]:
    settings = new_settings()
    create_topics(settings)
    streams, config = bench.streams(), bench.config
    with (
        running(name, command(settings), bench.directory / "latency.log", environment(settings)) as program,
        traffic_of(settings, streams, program.check, linger_ms=0) as traffic,  # each observation a source of its own
    ):
        traffic.warm_up()
        with company(program):
            most = traffic.burst(streams * bench.steps())
            yield Sample(f"{name}, at most", most, "records/s", role, limit and f"{limit}, at most")
            for rate in config.rates:
                yield from samples(traffic.paced(rate, config.seconds), name, f"{rate:,.0f}/s", role, limit)
                traffic.settle()


def samples(latencies: Latencies, name: str, told: str, role: Role, limit: str) -> Iterator[Sample]:
    """The quantiles of what was measured at one rate."""
    note = f"{latencies.unanswered:,} not answered in time: it falls behind" if latencies.unanswered else ""
    for quantile, q in QUANTILES.items():
        suffix = f", at {told}: {quantile}"
        yield Sample(name + suffix, latencies.ms(q), "ms", role, limit and limit + suffix, note)
