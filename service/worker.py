"""The worker's loop: gather, process, commit; again, until told to stop. And what comes between: partitions that come
and go, Kafka that goes away.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from service import interpreter
from service.engine import Engine, timed
from service.errors import AbortedError, DisconnectedError, LostStateError
from service.metrics import Metrics
from service.records import Outgoing, Record
from service.restore import Restore
from service.settings import Settings
from service.snapshots import Keeper, Note, Prepared, Trial
from service.transport.contract import Transport

log = logging.getLogger(__name__)

POLL_MS = 100
RESTORING_POLL_MS = 10
RESTORE_SLICE_S = 0.1
BATCH_BYTES_MAX = 32 << 20
"""A batch is closed at this size, whatever the settings say of records: it is held in memory several times over."""
WATCH_EVERY_S = 1.0
RECONNECT_S = 1.0
EAGER_S = 0.002
EAGER_SHARE = 0.5
EARLY_SHARE = 0.2
"""Of the time that Kafka gives a transaction, what a batch may take that is computed while one is open."""
STILL_HERE_S = 5.0
"""Where there is nothing to commit for so long, an offset is committed again: only who commits finds out that another
has taken its place, and must not go on answering over HTTP.
"""
STALLED_S = 180.0
"""Longer than a commit may wait for a broker that is away: a restart would not bring it back."""
ALONE_LIVES = 2
"""Of `crash_restarts`, so many are left for finding the one record of a batch at which the process ends."""

Batch = dict[int, list[Record]]


class Worker:
    """One member of the consumer group. `run` on one thread; `stop` and the properties may be used from any."""

    def __init__(
        self,
        engine: Engine,
        connect: Callable[[], Transport],
        settings: Settings,
        metrics: Metrics,
        publish: Callable[[Sequence[Outgoing]], None],
        now_s: Callable[[], float] = time.time,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """connect: begins a session with Kafka. publish: told of what was delivered, once it is. now_s: the time of
        day. clock_s: one that never steps, by which all is scheduled.
        """
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._connect, self._publish, self._now_s, self._clock_s = connect, publish, now_s, clock_s
        self._stopping = threading.Event()
        self._consumed = metrics.consumed.labels(settings.observations_topic)
        self._turned_at = self._clock_s()
        self._unready = "the worker has not joined its group yet"
        self._kafka_answers = True
        self._survived: dict[int, Trial] = {}
        """What this process tried: whatever else went wrong with it, the process did not end."""
        self._reset()
        metrics.assigned.set_function(lambda: len(self._restores) + len(self._keepers))
        metrics.restoring.set_function(lambda: len(self._restores))
        metrics.restore_progress.set_function(lambda: self._restored)

    def _reset(self) -> None:
        """What belongs to one session."""
        self._gathered_at = self._committed_at = self._watched_at = self._batch_s = 0.0
        self._record_s = math.inf
        """What the last batch took a record, before its commit."""
        self._restores: dict[int, tuple[Restore, Iterator[None], float]] = {}
        self._keepers: dict[int, Keeper] = {}
        self._offsets: dict[int, int] = {}
        """Of live partitions, the committed offsets."""
        self._unnoted: set[int] = set()
        """Live partitions whose offset and note are to be committed though nothing came."""
        self._trials: dict[int, Trial] = {}
        """Live partitions of which nothing was committed in this session yet, with what was said of the last."""

    @property
    def unready(self) -> str:
        """Why this worker is not ready; empty if it is."""
        return "stopping" if self._stopping.is_set() else self._unready

    @property
    def ready(self) -> bool:
        """Whether Kafka answers, and this worker is a settled member of its group and has its streams."""
        return not self.unready

    @property
    def alive(self) -> bool:
        """Whether the loop still turns."""
        return self._clock_s() - self._turned_at < STALLED_S

    @property
    def live(self) -> frozenset[int]:
        """The partitions whose streams are followed here, as of their last commit."""
        return frozenset(self._keepers)

    @property
    def unsaved(self) -> int:
        """Buckets that have changed since their snapshots were written."""
        return sum(keeper.open_marks.total() for keeper in self._keepers.values())

    def stop(self) -> None:
        """Finish the batch at hand, deliver, commit, leave the group."""
        self._stopping.set()

    def run(self) -> None:
        """Until `stop`. Raises ServiceError if it cannot go on."""
        while not self._stopping.is_set():
            try:
                self._session()
            except DisconnectedError as error:
                self._answered(False, str(error))
                self._turned_at = self._clock_s()
                self._stopping.wait(RECONNECT_S)

    def _session(self) -> None:
        """One session with Kafka, until it fails or this worker is to stop."""
        self.begin_session()
        try:
            while not self._stopping.is_set():
                self.turn()
        finally:
            self.end_session()

    def begin_session(self) -> None:
        """Connect: of itself `run` does so, and this is for those who turn the loop themselves."""
        self.transport = self._connect()

    def end_session(self) -> None:
        """Forget all, and hang up: the next session finds out where things stand."""
        self._set_unready("the session with Kafka has ended")
        self.engine.rollback()
        self._drop(frozenset(self._restores) | frozenset(self._keepers))
        self._reset()
        self.transport.close()
        log.info("left the group %s", self.settings.group_id)

    def turn(self) -> None:
        """One turn of the loop: whatever comes within one commit interval, all the way to its commit."""
        batch = self._gather()
        self._restore_some()
        began_s = self._clock_s()
        self._process(batch)
        self._turned_at = self._clock_s()
        self._batch_s = self._turned_at - began_s
        if self._turned_at - self._watched_at > WATCH_EVERY_S:
            self._watched_at = self._turned_at
            self._watch()

    # Gathering: no transaction is open while it waits.

    def _gather(self) -> Batch:
        """The records of one commit interval, by partition; fewer if that is a lot already.

        At least once no transaction is waited for, and what is there goes at once; but on the heels of a batch that
        took long, waiting for part of that time makes batches fewer.
        """
        batch: Batch = {}
        count = size = 0
        until = self._clock_s() + POLL_MS / 1000
        while True:
            wait_ms = RESTORING_POLL_MS if self._restores else max(0, round(1000 * (until - self._clock_s())))
            polled = self.transport.poll(wait_ms, self.settings.max_poll_records - count)
            self._drop(polled.revoked)
            for partition in polled.revoked:
                batch.pop(partition, None)
            self._take_up(polled.assigned)
            if polled.records and not batch:
                until = self._clock_s() + self._patience_s
            for record in polled.records:
                batch.setdefault(record.partition, []).append(record)
                count, size = count + 1, size + len(record.value or b"")
            full = count >= self.settings.max_poll_records or size >= BATCH_BYTES_MAX
            if full or self._restores or self._stopping.is_set() or self._clock_s() >= until:
                if batch:
                    self._gathered_at = self._clock_s()
                return batch

    @property
    def _patience_s(self) -> float:
        """How long a batch is gathered from its first record on. Exactly once: until an interval after the batch before
        was closed, so that the work on that one is part of the interval and not added to it.
        """
        now_s, interval_s = self._clock_s(), self.settings.commit_interval_ms / 1000
        eager_s = min(max(EAGER_S, self._turned_at + EAGER_SHARE * self._batch_s - now_s), interval_s)
        if self.settings.guarantee == "exactly_once":
            return max(eager_s, self._gathered_at + interval_s - now_s)
        return eager_s

    def _drop(self, partitions: frozenset[int]) -> None:
        """These partitions are not this worker's any more. Nothing of them is in a transaction."""
        if not partitions:
            return
        for partition in partitions:
            self._keepers.pop(partition, None)  # first: who asks for a stream of theirs shall hear that it moves
        self.engine.forget_partitions(partitions)
        for partition in partitions:
            if restoring := self._restores.pop(partition, None):
                restoring[1].close()  # type: ignore[attr-defined]
            self._offsets.pop(partition, None)
            self._trials.pop(partition, None)
            self._unnoted.discard(partition)
            self.metrics.forget_partition(self.settings.observations_topic, partition)
        self.engine.watch(self.live)
        log.info("partitions %s of %s are gone", sorted(partitions), self.settings.observations_topic)

    def _take_up(self, partitions: frozenset[int]) -> None:
        if not partitions:
            return
        log.info("partitions %s of %s to be taken up", sorted(partitions), self.settings.observations_topic)
        self._set_unready("partitions are being restored")
        for partition in sorted(partitions):
            restore = Restore(partition, self.transport, self.engine, self._clock_s)
            self._restores[partition] = restore, restore.steps(), self._clock_s()

    def _restore_some(self) -> None:
        """Steps of the restorations, each in turn, for a moment: other partitions wait for it."""
        until = self._clock_s() + RESTORE_SLICE_S
        while self._restores:
            self._restore_step()
            if self._clock_s() >= until:
                break

    def _restore_step(self) -> None:
        partition = next(iter(self._restores))
        restore, steps, began_s = self._restores[partition]
        try:
            next(steps)
        except StopIteration:
            del self._restores[partition]
            self._keepers[partition] = restore.keeper
            self._offsets[partition] = restore.offset
            self._trials[partition] = self._trial(partition, restore.note)
            if restore.note is None or restore.note.partitions != restore.keeper.partitions:
                self._unnoted.add(partition)
            self.metrics.restore_seconds.observe(self._clock_s() - began_s)
            self.transport.start(partition, restore.offset)
            self._watched_at = -WATCH_EVERY_S  # whoever waits for it need not wait longer
        else:
            self._restores[partition] = self._restores.pop(partition)  # behind the others

    @property
    def _restored(self) -> float:
        """The part of the restorations' replays that is done. May be read from any thread."""
        done = [restore.progress for restore, _, _ in tuple(self._restores.values())]
        return sum(done) / len(done) if done else 1.0

    def _trial(self, partition: int, note: Note | None) -> Trial:
        trial = (note.trial if note else None) or Trial(0, 0)
        return replace(trial, lives=trial.lives - 1) if trial == self._survived.get(partition) else trial

    # Processing.

    def _process(self, batch: Batch) -> None:
        batch = {partition: records for partition, records in batch.items() if partition in self._keepers}
        count = sum(map(len, batch.values()))
        interpreter.expect(count)
        self._consumed.inc(count)
        for partition in [p for p in batch if self._suspect(p)]:  # first: whoever comes before it is not to blame
            self._process_alone(partition, batch.pop(partition))
        unproven = {p: Trial(self._trials[p].lives + 1, batch[p][-1].offset + 1) for p in batch if p in self._trials}
        if unproven and not self._commit([], {}, unproven):
            self.transport.rewind({p: records[0].offset for p, records in batch.items()})
        else:
            self._process_batch(batch)

    def _suspect(self, partition: int) -> bool:
        """Whether the process has ended too often in a batch that is still before us."""
        trial = self._trials.get(partition)
        return trial is not None and trial.lives >= self._alone_from and trial.until > self._offsets[partition]

    @property
    def _alone_from(self) -> int:
        return max(self.settings.crash_restarts - ALONE_LIVES, 1)

    def _process_alone(self, partition: int, records: list[Record]) -> None:
        """Try one record by itself, having noted that; if the process ended at this very one time and again, it becomes
        a dead letter. The others come again.
        """
        trial, first = self._trials[partition], records[0].offset
        again = trial.alone == first
        crashed = {(partition, first)} if again and trial.lives >= self.settings.crash_restarts else set()
        marked = replace(trial, lives=(trial.lives if again else self._alone_from) + 1, alone=first)
        log.warning("partition %d: trying offset %d alone, for the %d. time", partition, first, marked.lives)
        self.transport.rewind({partition: first})
        known = crashed or self._commit([], {}, {partition: marked})
        if known and self._process_batch({partition: records[:1]}, crashed):
            self.transport.rewind({partition: first + 1})
            if trial.until > first + 1:
                self._trials[partition] = replace(trial, lives=self._alone_from, alone=-1)

    def _process_batch(self, batch: Batch, crashed: set[tuple[int, int]] | None = None) -> bool:
        records = [record for records in batch.values() for record in records]
        offsets = {partition: records[-1].offset + 1 for partition, records in batch.items()}
        began_s, outgoing, early = self._clock_s(), list[Outgoing](), self._early(len(records))
        for answers in self.engine.answers(records, crashed or ()):
            if early:
                self.transport.send(answers)
            outgoing += answers
        self._record_s = (self._clock_s() - began_s) / max(len(records), 1)
        if self._commit([] if early else outgoing, offsets, {}):
            self._delivered(outgoing)
            return True
        self.transport.rewind({partition: records[0].offset for partition, records in batch.items()})
        return False

    def _early(self, count: int) -> bool:
        """Whether the answers to so many records may go to Kafka one by one, while others are still being computed.
        A transaction is open meanwhile: it must not take too long, and how long it takes the first batch tells.
        """
        return self._record_s * count < EARLY_SHARE * self.settings.transaction_timeout_ms / 1000

    def _commit(self, outgoing: Sequence[Outgoing], offsets: Mapping[int, int], trials: Mapping[int, Trial]) -> bool:
        """One transaction: what goes out, the input that is done with, the snapshots whose turn it is. -> False if it
        was aborted, and all that was processed is undone.
        """
        now_s = self._clock_s()
        due = {p: self._offsets[p] for p, keeper in self._keepers.items() if p in self._unnoted or keeper.due(now_s)}
        told = due | {partition: self._offsets[partition] for partition in trials} | dict(offsets)
        if not told:
            return True
        prepared = {p: self._keepers[p].prepare(offset, now_s, trials.get(p)) for p, offset in told.items()}
        before = [*outgoing, *(record for one in prepared.values() for record in one.before)]
        after = [record for one in prepared.values() for record in one.after]
        try:
            with timed(self.metrics.commit_seconds):
                self.transport.commit(before, {p: one.offset for p, one in prepared.items()}, after)
        except AbortedError as error:
            self._aborted(prepared, error)
            return False
        self._stands(prepared, offsets)
        self._survived |= trials
        return True

    def _aborted(self, prepared: Mapping[int, Prepared], error: AbortedError) -> None:
        log.warning("a commit was aborted and is done again: %s", error)
        self.metrics.commits["aborted"].inc()
        touched = {p: self.engine.partition(p).touched for p in prepared}
        self.engine.rollback()
        for p, streams in touched.items():
            self._keepers[p].touch(streams, self.engine.partition(p).mark, self._clock_s())

    def _stands(self, prepared: Mapping[int, Prepared], offsets: Mapping[int, int]) -> None:
        self._committed_at = self._clock_s()
        self.metrics.commits["committed"].inc()
        self.engine.commit({p: one.mark.offset for p, one in prepared.items()})
        for partition, one in prepared.items():
            self._keepers[partition].stand(one)
            self._offsets[partition] = one.mark.offset
            self._unnoted.discard(partition)
            self.metrics.snapshots.inc(len(one.written))
            self.metrics.snapshot_bytes.inc(sum(len(record.value or b"") for record in one.after))
        for partition in offsets:
            self._trials.pop(partition, None)
        self.engine.watch(self.live)

    def _delivered(self, outgoing: Sequence[Outgoing]) -> None:
        self._publish(outgoing)
        forecasts = [o for o in outgoing if o.topic == self.settings.forecasts_topic]
        self.metrics.forecasts.inc(len(forecasts))
        causes_ms = np.array([o.cause_ms for o in forecasts if o.cause_ms >= 0], dtype=float)
        if len(causes_ms):
            self.metrics.end_to_end_seconds.observe(np.maximum(self._now_s() - causes_ms / 1000, 0))

    # Watching.

    def _watch(self) -> None:
        lags = self.transport.lag()
        self._answered(lags is not None, f"Kafka at {self.settings.bootstrap_servers} does not answer")
        for partition, lag in (lags or {}).items():
            self.metrics.lag.labels(self.settings.observations_topic, str(partition)).set(lag)
        if lags is None:
            return
        self._check_partitions()
        if self._keepers and self._clock_s() - self._committed_at > STILL_HERE_S:
            self._unnoted.add(min(self._keepers))
        if self._restores:
            self._set_unready(
                f"{len(self._restores)} partitions are being restored, {self._restored:.0%} of their replay is done"
            )
        elif not self.transport.stable:
            self._set_unready("the worker is not (or no longer) a settled member of its group")
        else:
            self._set_unready("")

    def _check_partitions(self) -> None:
        """Partitions that were added take keys away from their states."""
        now = self.transport.partitions
        self.metrics.partitions.set(now)
        counts = {keeper.partitions for keeper in self._keepers.values()}
        if counts and now and counts != {now}:
            told = f"{self.settings.observations_topic} has {now} partitions now, and had {sorted(counts)}"
            if self.settings.on_lost_state == "stop":
                raise LostStateError(
                    f"{told}: keys have moved away from their states; to go on all the same, and let the streams that"
                    " moved begin afresh: --on-lost-state restart_streams"
                )
            raise DisconnectedError(f"{told}; taking them up")

    def _answered(self, answers: bool, why: str) -> None:
        """Say it once when Kafka goes, and once when it is back."""
        if self._kafka_answers and not answers:
            log.warning("%s; waiting for it", why)
        elif answers and not self._kafka_answers:
            log.info("Kafka at %s answers again", self.settings.bootstrap_servers)
        self._kafka_answers = answers
        if not answers:
            self._set_unready(why)

    def _set_unready(self, why: str) -> None:
        self._unready = why
        self.metrics.ready.set(not why)
