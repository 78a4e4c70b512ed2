"""`carousel bench training` measures what it names, in turns, each beside Carousel."""

from __future__ import annotations

import importlib.util

import pytest

from deploy.bench import training
from deploy.bench.load import BenchConfig
from deploy.bench.suite import run
from deploy.bench.training import BARE, CAROUSEL
from training import windows
from training.windows import WindowOptions


def test_every_measurement_stands_beside_the_bare_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WINDOWS", WindowOptions(steps=32, burn_in=8, batch_size=2))
    monkeypatch.setattr(training, "SERIES", 2)
    monkeypatch.setattr(training, "BATCHES", 2)
    monkeypatch.setattr(windows, "COLD_STARTS", 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    bare, carousel = run(BenchConfig(what=("training",), rounds=2))
    assert (bare.name, carousel.name) == (BARE, CAROUSEL)
    assert bare.value > 0
    assert carousel.beside
    assert carousel.note.endswith("forecasts learned from/s")


def test_a_clock_counts_only_what_comes_after_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 50.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(times))
    clock = training._Clock()
    for _ in range(training.WARM_BATCHES + 2):
        clock.on_train_batch_end()
    assert clock.windows_per_second() == training.WINDOWS.batch_size / 2
