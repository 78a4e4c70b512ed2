"""Java as a child process: started apart from the terminal, ended in order, and never left behind."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from deploy.distribution import BrokerError

log: Final = logging.getLogger(__name__)

TOOL_LIMIT_S: Final = 120.0

# Runs between fork and java. A preexec_fn would do it too, but may deadlock where the parent has threads, and
# torch has many. The comparison catches a parent that died before prctl was called.
LAUNCHER: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def locked_log(path: Path) -> Iterator[BinaryIO]:
    """Open a log to append to, and lock it. A child that writes to it inherits the lock, and keeps it as it lives.

    Raises BrokerError when another process has it.
    """
    with path.open("ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BrokerError(f"another broker runs in {path.parent}: stop it, or name another directory") from error
        yield output


def spawn(command: list[str], directory: Path, output: BinaryIO) -> subprocess.Popen[bytes]:
    """Start java in a session of its own, so that a terminal's Ctrl-C reaches only us, who stop it in order.

    On Linux, and started from the main thread, it dies with this process. (The kernel tells of a parent's death
    when the *thread* that forked ends, so other threads must not ask for it.)
    """
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        command = [sys.executable, "-ISc", LAUNCHER, str(os.getpid()), *command]
    return subprocess.Popen(  # noqa: S603  # the command is ours
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_to_end(command: list[str], directory: Path, output: BinaryIO) -> None:
    """Run a tool. Raises BrokerError when it fails or takes longer than two minutes."""
    since = output.tell()
    process = spawn(command, directory, output)
    try:
        status = process.wait(TOOL_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise failure(f"java did not end within {TOOL_LIMIT_S:g} s", Path(output.name), since) from error
    finally:
        end(process, 0)
    if status != 0:
        raise failure(f"java {ending(status)}", Path(output.name), since)


def end(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """SIGTERM, then SIGKILL when `limit_s` seconds are over, or at a second Ctrl-C."""
    if process.poll() is not None:
        return
    try:
        if limit_s:
            process.terminate()
            process.wait(limit_s)
    except subprocess.TimeoutExpired:
        log.warning("Apache Kafka did not stop within %g s: killed", limit_s)
    finally:
        process.kill()
        process.wait()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C, unless they are ignored (`nohup`), so that each stops what was started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    chosen = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in chosen}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(status: int) -> str:
    """An exit status in words.

    >>> ending(1), ending(-9)
    ('ended with status 1', 'was killed by SIGKILL')
    """
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def failure(what: str, log_file: Path, since: int) -> BrokerError:
    """An error whose first line has the cause, where the log from byte `since` on names one; then its last lines."""
    text = log_file.read_bytes()[since:].decode(errors="replace")
    thrown = re.findall(r"^(?:Caused by: )?([\w.$]*(?:Exception|Error): .*)$", text, re.MULTILINE)
    causes = thrown or re.findall(r" ERROR (.*)", text)
    cause = f": {causes[-1]}" if causes else ""
    lines = [line for line in text.splitlines() if not line.startswith("\tat ")]
    return BrokerError("\n".join([f"{what}{cause}", f"The log is {log_file}; it ends:", *lines[-10:]]))
