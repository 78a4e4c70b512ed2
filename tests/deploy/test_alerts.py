"""The recording rules and alerts of deploy/prometheus, and docs/runbooks.md, held against each other, against the
metrics that there are, and against promtool and a genuine Prometheus.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import promql_parser
import pytest
import torch
import typer.main
import yaml

import carousel
from deploy.broker import EmbeddedBroker
from deploy.chaos.bundle import HOUR_MS
from model.bundle import save_bundle
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from service.metrics import Judged, Metrics
from service.settings import Settings
from tests.deploy.prometheus import (
    ALERTS,
    HTTP,
    PROMETHEUS,
    ROOT,
    RULES,
    asked,
    at_once,
    promtool,
    selectors,
    watching,
)
from tests.served import observation, random_bundle, serving, until

RUNBOOKS = ROOT / "docs/runbooks.md"
CASES = sorted((Path(__file__).parent / "rules").glob("*.yml"))
BY_PROMETHEUS = {"job", "instance"}
"""Labels that a sample gets from who scrapes it."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in read(path)["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules(ALERTS)}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules(RULES)}


@cache
def exported() -> dict[str, list[dict[str, str]]]:
    """What a worker exports, once it serves: the name of each sample -> the labels that it comes with."""
    metrics = Metrics()
    metrics.model.info({"model": "m"})
    metrics.consumed.labels("t")
    metrics.lag.labels("t", "0")
    Judged(metrics, (0.1, 0.9), [1])
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for family in metrics.registry.collect():
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return dict(found) | {"up": [{}]}


def cases() -> Iterator[tuple[str, bool]]:
    """Of each case of promtool's unit tests, the alert, and whether it is to fire."""
    for path in CASES:
        for test in read(path)["tests"]:
            for case in test.get("alert_rule_test", []):
                yield case["alertname"], bool(case.get("exp_alerts"))


