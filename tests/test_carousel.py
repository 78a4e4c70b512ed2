"""The front door: help that says all one needs, and errors of one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from carousel import columns_of
from model.bundle import load_bundle
from service.settings import Settings
from tests.served import random_bundle
from training.table import Columns

COMMANDS = ("demo", "train", "backtest", "serve", "replay", "broker", "bench", "chaos", "inspect", "memory")


def carousel(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAROUSEL_")}
    return subprocess.run(
        [sys.executable, "-m", "carousel", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"COLUMNS": "200", "NO_COLOR": "1"},
    )


def refused(*arguments: object) -> str:
    """The one line that a command ends with when it cannot go on."""
    done = carousel(*arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("carousel: ")
    return line


def test_help_names_every_command() -> None:
    said = carousel("--help").stdout
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_explains_each_of_its_options(command: str) -> None:
    done = carousel(command, "--help")
    assert done.returncode == 0
    options = [line for line in done.stdout.splitlines() if line.strip("│ *").startswith("--")]
    assert options
    for line in options:
        assert len(line.strip("│ ").split("  ", 1)[-1].split()) >= 3, f"no explanation: {line}"


def test_serve_has_a_flag_for_every_setting_with_its_variable() -> None:
    said = " ".join(carousel("serve", "--help").stdout.replace("│", " ").split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in said
        assert f"CAROUSEL_{name.upper()}" in said


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    assert "none.csv" in refused("train", tmp_path / "none.csv", "--out", tmp_path / "model")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    table = tmp_path / "sales.csv"
    table.write_text("shop,day,sold\na,2024-01-01,1\n")
    line = refused("train", table, "--out", tmp_path / "model")
    assert "--id-column" in line or "--time-column" in line
    assert "shop" in line


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [("classify", "--trials", 3), ("regress", "--horizon", 24), ("forecast", "--label-column", "y")],
)
def test_an_option_that_would_be_of_no_effect(tmp_path: Path, task: str, option: str, value: object) -> None:
    line = refused("train", tmp_path / "some.csv", "--out", tmp_path / "model", "--task", task, option, value)
    assert option in line
    assert f"--task {task}" in line


def test_a_bundle_knows_the_columns_of_its_table(tmp_path: Path) -> None:
    loaded = load_bundle(random_bundle(tmp_path, covariates=("rain",)))
    told = {"id_column": "shop", "time_column": "day", "value_column": "sold", "timezone": "Europe/Berlin"}
    bundle = replace(loaded, training=told)
    assert columns_of(bundle, None, None, None, None) == Columns("shop", "day", "sold", ("rain",), "Europe/Berlin")
    assert columns_of(bundle, None, "week", None, "UTC", "") == Columns("shop", "week", "sold", (), "UTC")
    assert columns_of(loaded, None, None, None, None) == Columns(covariates=("rain",)), "an older one does not"


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    line = refused("serve", "--model", tmp_path / "none")
    assert "none" in line
    assert "carousel train" in line


def test_a_bundle_of_another_version(tmp_path: Path) -> None:
    config = random_bundle(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    assert "format 99" in refused("serve", "--model", tmp_path)


def test_a_damaged_bundle(tmp_path: Path) -> None:
    weights = random_bundle(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "damaged" in refused("serve", "--model", tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("serve", "--model", random_bundle(tmp_path), "--http-port", port)
    assert str(port) in line
    assert "--http-port" in line


def test_a_setting_that_makes_no_sense(tmp_path: Path) -> None:
    assert "max_streams" in refused("serve", "--model", tmp_path, "--max-streams", 0)
