"""The log of `carousel serve`: each line a JSON object if so asked, and what repeats itself is cut short."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.logs import EVENTS_MAX, MOST, JsonFormatter, LimitedHandler
from tests.served import Served, group_members, random_bundle, serving, until
from tests.service.test_supervisor import workers_of

GARBAGE = 200
CONSOLE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: .+")
LEVELS = {"debug", "info", "warning", "error", "critical"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle"))


def parsed(log: str) -> list[dict[str, Any]]:
    """The objects of a log, each of a line of its own, with all that each must have."""
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        assert list(line)[:3] == ["ts", "level", "logger"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
        assert line["level"] in LEVELS
        assert isinstance(line["event"], str)
    return lines


def lines_of(served: Served) -> list[dict[str, Any]]:
    return parsed(served.log_file.read_text())


def speak_no_http(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"garbage\r\n\r\n")
        assert b" 400 " in connection.recv(1_000)


@pytest.mark.parametrize(("transport", "log_level"), [("librdkafka", "info"), ("kafka-python", "debug")])
def test_each_line_of_a_workers_life_is_a_json_object(
    bundle: Path, bootstrap_servers: str, tmp_path: Path, transport: str, log_level: str
) -> None:
    settings = {"log_format": "json", "log_level": log_level, "transport": transport, "slot": "w0"}
    with serving(bundle, bootstrap_servers, tmp_path, **settings) as served:
        served.produce([(b"s%d" % n, b"garbage\n%d" % n) for n in range(GARBAGE)])
        assert len(served.read(served.dead_letters, GARBAGE)) == GARBAGE
        for _ in range(MOST + 5):
            speak_no_http(served.url)
        assert served.stop() == 0
    lines = lines_of(served)
    assert {line["worker"] for line in lines} == {"w0"}
    events = [line["event"] for line in lines]
    assert any(event.startswith("serving ") for event in events)
    assert "SIGTERM: finishing" in events
    http = [line for line in lines if line["logger"].startswith("uvicorn") and line["level"] == "warning"]
    assert [line.get("suppressed") for line in http] == [None] * MOST + [5], "no more than that; and that, at the end"
    if log_level == "debug":
        assert any(line["logger"].startswith("kafka") for line in lines)
    else:
        assert not any("garbage" in event for event in events), "a record that is refused is counted, not logged"
        assert len(lines) < 40


def test_workers_that_share_a_log_write_a_json_object_a_line(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    settings = {"workers": 2, "slot": "w", "log_format": "json", "session_timeout_ms": 6_000}
    with serving(bundle, bootstrap_servers, tmp_path, **settings) as served:
        until("both to join", lambda: group_members(bootstrap_servers, str(served.settings["group_id"])) == 2)
        workers_of(served)[1].kill()
        until("it to be told", lambda: "ended with status -9" in served.log_file.read_text())
        assert served.stop() == 0
    lines = lines_of(served)
    assert {line["worker"] for line in lines} == {"w", "w-0", "w-1"}
    assert [line["level"] for line in lines if line["logger"] == "service.supervisor"] == ["warning", "info"]


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, **options)


def test_why_a_worker_ends_is_its_last_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "carousel", "serve", "--model", tmp_path / "none")
    console, done = run(*command), run(*command, "--log-format", "json")
    assert console.returncode == done.returncode == 1
    (line,) = parsed(done.stderr)
    assert (line["level"], line["logger"]) == ("critical", "carousel")
    assert console.stderr == f"carousel: {line['event']}\n", "and to people it is told as ever"


def test_for_people_the_log_is_as_ever(bundle: Path, bootstrap_servers: str, tmp_path: Path) -> None:
    with serving(bundle, bootstrap_servers, tmp_path) as served:
        assert served.stop() == 0
    lines = served.log_file.read_text().splitlines()
    assert all(CONSOLE.fullmatch(line) for line in lines)
    assert any(line.endswith(" INFO service.serve: SIGTERM: finishing") for line in lines)


STRAY = """
import logging, threading, warnings
from pathlib import Path
from service.logs import handler_of
from service.settings import Settings

logging.basicConfig(level="INFO", handlers=[handler_of(Settings(model=Path("m"), log_format="json"))])

class Broken:
    def __del__(self):
        raise OSError("deleted\\nin vain")

def fail():
    raise OSError("a thread\\nof its own")

