"""Several workers on one machine: they share the partitions, are started again when they die, and end together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from service.errors import ServiceError
from service.settings import Settings
from service.supervisor import HOPELESS, Child
from tests.served import Served, group_members, observation, random_bundle, serving, until


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle"))


def workers_of(served: Served) -> list[psutil.Process]:
    return psutil.Process(served.process.pid).children()


def streams_told(served: Served) -> int:
    """How many streams all workers tell of together; 0 while partitions move from one to the other, which is a 503."""
    answer = httpx.get(f"{served.url}/v1/streams")
    assert answer.status_code in (200, 503), answer.text
    return int(answer.json()["total"]) if answer.status_code == 200 else 0


def test_two_workers_share_the_partitions_and_one_that_is_killed_comes_back(
    bundle: Path, bootstrap_servers: str, tmp_path: Path
) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, workers=2, slot="w", session_timeout_ms=6_000) as served:
        group = str(served.settings["group_id"])
        until("both to join", lambda: group_members(bootstrap_servers, group) == 2)
        until("readiness", served.ready)
        served.produce([(b"s%d" % n, observation(hour, 1.0)) for hour in range(3) for n in range(40)])
        assert len(served.read(served.forecasts, 120)) == 120
        until("both to answer", lambda: streams_told(served) == 40)
        first, second = workers_of(served)
        os.kill(second.pid, signal.SIGKILL)
        until("another in its place", lambda: {p.pid for p in workers_of(served)} - {first.pid, second.pid})
        served.produce([(b"s%d" % n, observation(3, 1.0)) for n in range(40)])
        assert len(served.read(served.forecasts, 160)) == 160, "exactly once"
        workers = workers_of(served)
        assert served.stop() == 0
        assert not any(process.is_running() for process in workers)


def test_workers_end_with_a_supervisor_that_is_killed(bundle: Path, bootstrap_servers: str, tmp_path: Path) -> None:
    with serving(bundle, bootstrap_servers, tmp_path, workers=2) as served:
        workers = workers_of(served)
        served.process.kill()
        until("the workers to end", lambda: not any(process.is_running() for process in workers))
        with pytest.raises(httpx.TransportError):
            served.get("/livez")


def test_a_worker_that_cannot_start_is_given_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.supervisor.BACKOFF_MAX_S", 0.0)
    child, starts = Child(0, Settings.load({"model": tmp_path / "none"})), []
    monkeypatch.setattr("service.supervisor.sys.executable", "/bin/false")
    monkeypatch.setattr(Child, "start", lambda self, start=Child.start: (starts.append(1), start(self)))

    def look() -> str:
        try:
            child.look()
        except ServiceError as error:
            return str(error)
        return ""

    assert f"worker 0 ended {HOPELESS} times" in until("it to be given up", look)
    assert len(starts) == HOPELESS


def test_a_worker_gets_all_settings_of_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAROUSEL_EMIT_DECIMALS", "7")
    given = {"model": "m", "emit_quantiles": [0.1, 0.9], "compiled": False, "emit_decimals": None, "idle_limit_s": 2.5}
    given |= {"watched_streams": ["shop 7", "b"]}
    settings = Settings.load(given).model_copy(update={"emit_decimals": None})
    environment = settings.environment()
    for name in [name for name in os.environ if name.startswith("CAROUSEL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings.load({}).model_dump() == settings.model_dump()
