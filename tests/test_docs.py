"""The README and docs/, held against what they speak of: links, commands, names; and their programs are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import typer.main
from kafka import KafkaConsumer, TopicPartition
from kafka.partitioner.default import murmur2

import carousel
from deploy.distribution import cache_dir
from model.errors import CarouselError
from service.settings import Settings
from tests.deploy.prometheus import free_port
from tests.deploy.test_alerts import exported
from tests.served import Served, random_bundle, serving, until
from training.fit import TrainConfig, prepare
from training.series import infer_grid, infer_season, parse_step, to_grid
from training.table import Columns, Observed

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "tests/README.md", *sorted(DOCS.glob("*.md"))]
SOURCES = ("model", "training", "service", "deploy", "tests")
PARTITIONS = 4


@dataclass(frozen=True)
class Block:
    """A block of code in a page. language, name: what stands behind its fence; empty where it is indented."""

    language: str
    name: str
    text: str


@cache
def text_of(page: Path) -> str:
    return page.read_text()


@cache
def blocks(page: Path) -> list[Block]:
    fenced = re.findall(r"^```(\w*) ?(\S*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?:    .*\n|\n(?=    ))+)", prose(page, inline=True))
    return [Block(*each) for each in fenced] + [
        Block("", "", re.sub(r"^    ", "", one, flags=re.M)) for one in indented
    ]


def prose(page: Path, inline: bool = False) -> str:
    """A page without its fenced blocks; inline: with its indented ones and what stands in backticks."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return text if inline else re.sub(r"`[^`]*`", "", text)


def in_backticks(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page, inline=True))


def named(page: Path) -> Any:
    return pytest.param(page, id=str(page.relative_to(ROOT)))


each_page = pytest.mark.parametrize("page", [named(page) for page in PAGES])


# ---------------------------------------------------------------- what they speak of


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page, inline=True), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_index_names_every_page() -> None:
    index = text_of(DOCS / "README.md")
    assert [page.name for page in sorted(DOCS.glob("*.md")) if f"({page.name})" not in index] == ["README.md"]


def commands(block: Block) -> Iterator[list[str]]:
    """The `carousel` commands of a block, as a shell would split them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        if line.startswith("carousel "):
            split = list(words)[1:]
            yield split[: next((n for n, word in enumerate(split) if set(word) <= set("&|;<>()")), len(split))]


@each_page
def test_commands_are_such_as_the_front_door_takes(page: Path) -> None:
    for words in (found for block in blocks(page) for found in commands(block)):
        command = typer.main.get_command(carousel.app).commands[words[0]]
        command.make_context(words[0], words[1:])  # raises for an option, an argument or a value that it has not


def options() -> dict[str, set[str]]:
    """Of each command."""
    found = typer.main.get_command(carousel.app).commands
    return {name: {"--help"}.union(*(each.opts for each in command.params)) for name, command in found.items()}


@each_page
def test_options_in_the_text_are_there(page: Path) -> None:
    known = options()
    for text in in_backticks(page):
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        if command := re.match(r"carousel ([a-z]+)", text):
            assert flags <= known[command[1]], text
        elif text.startswith("--"):
            assert flags <= set().union(*known.values()), text


@cache
def sources() -> dict[Path, str]:
    """All code and configuration but this file."""
    folders = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")]
    kept = [path for path in [*folders, *ROOT.glob("*.*")] if path.suffix in {".py", ".yml", ".toml", ".html"}]
    return {path: path.read_text() for path in kept if path != Path(__file__)}


@cache
def words() -> set[str]:
    return set(re.findall(r"\w+", "\n".join(sources().values())))


@each_page
def test_names_in_the_text_are_those_of_the_code(page: Path) -> None:
    its_own = "\n".join(block.text for block in blocks(page))
    for text in in_backticks(page):
        if name := re.fullmatch(r"([a-z]\w*_\w+)(: \w+|=\w+)?", text):
            assert name[1] in words() or name[1] in its_own, text
        if re.fullmatch(r"[\w/]+\.py", text):
            assert any(path.match(text) for path in sources()), text


@each_page
def test_metrics_and_variables_are_there(page: Path) -> None:
    variables = {f"CAROUSEL_{name.upper()}" for name in Settings.model_fields}
    for name in re.findall(r"\bcarousel_[a-z_]+\b", prose(page, inline=True)):
        assert name in exported(), name
    for name in re.findall(r"\bCAROUSEL_[A-Z_]+\b", text_of(page)):
        assert name in variables or name in words(), name


# ---------------------------------------------------------------- your-table.md

HOUR, DAY = 3_600_000, 86_400_000
MONDAY = 1_704_067_200_000


def times_of(what: str) -> np.ndarray:
    """A hundred days or more of times, epoch ms, as a row of the page calls them."""
    hours = MONDAY + HOUR * np.arange(24 * 100)
    days = MONDAY + DAY * np.arange(200)
    random = np.random.default_rng(0)
    months = np.arange("2010-01", "2024-01", dtype="datetime64[M]").astype("datetime64[ms]")
    return {
        "each hour": hours,
        "each hour from 8 to 20": hours[np.isin(np.arange(len(hours)) % 24, range(8, 20))],
        "each day": days,
        "Monday to Friday": days[np.arange(len(days)) % 7 < 5],
        "every five minutes, with a clock that jitters": MONDAY
        + 300_000 * np.arange(3_000)
        + random.integers(0, 9_000, 3_000),
        "each week": MONDAY + 7 * DAY * np.arange(300),
        "each month": months.astype(np.int64),
        "whenever something happens": MONDAY + np.cumsum(random.exponential(5e6, 300).astype(np.int64)),
    }[what]


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|.*\n((?:\|.*\n)+)", text_of(page), re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


@pytest.mark.parametrize(("what", "step", "season"), rows(DOCS / "your-table.md", "times"))
def test_step_and_season_are_found_as_the_page_says(what: str, step: str, season: str) -> None:
    times = times_of(what)
    noise = np.random.default_rng(1).normal(size=len(times))
    wave = 3 * np.sin(2 * np.pi * np.arange(len(times)) / int(season)) if int(season) > 1 else 0
    series = [Observed("a", times, wave + noise, np.empty((len(times), 0)))]
    grid = infer_grid(series)
    length, _, without = step.partition(",")
    assert (grid.step_ms if grid else None) == parse_step(length)
    assert bool(without) == bool(grid and grid.period > 1)
    assert infer_season(to_grid(series, grid, 64), grid) == int(season)


def said_of(table: str, **options: Any) -> str:
    """What is said of a table sales.csv in the working directory that nothing can be learned from."""
    Path("sales.csv").write_text(table)
    with pytest.raises(CarouselError) as caught:
        prepare(Path("sales.csv"), Columns(), TrainConfig(Path("model"), **options))
    return str(caught.value)


def many(count: int, value: Callable[[int], object]) -> str:
    return "ds,y\n" + "".join(f"2024-01-{1 + n // 24:02} {n % 24:02}:00,{value(n)}\n" for n in range(count))


def test_errors_are_said_as_the_page_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = [
        said_of("shop,day,sold\na,2024-01-01,1\n"),
        said_of("ds,y,shop\n2024-01-01,1,a\n2024-01-01,2,b\n"),
        said_of('ds,y\n2024-01-01,1\n2024-01-02,"1,5"\n'),
        said_of("ds,y\n31.01.2024,1\n"),
        said_of("ds,y\n2024-01-31,1,5\n"),
        said_of(many(20, lambda n: n)),
        said_of(many(200, lambda _: 1)),
        said_of(many(200, lambda n: n), step="1 month"),
    ]
    assert [f"`{line}`" for line in said] == [cells[0] for cells in rows(DOCS / "your-table.md", "it says")]


# ---------------------------------------------------------------- first-ten-minutes.md


def test_the_newcomers_commands_bring_a_table_of_ones_own_to_live_forecasts(tmp_path: Path) -> None:
    page = DOCS / "first-ten-minutes.md"
    script = "\n".join(
        block.text for block in blocks(page) if block.language == "sh" and "make setup" not in block.text
    )
    kafka, http = free_port(), free_port()
    for before, after in (
        ("carousel broker", f"carousel broker --port {kafka}"),
        ("carousel train", "carousel train --epochs 1"),
        ("localhost:8000", f"localhost:{http}"),
    ):
        assert before in script
        script = script.replace(before, after)
    own = {
        "CAROUSEL_BOOTSTRAP_SERVERS": f"127.0.0.1:{kafka}",
        "CAROUSEL_HTTP_PORT": str(http),
        "CAROUSEL_COMPILED": "False",  # numba takes longer to load than all the rest
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ | own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=240)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert run.returncode == 0, f"{said}\n{logs}"
    for line in ("season 12 (found)", "of 4 series to carousel.observations"):
        assert line in text_of(page)
        assert line in said, said
    forecast = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    assert forecast["stream"] == "north"
    assert forecast["status"] == "live"
    assert len(forecast["quantiles"]["0.5"]) == 24


# ---------------------------------------------------------------- produce.md


def tool(name: str, package: str) -> str:
    """Skips where it is not, except where it must be."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed: .ci/run installs {package}")
    return path or pytest.skip(f"{name} is not installed: apt-get install {package}")


@pytest.fixture(scope="module")
def served(bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    bundle = random_bundle(tmp_path_factory.mktemp("bundle"))
    with serving(bundle, bootstrap_servers, tmp_path_factory.mktemp("log"), partitions=PARTITIONS) as service:
        yield service


@dataclass(frozen=True)
class Shelf:
    """The programs of produce.md in a directory, with the addresses and topics of a service of ours."""

    directory: Path
    environment: dict[str, str]

    def start(self, name: str) -> subprocess.Popen[str]:
        interpreter = sys.executable if name.endswith(".py") else "bash"
        return subprocess.Popen(
            [interpreter, name],
            cwd=self.directory,
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str) -> str:
        with self.start(name) as program:
            said, _ = program.communicate(timeout=60)
        assert program.returncode == 0, said
        return said

    def says(self, name: str, what: str) -> str:
        """The first line with `what` in it of a program that goes on for ever."""
        with self.start(name) as program:
            assert program.stdout
            try:
                return next(line for line in program.stdout if what in line)
            finally:
                program.kill()


@pytest.fixture
def shelf(served: Served, tmp_path: Path) -> Shelf:
    for block in blocks(DOCS / "produce.md"):
        text = block.text
        for before, after in (
            ("localhost:9092", served.servers),
            ("carousel.observations.dlq", served.dead_letters),
            ("carousel.observations", served.observations),
            ("carousel.forecasts", served.forecasts),
        ):
            text = text.replace(before, after)
        if block.name:
            (tmp_path / block.name).write_text(text)
    home = os.environ.get("KAFKA_HOME")
    if not home:
        jars = next(cache_dir().glob("kafka-*/jars"), None)
        if jars:
            (tmp_path / "libs").symlink_to(jars)
    return Shelf(tmp_path, {"KAFKA_HOME": home or str(tmp_path), "PYTHONUNBUFFERED": "1"})


def forecast_of(served: Served, stream: str) -> Any:
    """The first record of a stream on the forecasts topic."""
    consumer = KafkaConsumer(
        bootstrap_servers=served.servers, auto_offset_reset="earliest", isolation_level="read_committed"
    )
    consumer.assign([TopicPartition(served.forecasts, partition) for partition in range(PARTITIONS)])
    found: list[Any] = []

    def look() -> list[Any]:
        for batch in consumer.poll(200).values():
            found.extend(record for record in batch if record.key == stream.encode())
        return found

    try:
        return until(f"a forecast of {stream}", look)[0]
    finally:
        consumer.close()


def by_murmur2(key: bytes) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % PARTITIONS


@pytest.mark.parametrize(
    ("program", "stream"),
    [
        ("kcat.sh", "kcat"),
        ("console.sh", "console"),
        ("kafka_python.py", "kafka-python"),
        ("confluent.py", "confluent-kafka"),
        ("java.sh", "java"),
    ],
)
def test_what_each_client_produces_is_forecast_and_lies_where_java_would_put_it(
    served: Served, shelf: Shelf, program: str, stream: str
) -> None:
    if program == "kcat.sh":
        tool("kcat", "kcat")
    if program == "java.sh":
        tool("javac", "default-jdk-headless")
    if program == "console.sh" and not Path(shelf.environment["KAFKA_HOME"], "bin").exists():
        pytest.skip("no KAFKA_HOME: Kafka's own download")
    key = stream.encode()
    assert by_murmur2(key) != zlib.crc32(key) % PARTITIONS, "or the partitioner would not matter"
    said = shelf.run(program)
    record = forecast_of(served, stream)
    assert record.partition == by_murmur2(key)
    assert json.loads(record.value)["observed"] == 23.4
    if "partition" in said:
        assert f"partition {record.partition}" in said


def test_a_tombstone_ends_the_stream(served: Served, shelf: Shelf) -> None:
    tool("kcat", "kcat")
    shelf.run("kcat.sh")

    def known() -> bool:
        return httpx.get(f"{served.url}/v1/streams/kcat").status_code == 200

    until("the stream", known)
    shelf.run("tombstone.sh")
    until("its end", lambda: not known())


def test_forecasts_are_read_as_the_page_says(served: Served, shelf: Shelf) -> None:
    stream = f"read-{uuid.uuid4().hex[:8]}"
    served.produce([(stream.encode(), b'{"value": 5}')])
    assert "with 80% between" in shelf.says("forecasts.py", f"{stream}: next")
    tool("kcat", "kcat")
    assert stream in shelf.run("read.sh")


def test_dead_letters_are_read_as_the_page_says(served: Served, shelf: Shelf) -> None:
    served.produce([(b"odd", b'{"value": 23,4}')])
    assert shelf.says("dead_letters.py", "odd").startswith("decode: ")


def test_routes_in_the_text_are_there(served: Served) -> None:
    known = {re.sub(r"{.*?}", "{}", path) for path in served.get("/openapi.json")["paths"]}
    known |= {"/openapi.json", "/metrics", "/tmp"}  # the last is none, but looks like one
    for page in PAGES:
        for text in in_backticks(page):
            for route in re.findall(r"^(?:GET |POST )?(/(?:v1/[\w/{}]+|\w+))(?=$|\?)", text):
                assert re.sub(r"{.*?}", "{}", route) in known, f"{page.name}: {text}"
