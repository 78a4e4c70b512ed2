"""Records of numbers as JSON, for a whole wave at a time: compiled by numba, a fraction of the time that orjson takes.

First all numbers of a record are made text at once, several by each instruction; then the texts are put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import raw_memcpy
from numba.extending import intrinsic
from numpy.typing import NDArray

from model.grid import Int64s
from model.kernels import compiled

ROWS_AT_ONCE = 128
"""Written into one buffer: it stays in the cache."""
DECIMALS_MAX = 8
WHOLE_MAX = 10**8
"""Numbers of more decimals, or more digits before them, are not written here."""
NUMBER_BYTES = 19
"""A sign, 8 digits, a dot, 8 decimals, a comma."""
WORD_BYTES = 8

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""As of `model.kernels`, without its fastmath: each digit must be exact."""
INT, WORD, SHORT = np.int64, np.uint64, np.uint32
MINUS, DOT, COMMA = (WORD(ord(character)) for character in "-.,")
NEWLINE, INDENT = ord("\n"), 4
LINES = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
_POWERS = 10.0 ** np.arange(DECIMALS_MAX + 1)


class Form:
    """The JSON of a record with holes, to be filled in."""

    def __init__(self, pieces: Sequence[bytes], lists: Sequence[bool]) -> None:
        """pieces: the text before each hole, and behind the last. lists: which holes are for the numbers of a list;
        the others are for a field each.
        """
        self._text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces])
        self._holes = np.stack((ends[:-1], lists))
        self._fields = len(lists) - sum(lists)

    def fill(
        self, columns: Sequence[Sequence[Any] | NDArray[Any]], values: NDArray[np.float64], decimals: Int64s
    ) -> Iterator[bytes | None]:
        """B records, of their fields, in columns of B, and their lists [B, Q, H], to so many decimals [B]; None for one
        whose numbers do not fit. Raises ValueError if columns are not equally long.

        >>> form = Form([b'{"stream":', b',"low":[', b'],"high":[', b"]}"], [False, True, True])
        >>> numbers = np.array([[[12.345, -0.005], [0.0, 1.00049]], [[0.0, 1e9], [0.0, 0.0]]])
        >>> [*form.fill([["a", "b"]], numbers, np.array([3, 3]))]
        [b'{"stream":"a","low":[12.345,-0.005],"high":[0.000,1.000]}', None]
        """
        if {len(values), len(decimals), *map(len, columns)} != {len(values)}:
            raise ValueError("columns must be equally long")  # the loops would read past their ends
        fields = orjson.dumps(columns, option=LINES)
        count = values.shape[1] * values.shape[2]
        numbers = np.ascontiguousarray(values).reshape(len(values), count)
        row_bytes = len(self._text) + count * NUMBER_BYTES + WORD_BYTES
        at_once = min(ROWS_AT_ONCE, len(values))
        text, ends = np.empty(at_once * row_bytes + len(fields), dtype=np.uint8), np.empty(at_once, dtype=np.int64)
        lines, words = np.empty(self._fields, dtype=np.int64), np.empty((4, count), dtype=np.uint64)
        out = words, text, ends
        for start in range(0, len(values), ROWS_AT_ONCE):
            _write(self._text, self._holes, fields, lines, numbers, decimals, start, *out)  # type: ignore[no-untyped-call]
            begin = 0
            for end in ends[: len(values) - start].tolist():
                yield text.data[begin:end].tobytes() or None
                begin = end


@intrinsic
def _store(typing_context, out, at, word):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Write the eight bytes of a word at byte `at`, aligned or not; what is too many of them, the next writes over."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], place).align = 1
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64), generate


