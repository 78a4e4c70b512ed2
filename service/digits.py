"""Numbers as text, for a whole wave at a time: compiled by numba, a fraction of the time that orjson takes for them.

Text is put together in registers, eight characters at a time: a stream of bytes would be slower than orjson's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit
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


def fits(whole: NDArray[np.float64], decimals: Int64s) -> NDArray[np.bool_]:
    """Which of B lists of whole numbers [B, Q, H] of their last decimal [B] can be written here."""
    within = (decimals >= 0) & (decimals <= DECIMALS_MAX)
    most = WHOLE_MAX * _POWERS[np.where(within, decimals, 0)]
    return np.asarray(within & (np.abs(whole) < most[:, None, None]).all(axis=(1, 2)))


def write(whole: NDArray[np.float64], decimals: Int64s, keys: Sequence[str]) -> Iterator[bytes]:
    """Lists of numbers, [B, Q, H] whole numbers of their last decimal [B], as the members of a JSON object.

    >>> [*write(np.array([[[12345.0, -5.0], [0.0, 1000.0]]]), np.array([3]), ["0.1", "0.9"])]
    [b'"0.1":[12.345,-0.005],"0.9":[0.000,1.000]']
    """
    heads = [f'],"{key}":['.encode() for key in keys]
    padded = [head.ljust(-len(head) // 8 * -8, b" ") for head in heads]
    words = np.frombuffer(b"".join(padded), dtype=np.uint64)
    ends, lengths = np.cumsum([len(head) // 8 for head in padded]), np.array([len(head) for head in heads])
    width = len(words) + (whole.shape[1] * whole.shape[2] * NUMBER_BYTES + 16) // 8
    text, sizes = np.empty((ROWS_AT_ONCE, width), dtype=np.uint64), np.empty(ROWS_AT_ONCE, dtype=np.int64)
    for start in range(0, len(whole), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        _write(np.ascontiguousarray(whole[some]), decimals[some], words, ends, lengths, text, sizes)
        for row, size in zip(text.view(np.uint8), sizes[: len(whole[some])].tolist(), strict=False):
            yield row[2:size].tobytes()  # without the first "],"


@njit(inline="always", error_model="numpy")
def _digits(number):  # type: ignore[no-untyped-def]
    """Eight digits as eight bytes, the first one lowest."""
    number = np.uint64(number)
    high = number // np.uint64(10_000)
    pair = high | ((number - np.uint64(10_000) * high) << np.uint64(32))
    hundreds = ((pair * np.uint64(10_486)) >> np.uint64(20)) & np.uint64(0x7F0000007F)
    four = ((pair - np.uint64(100) * hundreds) << np.uint64(16)) + hundreds
    tens = ((four * np.uint64(103)) >> np.uint64(10)) & np.uint64(0x000F000F000F000F)
    return (((four - np.uint64(10) * tens) << np.uint64(8)) + tens) | _ZEROS


@njit(inline="always", error_model="numpy")
def _put(out, at, word, length):  # type: ignore[no-untyped-def]
    """Write the first `length` <= 8 bytes of a word behind the `at` bytes that stand there. -> the bytes now."""
    place, shift = np.uint64(at >> 3), np.uint64((at & 7) << 3)
    out[place] |= word << shift
    # Twice, since a shift by 64 is none at all.
    out[place + np.uint64(1)] = (word >> (np.uint64(56) - shift)) >> np.uint64(8)
    return at + length


@njit(cache=True, nogil=True, error_model="numpy")
def _write(whole, decimals, heads, ends, lengths, out, sizes):  # type: ignore[no-untyped-def]
    for row in range(whole.shape[0]):
        text, at = out[row], 0
        text[0] = 0
        places = decimals[row]
        power = _POWERS[places]
        for line in range(whole.shape[1]):
            at -= line > 0  # over the last comma
            if line:
                text[at >> 3] &= (np.uint64(1) << np.uint64((at & 7) << 3)) - np.uint64(1)
            first = ends[line - 1] if line else 0
            for n in range(first, ends[line]):
                length = min(8, lengths[line] - 8 * (n - first))
                word = heads[n] & (~np.uint64(0) >> np.uint64(64 - 8 * length))
                at = _put(text, at, word, length)
            for n in range(whole.shape[2]):
                number = whole[row, line, n]
                if number < 0:
                    at = _put(text, at, MINUS, 1)
                    number = -number
                before = np.floor(number / power)
                count = 1
                for digits in range(1, 8):
                    count += before >= _POWERS[digits]
                word = _digits(before) >> np.uint64(64 - 8 * count)
                at = _put(text, at, word, count)
                rest = _digits(number - before * power) >> np.uint64(64 - 8 * max(places, 1))  # "0" if there are none
                length = max(places, 1)
                if length <= 6:  # a dot, the decimals and a comma, in one word
                    at = _put(text, at, DOT | (rest << BYTE) | (COMMA << np.uint64(8 * length + 8)), length + 2)
                else:
                    at = _put(text, at, DOT, 1)
                    at = _put(text, at, rest, length)
                    at = _put(text, at, COMMA, 1)
        text[(at - 1) >> 3] &= (np.uint64(1) << np.uint64(((at - 1) & 7) << 3)) - np.uint64(1)
        sizes[row] = _put(text, at - 1, BRACKET, 1)
