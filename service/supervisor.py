"""`carousel serve --workers N`: N workers of the group as processes of one machine, each started again when it ends.

They are workers as any others: Kafka shares the partitions out among them, and each passes an HTTP request on to the
one that has the stream. Worker n listens on `http_port` + n and has the slot `slot`-n.
"""

from __future__ import annotations

import ctypes
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from types import FrameType

from service.errors import ServiceError
from service.settings import Settings

log = logging.getLogger(__name__)

WATCH_S = 0.2
BACKOFF_S = 1.0
BACKOFF_MAX_S = 30.0
SETTLED_S = 60.0
"""A worker that lived for so long had no trouble in starting."""
HOPELESS = 10
"""So many short lives of one worker, one after the other: starting it again will not help."""
STOP_S = 30.0
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One worker's process, and how often it ended soon after its start."""

    number: int
    settings: Settings
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    due_s: float = 0.0
    short_lives: int = 0

    def start(self) -> None:
        """Start it; it ends with us, however we end."""
        command = [sys.executable, "-m", "carousel", "serve"]
        self.process = subprocess.Popen(  # noqa: S603
            command, env=self.settings.environment(), preexec_fn=_end_with_parent if sys.platform == "linux" else None
        )
        self.started_s = time.monotonic()

    def look(self) -> None:
        """Start it again if it has ended, the later the more often it did. Raises ServiceError if that is no help."""
        now_s = time.monotonic()
        if self.process is None:
            if now_s >= self.due_s:
                self.start()
            return
        if self.process.poll() is None:
            return
        status, self.process = self.process.returncode, None
        self.short_lives = 0 if now_s - self.started_s > SETTLED_S else self.short_lives + 1
        if self.short_lives >= HOPELESS:
            raise ServiceError(
                f"worker {self.number} ended {HOPELESS} times soon after its start, last with status {status}: its last"
                " lines above say why"
            )
        wait_s = min(BACKOFF_S * 2 ** max(self.short_lives - 1, 0), BACKOFF_MAX_S)
        log.warning("worker %d ended with status %d; started again in %g s", self.number, status, wait_s)
        self.due_s = now_s + wait_s


@dataclass
class Supervisor:
    """Keeps the workers running. `run` until `stop`, which any thread may call."""

    settings: Settings
    children: list[Child] = field(init=False)

    def __post_init__(self) -> None:
        self.children = [Child(n, worker_settings(self.settings, n)) for n in range(self.settings.workers)]
        self._stopping = threading.Event()

    def run(self) -> None:
        """Raises ServiceError if a worker cannot be kept running."""
        try:
            while not self._stopping.wait(WATCH_S):
                for child in self.children:
                    child.look()
        finally:
            self._end()

    def stop(self) -> None:
        """Let all workers end in order."""
        self._stopping.set()

    def _end(self) -> None:
        running = [child.process for child in self.children if child.process]
        for process in running:
            process.terminate()
        until_s = time.monotonic() + STOP_S
        for process in running:
            try:
                process.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker process %d did not end within %g s and is killed", process.pid, STOP_S)
                process.kill()
                process.wait()


def supervise(settings: Settings) -> None:
    """Run `workers` workers until SIGTERM or SIGINT. Raises ServiceError if one cannot be kept running."""
    supervisor = Supervisor(settings)

    def stop(signum: int, _frame: FrameType | None) -> None:
        log.info("%s: ending %d workers", signal.Signals(signum).name, settings.workers)
        supervisor.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    supervisor.run()


def worker_settings(settings: Settings, number: int) -> Settings:
    """Those of one of the workers: its own port, URL and slot.

    >>> of = Settings.load({"model": "m", "workers": 2, "slot": "a", "advertised_url": "http://host:80"})
    >>> one = worker_settings(of, 1)
    >>> one.http_port, one.advertised_url, one.slot, one.workers
    (8001, 'http://host:81', 'a-1', 1)
    """

    def moved(port: str) -> str:
        return str(int(port) + number)

    return settings.model_copy(
        update={
            "workers": 1,
            "http_port": settings.http_port and settings.http_port + number,
            "advertised_url": re.sub(r"(?<=:)\d+$", lambda port: moved(port[0]), settings.advertised_url),
            "slot": settings.slot and f"{settings.slot}-{number}",
        }
    )


def _end_with_parent() -> None:
    """Asks Linux to end this process when its parent has ended, killed even."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
