"""The arena: one row of every state tensor for each stream that this worker has.

Streams belong to partitions, and come and go with them. Rows are gathered into a batch, advanced, and scattered back;
between gather and scatter nothing else may touch them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.state import Rows, Schema

FIRST_ROWS = 256


class StreamKey(NamedTuple):
    """A stream as Kafka knows it. The same id in two partitions is two streams: their order is not defined."""

    partition: int
    stream: str


class Full(Exception):
    """There is no row for one stream more."""


class Arena:
    """State rows of at most `max_streams` streams."""

    def __init__(self, schema: Schema, max_streams: int) -> None:
        self.schema = schema
        self.max_streams = max_streams
        self._tensors = schema.initial(FIRST_ROWS)
        self._initial = schema.initial(1)
        self._row_of: dict[StreamKey, int] = {}
        self._partitions: set[int] = set()
        self._free = list(range(FIRST_ROWS))[::-1]

    def __len__(self) -> int:
        return len(self._row_of)

    def __iter__(self) -> Iterator[StreamKey]:
        return iter(self._row_of)

    @property
    def state_bytes(self) -> int:
        """Bytes of the rows in use."""
        return len(self) * self.schema.row_bytes

    def find(self, key: StreamKey) -> int | None:
        return self._row_of.get(key)

    def keys_of(self, stream: str) -> list[StreamKey]:
        """The streams of this id: one at most in each partition."""
        keys = (StreamKey(partition, stream) for partition in self._partitions)
        return [key for key in keys if key in self._row_of]

    def row(self, key: StreamKey) -> int:
        """The row of a stream, a new one if it has none yet. Raises Full."""
        row = self._row_of.get(key)
        if row is None:
            if len(self) >= self.max_streams:
                raise Full
            if not self._free:
                self._grow()
            row = self._row_of[key] = self._free.pop()
            self._partitions.add(key.partition)
        return row

    def forget(self, keys: Iterable[StreamKey]) -> int:
        """End streams. -> how many of them there were."""
        rows = [row for key in keys if (row := self._row_of.pop(key, None)) is not None]
        self.reset(rows)
        self._free += rows
        return len(rows)

    def forget_partition(self, partition: int) -> int:
        """End all streams of a partition. -> how many there were."""
        return self.forget([key for key in self._row_of if key.partition == partition])

    def reset(self, rows: Iterable[int]) -> None:
        """Let these rows start afresh."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        for name, tensor in self._tensors.items():
            tensor[index] = self._initial[name]

    def gather(self, rows: Tensor) -> Rows:
        """The states of these rows [B], copied."""
        return {name: tensor[rows] for name, tensor in self._tensors.items()}

    def scatter(self, rows: Tensor, state: Rows) -> None:
        """Write back states; those tensors alone that `state` has."""
        for name, values in state.items():
            self._tensors[name][rows] = values

    def column(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """One tensor of all rows as a numpy view; good until the next stream is added."""
        return self._tensors[name].numpy()

    def _grow(self) -> None:
        """Twice the rows. The old tensors are copied once a doubling."""
        rows = len(next(iter(self._tensors.values())))
        more = self.schema.initial(min(rows, self.max_streams))
        self._tensors = {name: torch.cat((tensor, more[name])) for name, tensor in self._tensors.items()}
        self._free = list(range(rows, rows + len(more["slot"])))[::-1]
