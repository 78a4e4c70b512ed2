"""A genuine Prometheus and promtool, for whoever holds our files against them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml

from deploy.java import end
from tests.served import until

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus/prometheus.yml"
RULES = ROOT / "deploy/prometheus/rules.yml"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"

HTTP = httpx.Client(timeout=10, trust_env=False)  # one for all: each reads the certificates of the system first


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answered(url: str) -> bool:
    try:
        return HTTP.get(url).status_code == 200
    except httpx.TransportError:
        return False


def installed_tool(name: str) -> str:
    """Path of a tool that CI has. Elsewhere its tests are skipped where it is not."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed: .ci/run installs Debian's package `prometheus`")
    return path or pytest.skip(f"{name} is not installed: apt-get install prometheus")


def promtool(*words: str, given: str = "") -> None:
    """Run it; fails with what it says if it finds a fault."""
    command = [installed_tool("promtool"), *words]
    checked = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def selectors(query: str) -> list[Any]:
    """The metrics with their labels that a query asks for. Raises ValueError if it is not PromQL."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


@contextmanager
def watching(
    target: str, directory: Path, flags: Mapping[str, str], hasten: Callable[[str], str] = str
) -> Iterator[tuple[str, Path]]:
    """Prometheus as compose runs it, but for addresses, paths and shorter intervals, and what it reads of `target`
    -> its HOST:PORT, its log. flags: compose's. hasten: what is to be changed in the rules' files.
    """
    config = yaml.safe_load(PROMETHEUS.read_text())
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    config["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    for file in config["rule_files"]:
        content = yaml.safe_load((PROMETHEUS.parent / file).read_text())
        for group in content["groups"]:
            group.pop("interval", None)
        (directory / file).write_text(hasten(yaml.safe_dump(content)))
    address = f"127.0.0.1:{free_port()}"
    own = {
        "--config.file": str(directory / "prometheus.yml"),
        "--storage.tsdb.path": str(directory / "data"),
        "--web.listen-address": address,
    }
    command = [installed_tool("prometheus"), *(f"{name}={value}" for name, value in {**flags, **own}.items())]
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT)
    try:
        until("Prometheus is ready", lambda: answered(f"http://{address}/-/ready"), log=log)
        yield address, log
    finally:
        end(process, 15)


def at_once(rules: str) -> str:
    """Rules that fire as soon as they are true: for `hasten`."""
    return re.sub(r"\bfor: \w+", "for: 1s", rules)


def asked(address: str, path: str, **params: str) -> Any:
    """What Prometheus' API answers."""
    answer = HTTP.get(f"http://{address}/api/v1/{path}", params=params).json()
    assert answer["status"] == "success", f"{path} {params}: {answer}"
    return answer["data"]
