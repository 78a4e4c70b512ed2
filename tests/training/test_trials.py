"""A search: the first trial is what was given, validation alone decides, and nothing of it is lost or repeated."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from model.bundle import Bundle, load_bundle
from tests.training.synthetic import SEASON, observed
from training import trials as module
from training import windows as windows_module
from training.fit import TrainConfig, TrainError, TrainInterrupted, fit
from training.module import TrainingModule
from training.table import Columns, Observed
from training.trials import search, space, values
from training.windows import WindowOptions, find_split

LENGTH = 200


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that take a tenth of a second."""

    def sizes(config: TrainConfig) -> dict[str, BaseDistribution]:
        small = {"hidden_size": IntDistribution(4, 16), "layers": IntDistribution(1, 2)}
        return {**space(config), **small, "window_steps": IntDistribution(16, 48)}

    monkeypatch.setattr(module, "space", sizes)
    monkeypatch.setattr(windows_module, "COLD_STARTS", 8)


def table() -> list[Observed]:
    return [observed(LENGTH, 0), observed(LENGTH, 1)]


def tiny(out: Path, **fields: object) -> TrainConfig:
    known: dict[str, object] = {
        "out": out,
        "season": SEASON,
        "horizon": 4,
        "quantiles": (0.1, 0.5, 0.9),
        "hidden_size": 8,
        "layers": 1,
        "epochs": 2,
        "windows": WindowOptions(steps=32, burn_in=8, batch_size=4, batches=2),
    }
    return TrainConfig(**{**known, **fields})  # type: ignore[arg-type]


def searched(out: Path, trials: int, many: Sequence[Observed] | None = None, **fields: object) -> Bundle:
    return search(many or table(), Columns(), tiny(out, **fields), trials)


def study(out: Path) -> optuna.Study:
    """As Optuna's own tools read it from the file."""
    storage = JournalStorage(JournalFileBackend(str(out / "trials" / "study.journal")))
    return optuna.load_study(study_name="carousel", storage=storage)


def tried(out: Path) -> list[FrozenTrial]:
    """The trials that were done."""
    return study(out).get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def test_the_best_by_validation_is_the_bundle_and_it_tells_of_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "training.trials"):
        bundle = searched(tmp_path, 3)
    done = tried(tmp_path)
    losses = [each.value for each in done]
    assert len(losses) == 3
    best = done[int(np.argmin(np.array(losses, dtype=float)))]
    told = load_bundle(tmp_path).training
    assert told["trials"] == 3
    assert told["validation_loss"] == pytest.approx(best.value, abs=1e-6)
    assert told["validation_loss_as_given"] == pytest.approx(losses[0], abs=1e-6)
    assert done[told["best_trial"] - 1].params == best.params
    assert bundle.config.hidden_size == best.params["hidden_size"]
    assert told["learning_rate"] == best.params["learning_rate"]
    assert told["window_steps"] == best.params["window_steps"]
    assert bundle.scores == load_bundle(tmp_path).scores != {}
    assert [line.split(":")[0] for line in caplog.messages] == [f"trial {k} of 3" for k in (1, 2, 3)]


def test_the_first_trial_is_the_training_that_there_would_be_without_a_search(tmp_path: Path) -> None:
    plain = fit(table(), Columns(), tiny(tmp_path / "plain"))
    alone = searched(tmp_path / "search", 1)
    assert alone.weights_sha256 == plain.weights_sha256
    assert tried(tmp_path / "search")[0].params == values(tiny(tmp_path))


def test_whatever_is_given_is_part_of_what_is_searched(tmp_path: Path) -> None:
    for fields in ({}, {"hidden_size": 77, "layers": 5, "dropout": 0.6, "learning_rate": 0.5}, {"weight_decay": 0.0}):
        config = tiny(tmp_path, **fields)
        for name, value in values(config).items():
            distribution = space(config)[name]
            assert distribution._contains(distribution.to_internal_repr(value))


def test_an_interrupted_search_resumed_is_as_if_never_interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = searched(tmp_path / "whole", 4)
    with pytest.MonkeyPatch.context() as patch:
        begun = []

        def interrupt(module: TrainingModule) -> None:
            begun.append(module)
            if len(begun) == 6:  # in the second epoch of the third trial
                signal.raise_signal(signal.SIGINT)

        patch.setattr(TrainingModule, "on_train_epoch_start", interrupt)
        with pytest.raises(TrainInterrupted, match=r"after 2 of 4 trials.*--resume"):
            searched(tmp_path / "parts", 4)
    kept = load_bundle(tmp_path / "parts").training
    assert kept["trials"] == 2, "the best so far is there to be used"
    with caplog.at_level(logging.INFO, "training.trials"):
        resumed = searched(tmp_path / "parts", 4, resume=True)
    assert len(caplog.messages) == 2, "and no trial is done again"
    assert resumed.weights_sha256 == whole.weights_sha256
    for name in ("whole", "parts"):
        assert len(tried(tmp_path / name)) == 4
    assert [each.params for each in tried(tmp_path / "parts")] == [each.params for each in tried(tmp_path / "whole")]


