"""`carousel bench --training` measures what it names, in turns, each beside Carousel."""

from __future__ import annotations

import importlib.util

import pytest
from rich.console import Console

from deploy import bench_training
from deploy.bench_training import BARE, CAROUSEL, run
from training import windows
from training.windows import WindowOptions


def test_every_measurement_is_told_beside_carousel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "WINDOWS", WindowOptions(steps=32, burn_in=8, batch_size=2))
    monkeypatch.setattr(bench_training, "SERIES", 2)
    monkeypatch.setattr(windows, "COLD_STARTS", 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    console = Console(record=True, width=160)
    figures = run(batches=2, rounds=2, console=console)
    assert [figure.what for figure in figures] == [BARE, CAROUSEL]
    assert all(figure.windows_per_second > 0 for figure in figures)
    said = console.export_text()
    assert "1.00 x" in next(row for row in said.splitlines() if CAROUSEL in row)
    assert "NeuralForecast is not installed" in said


def test_a_clock_counts_only_what_comes_after_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 50.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(bench_training.time, "perf_counter", lambda: next(times))
    clock = bench_training._Clock()
    for _ in range(bench_training.WARM_BATCHES + 2):
        clock.on_train_batch_end()
    assert clock.windows_per_second() == bench_training.WINDOWS.batch_size / 2
