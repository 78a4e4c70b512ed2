"""The arena: one row for each stream that this worker has, of all its state's tensors side by side.

Streams belong to partitions, and come and go with them. Rows are gathered into a batch, advanced, and scattered back;
between gather and scatter nothing else may touch them. The arena has transactions, as Kafka has: what was changed since
the last `commit` can be undone by `rollback`.

All rows lie in one stretch of address space, of which the system gives memory only to what was written to. So the arena
grows row by row, and nothing is ever copied for it.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.grid import Int64s
from model.state import Rows, Schema
from service.packing import Columns

FIRST_ROWS = 256
ADDRESSES_BYTES = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Of address space, not of memory: more than this machine has of that."""
MAP_NORESERVE = 0x4000
"""Linux's; Python has no name for it."""
NO_STREAMS: Mapping[str, int] = {}


class StreamKey(NamedTuple):
    """A stream as Kafka knows it. The same id in two partitions is two streams: their order is not defined."""

    partition: int
    stream: str


class Arena:
    """State rows of streams, which their partitions list in the order in which they were last heard."""

    def __init__(self, schema: Schema) -> None:
        """schema: has those of `service.grid`: when, and by which record, a stream was last moved."""
        self.schema = schema
        self.block = _reserve(schema.row_bytes)
        """All rows, [R, row_bytes] uint8; of those that no stream has, the content is of no meaning."""
        self.tensors = schema.views(self.block)
        """The same by name: each [R, ...]."""
        self.columns = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        """The same as numpy's."""
        self._record = schema.record
        self._bytes, self._first = self.block.numpy(), schema.block(1)[0].numpy()
        self._streams: dict[int, OrderedDict[str, int]] = {}
        self.changes = 0
        """Differs whenever other streams are here than before."""
        self._rows = 0
        self._free: list[int] = []
        # What a rollback needs: the old content of rows changed since the last commit, and who came or went.
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._is_saved = np.zeros(FIRST_ROWS, dtype=np.bool_)
        self._came: list[tuple[StreamKey, int, bool]] = []

    def __len__(self) -> int:
        return sum(map(len, self._streams.values()))

    def __iter__(self) -> Iterator[StreamKey]:
        return (StreamKey(partition, stream) for partition, streams in self._streams.items() for stream in streams)

    @property
    def state_bytes(self) -> int:
        """Bytes of the rows in use."""
        return len(self) * self.schema.row_bytes

    def streams(self, partition: int) -> Mapping[str, int]:
        """A partition's streams with their rows, the least recently heard first."""
        return self._streams.get(partition, NO_STREAMS)

    def open(self, partition: int) -> OrderedDict[str, int]:
        """The same, of a partition that is now this worker's, for whoever keeps them in order."""
        return self._streams.setdefault(partition, OrderedDict())

    def find(self, key: StreamKey) -> int | None:
        return self.streams(key.partition).get(key.stream)

    def keys_of(self, stream: str) -> list[StreamKey]:
        """The streams of this id: one at most in each partition."""
        return [StreamKey(partition, stream) for partition, streams in self._streams.items() if stream in streams]

    def last_heard(self, stream: str, partitions: frozenset[int] | None = None) -> StreamKey | None:
        """Of the streams of this id, in `partitions` only unless None, the one whose last observation is the latest."""
        among = self._streams if partitions is None else partitions
        rows = [(partition, row) for partition in among if (row := self.streams(partition).get(stream)) is not None]
        if not rows:
            return None
        ts_ms, count = self.column("ts_ms"), self.column("count")
        heard = [(ts_ms[row], partition) for partition, row in rows if count[row]]
        return StreamKey(max(heard)[1], stream) if heard else None

    def add(self, key: StreamKey) -> int:
        """The row of a stream that was not there, in its initial state; the most recently heard of its partition."""
        row = self._unused()
        self._bytes[row] = self._first
        self.open(key.partition)[key.stream] = row
        self.changes += 1
        self._came.append((key, row, True))
        return row

    def _unused(self) -> int:
        """A row that nobody has."""
        if self._free:
            return self._free.pop()
        self._rows += 1
        return self._rows - 1

    def forget(self, key: StreamKey) -> bool:
        """End a stream. -> whether there was one. Its row is free from the next commit on."""
        row = self.find(key)
        if row is None:
            return False
        del self._streams[key.partition][key.stream]
        self.changes += 1
        self._came.append((key, row, False))
        return True

    def forget_partition(self, partition: int) -> int:
        """End all streams of a partition, for good: between transactions. -> how many there were."""
        rows = list(self.streams(partition).values())
        self._streams.pop(partition, None)
        self._free += rows
        self.changes += 1
        return len(rows)

    def load(self, partition: int, streams: Sequence[str], states: Columns) -> None:
        """Give streams these states, whether they were there or not, for good: between transactions."""
        held = self.open(partition)
        for stream in streams:
            if stream not in held:
                held[stream] = self._unused()
        rows = np.array([held[stream] for stream in streams], dtype=np.int64)
        for name, values in states.items():
            self.columns[name][rows] = values
        self.changes += 1

    def sort(self, partition: int) -> None:
        """Bring a partition's streams into the order in which they were last heard."""
        held = self.open(partition)
        streams, rows = list(held), np.fromiter(held.values(), np.int64, len(held))
        for n in np.argsort(self.column("offset")[rows], kind="stable").tolist():
            held.move_to_end(streams[n])

    def reset(self, rows: Tensor) -> None:
        """Let these rows [B] start afresh."""
        if len(rows):
            self.save(rows)
            self._bytes[rows.numpy()] = self._first

    def gather(self, rows: Tensor) -> Rows:
        """The states of these rows [B], copied."""
        return self.schema.views(self.block.index_select(0, rows))  # twice as fast as block[rows]

    def records(self, rows: Int64s) -> NDArray[np.void]:
        """The same as one array [B], for whoever needs no torch."""
        records: NDArray[np.void] = self._bytes[rows].view(self._record)[:, 0]
        return records

    def row(self, number: int) -> NDArray[np.void]:
        """The state of one row, copied: its tensors by name, [1, ...] each. So they are much sooner there than if
        `gather` made a view of each.
        """
        row: NDArray[np.void] = self._bytes[number].copy().view(self._record)
        return row

    def scatter(self, rows: Tensor, state: Rows) -> None:
        """Write back states; those tensors alone that `state` has."""
        self.save(rows)
        at = rows.numpy()
        for name, values in state.items():
            self.columns[name][at] = values.numpy()  # quicker than by torch

    def column(self, name: str) -> NDArray[np.int64]:
        """One tensor of all rows as a numpy view."""
        return self.columns[name]

    def commit(self) -> None:
        """Let all that was changed stand."""
        self._end_transaction()
        self._free += [row for _, row, came in self._came if not came]
        self._came.clear()

    def rollback(self) -> None:
        """Undo all that was changed since the last commit."""
        for index, old in self._saved:
            self.block[index] = old
        for key, row, came in reversed(self._came):
            if came:
                del self._streams[key.partition][key.stream]
                self._free.append(row)
            else:
                self._streams[key.partition][key.stream] = row
        self._came.clear()
        self.changes += 1
        self._end_transaction()
        for partition in self._streams:
            self.sort(partition)

    def save(self, rows: Tensor) -> None:
        """Keep the content of rows, before it is changed for the first time in this transaction."""
        if self._rows > len(self._is_saved):
            more = max(FIRST_ROWS, self._rows, len(self._is_saved))
            self._is_saved = np.append(self._is_saved, np.zeros(more, dtype=np.bool_))
        first = rows[torch.from_numpy(~self._is_saved[rows.numpy()])]
        if len(first):
            self._saved.append((first, self.block.index_select(0, first)))
            self._is_saved[first.numpy()] = True

    def _end_transaction(self) -> None:
        for index, _ in self._saved:
            self._is_saved[index.numpy()] = False
        self._saved.clear()


def _reserve(row_bytes: int) -> Tensor:
    """Rows of zeros that take memory once they are written to. Where so many addresses are not to be had (a limit was
    set, or the system counts them as memory), half as many, and so on.
    """
    size = ADDRESSES_BYTES
    while True:
        try:
            addresses = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except OSError:
            size //= 2
            if size < FIRST_ROWS * row_bytes:
                raise
        else:
            rows = size // row_bytes
            return torch.from_numpy(np.frombuffer(addresses, np.uint8, rows * row_bytes)).view(rows, row_bytes)
