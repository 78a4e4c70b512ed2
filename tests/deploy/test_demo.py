"""The demo, as a newcomer runs it: it flows, it ends, it leaves nothing running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deploy.broker import EmbeddedBroker
from deploy.demo import HTTP_PORT, SAMPLE, TRAINING, bundle_directory, quantile
from tests.served import running_with, until


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with Kafka in it, as every machine has after the first start, and nothing else."""
    with EmbeddedBroker():
        pass
    cache = tmp_path_factory.mktemp("home") / "carousel"
    cache.mkdir()
    for kafka in bundle_directory().parent.glob("kafka-*"):
        (cache / kafka.name).symlink_to(kafka)
    return cache.parent


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The same with a model, of one epoch."""
    command = [sys.executable, "-m", "carousel", "train", SAMPLE, "--out", home / "carousel" / bundle_directory().name]
    subprocess.run([*command, *TRAINING, "--epochs", "1"], check=True, env=environment(home))
    return home


def environment(home: Path) -> dict[str, str]:
    """Such as a shell may have in which `carousel serve` is used, too."""
    logs = {"CAROUSEL_LOG_FORMAT": "json", "CAROUSEL_LOG_LEVEL": "error"}
    return os.environ | logs | {"XDG_CACHE_HOME": str(home), "COLUMNS": "160"}


def demo(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "carousel", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(home),
        process_group=0,
    )


def running(home: Path) -> list[str]:
    """Commands of the processes that have the demo's environment: the demo's own, and all that came from it."""
    return running_with(f"XDG_CACHE_HOME={home}")


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout
    while line := process.stdout.readline():
        yield line


def test_it_forecasts_every_stream_says_what_it_counted_and_leaves_nothing(trained: Path) -> None:
    with socket.socket() as another:  # on the usual port, which the demo then leaves alone
        with suppress(OSError):
            another.bind(("127.0.0.1", HTTP_PORT))
            another.listen()
        process = demo(trained, "--for", "8", "--speed", "36000")
        said = list(lines(process))
    assert process.wait() == 0, "".join(said)
    text = "".join(said)
    assert "forecasts flowed for all 17 streams" in text
    assert text.index("look ") < text.index("/v1/streams"), "the page first"
    assert "/metrics" in text
    for figure in ("forecasts", "lag", "end to end p50", "error beside seasonal naive", "in 80% interval"):
        assert figure in text
    assert running(trained) == []


@pytest.mark.parametrize("moment", ["starting", "flowing"])
def test_ctrl_c_at_any_moment_leaves_nothing_running(trained: Path, moment: str) -> None:
    process = demo(trained, "--speed", "36000")
    wanted = {"starting": "model", "flowing": "end to end"}[moment]
    next(line for line in lines(process) if wanted in line)
    os.killpg(process.pid, signal.SIGINT)
    list(lines(process))
    assert process.wait(60) in {"starting": (130,), "flowing": (0, 1)}[moment]
    assert running(trained) == []


def test_ctrl_c_while_training_leaves_nothing_running(home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "carousel"
    cache.mkdir()
    process = demo(tmp_path)
    until("the trainer", lambda: any(" train " in command for command in running(tmp_path)))
    os.killpg(process.pid, signal.SIGINT)
    list(lines(process))
    assert process.wait(60) == 130
    assert running(tmp_path) == []
    assert not list(cache.glob("demo-*/config.json")), "no half of a bundle"


def test_a_quantile_of_a_histogram_is_linear_within_its_bucket() -> None:
    buckets = {0.1: 0.0, 0.2: 50.0, 0.4: 100.0, float("inf"): 100.0}
    assert [round(quantile(buckets, share), 6) for share in (0.25, 0.5, 0.75, 1.0)] == [0.15, 0.2, 0.3, 0.4]
    assert quantile({1.0: 0.0, float("inf"): 0.0}, 0.5) == 0.0
