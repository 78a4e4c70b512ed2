"""The benchmarks measure what they name, each beside its limit, and tell the same in every form."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from deploy.bench import against, flame, latency, step, suite, traffic
from deploy.bench.ask import requests_of
from deploy.bench.figures import BenchError, Figure, Sample, Taken
from deploy.bench.growth import points
from deploy.bench.load import Bench, BenchConfig, make_records
from deploy.bench.report import number
from deploy.bench.suite import WHAT, run

ECHO = """
import os
from kafka import KafkaConsumer, KafkaProducer
servers = os.environ["BOOTSTRAP"]
consumer = KafkaConsumer(
    os.environ["IN_TOPIC"], bootstrap_servers=servers, group_id=os.environ["GROUP"], auto_offset_reset="earliest"
)
producer = KafkaProducer(bootstrap_servers=servers)
for record in consumer:
    producer.send(os.environ["OUT_TOPIC"], b"{}", key=record.key, partition=record.partition)
"""
SMALL = {"rounds": 1, "streams": 20, "steps": 3, "seconds": 0.5}


def tiny(bootstrap_servers: str, *what: str, **changed: object) -> BenchConfig:
    return BenchConfig(**SMALL | {"what": what, "bootstrap_servers": bootstrap_servers} | changed)  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(record=True, width=160, file=io.StringIO())


def named(figures: list[Figure], *parts: str) -> list[Figure]:
    return [figure for figure in figures if all(part in figure.name for part in parts)]


def rival(directory: Path, text: str) -> str:
    program = directory / "rival.py"
    program.write_text(text)
    return f"{sys.executable} {program}"


def test_throughput_stands_beside_its_limits_in_json_table_and_picture(bootstrap_servers: str, tmp_path: Path) -> None:
    console, out, command = quiet(), tmp_path / "figures" / "now.json", rival(tmp_path, ECHO)
    figures = run(tiny(bootstrap_servers, "throughput", out=out, against=(command,)), console)
    assert all(figure.value > 0 for figure in figures)
    assert {figure.role for figure in figures} == {"limit", "carousel", "rival"}
    assert all((figure.beside is None) == (figure.role == "limit") for figure in figures)
    (echoed,) = [figure for figure in figures if figure.name == command]
    assert not echoed.note
    written = json.loads(out.read_text())
    assert [Figure(**fields) for fields in written["figures"]] == figures
    assert written["config"]["streams"] == 20
    assert written["machine"]["processors"]
    said = console.export_text()
    assert out.with_suffix(".txt").read_text() in said
    for figure in figures:
        assert figure.name.rpartition(": ")[2] in said or figure is echoed  # its name is long
        assert f"{number(figure.value)} records/s" in said
        assert figure.beside is None or f"{figure.beside:.2f} x" in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_taken_apart_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "WAVES", (2, 8))
    monkeypatch.setattr(step, "TIMED_S", 0)
    console = quiet()
    figures = run(BenchConfig(what=("step",), rounds=2), console)
    assert len(figures) == 2 * 2 * 5
    assert all(figure.rounds == 2 and figure.low <= figure.value <= figure.high for figure in figures)
    assert all(figure.value > 0 for figure in figures if "of that" not in figure.name)
    assert all((figure.beside is None) == (figure.role == "limit") for figure in figures)
    assert "wave of 8, no regression" in console.export_text()


def test_latency_is_measured_of_all_alike(
    bootstrap_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "GUARANTEES", ("exactly_once",))
    command = rival(tmp_path, ECHO)
    figures = run(tiny(bootstrap_servers, "latency", rates=(40.0,), against=(command,)), quiet())
    for who in ("exactly once: the client alone", "exactly once: carousel", "exactly once: with 1,000", command):
        (most,) = named(figures, who, "at most")
        p50, p99, longest = (named(figures, who, "at 40/s", q)[0].value for q in ("p50", "p99", "max"))
        assert most.value > 0
        assert 0 < p50 <= p99 <= longest
    assert all(figure.beside for figure in figures if figure.role != "limit")


def test_http_is_measured_idle_and_at_work_beside_what_serves_the_same_bytes(
    bootstrap_servers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAROUSEL_LOG_FORMAT", "json")  # as a shell may have it
    figures = run(tiny(bootstrap_servers, "http"), quiet())
    assert len(figures) == 5 * 3 + 4 * 2 + 4  # and at a steady rate times alone; of whoever is idle, its processor time
    assert all(figure.value > 0 for figure in figures)
    assert all(figure.beside for figure in figures if figure.role == "carousel")


def test_restore_and_memory_and_what_they_stand_beside(bootstrap_servers: str) -> None:
    figures = run(tiny(bootstrap_servers, "restore", "memory"), quiet())
    (restored,), (resident,) = named(figures, "restore, with"), named(figures, "resident, a")
    (rate,) = named(figures, "restored")
    assert restored.beside
    assert rate.beside
    assert restored.note == "20 streams, 4 observations replayed"
    assert resident.limit == "declared bytes of a stream's state"
    (scraped,) = named(figures, "metrics written out, for a scrape")
    assert scraped.beside
    assert re.fullmatch(r"20 streams, [1-9][0-9]?,[0-9]{3} bytes", scraped.note)
    assert all(figure.value > 0 for figure in figures if "resident" not in figure.name)  # of 20 streams: a page or none


def test_growth_tells_what_bounds_each_point(
    bootstrap_servers: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(BenchConfig(most_streams=1_000_000), bootstrap_servers, tmp_path)
    all_points = list(points(bench))
    assert max(point.at for point in all_points if point.axis == "streams") == 1_000_000
    assert {point.axis for point in all_points} == {"streams", "partitions", "workers", "hidden size", "horizon"}
    two = [point for point in points(Bench(BenchConfig(streams=20), "", tmp_path)) if point.axis == "workers"][1:]
    monkeypatch.setattr("deploy.bench.growth.points", lambda _: two)
    console = quiet()
    figures = run(tiny(bootstrap_servers, "growth", out=tmp_path), console)
    assert [figure.unit for figure in figures] == ["records/s", "us a record", "MB", "p99 ms"]
    assert all(figure.value > 0 and figure.at == 2 and "model step" in figure.note for figure in figures)
    assert "workers 2" in console.export_text()


def test_a_rival_that_never_answers_is_told_of_and_ended(
    bootstrap_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (against, traffic):
        monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(against, "READ_S", 0.1)
    pid = tmp_path / "pid"
    dumb = rival(tmp_path, f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    bench = Bench(tiny(bootstrap_servers), bootstrap_servers, tmp_path)
    (sample,) = against.probe(bench, dumb, 0, make_records(20, 1), "").measure()
    assert sample.value == 0
    assert sample.note == "answered 0 of 20, then was silent for 1 s"
    assert not alive(int(pid.read_text()))
    monkeypatch.setattr(latency, "GUARANTEES", ())
    (figure,) = run(tiny(bootstrap_servers, "latency", against=(dumb,)), quiet())
    assert figure.value == 0
    assert figure.note == "20 of 20 observations were not answered in 1 s"
    assert not alive(int(pid.read_text()))


def test_a_rival_that_ends_by_itself_is_told_of_with_its_last_line(bootstrap_servers: str, tmp_path: Path) -> None:
    bench = Bench(tiny(bootstrap_servers), bootstrap_servers, tmp_path)
    (sample,) = against.probe(
        bench, rival(tmp_path, "raise SystemExit('no luck')"), 0, make_records(20, 1), ""
    ).measure()
    assert sample.note == "answered 0 of 20, then ended with status 1: no luck"


def alive(pid: int) -> bool:
    time.sleep(0.05)
    return Path(f"/proc/{pid}").exists()


def test_a_profile_is_a_flame_graph_of_the_worker(
    bootstrap_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyinstrument")
    monkeypatch.setattr(suite, "probes_of", lambda what, bench: [])
    path = tmp_path / "flame.svg"
    run(tiny(bootstrap_servers, "throughput", steps=20, profile=path), quiet())
    drawn = path.read_text()
    assert drawn.startswith("<svg")
    assert "_process (service/worker.py:" in drawn


@pytest.mark.parametrize(("suffix", "holds"), [(".html", "<html"), (".json", "speedscope")])
def test_a_profile_may_be_a_page_or_for_speedscope(tmp_path: Path, suffix: str, holds: str) -> None:
    pytest.importorskip("pyinstrument")
    path = tmp_path / f"flame{suffix}"
    with flame.graph(path):
        time.sleep(0.02)
    assert holds in path.read_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"what": ("speed",)}, f"there are: {', '.join(WHAT)}"),
        ({"rates": (0.0,)}, "--rates takes"),
        ({"profile": Path("flame.gif")}, ".svg, .html"),
        ({"what": ("step",), "against": ("echo",)}, "latency or throughput"),
        ({"out": Path("/dev/null/figures")}, "cannot write to /dev/null/figures"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(changed: dict[str, object], told: str) -> None:
    with pytest.raises(BenchError) as raised:
        run(BenchConfig(**changed))  # type: ignore[arg-type]
    assert told in str(raised.value)


def test_a_profiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.bench.flame.find_spec", lambda _: None)
    with pytest.raises(BenchError, match=r"pip install 'carousel\[bench\]'"):
        run(BenchConfig(profile=Path("flame.svg")))


@pytest.mark.parametrize("end", [KeyboardInterrupt, BenchError])
def test_what_was_measured_until_it_ended_is_told(end: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured_then_interrupted(config: object, stack: object, taken: Taken, console: object) -> None:
        taken.add("step", 0, Sample("so far", 42, "records/s"))
        raise end

    monkeypatch.setattr(suite, "_measure", measured_then_interrupted)
    console = quiet()
    with pytest.raises(end):
        run(BenchConfig(), console)
    assert "42 records/s" in " ".join(console.export_text().split())


def test_a_request_is_whole(tmp_path: Path) -> None:
    bodies = tmp_path / "bodies"
    bodies.write_bytes(b'{"stream": "a"}\n')
    head, _, body = requests_of(bodies, "127.0.0.1:1")[0].partition(b"\r\n\r\n")
    assert b"Content-Length: 15" in head
    assert body == b'{"stream": "a"}'
