"""What of the states is on the state topic, so that a worker that starts can take them up again.

The streams of a partition fall into buckets by the hash of their ids; a bucket that grows too large for a record is
split in two. Each commit writes those buckets whose turn it is, each with the offset that it stands at. Beside the
offset that is committed stands a `Note`: from where the input must be replayed, because not all buckets are younger.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import heappop, heappush

import numpy as np
import orjson

from service.engine import Engine
from service.errors import LostStateError
from service.packing import Columns, Packing
from service.partition import Decided, Entry, Mark
from service.records import Outgoing
from service.transport.contract import Offset

FORMAT = 1
SNAPSHOT_BYTES = 262_144
"""A bucket whose rows take more is split, so that writing one never holds up a commit."""
OUTGROWN = 4
"""A bucket that is so many times as large is written, and split, before its turn."""
COMMIT_BYTES_MAX = 8_388_608
"""Snapshots written in one commit; what is due beyond waits for the next."""
JOURNAL_ENTRIES_MAX = 500
"""In one record; an entry may hold a stream id of up to 1 kB."""
HASH_BITS = 64


@dataclass(frozen=True)
class Trial:
    """A batch that was begun and not yet committed. lives: how often. until: the offset after it. alone: the offset of
    the one record that was tried by itself, -1 where it was a whole batch.
    """

    lives: int
    until: int
    alone: int = -1


@dataclass(frozen=True)
class Note:
    """What is told beside a committed offset.

    replay: where to replay from. mark: where the partition stands at the offset. snapshots, digest: how many there are
    on the topic, and a sum over their buckets and offsets, empty where that cannot be promised. partitions: of the
    observations topic.
    """

    replay: Mark
    mark: Mark
    snapshots: int
    digest: str
    partitions: int
    model: str
    trial: Trial | None = None

    def encode(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Note:
        """Raises LostStateError if these are not the words of `encode`."""
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise LostStateError("the offset was committed by another version of Carousel")
            trial = fields.pop("trial")
            replay, mark = Mark(**fields.pop("replay")), Mark(**fields.pop("mark"))
            return cls(replay=replay, mark=mark, trial=Trial(**trial) if trial else None, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LostStateError(
                "the offset was not committed by Carousel (was it reset by hand?), so the states do not belong to it"
            ) from error


@dataclass(eq=False)
class Bucket:
    """Streams whose ids' hashes begin with `bits`.

    offset: the input before it is in the snapshot on the topic; -1: there is none. due_s: when its turn comes to be
    written, if it is dirty then. dirty: where the partition stood before what changed since the snapshot.
    """

    bits: str
    streams: dict[str, None] = field(default_factory=dict)
    """A dict, as a set takes twice the memory."""
    offset: int = -1
    due_s: float = math.inf
    dirty: Mark | None = None

    @property
    def phase(self) -> float:
        """A number in [0, 1) that spreads buckets evenly, so that they are not all written at once."""
        return int(self.bits or "0", 2) / (1 << len(self.bits))

    def halves(self) -> tuple[Bucket, Bucket]:
        """The two buckets that it splits into, which have no snapshots of their own yet."""
        zero, one = dict[str, None](), dict[str, None]()
        for stream in self.streams:
            (zero if hash_bits(stream)[len(self.bits)] == "0" else one)[stream] = None
        return replace(self, bits=self.bits + "0", streams=zero), replace(self, bits=self.bits + "1", streams=one)


@dataclass(frozen=True)
class Prepared:
    """What one commit adds for a partition. before: needed before the offset is committed. after: only true after it.
    written, removed: buckets with new snapshots, and those split into them.
    """

    mark: Mark
    note: Note
    before: Sequence[Outgoing]
    after: Sequence[Outgoing]
    written: Sequence[Bucket]
    removed: Sequence[Bucket]

    @property
    def offset(self) -> Offset:
        return Offset(self.mark.offset, self.note.encode())


def hash_bits(stream: str) -> str:
    """The hash of a stream id as text of 0 and 1. A good one, lest a producer could fill one bucket on purpose."""
    digest = hashlib.blake2b(stream.encode(), digest_size=HASH_BITS // 8).digest()
    return f"{int.from_bytes(digest):0{HASH_BITS}b}"


@dataclass
class Keeper:
    """The snapshots of one partition."""

    number: int
    engine: Engine
    partitions: int
    """Of the observations topic."""
    buckets: dict[str, Bucket] = field(default_factory=dict)
    """By their bits."""
    homes: dict[str, Bucket] = field(default_factory=dict)
    """Of each stream its bucket, so that nobody hashes for it."""
    turns: list[tuple[float, str]] = field(default_factory=list)
    """Of each dirty bucket when its turn comes, and its bits; also what was true once, which is passed over. A heap."""
    open_marks: Counter[Mark] = field(default_factory=Counter)
    """How many buckets are dirty since each, the oldest first, as marks only grow."""
    count: int = 0
    """How many buckets have snapshots."""
    digest: int = 0
    journals: list[tuple[bytes, int]] = field(default_factory=list)
    """Records of the journal on the topic, by key, with their last entries' offsets."""
    stale: list[bytes] = field(default_factory=list)
    """Keys on the topic that are of no use any more."""

    def __post_init__(self) -> None:
        self.settings = self.engine.settings
        self.packing = Packing(self.engine.arena.schema)
        self.interval_s = self.settings.snapshot_interval_s
        self.outgrown = OUTGROWN * max(SNAPSHOT_BYTES // self.engine.arena.schema.row_bytes, 1)
        self.adopt([Bucket("")])

    def adopt(self, buckets: Iterable[Bucket]) -> None:
        """Begin with these, which cover all streams without overlapping."""
        for bucket in tuple(self.buckets.values()):
            self._remove(bucket)
        for bucket in buckets:
            self._add(bucket)
        self.digest = digest_of(self.buckets.values())

    # Keys: group, partition, then a bucket's bits or the journal; so groups may share a topic.
    def key(self, name: str) -> bytes:
        return f"{self.settings.group_id}/{self.number}/{name}".encode()

    def bucket_of(self, stream: str) -> Bucket:
        if home := self.homes.get(stream):
            return home
        bits = hash_bits(stream)
        for length in range(HASH_BITS):
            if bucket := self.buckets.get(bits[:length]):
                return bucket
        raise KeyError(stream)

    def covered(self, stream: str) -> int:
        """The offset before which a stream's records are in its snapshot."""
        return self.bucket_of(stream).offset

    def touch(self, streams: Iterable[str], mark: Mark, now_s: float) -> None:
        """These streams came, went or moved since the partition stood at `mark`."""
        held, homes = self.engine.arena.streams(self.number), self.homes
        for stream in streams:
            home = homes.get(stream)
            bucket = home or self.bucket_of(stream)
            if bucket.dirty is None:
                self._soil(bucket, mark, now_s)
            if stream not in held:
                bucket.streams.pop(stream, None)
                homes.pop(stream, None)
            elif home is None:
                self._enter(bucket, stream, now_s)

    def _soil(self, bucket: Bucket, mark: Mark, now_s: float) -> None:
        """One that never was dirty waits an interval for its turn."""
        bucket.dirty, bucket.due_s = mark, min(bucket.due_s, now_s + self.interval_s)
        self.open_marks[mark] += 1
        self._queue(bucket)

    def _enter(self, bucket: Bucket, stream: str, now_s: float) -> None:
        self.homes[stream] = bucket
        bucket.streams[stream] = None
        if bucket.offset < 0 and self._too_large(bucket):
            self._split_unwritten(bucket)
        elif len(bucket.streams) == self.outgrown + 1:
            heappush(self.turns, (now_s, bucket.bits))

    def _split_unwritten(self, bucket: Bucket) -> None:
        """Nothing of it is on the topic yet, so it splits at no cost; else all streams of a worker's first minute would
        be written in one piece. It was due an interval after it was first touched, and its parts are spread over that.
        """
        for part in self._fit(bucket):
            part.due_s -= (part.phase - bucket.phase) * self.interval_s
            self._add(part)
        self._remove(bucket)

    def _add(self, bucket: Bucket) -> None:
        self.buckets[bucket.bits] = bucket
        self.homes.update(dict.fromkeys(bucket.streams, bucket))
        self.count += bucket.offset >= 0
        if bucket.dirty:
            self.open_marks[bucket.dirty] += 1
            self._queue(bucket)

    def _remove(self, bucket: Bucket) -> None:
        """Its streams are, or will be, in others."""
        del self.buckets[bucket.bits]
        self.count -= bucket.offset >= 0
        if bucket.dirty:
            self.open_marks[bucket.dirty] -= 1
            if not self.open_marks[bucket.dirty]:
                del self.open_marks[bucket.dirty]

    def _queue(self, bucket: Bucket) -> None:
        heappush(self.turns, (bucket.due_s, bucket.bits))

    def due(self, now_s: float) -> bool:
        """Whether there are snapshots to be written."""
        return self._first_due(now_s) is not None

    def _first_due(self, now_s: float) -> Bucket | None:
        """The dirty bucket whose turn came first, which is then at the front."""
        while self.turns and self.turns[0][0] <= now_s:
            due_s, bits = self.turns[0]
            bucket = self.buckets.get(bits)
            if bucket and bucket.dirty and (bucket.due_s == due_s or len(bucket.streams) > self.outgrown):
                return bucket
            heappop(self.turns)
        return None

    def prepare(self, offset: int, now_s: float, trial: Trial | None = None) -> Prepared:
        """What a commit of the input before `offset` writes for this partition. Changes nothing that matters."""
        partition = self.engine.partition(self.number)
        mark = partition.next(offset)
        self.touch(partition.touched, partition.mark, now_s)
        removed = self._due(now_s)
        written = [self._at(part, offset, now_s, split=part is not one) for one in removed for part in self._fit(one)]
        exactly = self.settings.guarantee == "exactly_once"
        # At least once, snapshots come after the offset, or not at all: it must not count on them.
        settled = Counter(bucket.dirty for bucket in removed if exactly)
        start = next((since for since, count in self.open_marks.items() if count > settled[since]), mark)
        count = self.count
        if exactly:
            count += len(written) - sum(bucket.offset >= 0 for bucket in removed)
        digest = f"{self._digest_after(removed, written):016x}" if exactly else ""
        note = Note(start, mark, count, digest, self.partitions, self.engine.bundle.model_id, trial)
        after = self._after(start, removed, written)
        return Prepared(mark, note, self._journal(partition.journal), after, written, removed)

    def stand(self, prepared: Prepared) -> None:
        """The commit went well."""
        self.digest = self._digest_after(prepared.removed, prepared.written)
        for bucket in prepared.removed:
            self._remove(bucket)
        for bucket in prepared.written:
            self._add(bucket)
        gone = {record.key for record in prepared.after if record.value is None}
        self.journals = [(key, last) for key, last in self.journals if key not in gone]
        self.stale = [key for key in self.stale if key not in gone]
        for record in prepared.before:
            if record.key:
                self.journals.append((record.key, prepared.mark.offset - 1))

    def _due(self, now_s: float) -> list[Bucket]:
        """The dirty buckets whose turn it is, the oldest first."""
        chosen, size, turns = dict[str, Bucket](), 0, []
        while size <= COMMIT_BYTES_MAX and (bucket := self._first_due(now_s)):
            turns.append(heappop(self.turns))
            if bucket.bits not in chosen:
                chosen[bucket.bits] = bucket
                size += self._bytes(bucket)
        for turn in turns:  # it is still theirs, until the commit stands
            heappush(self.turns, turn)
        return list(chosen.values())

    def _bytes(self, bucket: Bucket) -> int:
        return len(bucket.streams) * self.engine.arena.schema.row_bytes

    def _too_large(self, bucket: Bucket) -> bool:
        return len(bucket.streams) > 1 and self._bytes(bucket) > SNAPSHOT_BYTES and len(bucket.bits) < HASH_BITS - 1

    def _at(self, bucket: Bucket, offset: int, now_s: float, split: bool) -> Bucket:
        """The bucket once its snapshot at this offset is written. The next ones of those that split are spread out."""
        due_s = now_s + self.interval_s * (1 - bucket.phase if split else 1)
        return replace(bucket, offset=offset, dirty=None, due_s=due_s)

    def _fit(self, bucket: Bucket) -> Iterator[Bucket]:
        """The bucket, or those that it must be split into."""
        if self._too_large(bucket):
            for half in bucket.halves():
                yield from self._fit(half)
        else:
            yield bucket

    def _digest_after(self, removed: Sequence[Bucket], written: Sequence[Bucket]) -> int:
        return self.digest ^ digest_of((*removed, *written))

    def _after(self, start: Mark, removed: Sequence[Bucket], written: Sequence[Bucket]) -> list[Outgoing]:
        """Snapshots, and tombstones for what they, or the passing of time, have made useless."""
        kept = {bucket.bits for bucket in written}
        useless = [self.key(b.bits) for b in removed if b.offset >= 0 and b.bits not in kept]
        useless += [key for key, last in self.journals if last < start.offset]
        snapshots = [self._record(self.key(bucket.bits), self._encode(bucket)) for bucket in written]
        return snapshots + [self._record(key, None) for key in (*useless, *self.stale)]

    def _journal(self, entries: Sequence[Entry]) -> list[Outgoing]:
        """New entries of the journal, as records."""
        parts = [entries[n : n + JOURNAL_ENTRIES_MAX] for n in range(0, len(entries), JOURNAL_ENTRIES_MAX)]
        return [
            self._record(self.key(f"journal/{part[0].offset}.{n}"), orjson.dumps([asdict(entry) for entry in part]))
            for n, part in enumerate(parts)
        ]

    def _record(self, key: bytes, value: bytes | None) -> Outgoing:
        return Outgoing(self.settings.state_topic, self.number, key, value)

    def _encode(self, bucket: Bucket) -> bytes:
        streams = sorted(bucket.streams)
        held = self.engine.arena.streams(self.number)
        rows = np.array([held[stream] for stream in streams], dtype=np.int64)
        with self.engine.lock:
            states = self.engine.arena.records(rows)
        described = {
            "format": FORMAT,
            "group": self.settings.group_id,
            "topic": self.settings.observations_topic,
            "partition": self.number,
            "bucket": bucket.bits,
            "model": self.engine.bundle.model_id,
            "offset": bucket.offset,
            "streams": orjson.dumps(streams).decode(),
        }
        return self.packing.pack(states, {name: str(value) for name, value in described.items()})

    def decode(self, bits: str, value: bytes) -> tuple[Snapshot, Columns]:
        """A snapshot and its streams' states. Raises LostStateError for what this engine cannot go on from."""
        where = f"bucket {bits!r} of partition {self.number} on {self.settings.state_topic}"
        try:
            states, told = self.packing.unpack(value)
            snapshot = Snapshot(bits, int(told["offset"]), told["model"], orjson.loads(told["streams"]))
            as_keyed = (told["format"], told["bucket"], told["partition"]) == (str(FORMAT), bits, str(self.number))
            count = len(next(iter(states.values())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LostStateError(f"{where} does not fit: {' '.join(str(error).split())}") from error
        if not as_keyed or count != len(snapshot.streams):
            raise LostStateError(f"{where} is another's")
        return snapshot, states


def digest_of(buckets: Iterable[Bucket | Snapshot]) -> int:
    """A number for the snapshots of these buckets. That of some, combined by exclusive or with that of others, is that
    of both; and with that of the same, of neither.
    """
    digest = 0
    for bucket in buckets:
        if bucket.offset >= 0:
            name = f"{bucket.bits}@{bucket.offset}".encode()
            digest ^= int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    return digest


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot on the topic tells, beside its streams' states."""

    bits: str
    offset: int
    model: str
    streams: Sequence[str]

    def part(self, bits: str) -> Snapshot:
        """Only those streams whose hashes begin with `bits`."""
        kept = [stream for stream in self.streams if hash_bits(stream).startswith(bits)]
        return replace(self, bits=bits, streams=kept)


def decode_journal(value: bytes) -> list[Entry]:
    """Raises LostStateError if this is no journal."""
    try:
        return [Entry(one["offset"], Decided(one["decided"]), one["stream"]) for one in orjson.loads(value)]
    except (ValueError, KeyError, TypeError) as error:
        raise LostStateError(f"a record of the journal is damaged: {error}") from error
