"""A stream's state: one row in each of some named tensors.

Every part that remembers declares its tensors here, so that whoever keeps, moves or stores a state (the arena, a
snapshot, a bundle's check) needs to know no part by name. Nothing is ever pickled.

The tensors of many streams may lie in one block of memory, a stream's row of all of them side by side: then a state is
found, copied and put back in one piece, wherever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""A state of B streams: name -> tensor [B, *shape]."""

ALIGN = 8
"""Bytes: those of the largest number in a state."""


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a stream's state: the shape of a row, its dtype, and what a new stream starts from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: float = 0.0

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Schema(tuple[TensorSpec, ...]):
    """The tensors that make up one stream's state, in a fixed order. Raises ValueError if a name stands twice.

    >>> schema = Schema([TensorSpec("h", (2, 4), torch.float32), TensorSpec("count", (), torch.int64)])
    >>> {name: tuple(rows.shape) for name, rows in schema.initial(3).items()}
    {'h': (3, 2, 4), 'count': (3,)}
    >>> schema.row_bytes
    40
    """

    def __new__(cls, specs: Iterable[TensorSpec]) -> Schema:
        schema = super().__new__(cls, specs)
        names = [spec.name for spec in schema]
        if len(set(names)) != len(names):
            raise ValueError(f"a state's tensors must have different names, not {names}")
        return schema

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row in a block: each tensor begins at a multiple of ALIGN."""
        return sum(map(_aligned, self))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where in a row each tensor begins, in bytes.

        >>> Schema([TensorSpec("gap", (), torch.int32), TensorSpec("h", (2, 4), torch.float32)]).offsets
        {'gap': 0, 'h': 8}
        """
        ends = [*accumulate(map(_aligned, self), initial=0)]
        return {spec.name: start for spec, start in zip(self, ends, strict=False)}

    @property
    def record(self) -> np.dtype[np.void]:
        """A row of a block as numpy reads it."""
        formats = [(torch.empty(0, dtype=spec.dtype).numpy().dtype, spec.shape) for spec in self]
        fields = {"names": list(self.offsets), "formats": formats, "offsets": [*self.offsets.values()]}
        return np.dtype({**fields, "itemsize": self.row_bytes})  # type: ignore[call-overload, no-any-return]

    def views(self, block: Tensor) -> Rows:
        """The tensors that lie in a block [B, row_bytes] of uint8. They share its memory."""
        offsets, views = self.offsets, {}
        for spec in self:
            first = offsets[spec.name] // spec.dtype.itemsize
            flat = block.view(spec.dtype)[:, first : first + spec.row_bytes // spec.dtype.itemsize]
            views[spec.name] = flat.view(len(block), *spec.shape)
        return views

    def block(self, streams: int) -> Tensor:
        """The state of `streams` new streams, in one block."""
        block = torch.zeros(streams, self.row_bytes, dtype=torch.uint8)
        views = self.views(block)
        for spec in self:
            views[spec.name].fill_(spec.initial)
        return block

    def initial(self, streams: int) -> Rows:
        """The state of `streams` new streams."""
        return {spec.name: torch.full((streams, *spec.shape), spec.initial, dtype=spec.dtype) for spec in self}

    def check(self, rows: Mapping[str, Tensor]) -> int:
        """The number of streams in `rows`. Raises ValueError, naming the tensor, if it is not of this schema."""
        if missing := {spec.name for spec in self} ^ set(rows):
            raise ValueError(f"a state needs the tensors {[spec.name for spec in self]}; odd: {sorted(missing)}")
        for spec in self:
            tensor = rows[spec.name]
            if not tensor.ndim or tuple(tensor.shape[1:]) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name} must be {spec.dtype} {spec.shape}, not {tensor.dtype} {tuple(tensor.shape[1:])}"
                )
        streams = {len(tensor) for tensor in rows.values()}
        if len(streams) != 1:
            raise ValueError(f"the tensors of a state must have as many rows each, not {sorted(streams)}")
        return streams.pop()


def _aligned(spec: TensorSpec) -> int:
    return -(-spec.row_bytes // ALIGN) * ALIGN
