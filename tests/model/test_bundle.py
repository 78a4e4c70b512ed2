"""A model on disk: the same model again, or a refusal in one line; never code."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import model
from model.bundle import CARD, CONFIG, FORMAT, WEIGHTS, BundleError, load_bundle, save_bundle
from model.config import ModelConfig
from model.grid import Grid
from tests.model import HOUR_MS, block_of, random_forecaster

MODEL = ModelConfig(
    grid=Grid(HOUR_MS, period=24, phases=tuple(range(6, 22))),
    season=4,
    horizon=6,
    quantiles=(0.05, 0.5, 0.95),
    covariates=("temperature",),
    hidden_size=8,
)
TRAINING = {"table": "load.csv", "seed": 7, "epochs": 3, "best_loss": 0.25}
SCORES = {"carousel": {"wql": 0.08125, "mase": 0.75, "coverage": 0.9}, "seasonal naive": {"wql": 0.1, "mase": 1.0}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a bundle lies, whole."""
    path = tmp_path / "bundles" / "load"
    save_bundle(path, random_forecaster(MODEL), name="load", training=TRAINING, scores=SCORES)
    return path


def refusal(directory: Path) -> str:
    """Why a bundle is refused: one line, that names a path."""
    with pytest.raises(BundleError) as refused:
        load_bundle(directory)
    message = str(refused.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def replace_weights(directory: Path, content: bytes) -> None:
    """Other weights, with the checksum that vouches for them."""
    (directory / WEIGHTS).write_bytes(content)
    edit(directory, lambda config: config.update(weights_sha256=hashlib.sha256(content).hexdigest()))


# --- Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_loaded_model_forecasts_bit_for_bit_as_the_saved_one(tmp_path: Path, cell: str) -> None:
    config = ModelConfig(season=4, horizon=6, covariates=("temperature",), hidden_size=8, cell=cell)
    ours = random_forecaster(config, seed=3).requires_grad_(False)  # else, on an AMD processor, torch rounds otherwise
    save_bundle(tmp_path, ours, name="load", training={}, scores={})
    theirs = load_bundle(tmp_path).forecaster
    random = torch.Generator().manual_seed(0)
    values = torch.randn(5, 40, dtype=torch.float64, generator=random)
    block = block_of(values, covariates=torch.randn(5, 40, 1, dtype=torch.float64, generator=random))
    forecast, state = ours.advance(ours.initial_state(5), block)
    again, state_again = theirs.advance(theirs.initial_state(5), block)
    assert torch.equal(again.values, forecast.values)
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state_again[name], rows) for name, rows in state.items())


def test_all_that_is_known_of_a_model_comes_back(directory: Path) -> None:
    bundle = load_bundle(directory)
    assert bundle.config == MODEL
    assert bundle.name == "load"
    assert bundle.training == TRAINING
    assert bundle.scores == SCORES


def test_what_save_returns_is_what_load_returns(tmp_path: Path) -> None:
    saved = save_bundle(tmp_path, random_forecaster(MODEL), name="load", training=TRAINING, scores=SCORES)
    loaded = load_bundle(tmp_path)
    assert (saved.model_id, saved.config, saved.training, saved.scores) == (
        loaded.model_id,
        loaded.config,
        loaded.training,
        loaded.scores,
    )


def test_a_model_that_is_loaded_is_ready_to_serve(directory: Path) -> None:
    forecaster = load_bundle(directory).forecaster
    assert not forecaster.training
    assert not any(weights.requires_grad for weights in forecaster.parameters())


def test_the_models_id_is_its_name_and_what_its_weights_are(directory: Path, tmp_path: Path) -> None:
    bundle = load_bundle(directory)
    assert bundle.model_id == f"load-{hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()[:8]}"
    other = save_bundle(tmp_path / "other", random_forecaster(MODEL, seed=1), name="load", training={}, scores={})
    assert other.model_id != bundle.model_id
    same = save_bundle(tmp_path / "same", random_forecaster(MODEL), name="load", training={}, scores={})
    assert same.model_id == bundle.model_id