warnings.warn("a warning\\nof two lines")
Broken()
thread = threading.Thread(target=fail, name="failing")
thread.start()
thread.join()
logging.info("%d %d", 1)
raise OSError("the end\\nof it")
"""


def test_what_python_itself_would_write_is_logged() -> None:
    done = run(sys.executable, "-c", STRAY)
    assert done.returncode == 1
    warning, deleted, thread, unfit, end = parsed(done.stderr)
    assert warning["level"] == "warning"
    assert "a warning\nof two lines" in warning["event"]
    assert "Broken.__del__" in deleted["event"]
    assert thread["event"] == "an exception ended the thread failing"
    assert unfit["event"] == "%d %d (1,)"
    for line, said in ((deleted, "deleted\nin vain"), (thread, "a thread\nof its own"), (end, "the end\nof it")):
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert line["exception"].endswith(f"OSError: {said}")
    assert end["level"] == "critical"


CROWD = """
import logging
from pathlib import Path
from service.logs import handler_of
from service.settings import Settings

logging.basicConfig(handlers=[handler_of(Settings(model=Path("m"), log_format="json"))])
for n in range(500):
    logging.error(f"{n} " + "x" * 30_000)
"""


def test_long_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        crowd = [subprocess.Popen([sys.executable, "-c", CROWD], stderr=log) for _ in range(3)]
        assert [process.wait(60) for process in crowd] == [0, 0, 0]
    assert len(parsed((tmp_path / "log").read_text())) == 1_500


class Log:
    """A logger of its own that writes to memory, with a clock that is set by hand."""

    def __init__(self, most: int = 3, within_s: float = 60.0) -> None:
        self.now_s = 0.0
        self.stream = io.StringIO()
        self.handler = LimitedHandler(self.stream, most, within_s, lambda: self.now_s)
        self.logger = logging.Logger("a")
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_an_event_is_written_so_often_a_minute_then_counted() -> None:
    log = Log()
    for n in range(10):
        log.now_s = n
        log.logger.warning("lost %d", n)
    assert log.lines == ["lost 0", "lost 1", "lost 2"]
    log.now_s = 59.9
    log.logger.warning("lost %d", 10)
    assert len(log.lines) == 3
    log.now_s = 60.0
    log.logger.warning("lost %d", 11)
    assert log.lines[3:] == ["8 more within 60 s were not written: lost %d", "lost 11"]


def test_other_events_have_counts_of_their_own() -> None:
    log = Log(most=1)
    other = logging.Logger("b")
    other.addHandler(log.handler)
    for _ in range(2):
        log.logger.warning("x %d", 1)
        log.logger.error("x %d", 2)
        log.logger.warning("y")
        other.warning("x %d", 3)
    assert log.lines == ["x 1", "x 2", "y", "x 3"]


def test_what_was_suppressed_is_said_by_whatever_is_logged_next() -> None:
    log = Log(most=1)
    for _ in range(3):
        log.logger.warning("x")
    log.now_s = 61.0
    log.logger.info("y")
    assert log.lines == ["x", "2 more within 60 s were not written: x", "y"]


def test_what_was_suppressed_is_said_though_nothing_more_is_logged() -> None:
    log = Log(most=1, within_s=0.05)
    for event in ("x", "y"):
        for _ in range(2):
            log.logger.warning(event)
    log.now_s = 0.05
    until("both to be said", lambda: len(log.lines) == 4, 10)
    assert sorted(log.lines[2:]) == [f"1 more within 0.05 s were not written: {event}" for event in "xy"]


def test_what_was_suppressed_is_said_at_the_end() -> None:
    log = Log(most=1)
    for _ in range(3):
        log.logger.warning("x")
    log.handler.close()
    log.handler.close()
    assert log.lines == ["x", "2 more within 60 s were not written: x"]


def test_no_more_events_are_counted_than_there_is_room_for() -> None:
    log = Log(most=1)
    for _ in range(2):
        log.logger.warning("first")
    for n in range(EVENTS_MAX):
        log.logger.warning(f"event {n}")
    assert log.lines[-2:] == ["1 more within 60 s were not written: first", f"event {EVENTS_MAX - 1}"]


def test_an_object_has_what_was_passed_as_extra() -> None:
    log = Log()
    log.handler.setFormatter(JsonFormatter())
    extra = {"partition": 3, "where": Path("a/b"), "share": float("nan"), "keys": ["a\nb"], "ts": "mine"}
    log.logger.warning("two\nlines \u2028 and %s", "more", extra=extra)
    (line,) = parsed(log.stream.getvalue())
    assert line | {"ts": ""} == {
        "ts": "",
        "level": "warning",
        "logger": "a",
        "event": "two\nlines \u2028 and more",
        "partition": 3,
        "where": "a/b",
        "share": "nan",
        "keys": ["a\nb"],
    }
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line["ts"])).total_seconds()) < 60


def test_an_exception_stays_on_its_line() -> None:
    log = Log()
    log.handler.setFormatter(JsonFormatter())
    try:
        int("one\ntwo")
    except ValueError:
        log.logger.exception("failed", stack_info=True)
    (line,) = parsed(log.stream.getvalue())
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].count("\n") > 1
    assert line["exception"].endswith(": 'one\\ntwo'")
    assert line["stack"].startswith("Stack (most recent call last):\n")