def test_a_trial_whose_process_was_killed_is_done_again(tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole", 2)
    searched(tmp_path / "parts", 1)
    study(tmp_path / "parts").ask(module.space(tiny(tmp_path)))
    (tmp_path / "parts" / "trials" / "1.safetensors").write_bytes(b"half a fi")
    assert searched(tmp_path / "parts", 2, resume=True).weights_sha256 == whole.weights_sha256
    assert len(tried(tmp_path / "parts")) == 2


def test_stopped_before_anything_is_done_there_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingModule, "on_train_epoch_start", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainInterrupted, match="no bundle"):
        searched(tmp_path, 2)
    assert not (tmp_path / "config.json").exists()


def test_equal_seeds_search_alike_and_others_elsewhere(tmp_path: Path) -> None:
    made = [searched(tmp_path / str(number), 2, seed=seed) for number, seed in enumerate((0, 0, 1))]
    first, again, other = ([each.params for each in tried(tmp_path / str(number))] for number in range(3))
    assert first == again
    assert made[0].weights_sha256 == made[1].weights_sha256
    assert first[1] != other[1]


def test_a_finished_search_goes_on_if_more_trials_are_wanted(tmp_path: Path) -> None:
    searched(tmp_path, 1)
    assert searched(tmp_path, 2, resume=True).training["trials"] == 2
    assert searched(tmp_path, 1).training["trials"] == 1, "without --resume it begins anew"


def test_only_the_same_search_is_resumed(tmp_path: Path) -> None:
    searched(tmp_path, 1)
    with pytest.raises(TrainError, match="epochs was 2 and is 3"):
        searched(tmp_path, 2, epochs=3, resume=True)
    with pytest.raises(TrainError, match="table was"):
        searched(tmp_path, 2, table()[:1], resume=True)


def test_the_held_back_end_decides_nothing(tmp_path: Path) -> None:
    split = find_split([LENGTH, LENGTH], horizon=4)
    spoiled = []
    for each in table():
        y = each.y.copy()
        y[split.test_start(LENGTH) :] = np.linspace(-1e6, 1e6, LENGTH - split.test_start(LENGTH))
        spoiled.append(dataclasses.replace(each, y=y))
    clean, poisoned = (searched(tmp_path / str(k), 2, many) for k, many in enumerate((table(), spoiled)))
    assert clean.weights_sha256 == poisoned.weights_sha256
    assert [each.value for each in tried(tmp_path / "0")] == [each.value for each in tried(tmp_path / "1")]
    assert clean.scores != poisoned.scores


def losses_of(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Lets every epoch, trial after trial, have a given validation loss."""
    left = iter(losses)
    monkeypatch.setattr(TrainingModule, "validation_step", lambda self, *_: self.log("validation_loss", next(left)))


def test_what_promises_nothing_is_given_up_early_and_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STARTUP_TRIALS", 2)
    losses_of(monkeypatch, [5.0, 5.0, 2.0, 4.0, 4.0, 1.0, 9.0, 9.0])
    bundle = searched(tmp_path, 3, epochs=3)
    assert [each.state for each in tried(tmp_path)] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert (bundle.training["trials_given_up"], bundle.training["best_trial"]) == (1, 2)


def test_the_weights_are_those_of_the_best_trial_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_of(monkeypatch, [2.0, 2.0, 1.0, 1.0, 3.0, 3.0])
    trained: list[torch.Tensor] = []

    def remember(*arguments: object) -> object:
        made = train(*arguments)  # type: ignore[arg-type]
        trained.append(made.forecaster.head.linear.weight.detach().clone())
        return made

    train = module.train
    monkeypatch.setattr(module, "train", remember)
    bundle = searched(tmp_path, 3)
    assert torch.equal(bundle.forecaster.head.linear.weight, trained[1])
    assert [file.suffix for file in (tmp_path / "trials").glob("*.safetensors")] == [".safetensors"], "one is kept"


def test_a_trial_that_diverges_counts_but_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_of(monkeypatch, [math.nan, 1.0, 1.0])
    bundle = searched(tmp_path, 2)
    assert bundle.training["best_trial"] == 2
    assert bundle.training["validation_loss_as_given"] is None
    losses_of(monkeypatch, [math.nan])
    with pytest.raises(TrainError, match="none of 1 trials"):
        searched(tmp_path / "other", 1)
