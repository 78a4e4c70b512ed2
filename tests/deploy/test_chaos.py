"""The torment is the same for the same seed, its judge misses nothing, and the service comes through it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from deploy.chaos.bundle import random_bundle
from deploy.chaos.faults import Recovery
from deploy.chaos.load import Aborted, Item, Sent, items
from deploy.chaos.plan import FIRST, LAST, SHORT, SLOTS, ChaosConfig, ChaosError, Guarantee, Kind, plan
from deploy.chaos.run import run
from deploy.chaos.verify import Undisturbed, forecasts_differ, letters_differ, states_differ, undisturbed
from deploy.chaos.watch import Seen
from model.bundle import load_bundle
from service.engine import Engine
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.settings import Settings
from tests.served import running_with, until

CONFIG = ChaosConfig(seed=5, observations=600, streams=12, partitions=2, adds=0)


def test_the_same_seed_tells_the_same_story() -> None:
    assert plan(CONFIG) == plan(CONFIG)
    assert items(CONFIG) == items(CONFIG)
    assert plan(CONFIG) != plan(replace(CONFIG, seed=6))
    assert items(CONFIG) != items(replace(CONFIG, seed=6))


def test_every_fault_asked_for_comes_in_its_turn_and_while_there_is_something_to_lose() -> None:
    config = ChaosConfig(seed=3)
    faults = plan(config)
    assert Counter(fault.kind for fault in faults) == Counter(config.counts)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert all(FIRST * config.observations <= fault.at <= LAST * config.observations for fault in faults)
    assert {fault.slot for fault in faults if fault.kind is Kind.KILL} == set(SLOTS)
    assert all(fault.seconds > 6 for fault in faults if fault.kind is Kind.STOP), "beyond the session"
    assert all(fault.at < fault.until < config.observations for fault in faults if fault.kind is Kind.ADD)


@pytest.mark.parametrize("wrong", [{"observations": 0}, {"kills": -1}, {"guarantee": "perhaps"}, {"partitions": 2}])
def test_a_run_that_makes_no_sense_is_refused_by_the_name_of_its_option(wrong: dict[str, Any]) -> None:
    with pytest.raises(ChaosError, match=f"--{next(iter(wrong))}|--adds"):
        ChaosConfig(**wrong)


def test_progress_counts_as_recovery_only_where_the_fault_hit_and_only_after_it() -> None:
    recovery = Recovery(Kind.KILL, "kill -9 of w0", frozenset({0, 1}), began_at=9.0, hit_at=10.0)
    assert not recovery.take(Seen(9.5, {0: 100, 1: 100})), "asked before the fault"
    assert not recovery.take(Seen(10.5, {0: 110, 1: 105, 2: 0})), "done before the fault"
    assert not recovery.take(Seen(11.0, {0: 120, 1: 105, 2: 50}))
    assert recovery.take(Seen(11.5, {0: 120, 1: 106, 2: 50}))


@dataclass(frozen=True)
class Scene:
    """An undisturbed run of a small load, and what a worker that was given it by other polls has written and knows."""

    wanted: Undisturbed
    forecasts: Sequence[Record]
    letters: Sequence[Record]
    states: dict[str, list[dict[str, Any]]]

    def differences(self, guarantee: Guarantee = "exactly_once", **doctored: Any) -> list[str]:
        found = replace(self, **doctored)
        return [
            *forecasts_differ(self.wanted, found.forecasts, guarantee),
            *letters_differ(self.wanted, found.letters, guarantee),
            *states_differ(self.wanted, found.states),
        ]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    bundle = load_bundle(random_bundle(tmp_path_factory.mktemp("bundle")))
    settings = Settings.load({"model": "unused"})
    records = as_input(items(CONFIG))
    engine = Engine(bundle, settings, Metrics())
    outgoing: list[Outgoing] = []
    for n in range(0, len(records), 97):
        outgoing += engine.process(records[n : n + 97])
        engine.commit({record.partition: record.offset + 1 for record in records[: n + 97]})
    wanted = undisturbed(bundle, settings, records)
    return Scene(
        wanted,
        as_topic(outgoing, settings.forecasts_topic),
        as_topic(outgoing, settings.dead_letters_topic),
        {stream: [orjson.loads(orjson.dumps(state))] for stream, state in wanted.states.items()},
    )


def as_input(sent: Sequence[Item]) -> list[Record]:
    """The load as it stands in the topic: what was aborted leaves but a gap in the offsets."""
    offsets: dict[int, int] = defaultdict(int)
    records = []
    for item in sent:
        if isinstance(item, Aborted):
            for each in item.records:
                offsets[each.partition] += 1
        else:
            records.append(
                Record("in", item.partition, offsets[item.partition], 1_795_000_000_000, item.key, item.value)
            )
            offsets[item.partition] += 1
    return records


def as_topic(outgoing: Sequence[Outgoing], topic: str) -> list[Record]:
    offsets: dict[int, int] = defaultdict(int)
    records = []
    for each in outgoing:
        if each.topic == topic:
            at = offsets[each.partition]
            records.append(Record(topic, each.partition, at, 0, each.key, each.value, each.headers))
            offsets[each.partition] += 1
    return records


def with_fields(record: Record, **changed: Any) -> Record:
    return msgspec.structs.replace(record, value=orjson.dumps(orjson.loads(record.value or b"") | changed))


def test_the_load_has_all_that_can_come(scene: Scene) -> None:
    sent = items(replace(CONFIG, observations=5_000))
    records = [item for item in sent if isinstance(item, Sent)]
    assert sum(isinstance(item, Aborted) for item in sent) == CONFIG.aborts
    assert any(record.value is None for record in records)
    assert any(record.key is None for record in records)
    assert len({letter.reason for letter in scene.wanted.letters}) >= 5
    assert scene.wanted.ended
    assert sum(map(len, scene.wanted.forecasts.values())) == CONFIG.observations


def test_what_is_as_undisturbed_passes_however_it_was_polled(scene: Scene) -> None:
    assert scene.differences() == []
    assert scene.differences("at_least_once") == []


def test_a_lost_forecast_is_found(scene: Scene) -> None:
    forecasts = [*scene.forecasts[:100], *scene.forecasts[101:]]
    for guarantee in ("exactly_once", "at_least_once"):
        (told,) = scene.differences(guarantee, forecasts=forecasts)
        assert "is lost" in told
        assert "of the observation at offset" in told


def test_a_doubled_forecast_is_found_unless_doubles_are_allowed(scene: Scene) -> None:
    last = scene.forecasts[-1]
    doubled = [*scene.forecasts, msgspec.structs.replace(scene.forecasts[100], offset=last.offset + 1)]
    (told,) = scene.differences(forecasts=doubled)
    assert f"offset {last.offset + 1}" in told
    assert "is doubled" in told
    assert scene.differences("at_least_once", forecasts=doubled) == []


def test_forecasts_of_a_stream_in_another_order_are_found(scene: Scene) -> None:
    first, second = [record for record in scene.forecasts if record.key == b"s1"][10:12]
    swap = {id(first): second, id(second): first}
    forecasts = [swap.get(id(record), record) for record in scene.forecasts]
    (told,) = scene.differences(forecasts=forecasts)
    assert "out of order" in told


def test_a_forecast_of_what_was_never_said_is_found(scene: Scene) -> None:
    never = with_fields(scene.forecasts[-1], count=10_000)
    for guarantee in ("exactly_once", "at_least_once"):
        (told,) = scene.differences(guarantee, forecasts=[*scene.forecasts, never])
        assert "ought not to be" in told


@pytest.mark.parametrize("share", [1.5e-4, -1e-2])
def test_a_changed_quantile_is_found(scene: Scene, share: float) -> None:
    record = scene.forecasts[300]
    fields = orjson.loads(record.value or b"")
    line = scene.wanted.forecasts[record.partition, fields["stream"]]
    scale = next(want.scale for want in line if want.fields["ts"] == fields["ts"])
    fields["quantiles"]["0.5"][3] += share * scale
    changed = with_fields(record, quantiles=fields["quantiles"])
    forecasts = [changed if each is record else each for each in scene.forecasts]
    for guarantee in ("exactly_once", "at_least_once"):
        (told,) = scene.differences(guarantee, forecasts=forecasts)
        assert f"partition {record.partition}, offset {record.offset}" in told
        assert "of the stream's scale" in told


@pytest.mark.parametrize(
    ("field", "value"), [("observed", 12.5), ("status", "hot"), ("model", "another"), ("anomaly", 5.0)]
)
def test_a_changed_field_is_found(scene: Scene, field: str, value: Any) -> None:
    changed = [*scene.forecasts[:-1], with_fields(scene.forecasts[-1], **{field: value})]
    (told,) = scene.differences(forecasts=changed)
    assert f"has {field} {value!r}" in told


def test_a_forecast_with_another_key_is_found(scene: Scene) -> None:
    changed = [*scene.forecasts[:-1], msgspec.structs.replace(scene.forecasts[-1], key=b"another")]
    (told,) = scene.differences(forecasts=changed)
    assert "has key b'another'" in told


def test_a_lost_a_doubled_and_a_changed_dead_letter_are_found(scene: Scene) -> None:
    (told,) = scene.differences(letters=scene.letters[1:])
    assert "is lost" in told
    doubled = [*scene.letters, scene.letters[0]]
    (told,) = scene.differences(letters=doubled)
    assert "is doubled" in told
    assert scene.differences("at_least_once", letters=doubled) == []
    changed = [msgspec.structs.replace(scene.letters[0], value=b"other"), *scene.letters[1:]]
    assert len(scene.differences("at_least_once", letters=changed)) == 2


@pytest.mark.parametrize("part", ["h", "c"])
def test_a_changed_state_is_found(scene: Scene, part: str) -> None:
    states = orjson.loads(orjson.dumps(scene.states))
    states["s2"][0]["layers"][1][part][3] += 3e-4
    (told,) = scene.differences(states=states)
    assert "s2" in told
    assert f"{part} of layer 1" in told


def test_a_stale_a_missing_and_a_surviving_state_are_found(scene: Scene) -> None:
    stale = {**scene.states, "s3": [{**scene.states["s3"][0], "count": 1}]}
    (told,) = scene.differences(states=stale)
    assert "count is 1" in told
    (told,) = scene.differences(states={**scene.states, "s3": []})
    assert "no worker knows it" in told
    (ended, *_) = scene.wanted.ended
    (told,) = scene.differences(states={**scene.states, ended: scene.states["s3"]})
    assert "still knows it" in told


def test_of_two_workers_that_know_a_stream_both_must_know_it_right(scene: Scene) -> None:
    wrong = {**scene.states["s3"][0], "steps": 1}
    (told,) = scene.differences(states={**scene.states, "s3": [*scene.states["s3"], wrong]})
    assert "steps is 1" in told


@pytest.mark.timeout(600)  # some 50 s on a quiet machine
def test_workers_that_are_killed_stopped_and_thrown_out_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAROUSEL_LOG_FORMAT", "json")  # as a shell may have it
    assert run(replace(SHORT, seed=3))


def test_ctrl_c_leaves_nothing_running_and_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "carousel", "chaos", "--short"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        process_group=0,
    )
    until("both workers", lambda: sum(" serve " in command for command in running(tmp_path)) == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert running(tmp_path) == []
    assert not list(tmp_path.glob("carousel-*"))


def running(home: Path) -> list[str]:
    """Commands of the processes that have the run's environment: its own, and all that came from it."""
    return running_with(f"TMPDIR={home}")