def runbooks() -> dict[str, str]:
    """Sections by title."""
    parts = re.split(r"^## (.+)\n", RUNBOOKS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def queries() -> list[str]:
    """All of them: rules', alerts', runbooks'."""
    of_rules: list[str] = [rule["expr"] for path in (RULES, ALERTS) for rule in rules(path)]
    of_runbooks = re.findall(r"^```promql\n(.+?)\n```$", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL)
    in_texts = [
        query for rule in rules(ALERTS) for query in re.findall(r'query "(.+?)" }}', rule["annotations"]["description"])
    ]
    assert len(of_runbooks) > len(alerts())
    assert in_texts
    return [*of_rules, *of_runbooks, *(query.replace('\\"', '"') for query in in_texts)]


class TestPromtool:
    @pytest.mark.parametrize("path", [RULES, ALERTS], ids=lambda path: path.name)
    def test_it_finds_no_fault_with_the_rules(self, path: Path) -> None:
        promtool("check", "rules", "--lint-fatal", str(path))

    def test_prometheus_loads_them(self) -> None:
        assert read(PROMETHEUS)["rule_files"] == [RULES.name, ALERTS.name]
        promtool("check", "config", str(PROMETHEUS))

    @pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
    def test_values_and_alerts_are_as_the_unit_tests_say(self, path: Path) -> None:
        promtool("test", "rules", str(path))


class TestRules:
    @pytest.mark.parametrize("query", queries())
    def test_a_query_asks_for_what_there_is(self, query: str) -> None:
        assert selectors(query)
        for selector in selectors(query):
            if ":" in selector.name:
                assert selector.name in recorded()
                continue
            samples = exported()[selector.name]
            for matcher in selector.matchers.matchers:
                if matcher.name not in BY_PROMETHEUS:
                    values = {labels[matcher.name] for labels in samples}
                    exact = matcher.op == promql_parser.MatchOp.Equal
                    for value in [matcher.value] if exact else matcher.value.split("|"):
                        assert value in values, f"{selector.name}{{{matcher.name}={value!r}}}"

    def test_names_tell_level_metric_and_operation(self) -> None:
        for name in recorded():
            level, metric, operations = name.split(":")
            assert level.split("_")[0] == "job"
            assert metric.startswith("carousel_")
            assert operations

    def test_what_is_recorded_has_the_labels_that_its_level_names(self) -> None:
        """By what each unit test of it expects."""
        seen = set()
        for test in (test for path in CASES for test in read(path)["tests"]):
            for case in test.get("promql_expr_test", []):
                [name] = [selector.name for selector in selectors(case["expr"])]
                for sample in case["exp_samples"]:
                    labels = re.findall(r"(\w+)=", sample["labels"])
                    assert sorted(labels) == sorted(name.partition(":")[0].split("_")), name
                    seen.add(name)
        assert seen == recorded(), "rules of which no value is tested"

    def test_unit_tests_are_fed_what_a_worker_exports(self) -> None:
        for test in (test for path in CASES for test in read(path)["tests"]):
            for given in test["input_series"]:
                [selector] = selectors(given["series"])
                names = {matcher.name for matcher in selector.matchers.matchers}
                assert names <= {*exported()[selector.name][0], *BY_PROMETHEUS}, given["series"]


class TestAlerts:
    @pytest.mark.parametrize("name", alerts())
    def test_it_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(self, name: str) -> None:
        rule = alerts()[name]
        assert re.fullmatch(r"Carousel([A-Z][a-z]+)+", name)
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["summary"].endswith(".")
        assert "{{ $value" in rule["annotations"]["description"] or "query" in rule["annotations"]["description"]
        assert rule["annotations"]["runbook_url"] == f"{RUNBOOKS.relative_to(ROOT)}#{name.lower()}"

    @pytest.mark.parametrize("name", alerts())
    def test_it_is_shown_firing_and_quiet(self, name: str) -> None:
        assert {fires for alert, fires in cases() if alert == name} == {True, False}

    def test_none_fires_for_a_worker_that_has_just_begun(self) -> None:
        first, second, *_ = read(next(path for path in CASES if path.name == "alerts.yml"))["tests"]
        for test in (first, second):
            assert [case["alertname"] for case in test["alert_rule_test"]] == list(alerts())
            assert not any(case.get("exp_alerts") for case in test["alert_rule_test"])


class TestRunbooks:
    def test_each_alert_has_a_section_and_each_section_an_alert(self) -> None:
        assert list(runbooks()) == list(alerts())

    @pytest.mark.parametrize("name", alerts())
    def test_it_tells_users_plight_where_to_look_and_when_it_ends(self, name: str) -> None:
        text = runbooks()[name]
        assert text.startswith(f"\n**{alerts()[name]['labels']['severity']}** · ")
        places = [text.index(f"\n**{word}") for word in ("Users:**", "Look:**", "Likely, and what to do:**", "Ends**")]
        assert places == sorted(places)
        assert "```promql" in text

    def test_metrics_alerts_and_settings_that_it_names_exist(self) -> None:
        text = RUNBOOKS.read_text()
        assert set(re.findall(r"\bcarousel_[a-z_]+\b", re.sub(r"\w+:carousel_[\w:]+", "", text))) <= set(exported())
        assert set(re.findall(r"\bjob\w*:\w+:\w+", text)) <= recorded()
        assert set(re.findall(r"\bCarousel[A-Z]\w+", text)) <= set(alerts())
        flags = set(re.findall(r"`--([a-z-]+)", text))
        assert flags
        assert {flag.replace("-", "_") for flag in flags} <= set(Settings.model_fields)

    def test_commands_that_it_names_exist(self) -> None:
        group = typer.main.get_command(carousel.app)
        commands = set(re.findall(r"`carousel ([a-z]+)", RUNBOOKS.read_text()))
        assert commands
        assert commands <= set(group.commands)  # type: ignore[attr-defined]


def test_faults_raise_their_alerts_and_their_end_ends_them(tmp_path: Path) -> None:
    """A genuine worker that is sent garbage, then loses Kafka, then is killed; watched by a genuine Prometheus with our
    rules, which only waits less before it fires.
    """
    with (
        EmbeddedBroker() as broker,
        serving(random_bundle(tmp_path / "model"), broker.bootstrap_servers, tmp_path) as served,
    ):
        at = served.url.removeprefix("http://")
        with watching(at, tmp_path, {}, at_once) as (prometheus, log):

            def firing() -> dict[str, str]:
                return firing_on(prometheus)

            nothing = 'carousel_records_rejected_total{reason="decode"} == 0'
            until("a scrape", lambda: answered_by(prometheus, nothing), log=log)
            # Before its first scrape Prometheus knew no worker: for less than 2 minutes, but more than the second here.
            until("nothing to be told of a worker that is well", lambda: firing() == {}, log=log)

            served.produce([(b"well", observation(step, 1.0)) for step in range(20)] + [(b"garbage", b"?")] * 20)
            until("garbage to be told", lambda: "CarouselRecordsRejected" in firing(), log=log)
            assert "with the reason decode" in firing()["CarouselRecordsRejected"]
            assert "b'garbage'" in dead_letters_as_operators_see_them(served.dead_letters, broker.bootstrap_servers)
            assert not {"CarouselNotReady", "CarouselWorkerDown", "CarouselStalled"} & set(firing())
            for path in set(re.findall(r"curl -s localhost:8000(/\S+)", RUNBOOKS.read_text())):
                assert HTTP.get(served.url + path.rstrip("`")).status_code == 200, path

            assert broker.pid
            os.kill(broker.pid, signal.SIGKILL)
            until("the loss of Kafka to be told", lambda: "CarouselNotReady" in firing(), log=log)
            assert firing()["CarouselNotReady"].startswith(f"{at} has not been ready")

            served.process.kill()
            until("the worker's end to be told", lambda: "CarouselWorkerDown" in firing(), log=log)
            assert firing()["CarouselWorkerDown"] == f"{at} does not answer; 0 others do."
            until("what a worker that is gone had said to be over", lambda: "CarouselNotReady" not in firing(), log=log)


def test_intervals_that_hold_nothing_raise_their_alert(bootstrap_servers: str, tmp_path: Path) -> None:
    """A model that is far too sure of itself, served as it is; only the hour is shorter that it must last."""
    too_sure = Forecaster(
        ModelConfig(grid=Grid(HOUR_MS), season=2, horizon=2, quantiles=(0.1, 0.5, 0.9), hidden_size=4)
    )
    torch.nn.init.zeros_(too_sure.head.linear.weight)
    torch.nn.init.constant_(too_sure.head.linear.bias, -20.0)  # so far apart are its quantiles: e^-20
    save_bundle(tmp_path / "model", too_sure, name="too-sure", training={}, scores={})
    with serving(tmp_path / "model", bootstrap_servers, tmp_path, intervals="raw") as served:
        at = served.url.removeprefix("http://")
        with watching(at, tmp_path, {}, at_once) as (prometheus, log):
            until("a scrape", lambda: answered_by(prometheus, "carousel_intervals_scored_total == 0"), log=log)
            random = Random(0)
            hours = [[(b"s%d" % n, observation(hour, random.gauss(50, 9))) for n in range(60)] for hour in range(40)]
            served.produce([record for hour in hours for record in hour])
            until("coverage to be told", lambda: "CarouselCoverageOff" in firing_on(prometheus), log=log)
            told = firing_on(prometheus)["CarouselCoverageOff"]
            assert re.match("[01](\\.[0-9]+)?% of the truths .* level 0.8, [12] steps ahead", told)
            assert served.get("/v1/streams/s0")["scores"]["total"]["coverage"] < 0.1, "the worker says the same"


def test_more_than_a_worker_can_follow_raises_its_alert(bootstrap_servers: str, tmp_path: Path) -> None:
    """A worker that takes one stream at a time, and producers who do not wait for it."""
    slow = {"max_wave_rows": 1, "max_poll_records": 50}
    with serving(random_bundle(tmp_path / "model"), bootstrap_servers, tmp_path, **slow) as served:
        at, hours = served.url.removeprefix("http://"), count()
        with watching(at, tmp_path, {}, at_once) as (prometheus, log):
            until("a scrape", lambda: answered_by(prometheus, "carousel_consumer_lag_records == 0"), log=log)

            def told_as_more_comes() -> str:
                steps = [observation(hour, 1.0) for hour in islice(hours, 10)]
                served.produce([(b"s%d" % n, value) for value in steps for n in range(300)])
                return firing_on(prometheus).get("CarouselLagGrows", "")

            assert until("lag to be told", told_as_more_comes, log=log).endswith("for its turn, and ever longer.")


def firing_on(prometheus: str) -> dict[str, str]:
    """Alerts by name: their descriptions."""
    found = [alert for alert in asked(prometheus, "alerts")["alerts"] if alert["state"] == "firing"]
    return {alert["labels"]["alertname"]: alert["annotations"]["description"] for alert in found}


def answered_by(prometheus: str, query: str) -> bool:
    return bool(asked(prometheus, "query", query=query)["result"])


def dead_letters_as_operators_see_them(topic: str, servers: str) -> str:
    """What the runbook's command prints."""
    [program] = re.findall(r'carousel python -c "\n(.+?)\n    " \|', RUNBOOKS.read_text(), re.DOTALL)
    here = textwrap.dedent(program).replace("carousel.observations.dlq", topic).replace("kafka:19092", servers)
    return subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, check=True).stdout
