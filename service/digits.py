"""Numbers as text, for a whole wave at a time: compiled by numba, a fraction of the time that orjson takes for them.

Text is put together in registers, eight characters at a time: a stream of bytes would be slower than orjson's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from model.grid import Int64s

ROWS_AT_ONCE = 128
"""Written into one buffer: it stays in the cache."""
DECIMALS_MAX = 8
WHOLE_MAX = 10**8
"""Numbers of more decimals, or more digits before them, are not written here."""
NUMBER_BYTES = 19
"""A sign, 8 digits, a dot, 8 decimals, a comma."""

BYTE = np.uint64(8)
MINUS, DOT, COMMA, BRACKET = (np.uint64(ord(character)) for character in "-.,]")
_ZEROS = np.uint64(0x3030303030303030)
_POWERS = 10.0 ** np.arange(DECIMALS_MAX + 1)


@lru_cache(maxsize=64)
def _heads(keys: tuple[str, ...]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """What stands before each list, as words; where the words of each end; how many bytes each has."""
    heads = [f'],"{key}":['.encode() for key in keys]
    padded = [head.ljust(-len(head) // 8 * -8, b" ") for head in heads]
    words = np.frombuffer(b"".join(padded), dtype=np.uint64)
    return words, np.cumsum([len(head) // 8 for head in padded]), np.array([len(head) for head in heads])


def write(values: NDArray[np.float64], decimals: Int64s, keys: Sequence[str]) -> Iterator[bytes | None]:
    """Lists of numbers [B, Q, H], to so many decimals [B], as the members of a JSON object; None for one that does not
    fit.

    >>> numbers = np.array([[[12.345, -0.005], [0.0, 1.00049]], [[0.0, 1e9], [0.0, 0.0]]])
    >>> [*write(numbers, np.array([3, 3]), ["0.1", "0.9"])]
    [b'"0.1":[12.345,-0.005],"0.9":[0.000,1.000]', None]
    """
    words, ends, lengths = _heads(tuple(keys))
    width = 8 * len(words) + values.shape[1] * values.shape[2] * NUMBER_BYTES + 8
    at_once = min(ROWS_AT_ONCE, len(values))
    text, sizes = np.empty((at_once, width), dtype=np.uint8), np.empty(at_once, dtype=np.int64)
    flat = text.reshape(-1).data
    for start in range(0, len(values), ROWS_AT_ONCE):
        some = np.ascontiguousarray(values[start : start + ROWS_AT_ONCE])
        _write(some, decimals[start : start + ROWS_AT_ONCE], words, ends, lengths, text, sizes)
        for row, size in enumerate(sizes[: len(some)].tolist()):
            first = row * width
            yield bytes(flat[first + 2 : first + size]) if size else None  # without the first "],"


@njit(inline="always", error_model="numpy")
def _digits(number):  # type: ignore[no-untyped-def]
    """Eight digits as eight bytes, the first one lowest."""
    number = np.uint64(np.int64(number))  # from a double it is cheaper so
    high = number // np.uint64(10_000)
    pair = high | ((number - np.uint64(10_000) * high) << np.uint64(32))
    hundreds = ((pair * np.uint64(10_486)) >> np.uint64(20)) & np.uint64(0x7F0000007F)
    four = ((pair - np.uint64(100) * hundreds) << np.uint64(16)) + hundreds
    tens = ((four * np.uint64(103)) >> np.uint64(10)) & np.uint64(0x000F000F000F000F)
    return (((four - np.uint64(10) * tens) << np.uint64(8)) + tens) | _ZEROS


@intrinsic
def _store(typing_context, out, at, word):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Write the eight bytes of a word at byte `at`, aligned or not."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], place).align = 1
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64), generate


@njit(inline="always", error_model="numpy")
def _put(out, at, word, length):  # type: ignore[no-untyped-def]
    """Write the first `length` <= 8 bytes of a word at byte `at`; what is behind them is written over by the next.
    -> the bytes now.
    """
    _store(out, at, word)  # type: ignore[call-arg]
    return at + length


@njit(inline="always", error_model="numpy")
def _put_number(out, at, number, places, power):  # type: ignore[no-untyped-def]
    """Write a whole number of its last decimal, and a comma. -> the bytes now."""
    if number < 0:
        at = _put(out, at, MINUS, 1)
        number = -number
    before = np.floor(number / power)
    count = 1
    for digits in range(1, 8):
        count += before >= _POWERS[digits]
    at = _put(out, at, _digits(before) >> np.uint64(64 - 8 * count), count)
    length = max(places, 1)  # "0" if there are none
    decimals = _digits(number - before * power) >> np.uint64(64 - 8 * length)
    if length <= 6:  # a dot, the decimals and a comma, in one word
        return _put(out, at, DOT | (decimals << BYTE) | (COMMA << np.uint64(8 * length + 8)), length + 2)
    at = _put(out, _put(out, at, DOT, 1), decimals, length)
    return _put(out, at, COMMA, 1)


@njit(cache=True, nogil=True, error_model="numpy")
def _write_row(values, places, heads, ends, lengths, out):  # type: ignore[no-untyped-def]
    """-> the bytes written; 0 if the row does not fit."""
    if places < 0 or places > DECIMALS_MAX:
        return 0
    at, power, first = 0, _POWERS[places], 0
    for line in range(values.shape[0]):
        for n in range(first, ends[line]):
            at = _put(out, at, heads[n], min(8, lengths[line] - 8 * (n - first)))
        first = ends[line]
        for value in values[line]:
            number = np.rint(value * power)
            if not abs(number) < WHOLE_MAX * power:
                return 0
            at = _put_number(out, at, number, places, power)
        at -= 1  # the last comma
    return _put(out, at, BRACKET, 1)


@njit(cache=True, nogil=True, error_model="numpy")
def _write(values, decimals, heads, ends, lengths, out, sizes):  # type: ignore[no-untyped-def]
    for row in range(len(values)):
        sizes[row] = _write_row(values[row], decimals[row], heads, ends, lengths, out[row])
