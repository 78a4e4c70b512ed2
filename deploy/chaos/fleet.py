"""Genuine `carousel serve` processes, kept running as Docker keeps them: whoever ends badly is started again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.java import ending, spawn

STOP_LIMIT_S = 10.0
"""Docker's own patience between SIGTERM and SIGKILL."""
HASTE_S = 3.0
"""Whoever ended sooner than this waits as long before the next start."""
HTTP_LIMIT_S = 5.0
CLEAR = re.compile(r"^carousel: |\b(ERROR|CRITICAL)\b")
"""What the last line of whoever ends badly must look like."""

REPLACED = "replaced"
"""The fate of a process whose slot another one took."""

Note = Callable[[str], None]


class Worker:
    """One slot of the service, and the process that fills it now. Each life has a log file of its own."""

    def __init__(self, slot: str, flags: Mapping[str, Any], directory: Path) -> None:
        self.slot, self.directory = slot, directory
        self.flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        self.lives = 0
        self.wanted = True
        """Whether it is to be started again when it ends."""
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The next life, beside the last one if that is not over. -> its process."""
        self.lives += 1
        self.started_at = time.monotonic()
        self._url = ""
        with self.log_file.open("wb") as log:
            command = [sys.executable, "-m", "carousel", "serve", *self.flags]
            self.process = spawn(command, Path.cwd(), log)
        return self.process

    def log_of(self, life: int) -> Path:
        return self.directory / f"{self.slot}-{life}.log"

    @property
    def log_file(self) -> Path:
        return self.log_of(self.lives)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def url(self) -> str:
        """Where its API listens; "" until its log tells."""
        if not self._url:
            for line in self.log_file.read_text(errors="replace").splitlines():
                if "serving " in line and "http://" in line:
                    self._url = "http://" + line.split("http://")[1].split()[0]
                    break
        return self._url

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def get(self, path: str) -> Any:
        """What its API answers; None: no such thing. Raises OSError if it does not answer, or not now."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=HTTP_LIMIT_S) as answer:  # noqa: S310 - ours
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def ready(self) -> bool:
        with suppress(OSError):
            return bool(self.url) and self.get("/readyz") is not None
        return False


class Fleet:
    """All workers. `tick` starts again what ended; failures are collected, so that a run tells all of them."""

    def __init__(self, flags: Mapping[str, Any], directory: Path, note: Note) -> None:
        self.flags, self.directory, self.note = flags, directory, note
        self.workers: dict[str, Worker] = {}
        self.restarts: Counter[str] = Counter()
        """By why they ended."""
        self.failures: list[str] = []
        self._killed: set[subprocess.Popen[bytes]] = set()
        self._others: list[subprocess.Popen[bytes]] = []

    def add(self, slot: str) -> Worker:
        self.workers[slot] = Worker(slot, self._flags_of(slot), self.directory)
        return self.workers[slot]

    def _flags_of(self, slot: str) -> Mapping[str, Any]:
        return {name: slot if name == "slot" else value for name, value in self.flags.items()}

    def tick(self) -> None:
        """Start again whoever ended, as Docker would; judge how they ended."""
        for worker in self.workers.values():
            status = worker.process.poll()
            if not worker.wanted or status is None:
                continue
            if time.monotonic() - worker.started_at < HASTE_S and worker.process not in self._killed:
                continue
            self.restart(worker, self.judge(worker, worker.process, worker.lives, "started again"))

    def kill(self, worker: Worker) -> None:
        """SIGKILL, whatever state it is in."""
        self._killed.add(worker.process)
        worker.process.kill()

    def restart(self, worker: Worker, after: str) -> None:
        """Start a worker again that ended."""
        worker.wanted = True
        self.restarts[after] += 1
        worker.start()

    def judge(self, worker: Worker, process: subprocess.Popen[bytes], life: int, fate: str) -> str:
        """See that a process of a worker which ended badly has said why; fate: what becomes of it. -> what ended it."""
        status = process.wait()
        if process in self._killed:
            return "kill -9"
        text = worker.log_of(life).read_text(errors="replace")
        last = text.strip().rpartition("\n")[2]
        self.note(f"{worker.slot} {ending(status)}, and is {fate}: {last}")
        if status == 0 and fate != REPLACED:
            self.failures.append(f"{worker.slot} ended by itself, with status 0 ({worker.log_of(life)})")
        elif not says_why(text):
            told = f"without a clear last line: {last[:200]!r}"
            self.failures.append(f"{worker.slot} {ending(status)} {told} ({worker.log_of(life)})")
        return "an end of its own"

    def stop(self, worker: Worker) -> Iterator[None]:
        """SIGTERM, and wait until it ended; it must do so with status 0 and soon. It is not started again."""
        worker.wanted = False
        asked_at = time.monotonic()
        worker.signal(signal.SIGTERM)
        while worker.running:
            if time.monotonic() - asked_at > STOP_LIMIT_S:
                self.failures.append(
                    f"{worker.slot} did not end within {STOP_LIMIT_S:g} s of SIGTERM ({worker.log_file})"
                )
                self.kill(worker)
                worker.process.wait()
                return
            yield
        if status := worker.process.wait():
            self.failures.append(f"{worker.slot} {ending(status)} at SIGTERM ({worker.log_file})")

    def replace(self, worker: Worker) -> tuple[subprocess.Popen[bytes], int]:
        """Start a second process in a worker's slot. -> the older one, which is not started again, and its life."""
        older, life = worker.process, worker.lives
        self._others.append(older)
        worker.start()
        return older, life

    def close(self) -> None:
        """Nothing is left running, whatever happened before."""
        for process in [*self._others, *(worker.process for worker in self.workers.values())]:
            if process.poll() is None:
                process.kill()
            process.wait()


def says_why(log: str) -> bool:
    r"""Whether a process that ended badly left an operator with one line that says why.

    >>> says_why("12:00 INFO serving\ncarousel: no Kafka broker answers at 127.0.0.1:9092; is it running?")
    True
    >>> says_why("Traceback (most recent call last):\n  ...\nKeyError: 7"), says_why("12:00 INFO serving")
    (False, False)
    """
    return "Traceback" not in log and bool(CLEAR.search(log.strip().rpartition("\n")[2]))
