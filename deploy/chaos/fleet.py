"""Genuine `carousel serve` processes, kept running as Docker keeps them: whoever ends badly is started again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import workers
from deploy.java import ending, spawn

STOP_LIMIT_S = 10.0
"""Docker's own patience between SIGTERM and SIGKILL."""
HASTE_S = 3.0
"""Whoever ended sooner than this waits as long before the next start."""
HTTP_LIMIT_S = 5.0
READY_LIMIT_S = 1.0
ABORT_LIMIT_S = 1.0
CLEAR = re.compile(r"^carousel: |\b(ERROR|CRITICAL)\b")
"""What the last line of whoever ends badly must look like."""


class Life:
    """One process of a worker, from its start to its end, with a log file of its own."""

    def __init__(self, name: str, flags: Mapping[str, Any], directory: Path) -> None:
        self.log_file = directory / f"{name}.log"
        self.began_at = time.monotonic()
        self._url = ""
        self.killed = False
        """Whether it was us who killed it."""
        with self.log_file.open("wb") as log:
            self.process = spawn(workers.command(flags), Path.cwd(), log)

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    @property
    def said(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where its API listens; "" until its log tells, which it does before it joins its group."""
        self._url = self._url or workers.url(self.said)
        return self._url

    @property
    def serving(self) -> bool:
        """Whether it has come as far as to join its group, and lives."""
        return bool(self.url) and not self.killed and self.status is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, whatever state it is in."""
        self.killed = True
        self.process.kill()

    def abort(self) -> None:
        """End it because it ought to have ended: its log then shows where each of its threads stood."""
        self.killed = True
        self.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(ABORT_LIMIT_S)
        self.process.kill()
        self.process.wait()

    def get(self, path: str, limit_s: float = HTTP_LIMIT_S) -> Any:
        """What its API answers; None: no such thing. Raises OSError if it does not answer, or not now."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=limit_s) as answer:  # noqa: S310 - ours
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def ready(self) -> bool:
        with suppress(OSError):
            return bool(self.url) and self.get("/readyz", READY_LIMIT_S) is not None
        return False


@dataclass
class Worker:
    """A slot of the service, and the life that fills it now. wanted: whether that is started again when it ends."""

    slot: str
    life: Life
    lives: int = 1
    wanted: bool = True


class Fleet:
    """All workers. `tick` starts again what ended; failures are collected, so that a run tells all of them."""

    def __init__(self, flags: Mapping[str, Any], directory: Path, note: Callable[[str], None]) -> None:
        self.flags, self.directory, self.note = flags, directory, note
        self.workers: dict[str, Worker] = {}
        self.restarts: Counter[str] = Counter()
        """By what ended the life before."""
        self.failures: list[str] = []
        self._lives: list[Life] = []

    def add(self, slot: str) -> Worker:
        self.workers[slot] = Worker(slot, self._begin(slot, 1))
        return self.workers[slot]

    def _begin(self, slot: str, number: int) -> Life:
        flags = {flag: slot if flag == "slot" else value for flag, value in self.flags.items()}
        self._lives.append(Life(f"{slot}-{number}", flags, self.directory))
        return self._lives[-1]

    def replace(self, worker: Worker) -> Life:
        """Begin the next life of a worker, whether or not the last one is over. -> the last one."""
        older = worker.life
        worker.lives += 1
        worker.life = self._begin(worker.slot, worker.lives)
        return older

    def restart(self, worker: Worker, after: str) -> None:
        """Begin the next life of a worker whose last one is over."""
        worker.wanted = True
        self.restarts[after] += 1
        self.replace(worker)

    def tick(self) -> None:
        """Start again whoever ended, as Docker would; judge how they ended."""
        for worker in self.workers.values():
            life = worker.life
            hasty = time.monotonic() - life.began_at < HASTE_S and not life.killed
            if worker.wanted and life.status is not None and not hasty:
                self.restart(worker, self.judge(worker, life, "is started again"))

    def judge(self, worker: Worker, life: Life, fate: str) -> str:
        """See that a life which ended badly has said why; fate: what becomes of the worker. -> what ended it."""
        status = life.process.wait()
        if life.killed:
            return "kill -9"
        said = life.said
        last = said.strip().rpartition("\n")[2]
        self.note(f"{worker.slot} {ending(status)} and {fate}: {last}")
        if status == 0 and worker.life is life:
            self.failures.append(f"{worker.slot} ended by itself, with status 0 ({life.log_file})")
        elif status and not says_why(said):
            told = f"without a clear last line: {last[:200]!r}"
            self.failures.append(f"{worker.slot} {ending(status)} {told} ({life.log_file})")
        return "an end of its own"

    def stop(self, worker: Worker) -> Iterator[None]:
        """SIGTERM, and wait until it ended; it must do so with status 0 and soon. It is not started again."""
        worker.wanted = False
        life, asked_at = worker.life, time.monotonic()
        life.signal(signal.SIGTERM)
        while life.status is None:
            if time.monotonic() - asked_at > STOP_LIMIT_S:
                told = f"did not end within {STOP_LIMIT_S:g} s of SIGTERM"
                self.failures.append(f"{worker.slot} {told} ({life.log_file})")
                life.abort()
                return
            yield
        if life.status:
            self.failures.append(f"{worker.slot} {ending(life.status)} at SIGTERM ({life.log_file})")

    def abort(self) -> None:
        """End all because the run did not come to its end."""
        for life in self._lives:
            if life.status is None:
                life.abort()

    def close(self) -> None:
        """Nothing is left running, whatever happened before."""
        for life in self._lives:
            if life.status is None:
                life.kill()
            life.process.wait()


def says_why(log: str) -> bool:
    r"""Whether a process that ended badly left an operator with one line that says why.

    >>> says_why("12:00 INFO serving\ncarousel: no Kafka broker answers at 127.0.0.1:9092; is it running?")
    True
    >>> says_why("Traceback (most recent call last):\n  ...\nKeyError: 7"), says_why("12:00 INFO serving")
    (False, False)
    """
    return "Traceback" not in log and bool(CLEAR.search(log.strip().rpartition("\n")[2]))