def test_the_layout_is_that_of_hugging_face_with_nothing_left_over(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_bundle_can_be_written_over_another(directory: Path) -> None:
    save_bundle(directory, random_forecaster(MODEL, seed=1), name="newer", training={}, scores={})
    assert load_bundle(directory).name == "newer"


def test_what_cannot_be_written_leaves_the_bundle_that_is_there(directory: Path) -> None:
    before = load_bundle(directory).model_id
    with pytest.raises(TypeError):
        save_bundle(directory, random_forecaster(MODEL, seed=1), name="bad", training={"table": object()}, scores={})
    assert load_bundle(directory).model_id == before


@pytest.mark.parametrize("name", ["", "-load", "load/now", "../load", "a b", "load\n", "x" * 65])
def test_a_name_that_could_not_stand_everywhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        save_bundle(tmp_path / "bundle", random_forecaster(MODEL), name=name, training={}, scores={})
    assert not (tmp_path / "bundle").exists()


# --- The card --------------------------------------------------------------------------------------------------------


def test_the_card_names_what_the_model_is_how_it_came_to_be_and_how_good_it_was(directory: Path) -> None:
    card = (directory / CARD).read_text()
    weights = sum(weights.numel() for weights in random_forecaster(MODEL).parameters())
    for named in (
        "# load\n",
        "2 layers of 8 LSTM cells",
        f"{weights:,} weights",
        "next 6 steps",
        "3 quantiles (0.05 ... 0.95)",
        "step: 3600 s",
        "season: 4 steps",
        "covariates: temperature",
        "- table: load.csv",
        "- seed: 7",
        "- best loss: 0.25",
        "| method | wql | mase | coverage |",
        "| carousel | 0.0813 | 0.7500 | 0.9000 |",
        "| seasonal naive | 0.1000 | 1.0000 | nan |",
    ):
        assert named in card


def test_the_card_begins_with_the_metadata_that_hugging_face_reads(directory: Path) -> None:
    _, metadata, _ = (directory / CARD).read_text().split("---\n", 2)
    assert metadata.splitlines() == ["library_name: carousel", "pipeline_tag: time-series-forecasting"]


def test_the_card_of_a_model_with_neither_clock_nor_covariates_says_so(tmp_path: Path) -> None:
    save_bundle(tmp_path, random_forecaster(ModelConfig(hidden_size=8)), name="load", training={}, scores={})
    assert "- step: each observation; season: 1 steps; covariates: none" in (tmp_path / CARD).read_text()


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_no_bundle_there(tmp_path: Path) -> None:
    assert "carousel train TABLE --out" in refusal(tmp_path / "nowhere")


def test_a_file_is_no_bundle(directory: Path) -> None:
    assert "there is no bundle" in refusal(directory / WEIGHTS)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_file_that_lacks(directory: Path, file: str) -> None:
    (directory / file).unlink()
    assert f"cannot read {directory / file}: No such file" in refusal(directory)


def test_a_card_that_lacks_does_not_matter(directory: Path) -> None:
    (directory / CARD).unlink()
    assert load_bundle(directory).name == "load"


@pytest.mark.parametrize("content", [b"", b"not\nJSON", b'{"format": 1,', b"\xff\xfe{}"])
def test_a_config_that_is_not_json(directory: Path, content: bytes) -> None:
    (directory / CONFIG).write_bytes(content)
    assert f"{directory / CONFIG} is damaged" in refusal(directory)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"model_type": "bert"}'])
def test_a_config_of_something_else(directory: Path, content: bytes) -> None:
    (directory / CONFIG).write_bytes(content)
    assert "is not the configuration of a Carousel bundle" in refusal(directory)


@pytest.mark.parametrize("other", [FORMAT + 1, 0, "1", None])
def test_another_format(directory: Path, other: object) -> None:
    edit(directory, lambda config: config.update(format=other))
    message = refusal(directory)
    assert f"of format {other!r}" in message
    assert f"reads format {FORMAT}" in message


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_bit_in_the_weights(directory: Path, position: int) -> None:
    weights = bytearray((directory / WEIGHTS).read_bytes())
    weights[position] ^= 1
    (directory / WEIGHTS).write_bytes(weights)
    assert f"{directory / WEIGHTS} is damaged" in refusal(directory)


