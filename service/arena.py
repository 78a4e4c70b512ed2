"""The arena: one row of every state tensor for each stream that this worker has.

Streams belong to partitions, and come and go with them. Rows are gathered into a batch, advanced, and scattered back;
between gather and scatter nothing else may touch them. The arena has transactions, as Kafka has: what was changed since
the last `commit` can be undone by `rollback`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.state import Rows, Schema

FIRST_ROWS = 256
NO_STREAMS: Mapping[str, int] = {}


class StreamKey(NamedTuple):
    """A stream as Kafka knows it. The same id in two partitions is two streams: their order is not defined."""

    partition: int
    stream: str


class Arena:
    """State rows of streams, which their partitions list in the order in which they were last heard."""

    def __init__(self, schema: Schema) -> None:
        """schema: has a tensor `offset`, of the record by which a stream was last moved."""
        self.schema = schema
        self._tensors = schema.initial(FIRST_ROWS)
        self._initial = schema.initial(1)
        self._streams: dict[int, OrderedDict[str, int]] = {}
        self._free = list(range(FIRST_ROWS))[::-1]
        # What a rollback needs: the old content of rows changed since the last commit, and who came or went.
        self._saved: list[tuple[Tensor, Rows]] = []
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

    def find(self, key: StreamKey) -> int | None:
        return self.streams(key.partition).get(key.stream)

    def keys_of(self, stream: str) -> list[StreamKey]:
        """The streams of this id: one at most in each partition."""
        return [StreamKey(partition, stream) for partition, streams in self._streams.items() if stream in streams]

    def add(self, key: StreamKey) -> int:
        """The row of a stream that was not there, in its initial state; the most recently heard of its partition."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._streams.setdefault(key.partition, OrderedDict())[key.stream] = row
        self._came.append((key, row, True))
        return row

    def heard(self, key: StreamKey) -> None:
        """Make a stream the most recently heard of its partition."""
        self._streams[key.partition].move_to_end(key.stream)

    def forget(self, key: StreamKey) -> bool:
        """End a stream. -> whether there was one. Its row is free from the next commit on."""
        row = self.find(key)
        if row is None:
            return False
        del self._streams[key.partition][key.stream]
        self._came.append((key, row, False))
        return True

    def forget_partition(self, partition: int) -> int:
        """End all streams of a partition, for good: between transactions. -> how many there were."""
        rows = list(self._streams.pop(partition, {}).values())
        self._release(rows)
        return len(rows)

    def load(self, partition: int, streams: Sequence[str], state: Rows) -> None:
        """Add streams with their states, for good: between transactions."""
        rows = [self.add(StreamKey(partition, stream)) for stream in streams]
        self.scatter(torch.tensor(rows, dtype=torch.int64), state)
        self.commit()

    def sort(self, partition: int) -> None:
        """Bring a partition's streams into the order in which they were last heard."""
        offset = self.column("offset")
        in_order = sorted(self.streams(partition).items(), key=lambda item: offset[item[1]])
        self._streams[partition] = OrderedDict(in_order)

    def reset(self, rows: Iterable[int]) -> None:
        """Let these rows start afresh."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        if not len(index):
            return
        self._save(index)
        for name, tensor in self._tensors.items():
            tensor[index] = self._initial[name]

    def gather(self, rows: Tensor) -> Rows:
        """The states of these rows [B], copied."""
        return {name: tensor.index_select(0, rows) for name, tensor in self._tensors.items()}  # twice tensor[rows]

    def scatter(self, rows: Tensor, state: Rows) -> None:
        """Write back states; those tensors alone that `state` has."""
        self._save(rows)
        for name, values in state.items():
            self._tensors[name][rows] = values

    def column(self, name: str) -> NDArray[np.int64]:
        """One tensor of all rows as a numpy view; good until the next stream is added."""
        return self._tensors[name].numpy()

    def commit(self) -> None:
        """Let all that was changed stand."""
        self._end_transaction()
        self._release([row for _, row, came in self._came if not came])
        self._came.clear()

    def rollback(self) -> None:
        """Undo all that was changed since the last commit."""
        for index, state in self._saved:
            for name, values in state.items():
                self._tensors[name][index] = values
        for key, row, came in reversed(self._came):
            if came:
                del self._streams[key.partition][key.stream]
                self._free.append(row)
            else:
                self._streams[key.partition][key.stream] = row
        self._came.clear()
        self._end_transaction()
        for partition in self._streams:
            self.sort(partition)

    def _save(self, rows: Tensor) -> None:
        """Keep the content of rows that this transaction changes for the first time."""
        first = rows[torch.from_numpy(~self._is_saved[rows.numpy()])]
        if len(first):
            self._saved.append((first, self.gather(first)))
            self._is_saved[first.numpy()] = True

    def _end_transaction(self) -> None:
        for index, _ in self._saved:
            self._is_saved[index.numpy()] = False
        self._saved.clear()

    def _release(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64)
        for name, tensor in self._tensors.items():
            tensor[index] = self._initial[name]
        self._free += rows

    def _grow(self) -> None:
        """Twice the rows. The old tensors are copied once a doubling."""
        rows = len(self._is_saved)
        more = self.schema.initial(rows)
        self._tensors = {name: torch.cat((tensor, more[name])) for name, tensor in self._tensors.items()}
        self._is_saved = np.append(self._is_saved, np.zeros(rows, dtype=np.bool_))
        self._free = list(range(rows, 2 * rows))[::-1]
