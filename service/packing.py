"""The states of some streams as safetensors, and back.

A snapshot has many small tensors, and by the format's own library each takes several copies and a dozen calls: longer
than all the rest of a snapshot. Here each is copied once on its way out, and not at all on its way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from model.state import Schema

Columns = Mapping[str, NDArray[Any]]
"""States of B streams: name -> [B, ...]."""


class Packing:
    """Of the states of one schema: in the library's order, the largest numbers first, so all are aligned."""

    def __init__(self, schema: Schema) -> None:
        fields = {name: schema.record[name] for name in schema.offsets}
        order = sorted(fields, key=lambda name: (-fields[name].base.itemsize, fields[name].base.kind == "f", name))
        self._fields = {name: fields[name] for name in order}
        self._codes = {name: f"{f.base.kind.upper()}{8 * f.base.itemsize}" for name, f in fields.items()}

    def _head(self, streams: int) -> dict[str, dict[str, Any]]:
        """Of each tensor, what the format tells of it."""
        head, start = {}, 0
        for name, field in self._fields.items():
            stop = start + streams * field.itemsize
            head[name] = {"dtype": self._codes[name], "shape": [streams, *field.shape], "data_offsets": [start, stop]}
            start = stop
        return head

    def pack(self, states: NDArray[np.void], metadata: Mapping[str, str]) -> bytes:
        """states: [B], rows as the schema's `record` has them."""
        head = orjson.dumps({"__metadata__": metadata, **self._head(len(states))})
        head += b" " * (-len(head) % 8)
        tensors = (np.ascontiguousarray(states[name]).data for name in self._fields)
        return b"".join((len(head).to_bytes(8, "little"), head, *tensors))

    def unpack(self, value: bytes) -> tuple[Columns, Mapping[str, str]]:
        """The tensors, which share its memory, and the metadata. Raises ValueError, KeyError, TypeError or
        AttributeError for what `pack` did not make of a state of this schema.
        """
        start = 8 + int.from_bytes(value[:8], "little")
        head = orjson.loads(value[8:start])
        metadata = head.pop("__metadata__")
        streams = next(iter(head.values()))["shape"][0]
        due = self._head(streams)
        if head != due:
            odd = sorted(name for name in head.keys() | due.keys() if _told(head, name) != _told(due, name))
            raise ValueError(f"a state's tensors are others: {odd}")
        columns = {
            name: np.ndarray((streams, *field.shape), field.base, value, start + due[name]["data_offsets"][0])
            for name, field in self._fields.items()
        }
        return columns, metadata


def _told(head: Mapping[str, dict[str, Any]], name: str) -> Any:
    """What matters of a tensor, if there is one."""
    return name in head and (head[name]["dtype"], head[name]["shape"][1:])
