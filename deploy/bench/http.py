"""Requests a second and their times: POST /v1/predict of a stream's live state, beside a bare FastAPI route and a bare
ASGI app that answer the same bytes from the same server; and beside what the asker itself can do. And both while the
worker is at work: asked as fast as it answers, which tells how much it can bear, and at a steady rate, which tells how
long those wait who do not overwhelm it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from deploy.bench.figures import BenchError, Probe, Role, Sample
from deploy.bench.load import Bench, create_topics, transports
from deploy.bench.programs import Program, environment, running, serve
from deploy.bench.traffic import Traffic, traffic_of

SHARE = 0.8
ASK_LIMIT_S = 60.0
LIMITS = {
    "asyncio": "the asker's own limit, no HTTP behind it",
    "asgi": "bare ASGI app, the same bytes",
    "fastapi": "bare FastAPI route, the same bytes",
}
IDLE = "carousel, idle"
BUSY = f"carousel, the worker at {SHARE:.0%} of its highest rate"
RATE = 100.0
"""Requests a second that are asked of a busy worker: as many people, or dashboards, as look once a second."""
PACED = f"{RATE:g} requests/s"


@dataclass(frozen=True)
class Asked:
    """What `ask.py` found."""

    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int
    answered: int


def probes(bench: Bench) -> Iterator[Probe]:
    yield Probe("HTTP", partial(_measure, bench))


def _measure(bench: Bench) -> Iterator[Sample]:
    settings, streams = bench.settings(transport=transports(bench.config)[0]), bench.streams()
    create_topics(settings)
    bodies = bench.directory / "bodies.jsonl"
    bodies.write_text("".join(json.dumps({"stream": f"s{n}"}) + "\n" for n in range(streams)))
    with ExitStack() as stack:
        log = bench.directory / "http.log"
        told = serve(settings)
        worker = stack.enter_context(running("carousel serve", told, log, environment(settings)))
        url = worker.wait_for_url()
        traffic = stack.enter_context(traffic_of(settings, streams, worker.check))
        traffic.warm_up()
        answer = bench.directory / "answer.json"
        answer.write_bytes(_answer(url))
        for kind, name in LIMITS.items():
            bench.tell(name)
            yield from _bare(bench, kind, name, answer, bodies)
        limit = LIMITS["fastapi"]
        bench.tell(IDLE)
        yield from _unhindered(bench, worker, url, bodies, IDLE, "carousel", limit)
        rate = SHARE * traffic.burst(bench.streams() * bench.steps())
        note = f"at {rate:,.0f} records/s"
        bench.tell(BUSY)
        yield from _samples(BUSY, _busy(bench, traffic, rate, url, bodies), "carousel", limit, note)
        bench.tell(f"{BUSY}, {PACED}")
        paced = _busy(bench, traffic, rate, url, bodies, RATE)
        yield from _times(f"{BUSY}, {PACED}", paced, "carousel", f"{limit}, {PACED}", note)


def _busy(bench: Bench, traffic: Traffic, records_rate: float, url: str, bodies: Path, rate: float = 0.0) -> Asked:
    """Ask while the worker follows so many records a second."""
    asked: list[Asked] = []
    failed: list[Exception] = []

    def ask() -> None:
        try:
            asked.append(_ask(bench, url, bodies, rate))
        except Exception as error:  # told by whoever waits
            failed.append(error)

    asking = threading.Thread(target=ask, name="ask", daemon=True)
    asking.start()
    traffic.paced(records_rate, ASK_LIMIT_S, until=lambda: not asking.is_alive())
    asking.join()
    traffic.settle()
    if failed:
        raise failed[0]
    return asked[0]


def _bare(bench: Bench, kind: str, name: str, answer: Path, bodies: Path) -> Iterator[Sample]:
    command = [sys.executable, "-m", "deploy.bench.answer", kind, str(answer)]
    with running(name, command, bench.directory / f"{kind}.log") as program:
        url = program.wait_for_url()
        yield from _unhindered(bench, program, url, bodies, name, "limit")
        yield from _times(f"{name}, {PACED}", _ask(bench, url, bodies, RATE), "limit")


def _unhindered(
    bench: Bench, program: Program, url: str, bodies: Path, name: str, role: Role, limit: str = ""
) -> Iterator[Sample]:
    """Of a program that does nothing else, also what the whole process took for a request: others on the machine change
    this far less than they change how many are answered.
    """
    before_s = program.usage().cpu_s
    asked = _ask(bench, url, bodies)
    cpu_s = program.usage().cpu_s - before_s
    yield from _samples(name, asked, role, limit)
    suffix = ": processor time a request"
    yield Sample(name + suffix, 1e6 * cpu_s / max(asked.answered, 1), "us", role, limit and limit + suffix)


def _samples(name: str, asked: Asked, role: Role, limit: str = "", note: str = "") -> Iterator[Sample]:
    yield Sample(f"{name}: requests", asked.per_second, "requests/s", role, limit and f"{limit}: requests", note)
    yield from _times(name, asked, role, limit, note)


def _times(name: str, asked: Asked, role: Role, limit: str = "", note: str = "") -> Iterator[Sample]:
    if asked.failed:
        raise BenchError(f"{asked.failed} requests of `{name}` were not answered with 200")
    for quantile, value in {"p50": asked.p50_ms, "p99": asked.p99_ms}.items():
        suffix = f": {quantile}"
        yield Sample(name + suffix, value, "ms", role, limit and limit + suffix, note)


def _answer(url: str) -> bytes:
    answer = httpx.post(f"{url}/v1/predict", json={"stream": "s0"})
    if answer.status_code != 200:
        raise BenchError(f"{url}/v1/predict answers {answer.status_code}: {answer.text[:200]}")
    return answer.content


def _ask(bench: Bench, url: str, bodies: Path, rate: float = 0.0) -> Asked:
    """rate: requests a second; 0: as fast as they are answered."""
    asker = [sys.executable, "-m", "deploy.bench.ask", url, str(bodies)]
    command = [*asker, f"--seconds={bench.config.seconds}", f"--rate={rate}"]
    done = subprocess.run(  # noqa: S603  # the command is ours
        command, capture_output=True, timeout=ASK_LIMIT_S + bench.config.seconds, check=False
    )
    if done.returncode:
        raise BenchError(f"asking {url} failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return Asked(**json.loads(done.stdout))
