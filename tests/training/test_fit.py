"""A table becomes a bundle: better than the naive forecast, the same for the same seed, resumable, and honest."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.bundle import Bundle, load_bundle
from tests.training.synthetic import SEASON, observed
from training import windows as windows_module
from training.backtest import CAROUSEL, NAIVE, RAW
from training.fit import TrainConfig, TrainError, TrainInterrupted, fit
from training.module import TrainingModule
from training.table import Columns, Observed
from training.windows import WindowOptions, find_split

LENGTH = 400


@pytest.fixture(autouse=True)
def few_cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "COLD_STARTS", 16)


def table() -> list[Observed]:
    return [observed(LENGTH, 0), observed(LENGTH, 1), observed(60, 2)]


def tiny(out: Path, **fields: object) -> TrainConfig:
    """Options of a training that takes a second."""
    known: dict[str, object] = {
        "out": out,
        "season": SEASON,
        "horizon": 4,
        "quantiles": (0.1, 0.5, 0.9),
        "hidden_size": 8,
        "layers": 1,
        "epochs": 3,
        "windows": WindowOptions(steps=32, burn_in=8, batch_size=8, batches=4),
    }
    return TrainConfig(**{**known, **fields})  # type: ignore[arg-type]


def train(out: Path, many: Sequence[Observed] | None = None, **fields: object) -> Bundle:
    return fit(many or table(), Columns(), tiny(out, **fields))


def test_it_learns_what_the_seasonal_naive_cannot_see(tmp_path: Path) -> None:
    windows = WindowOptions(steps=40, burn_in=8, batch_size=16, batches=25)
    bundle = train(tmp_path, epochs=8, windows=windows, learning_rate=1e-2)
    assert set(bundle.scores) == {CAROUSEL, RAW, NAIVE}
    ours, naive = bundle.scores[CAROUSEL], bundle.scores[NAIVE]
    assert ours["mase"] < 0.85 * naive["mase"]
    assert ours["wql"] < 0.85 * naive["wql"]
    assert 0.6 < ours["coverage"] < 0.95
    assert ours["count"] == naive["count"] > 200


def test_the_bundle_says_how_it_came_to_be_and_nothing_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    frames = [
        pd.DataFrame({"unique_id": each.unique_id, "ds": pd.to_datetime(each.ts_ms, unit="ms"), "y": each.y})
        for each in table()
    ]
    pd.concat(frames).rename(columns={"unique_id": "zone"}).to_csv(file, index=False)
    out = tmp_path / "my model"
    made = fit(file, Columns("zone", timezone="Europe/Berlin"), tiny(out, seed=7))
    bundle = load_bundle(out)
    assert bundle.weights_sha256 == made.weights_sha256
    assert bundle.name == "my-model"
    told = bundle.training
    assert (told["table"], told["series"], told["observations"]) == ("load.csv", 3, 2 * LENGTH + 60)
    assert (told["id_column"], told["time_column"], told["value_column"]) == ("zone", "ds", "y")
    assert told["timezone"] == "Europe/Berlin"
    assert (told["seed"], told["epochs"], told["test_steps"]) == (7, 3, 40)
    assert told["regression_share"] == pytest.approx(bundle.forecaster.regression.share.item())
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "README.md").read_text()
    assert bundle.scores == made.scores


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    first, again, other = (
        train(tmp_path / str(k), seed=seed, dropout=0.2, layers=2, epochs=2) for k, seed in enumerate((0, 0, 1))
    )
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.scores == again.scores


def test_the_held_back_end_changes_no_weight(tmp_path: Path) -> None:
    split = find_split([len(each.y) for each in table()], horizon=4)
    spoiled = []
    for each in table():
        y = each.y.copy()
        y[split.test_start(len(y)) :] = np.linspace(-1e6, 1e6, len(y) - split.test_start(len(y)))
        spoiled.append(dataclasses.replace(each, y=y))
    clean, poisoned = (train(tmp_path / str(k), many, season=None) for k, many in enumerate((table(), spoiled)))
    assert clean.weights_sha256 == poisoned.weights_sha256
    assert clean.config == poisoned.config
    assert clean.scores != poisoned.scores


def test_step_and_season_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    daily = []
    for each in table():
        hours = np.arange(len(each.y))
        daily.append(dataclasses.replace(each, y=each.y + 20 * np.sin(2 * np.pi * hours / 24)))
    with caplog.at_level(logging.INFO, "training"):
        bundle = train(tmp_path, daily, season=None, epochs=1)
    assert (bundle.config.step_ms, bundle.config.season) == (3_600_000, 24)
    assert "step 1:00:00, season 24 (found)" in caplog.text
    assert "epoch 1 of 1" in caplog.text


@pytest.mark.parametrize(("days", "yearly"), [(2 * 365, False), (3 * 365, True)])
def test_the_year_is_looked_at_once_the_history_holds_two(days: int, yearly: bool, tmp_path: Path) -> None:
    times = np.arange(days, dtype=np.int64) * 86_400_000
    values = np.random.default_rng(0).normal(size=days)
    daily = Observed("daily", times, values, np.zeros((days, 0)))
    assert train(tmp_path, [daily], season=7, epochs=1, test_steps=60).config.yearly is yearly


def test_without_a_clock_each_observation_is_a_step(tmp_path: Path) -> None:
    assert train(tmp_path, step="none", epochs=1).config.grid is None


class Stop:
    """Presses Ctrl-C when an epoch begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
        def interrupt(module: TrainingModule) -> None:
            if module.current_epoch == epoch:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TrainingModule, "on_train_epoch_start", interrupt)


