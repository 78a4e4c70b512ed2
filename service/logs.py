"""Where the log of `carousel serve` goes: stderr, for people to read or (`log_format: json`) one JSON object a line.

What repeats itself is cut short, in either format.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from service.settings import Settings

log = logging.getLogger(__name__)

MOST = 10
WITHIN_S = 60.0
"""Of the same event so many lines are written in this time, which begins with the first of them."""
EVENTS_MAX = 1_000
"""Events that are counted at a time. Ours are fewer; a library may put what it likes into its messages."""
TEMPLATE_MAX = 200
"""Characters by which two messages are told apart."""
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What a LogRecord has of itself; all else was passed as `extra`."""

Event = tuple[str, int, str]
"""Logger, level and message template."""


def handler_of(settings: Settings) -> LimitedHandler:
    """The handler for the root logger. With JSON, what Python itself would write to stderr is logged as well.

    Workers share this stderr, and their lines stay whole: each is one write(2). (Of those beyond 4 KiB that holds only
    where it is a file, or a pipe that somebody empties.)
    """
    handler = LimitedHandler(sys.stderr)
    if settings.log_format == "console":
        return handler
    handler.setFormatter(JsonFormatter(settings.slot))
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *raised: log.critical("an exception ended the process", exc_info=raised)
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread
    return handler


def _log_unraisable(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value:
        log.error("%s: %r", args.err_msg or "an exception was ignored in", args.object, exc_info=args.exc_value)


def _log_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value and not isinstance(args.exc_value, SystemExit):  # that is how a thread may end
        log.error("an exception ended the thread %s", args.thread and args.thread.name, exc_info=args.exc_value)


class JsonFormatter(logging.Formatter):
    """A record as a JSON object in ASCII, without a line break.

    >>> record = logging.makeLogRecord({"name": "a", "levelname": "INFO", "msg": "%d of 2", "args": (1,), "created": 0})
    >>> JsonFormatter("w-0").format(record)
    '{"ts": "1970-01-01T00:00:00.000Z", "level": "info", "logger": "a", "worker": "w-0", "event": "1 of 2"}'
    """

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = {"worker": worker} if worker else {}

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "ts": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._worker,
            "event": message_of(record),
        }
        if record.exc_info and record.exc_info[0]:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in STANDARD:
                fields.setdefault(name, as_json(value))
        return json.dumps(fields)


def message_of(record: logging.LogRecord) -> str:
    """Its message; where the arguments do not fit, both as they are: logging would write a traceback of lines."""
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        return f"{record.msg} {record.args}"


def as_json(value: Any) -> Any:
    """The value if JSON has the like of it, else as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


@dataclass
class Window:
    """How often an event came since the first time, and until when that counts."""

    until_s: float
    count: int = 0


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Writes at most `most` lines of the same event within `within_s`, and when that is over, or at the end, one that
    says how many more there were.
    """

    def __init__(
        self,
        stream: TextIO,
        most: int = MOST,
        within_s: float = WITHIN_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream)
        self._most, self._within_s, self._clock_s = most, within_s, clock_s
        self._windows: dict[Event, Window] = {}
        """In the order in which they began, and so end."""
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        now_s = self._clock_s()
        self._end_windows(now_s)
        event = record.name, record.levelno, str(record.msg)[:TEMPLATE_MAX]
        window = self._windows.get(event)
        if window is None:
            if len(self._windows) >= EVENTS_MAX:
                self._end_window(next(iter(self._windows)))
            window = self._windows[event] = Window(now_s + self._within_s)
        window.count += 1
        if window.count <= self._most:
            super().emit(record)
        elif self._timer is None:
            self._wake_in(window.until_s - now_s)

    def close(self) -> None:
        """As logging.shutdown calls it when the process ends."""
        self.acquire()
        try:
            self._end_windows(math.inf)
            if self._timer:
                self._timer.cancel()
        finally:
            self.release()
        super().close()

    def _wake_in(self, seconds: float) -> None:
        """Say how many there were though nothing more is logged."""
        self._timer = threading.Timer(seconds, self._wake)
        self._timer.daemon = True
        with suppress(RuntimeError):  # no thread begins while the process ends; `close` says it then
            self._timer.start()

    def _wake(self) -> None:
        self.acquire()
        try:
            self._timer, now_s = None, self._clock_s()
            self._end_windows(now_s)
            over_most = [window.until_s for window in self._windows.values() if window.count > self._most]
            if over_most:
                self._wake_in(over_most[0] - now_s)
        finally:
            self.release()

    def _end_windows(self, now_s: float) -> None:
        for event in [event for event, window in self._windows.items() if window.until_s <= now_s]:
            self._end_window(event)

    def _end_window(self, event: Event) -> None:
        window = self._windows.pop(event, None)  # a signal's handler may log in the midst of this
        if window and window.count > self._most:
            super().emit(self._told(event, window.count - self._most))

    def _told(self, event: Event, suppressed: int) -> logging.LogRecord:
        name, level, template = event
        return logging.makeLogRecord(
            {
                "name": name,
                "levelno": level,
                "levelname": logging.getLevelName(level),
                "msg": "%d more within %g s were not written: %s",
                "args": (suppressed, self._within_s, template),
                "suppressed": suppressed,
            }
        )
