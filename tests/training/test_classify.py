"""Many-to-one: a class or a value of a whole series, learnt on some series and told of others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.bundle import BundleError, ClassifierBundle, load_bundle, open_bundle
from model.classifier import Classifier, ClassifierConfig
from tests.training.synthetic import config as series_config
from tests.training.synthetic import series
from training.classify import (
    CAROUSEL,
    NAIVE,
    ClassifyConfig,
    Example,
    class_scores,
    fit_classifier,
    gather,
    split,
    value_scores,
)
from training.fit import TrainError
from training.table import Columns, TableError

PERIODS = {"slow": 40, "fast": 9}


def write(path: Path, count: int = 30, **columns: object) -> Path:
    """Series of different lengths and levels, slow or fast; their label, and their level as a value to regress."""
    random = np.random.default_rng(0)
    frames = []
    for n in range(count):
        kind = ("slow", "fast")[n % 2]
        steps, level = int(random.integers(50, 90)), float(random.uniform(50, 200))
        angle = 2 * np.pi * np.arange(steps) / PERIODS[kind] + random.uniform(0, 6.28)
        y = level + 20 * np.sin(angle) + 4 * random.normal(size=steps)
        ds = pd.date_range("2024-01-01", periods=steps, freq="h")
        frames.append(pd.DataFrame({"unique_id": f"m{n}", "ds": ds, "y": y, "kind": kind, "level": level} | columns))
    pd.concat(frames).to_csv(path, index=False)
    return path


def train(table: Path, out: Path, **fields: object) -> ClassifierBundle:
    known: dict[str, object] = {"label": "kind", "season": 1, "hidden_size": 16, "layers": 1, "epochs": 30}
    return fit_classifier(table, Columns(), ClassifyConfig(out, **{**known, **fields}))  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_slow_is_told_from_fast_on_series_never_seen(cell: str, tmp_path: Path) -> None:
    bundle = train(write(tmp_path / "kinds.csv"), tmp_path / "model", cell=cell, learning_rate=2e-2)
    ours, naive = bundle.scores[CAROUSEL], bundle.scores[NAIVE]
    assert bundle.config.labels == ("fast", "slow")
    assert ours["accuracy"] == ours["macro_f1"] == 1
    assert ours["log_loss"] < 0.3
    assert naive["accuracy"] <= 2 / 3
    assert naive["log_loss"] == pytest.approx(math.log(2), rel=0.1)
    assert (bundle.training["series"], bundle.training["test_series"]) == (30, 6)


def test_a_value_is_regressed_better_than_by_its_mean(tmp_path: Path) -> None:
    bundle = train(
        write(tmp_path / "kinds.csv"), tmp_path / "model", label="level", task="regress", epochs=60, learning_rate=2e-2
    )
    assert bundle.config.labels == ()
    assert bundle.scores[CAROUSEL]["mae"] < 0.4 * bundle.scores[NAIVE]["mae"]


def test_the_bundle_that_comes_back_answers_as_the_one_that_was_written(tmp_path: Path) -> None:
    made = train(write(tmp_path / "kinds.csv", 10), tmp_path / "model", epochs=1)
    read = open_bundle(tmp_path / "model")
    assert isinstance(read, ClassifierBundle)
    assert (read.config, read.model_id, read.scores) == (made.config, made.model_id, made.scores)
    some = gather([Example(series(40, seed), 0.0) for seed in range(3)])
    assert torch.equal(read.classifier.answer(*some), made.classifier.answer(*some))
    assert "accuracy" in (tmp_path / "model" / "README.md").read_text()


def test_a_classifier_is_no_forecaster_and_says_so(tmp_path: Path) -> None:
    train(write(tmp_path / "kinds.csv", 10), tmp_path / "model", epochs=1)
    with pytest.raises(BundleError, match="is a classifier: it forecasts nothing"):
        load_bundle(tmp_path / "model")


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    table = write(tmp_path / "kinds.csv", 10)
    first, again, other = (train(table, tmp_path / str(k), epochs=2, seed=s) for k, s in enumerate((0, 0, 1)))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_a_series_is_answered_the_same_alone_and_padded_among_longer_ones() -> None:
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(series_config(), ("a", "b", "c"))).eval()
    examples = [Example(series(length, length), 0.0) for length in (25, 90, 1, 60)]
    block, lengths = gather(examples)
    assert block.values.shape == (4, 90)
    alone = torch.cat([classifier.answer(*gather([each])) for each in examples])
    torch.testing.assert_close(classifier.answer(block, lengths), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone.sum(1), torch.ones(4).double())


def test_each_series_is_in_one_part_and_each_label_in_all() -> None:
    examples = [Example(series(5, n), float(n % 3)) for n in range(60)]
    parts = split(examples, seed=0)
    assert {part: len(held) for part, held in parts.items()} == {"fit": 36, "validation": 12, "test": 12}
    names = [each.series.unique_id for held in parts.values() for each in held]
    assert len(set(names)) == len(names) == 60
    assert all({each.truth for each in held} == {0.0, 1.0, 2.0} for held in parts.values())
    assert split(examples, seed=1) != parts


def test_scores_are_those_of_the_textbook() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]]).double()
    told = class_scores(probabilities, torch.tensor([0.0, 1.0, 1.0, 2.0]))
    assert told["accuracy"] == 0.5
    assert told["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert told["log_loss"] == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.3]).mean())
    assert value_scores(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 2.0])) == {"mae": 2.0, "rmse": math.sqrt(5)}


@pytest.mark.parametrize(
    ("columns", "fields", "words"),
    [
        ({}, {"label": "sort"}, r"no column 'sort'; its columns are unique_id, ds, y, kind, level; try --label-column"),
        ({"kind": "same"}, {}, "labels must be two or more"),
        ({"kind": ""}, {}, "series 'm0' has no label in column 'kind'"),
        ({}, {"label": "y"}, "series 'm0' has two labels in 'y'"),
        ({}, {"task": "regress"}, "'slow', which is no number: --task classify"),
        ({}, {"step": "soon"}, "a step is a number and a unit"),
    ],
)
def test_what_cannot_be_learned_is_said_in_one_line(
    columns: dict[str, object], fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    table = write(tmp_path / "kinds.csv", 6, **columns)
    with pytest.raises((TrainError, TableError), match=words) as caught:
        train(table, tmp_path / "out", **fields)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_few_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="4 series are too few"):
        train(write(tmp_path / "kinds.csv", 4), tmp_path / "out")


@pytest.mark.parametrize("fields", [{"task": "guess"}, {"epochs": 0}, {"learning_rate": math.nan}, {"steps": 0}])
def test_options_that_make_no_sense_are_refused_by_name(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=next(iter(fields))):
        ClassifyConfig(tmp_path, "kind", **fields)  # type: ignore[arg-type]