def test_an_interrupted_training_resumed_is_as_if_never_interrupted(tmp_path: Path) -> None:
    options = {"dropout": 0.2, "layers": 2, "epochs": 4}
    whole = train(tmp_path / "whole", **options)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, epoch=2)
        with pytest.raises(TrainInterrupted, match="--resume"):
            train(tmp_path / "parts", **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoints"], "no half a bundle"
    resumed = train(tmp_path / "parts", **options, resume=True)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.training["epochs"] == 4


def test_resuming_repeats_no_epoch_not_even_one_without_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = iter([1.0, 2.0, 3.0, 0.5])
    monkeypatch.setattr(TrainingModule, "validation_step", lambda self, *_: self.log("validation_loss", next(losses)))
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, epoch=2)
        with pytest.raises(TrainInterrupted):
            train(tmp_path, epochs=4)
    with caplog.at_level(logging.INFO, "training"):
        train(tmp_path, epochs=4, resume=True)
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("epoch")] == [
        "epoch 3 of 4",
        "epoch 4 of 4",
    ]


def test_an_interruption_leaves_the_bundle_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train(tmp_path, epochs=1)
    Stop(monkeypatch, epoch=0)
    with pytest.raises(TrainInterrupted, match="no epoch was finished"):
        train(tmp_path, epochs=2)
    assert load_bundle(tmp_path).weights_sha256 == before.weights_sha256


def test_a_finished_training_resumed_is_the_same(tmp_path: Path) -> None:
    assert train(tmp_path).weights_sha256 == train(tmp_path, resume=True).weights_sha256


def test_with_nothing_to_resume_it_begins(tmp_path: Path) -> None:
    assert train(tmp_path, epochs=1, resume=True).training["epochs"] == 1


def test_only_the_same_training_is_resumed(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    with pytest.raises(TrainError, match="hidden_size was 8 and is 16"):
        train(tmp_path, epochs=1, hidden_size=16, resume=True)
    with pytest.raises(TrainError, match="table was"):
        train(tmp_path, table()[:2], epochs=1, resume=True)


def test_a_damaged_checkpoint_is_said_so(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(TrainError, match=r"last\.ckpt is damaged"):
        train(tmp_path, epochs=1, resume=True)


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    weights: list[torch.Tensor] = []

    def validate(module: TrainingModule, *_: object) -> None:
        weights.append(module.forecaster.head.linear.weight.detach().clone())
        module.log("validation_loss", next(losses))

    monkeypatch.setattr(TrainingModule, "validation_step", validate)
    bundle = train(tmp_path, epochs=9, patience=3)
    assert bundle.training["epochs"] == 5, "and training ends when nothing gets better"
    assert torch.equal(bundle.forecaster.head.linear.weight, weights[1])
    assert not torch.equal(weights[1], weights[4])


def test_no_epoch_begins_after_the_time_is_up(tmp_path: Path) -> None:
    assert train(tmp_path, epochs=50, max_seconds=0.01).training["epochs"] < 50


def test_it_writes_nowhere_but_into_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    train(tmp_path / "out", epochs=1)
    assert list(here.iterdir()) == []


def test_lightning_keeps_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path, epochs=1)
    assert {record.name.split(".")[0] for record in caplog.records} == {"training"}
    assert [str(warning.message) for warning in recwarn] == []


def changed(**fields: object) -> list[Observed]:
    return [dataclasses.replace(each, **{name: make(each) for name, make in fields.items()}) for each in table()]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("many", "fields", "words"),
    [
        ([observed(15)], {}, "the longest series has 15 steps; a horizon of 4 needs 16"),
        ([observed(15)], {"horizon": 1}, "a horizon of 1 needs 16"),
        ([], {"season": None}, "the longest series has 0 steps"),
        (table(), {"horizon": 150}, "a horizon of 150 needs 600"),
        (changed(y=lambda each: np.full(len(each.y), 3.0)), {}, "no series ever changes"),
        (changed(y=lambda each: np.full(len(each.y), math.nan)), {}, "no series ever changes"),
        (table(), {"step": "soon"}, "a step is a number and a unit"),
        (table(), {"quantiles": (0.9, 0.1)}, "quantiles must increase"),
        (table(), {"hidden_size": 0}, "hidden_size must be in 1"),
    ],
)
def test_what_cannot_be_learned_is_said_in_one_line(
    many: list[Observed], fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=words) as caught:
        fit(many, Columns(), tiny(tmp_path / "out", **fields))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"test_steps": 3}, {"threads": 0}],
)
def test_options_that_make_no_sense_are_refused_by_name(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=next(iter(fields))):
        tiny(tmp_path, **fields)


def test_the_shortest_table_that_is_taken_trains(tmp_path: Path) -> None:
    assert train(tmp_path, [observed(16)], epochs=1).scores[CAROUSEL]["count"] > 0


def test_it_leaves_the_threads_of_torch_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tmp_path, epochs=1, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_run_is_described_beside_its_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    described = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    assert described["hidden_size"] == 8
