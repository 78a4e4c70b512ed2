"""A classifier is served over HTTP: a history comes in, what it is goes out; no stream, no Kafka."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.bundle import ClassifierBundle
from model.classifier import Classifier, ClassifierConfig
from model.config import ModelConfig
from model.features import Block
from model.grid import Grid
from service.api import create_classifier_app
from service.classify import Judge
from service.metrics import Metrics
from service.server import HttpServer
from service.settings import Settings
from tests.service.conftest import HOUR_MS, history, time_at, value_at

SERIES = ModelConfig(grid=Grid(HOUR_MS), season=6, hidden_size=12, max_gap=10)
LABELS = ("calm", "rough", "wild")


def bundle(labels: tuple[str, ...], steps: int = 1000) -> ClassifierBundle:
    torch.manual_seed(7)
    classifier = Classifier(ClassifierConfig(SERIES, labels, steps)).eval().requires_grad_(False)
    return ClassifierBundle(classifier, "kinds", "0" * 64, {"label": "kind"}, {"carousel": {"accuracy": 0.9}})


def serve(bundle: ClassifierBundle) -> Iterator[httpx.Client]:
    settings = Settings(model=Path("unused"), http_port=0, max_history_steps=100)
    server = HttpServer(settings)
    try:
        server.start(create_classifier_app(Judge(bundle, settings), settings, Metrics()))
        with httpx.Client(base_url=server.url, timeout=20) as client:
            yield client
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    yield from serve(bundle(LABELS))


def ask(client: httpx.Client, observations: list[dict[str, Any]]) -> dict[str, Any]:
    answer = client.post("/v1/predict", json={"history": observations})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(known: ClassifierBundle, first: int, stop: int) -> torch.Tensor:
    """What the classifier itself says of the observations first ... stop - 1."""
    values = torch.tensor([[value_at(n) for n in range(first, stop)]], dtype=torch.float64)
    ts_ms = torch.tensor([[time_at(n) for n in range(first, stop)]])
    block = Block(values, ts_ms, torch.empty(1, stop - first, 0, dtype=torch.float64))
    return known.classifier.answer(block, torch.tensor([stop - first]))[0]


def test_a_history_is_answered_with_its_label_and_the_probability_of_each(client: httpx.Client) -> None:
    told = ask(client, history(0, 40))
    assert list(told["probabilities"].values()) == pytest.approx(expected(bundle(LABELS), 0, 40).tolist())
    assert list(told["probabilities"]) == list(LABELS)
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert told["label"] == max(told["probabilities"], key=lambda label: told["probabilities"][label])
    assert (told["model"], told["ts"], told["count"]) == ("kinds-00000000", time_at(39), 40)


def test_what_lies_before_a_gap_too_long_or_the_last_steps_is_forgotten(client: httpx.Client) -> None:
    told = ask(client, history(0, 20) + history(40, 60))
    assert told["probabilities"] == pytest.approx(ask(client, history(40, 60))["probabilities"])
    assert told["count"] == 20
    for brief in serve(bundle(LABELS, steps=15)):
        assert ask(brief, history(0, 40))["probabilities"] == ask(brief, history(25, 40))["probabilities"]


def test_a_regressor_answers_with_a_value() -> None:
    known = bundle(())
    for client in serve(known):
        told = ask(client, history(0, 40))
        assert told["value"] == pytest.approx(float(expected(known, 0, 40)))
        assert "label" not in told


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"stream": "a"}, "stream"),
        ({"history": []}, "history"),
        ({"history": history(0, 1), "horizon": 3}, "horizon"),
        ({"history": [{"ts": "soon", "value": 1.0}]}, "ts"),
        ({"history": [{"ts": time_at(0), "value": 1.0, "covariates": {"wind": 1.0}}]}, "covariates"),
        ({"history": history(0, 1) + history(5, 6) * 100}, "history"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(client: httpx.Client, body: object, loc: str) -> None:
    answer = client.post("/v1/predict", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert loc in [part for error in answer.json()["errors"] for part in error["loc"]]


def test_it_says_what_it_is_and_that_it_is_ready_and_has_no_streams(client: httpx.Client) -> None:
    model = client.get("/v1/model").json()
    assert (model["labels"], model["step_ms"], model["scores"]) == (
        list(LABELS),
        HOUR_MS,
        {"carousel": {"accuracy": 0.9}},
    )
    assert client.get("/readyz").status_code == client.get("/livez").status_code == 200
    assert "carousel_model_info" in client.get("/metrics").text
    assert client.get("/v1/streams").status_code == 404


def test_its_openapi_examples_run_and_its_answers_fit_their_schemas(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    content = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    (example,) = content["examples"].values()
    told = client.post("/v1/predict", json=example["value"]).json()
    for schema, answer in (("Classified", told), ("ClassifierModel", client.get("/v1/model").json())):
        assert set(answer) <= set(described["components"]["schemas"][schema]["properties"])