@intrinsic
def _copy(typing_context, out, at, source, begin, length):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Write so many bytes of another text at byte `at`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, origin = (
            builder.gep(context.make_array(signature.args[n])(context, builder, arguments[n]).data, [arguments[n + 1]])
            for n in (0, 2)
        )
        raw_memcpy(builder, target, origin, arguments[4], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(out, types.int64, source, types.int64, types.int64), generate


@njit(**OPTIONS)
def _pair(number):  # type: ignore[no-untyped-def]
    """The first and the last four of eight digits, as the halves of a word."""
    high = np.floor((number + 0.5) * 1e-4)  # with the half it is never just below a whole number
    return WORD(np.int32(high)) | WORD(np.int32(number - 10_000 * high)) << WORD(32)


@njit(**OPTIONS)
def _split(values, power, words):  # type: ignore[no-untyped-def]
    """Of each number its whole part and its decimals, as `_pair`s; how many digits the one has; 1 if it is below 0.
    -> whether all fit.
    """
    whole, decimals, lengths, signs = words[0], words[1], words[2], words[3]
    odd = 0
    for n in range(len(values)):
        number = np.rint(values[n] * power)
        size = abs(number)
        odd |= not size < WHOLE_MAX * power
        before = np.floor(size / power)
        length = 1
        for digits in range(1, WORD_BYTES):
            length += before >= _POWERS[digits]
        whole[n], decimals[n], lengths[n], signs[n] = _pair(before), _pair(size - before * power), length, number < 0
    return not odd


@njit(**OPTIONS)
def _spell(numbers):  # type: ignore[no-untyped-def]
    """Make of numbers of four digits four characters, the first one lowest."""
    for n in range(len(numbers)):
        hundreds = SHORT(numbers[n] * SHORT(10_486)) >> SHORT(20)
        pair = SHORT(hundreds | SHORT(numbers[n] - SHORT(100) * hundreds) << SHORT(16))
        tens = SHORT(SHORT(pair * SHORT(103)) >> SHORT(10)) & SHORT(0x000F000F)
        numbers[n] = SHORT(tens | SHORT(pair - SHORT(10) * tens) << SHORT(8)) | SHORT(0x30303030)


@njit(**OPTIONS)
def _make(values, places, words):  # type: ignore[no-untyped-def]
    """Make text of numbers, to be put together by `_put_list`. -> whether all fit."""
    if places < 0 or places > DECIMALS_MAX or not _split(values, _POWERS[places], words):
        return False
    for part in range(2):
        _spell(words[part].view(SHORT))
    return True


@njit(**OPTIONS)
def _put_list(out, at, places, words):  # type: ignore[no-untyped-def]
    """Write numbers with commas between them. -> the bytes now."""
    whole, decimals, lengths, signs = words[0], words[1], words[2], words[3]
    places = max(places, 1)  # "0" if there are none
    for n in range(len(whole)):
        _store(out, at, MINUS)  # type: ignore[call-arg]
        at += INT(signs[n])
        _store(out, at, whole[n] >> WORD(8) * (WORD(8) - lengths[n]))
        at += INT(lengths[n])
        _store(out, at, DOT)
        _store(out, at + 1, decimals[n] >> WORD(8 * (8 - places)))
        at += 1 + places
        _store(out, at, COMMA)
        at += 1
    return at - 1


@njit(**OPTIONS)
def _line_end(fields, at):  # type: ignore[no-untyped-def]
    while fields[at] != NEWLINE:
        at += 1
    return at


@njit(**OPTIONS)
def _find_columns(fields, lines, rows):  # type: ignore[no-untyped-def]
    """Where each column has its first line."""
    at = len("[\n")
    for column in range(len(lines)):
        at += len("  [\n")
        lines[column] = at
        for _ in range(rows):
            at = _line_end(fields, at) + 1
        at += len("  ],\n")


@njit(**OPTIONS)
def _put(out, at, text, begin, end):  # type: ignore[no-untyped-def]
    """Write a part of a text. -> the bytes now."""
    _copy(out, at, text, begin, end - begin)  # type: ignore[call-arg]
    return at + end - begin


@partial(compiled, options=OPTIONS)
def _write(text, holes, fields, lines, values, decimals, start, words, out, ends):  # type: ignore[no-untyped-def]
    """Write the records from `start` on, as many as there are `ends`, which are filled in: where each has its end. One
    that does not fit has no bytes.
    """
    if start == 0:
        _find_columns(fields, lines, len(values))
    size = values.shape[1] // max(holes[1].sum(), 1)
    at = 0
    for n in range(min(len(ends), len(values) - start)):
        first, begin, column, done = at, 0, 0, 0
        fits = _make(values[start + n], decimals[start + n], words)
        for hole in range(holes.shape[1]):
            at, begin = _put(out, at, text, begin, holes[0, hole]), holes[0, hole]
            if not holes[1, hole]:
                end = _line_end(fields, lines[column])
                at = _put(out, at, fields, lines[column] + INDENT, end - (fields[end - 1] == COMMA))
                lines[column] = end + 1
                column += 1
            elif fits:
                at = _put_list(out, at, decimals[start + n], words[:, done : done + size])
                done += size
        at = _put(out, at, text, begin, len(text)) if fits else first
        ends[n] = at
