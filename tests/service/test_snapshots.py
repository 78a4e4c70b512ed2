"""When states are written: each within its interval, in pieces that never hold up a commit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.bundle import Bundle, load_bundle
from service.engine import Engine
from service.metrics import Metrics
from service.records import Record
from service.settings import Settings
from service.snapshots import COMMIT_BYTES_MAX, SNAPSHOT_BYTES, Keeper
from tests.served import HOUR_MS, START_MS, observation, random_bundle

INTERVAL_S = 10.0
COMMIT_S = 0.25
STREAMS = 12_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(random_bundle(tmp_path_factory.mktemp("bundle"), hidden_size=4))


class Life:
    """An engine that commits every COMMIT_S, by a clock that is turned by hand."""

    def __init__(self, bundle: Bundle) -> None:
        settings = Settings.load({"model": Path("unused"), "snapshot_interval_s": INTERVAL_S, "compiled": False})
        self.engine = Engine(bundle, settings, Metrics())
        self.keeper = Keeper(0, self.engine, partitions=1)
        self.now_s, self.offset, self.step = 100.0, 0, 0

    def speak(self, streams: range) -> None:
        """One observation of each."""
        at_ms, value = START_MS + 1_000 * HOUR_MS, observation(self.step, 1.0)
        self.engine.process([Record("in", 0, self.offset + k, at_ms, b"s%d" % n, value) for k, n in enumerate(streams)])
        self.offset, self.step = self.offset + len(streams), self.step + 1

    def commits(self, seconds: float) -> Iterator[list[int]]:
        """-> the sizes of the snapshots that each commit writes."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            prepared = self.keeper.prepare(self.offset, self.now_s)
            self.engine.commit({0: self.offset})
            self.keeper.stand(prepared)
            self.now_s += COMMIT_S
            yield [len(record.value) for record in prepared.after if record.value]


@pytest.fixture
def life(bundle: Bundle) -> Life:
    return Life(bundle)


def assert_in_pieces(commits: list[list[int]]) -> None:
    assert max(map(sum, commits)) < COMMIT_BYTES_MAX + 2 * SNAPSHOT_BYTES
    assert max(size for sizes in commits for size in sizes) < 2 * SNAPSHOT_BYTES, "the rows, and their streams' names"


def unwritten(life: Life) -> int:
    return sum(len(bucket.streams) for bucket in life.keeper.buckets.values() if bucket.dirty)


def test_a_flood_of_new_streams_is_written_over_the_interval_and_never_in_one_piece(life: Life) -> None:
    life.speak(range(STREAMS))
    row_bytes = life.engine.arena.schema.row_bytes
    assert STREAMS * row_bytes > 2 * COMMIT_BYTES_MAX, "else there is nothing to be seen"
    commits = list(life.commits(INTERVAL_S + 2 * COMMIT_S))  # what is due at its very end waits for a commit
    assert_in_pieces(commits)
    assert unwritten(life) == 0
    assert sum(map(sum, commits)) > STREAMS * row_bytes
    busy = sum(bool(sizes) for sizes in commits)
    assert busy > len(commits) / 2, "spread over it"


def test_a_bucket_that_outgrows_its_kind_is_written_before_its_turn(life: Life) -> None:
    life.speak(range(10))
    assert sum(map(len, life.commits(2 * INTERVAL_S))) == 1, "few streams are one bucket"
    life.speak(range(10, STREAMS))
    first = next(life.commits(INTERVAL_S))
    assert len(first) > 100, "at once, as its next snapshot would be of all of them"
    life.speak(range(STREAMS))
    assert_in_pieces([*life.commits(INTERVAL_S)])
    assert unwritten(life) == 0


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python it takes: work, by no clock."""
    count, before = 0, sys.gettrace()

    def trace(frame: object, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_commit_looks_at_no_bucket_but_those_that_were_touched(bundle: Bundle) -> None:
    works, buckets = [], []
    for streams in (10, 3_000):
        life = Life(bundle)
        life.speak(range(streams))
        list(life.commits(INTERVAL_S + 2 * COMMIT_S))
        life.speak(range(1))
        commits = life.commits(2 * COMMIT_S)
        works.append(lines_run(lambda commits=commits, life=life: (next(commits), life.keeper.due(life.now_s))))
        buckets.append(len(life.keeper.buckets))
        assert unwritten(life) > 0, "else it was its turn, and there was more to do"
    assert buckets[1] > 50 * buckets[0]
    assert works[0] == works[1]