def test_weights_cut_short(directory: Path) -> None:
    weights = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(weights[:-10])
    assert "is damaged" in refusal(directory)


@pytest.mark.parametrize("kept", [0, 4, 50, -10])
def test_weights_cut_short_that_are_vouched_for(directory: Path, kept: int) -> None:
    replace_weights(directory, (directory / WEIGHTS).read_bytes()[:kept])
    refusal(directory)


def test_weights_of_another_shape_that_are_vouched_for(directory: Path) -> None:
    wider = random_forecaster(ModelConfig(**{**vars(MODEL), "hidden_size": 9}))
    replace_weights(directory, save(wider.state_dict()))
    message = refusal(directory)
    assert f"{directory / WEIGHTS} does not match {CONFIG}" in message
    assert "size mismatch" in message


def test_weights_with_one_tensor_fewer_or_more(directory: Path) -> None:
    weights = random_forecaster(MODEL).state_dict()
    replace_weights(directory, save({name: tensor for name, tensor in weights.items() if name != "shortcut.bias"}))
    assert "shortcut.bias" in refusal(directory)
    replace_weights(directory, save({**weights, "attention": torch.zeros(3)}))
    assert "attention" in refusal(directory)


def test_a_field_of_the_model_that_this_version_does_not_know(directory: Path) -> None:
    edit(directory, lambda config: config["model"].update(heads=8))
    assert "heads" in refusal(directory)


@pytest.mark.parametrize("field", ["season", "quantiles", "cell", "max_gap", "grid"])
def test_a_field_of_the_model_that_lacks(directory: Path, field: str) -> None:
    edit(directory, lambda config: config["model"].pop(field))
    assert f"lacks the field '{field}'" in refusal(directory)


@pytest.mark.parametrize("field", ["name", "model"])
def test_a_field_that_lacks(directory: Path, field: str) -> None:
    edit(directory, lambda config: config.pop(field))
    assert f"lacks the field '{field}'" in refusal(directory)


def test_a_checksum_that_lacks(directory: Path) -> None:
    edit(directory, lambda config: config.pop("weights_sha256"))
    refusal(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("season", 0),
        ("season", "4"),
        ("season", 4.5),
        ("season", None),
        ("quantiles", None),
        ("quantiles", [0.9, 0.1]),
        ("quantiles", ["low"]),
        ("covariates", 3),
        ("cell", "transformer"),
        ("cell", ["lstm"]),
        ("grid", "hourly"),
        ("grid", [1]),
        ("hidden_size", 10**9),
    ],
)
def test_a_field_of_the_model_that_makes_no_sense(directory: Path, field: str, value: object) -> None:
    edit(directory, lambda config: config["model"].update({field: value}))
    refusal(directory)


@pytest.mark.parametrize("value", [None, 3, "LSTM", ["season"]])
def test_a_model_that_is_no_object(directory: Path, value: object) -> None:
    edit(directory, lambda config: config.update(model=value))
    refusal(directory)


# --- Nothing is ever unpickled ---------------------------------------------------------------------------------------


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [pickle.dumps, "torch"], ids=["pickle", "torch.save"])
def test_pickled_weights_are_refused_and_nothing_in_them_runs(directory: Path, tmp_path: Path, dump: Any) -> None:
    sprung = tmp_path / "sprung"
    if dump == "torch":
        torch.save(Trap(sprung), tmp_path / "weights")
        content = (tmp_path / "weights").read_bytes()
    else:
        content = dump(Trap(sprung))
    replace_weights(directory, content)
    refusal(directory)
    assert not sprung.exists()


UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "np.load", "numpy.load", "eval", "exec"}


@pytest.mark.parametrize("path", sorted(Path(model.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_file_of_the_model_can_unpickle(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
            assert not {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS
