"""Programs that are measured as processes: Carousel's own, the bare clients, and whatever else is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deploy import workers
from deploy.bench.figures import BenchError
from deploy.bench.load import flags_of
from deploy.java import LAUNCHER, ending
from service.settings import Settings

STOP_S = 10.0
READY_S = 60.0
LAST_LINES = 5
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """What a process has taken until now: seconds of processor, bytes of memory."""

    cpu_s: float
    rss: int


@dataclass
class Program:
    """A running process, with all that it starts, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def said(self) -> str:
        return self.log_file.read_text(errors="replace")

    def check(self) -> None:
        """Raises BenchError, with its last lines, if it has ended."""
        status = self.process.poll()
        if status is not None:
            told = "\n".join(self.said.strip().splitlines()[-LAST_LINES:])
            raise BenchError(f"{self.name} {ending(status)} while it was measured:\n{told}")

    def wait_for_url(self) -> str:
        """The URL that it tells."""
        return self.wait_for("tell its URL", workers.url)

    def wait_for(self, what: str, find: Callable[[str], T], limit_s: float = READY_S) -> T:
        """The first truth that `find` finds in its log; after `limit_s` raises BenchError with what it did not do."""
        until_s = time.monotonic() + limit_s
        while time.monotonic() < until_s:
            self.check()
            if told := find(self.said):
                return told
            time.sleep(0.05)
        raise BenchError(f"{self.name} did not {what} within {limit_s:g} s; its log: {self.said[-500:]}")

    def usage(self) -> Usage:
        return usage(self.process.pid)


@contextmanager
def standing_still(programs: Iterable[Program]) -> Iterator[None]:
    """They do nothing for the length of a block, which must be shorter than what Kafka bears with."""
    for program in programs:
        program.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for program in programs:
            program.process.send_signal(signal.SIGCONT)


def usage(pid: int) -> Usage:
    """Raises BenchError where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise BenchError("processor and memory of a process are read from /proc: this runs on Linux only") from error
    return Usage((int(fields[11]) + int(fields[12])) / TICKS, int(fields[21]) * PAGE)


@contextmanager
def running(
    name: str, command: Sequence[str], log_file: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Program]:
    """A program for the length of a block: then it is ended, with all that it started, in order or by force.

    Raises BenchError if it cannot be started.
    """
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        command = [sys.executable, "-ISc", LAUNCHER, str(os.getpid()), *command]  # dies with this process
    with log_file.open("wb") as log:
        try:
            process = subprocess.Popen(  # noqa: S603  # the command is ours, or the user's own
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise BenchError(f"{name} cannot be started: {error}") from error
    try:
        yield Program(name, process, log_file)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to its whole group, SIGKILL when it takes too long, or at a second Ctrl-C."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(settings: Settings) -> dict[str, str]:
    """Where a program is to read and write, as it is told to any."""
    return {
        "BOOTSTRAP": settings.bootstrap_servers,
        "IN_TOPIC": settings.observations_topic,
        "OUT_TOPIC": settings.forecasts_topic,
        "GROUP": settings.group_id,
    }


def serve(settings: Settings) -> list[str]:
    """The command of a worker with these settings, which says enough for its URL to be found."""
    return workers.command({**flags_of(settings), "log_level": "info"})
