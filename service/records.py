"""Kafka records in: the only file that knows what their bytes mean. An observation, or `Rejected` with a reason.

`parse` says of one record what it holds. `read` says the same of many at a time: it looks at all of them together, and
leaves those that look in any way odd to `parse`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.grid import Int64s
from service.errors import Reason, Rejected

Headers = Sequence[tuple[str, bytes | None]]

STREAM_ID_MAX = 256
"""Characters in a stream id."""
SECOND_MS = 1_000
DEAD_LETTER_BYTES_MAX = 1_000_000
"""What a dead letter carries of its record; Kafka's own limit, with all headers, is 1 MiB by default."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record as it came from the observations topic. timestamp_ms: -1 where the record has none."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Observation(msgspec.Struct, frozen=True, gc=False):
    """A record that can be used. value and covariates: NaN where not observed; ended: the record was a tombstone."""

    stream: str
    ts_ms: int
    value: float
    covariates: tuple[float, ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class Observations:
    """The same of n records, as columns. partitions, offsets, ts_ms [n] int64; values [n], covariates [n, K] float64;
    ended [n] bool.
    """

    records: Sequence[Record]
    streams: Sequence[str]
    partitions: Int64s
    offsets: Int64s
    ts_ms: Int64s
    values: NDArray[np.float64]
    covariates: NDArray[np.float64]
    ended: NDArray[np.bool_]


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A record to be written. value: None ends its key's life on a compacted topic. cause_ms: the timestamp of the
    record that it answers, -1 where that had none.
    """

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    cause_ms: int = -1


@dataclass(frozen=True)
class Limits:
    """What is accepted of an observation. covariates: the names that the model knows."""

    covariates: tuple[str, ...] = ()
    max_record_bytes: int = 65_536
    max_abs_value: float = 1e15
    earliest_ts_ms: int = 365 * 86_400_000
    max_ahead_ms: int = 366 * 86_400_000


class _Body(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The fields of an observation's value. A field that stands twice counts as it stands last."""

    value: float | None
    ts: Any = msgspec.UNSET
    covariates: dict[str, float | None] | msgspec.UnsetType = msgspec.UNSET
    stream: str | msgspec.UnsetType = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Body)
NO_BODY = _Body(None)
NO_LINE = b'{"value":null}'
NO_COVARIATES: dict[str, float | None] = {}
STREAMS_KNOWN = 1 << 16
"""Keys that need not be decoded again."""
TS_MAX = 1 << 53


def read(records: Sequence[Record], limits: Limits) -> tuple[Observations, list[tuple[Record, Rejected]]]:
    """The observations that records hold, in their order, and what holds none, with the reason."""
    lines = _lines_of([record.value for record in records], limits.max_record_bytes)
    bodies = _decode_together(lines)
    streams = [_stream_of(record.key) for record in records]
    ts_ms, timed = _times(bodies)
    values = np.array([body.value for body in bodies], dtype=np.float64)  # of None, NaN
    covariates, known = _covariates(bodies, limits.covariates)
    plain = timed & known & _within(records, ts_ms, np.column_stack((values, covariates)), limits)
    alike = [
        line is not NO_LINE and stream != "" and body.stream is msgspec.UNSET and not record.headers
        for line, stream, body, record in zip(lines, streams, bodies, records, strict=True)
    ]
    plain &= np.array(alike, dtype=np.bool_)
    ended, usable = np.zeros(len(records), dtype=np.bool_), np.ones(len(records), dtype=np.bool_)
    rejected: list[tuple[Record, Rejected]] = []
    for n in np.flatnonzero(~plain).tolist():
        try:
            one = parse(records[n], limits)
        except Rejected as error:
            rejected.append((records[n], error))
            usable[n] = False
        else:
            streams[n], ts_ms[n], values[n], ended[n] = one.stream, one.ts_ms, one.value, one.ended
            covariates[n] = one.covariates or math.nan
    partitions, offsets = (_column([getattr(record, name) for record in records]) for name in ("partition", "offset"))
    columns = Observations(records, streams, partitions, offsets, ts_ms, values, covariates, ended)
    return (part(columns, np.flatnonzero(usable)) if rejected else columns), rejected


def part(whole: Observations, chosen: Int64s) -> Observations:
    """Some of the observations."""
    picked = chosen.tolist()
    return Observations(
        [whole.records[n] for n in picked],
        [whole.streams[n] for n in picked],
        whole.partitions[chosen],
        whole.offsets[chosen],
        whole.ts_ms[chosen],
        whole.values[chosen],
        whole.covariates[chosen],
        whole.ended[chosen],
    )


def _column(numbers: Sequence[int]) -> Int64s:
    return np.array(numbers, dtype=np.int64)


def _lines_of(values: Sequence[bytes | None], max_bytes: int) -> Sequence[bytes]:
    """Values that may be decoded together; NO_LINE in place of one that may not.

    The decoder takes lines for white space: it would take two values on one, or one on two. But what begins and ends
    with a brace, and has no line of its own, holds a value at least and cannot be continued by such another: so as many
    values as lines are one on each, and none can come to stand for another stream's.
    """
    usable = [value for value in values if value is not None and len(value) <= max_bytes]
    if len(usable) == len(values):  # ask what is asked of each below of all of them at once
        text, between = b"\n".join(usable), len(values) - 1
        if text[:1] == b"{" and text[-1:] == b"}" and text.count(b"}\n{") == text.count(b"\n") == between:
            return usable
    return [value if _is_line(value, max_bytes) else NO_LINE for value in values]


def _is_line(value: bytes | None, max_bytes: int) -> TypeGuard[bytes]:
    if value is None or len(value) > max_bytes or b"\n" in value:
        return False
    return value.startswith(b"{") and value.endswith(b"}")


def _decode_together(lines: Sequence[bytes]) -> Sequence[_Body]:
    """The bodies of values, as many at a time as go; `NO_BODY` where one cannot be decoded."""
    try:
        bodies = _decoder.decode_lines(b"\n".join(lines))
        if len(bodies) == len(lines):
            return bodies
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        pass
    if len(lines) < 2:
        return [NO_BODY] * len(lines)
    half = len(lines) // 2
    return [*_decode_together(lines[:half]), *_decode_together(lines[half:])]


@lru_cache(STREAMS_KNOWN)
def _stream_of(key: bytes | None) -> str:
    """The stream that a key names; empty if it names none."""
    try:
        return _decode_key(key) or ""
    except Rejected:
        return ""


def _times(bodies: Sequence[_Body]) -> tuple[Int64s, NDArray[np.bool_]]:
    """The times of bodies, and whether they are plain numbers of milliseconds."""
    plain = [type(body.ts) is int and abs(body.ts) < TS_MAX for body in bodies]
    times = [body.ts if good else 0 for body, good in zip(bodies, plain, strict=True)]
    return np.array(times, dtype=np.int64), np.array(plain, dtype=np.bool_)


def _covariates(bodies: Sequence[_Body], names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The covariates of bodies in the model's order, [n, K], and whether they have no others."""
    given = [body.covariates or NO_COVARIATES for body in bodies]
    known = [not each or each.keys() <= set(names) for each in given]
    if not names:
        return np.empty((len(bodies), 0)), np.array(known, dtype=np.bool_)
    values = np.array([[each.get(name) for name in names] for each in given], dtype=np.float64)
    return values.reshape(len(bodies), len(names)), np.array(known, dtype=np.bool_)


def _within(
    records: Sequence[Record], ts_ms: Int64s, numbers: NDArray[np.float64], limits: Limits
) -> NDArray[np.bool_]:
    """Whether times and numbers [n, ...] lie within the limits."""
    stamped = _column([record.timestamp_ms for record in records])
    ahead = (stamped >= 0) & (ts_ms > stamped + limits.max_ahead_ms)
    large = (np.abs(numbers) > limits.max_abs_value).any(axis=1)  # what is NaN is not
    return ~ahead & ~large & (ts_ms >= limits.earliest_ts_ms)


def parse(record: Record, limits: Limits) -> Observation:
    """The observation that a record holds. Raises Rejected with the reason if it holds none."""
    if record.headers:
        _check_headers(record.headers)
    stream = _decode_key(record.key)
    if record.value is None:
        if stream is None:
            raise Rejected(Reason.KEY, "a record without a value ends a stream, and has no key to name it")
        return Observation(stream, record.timestamp_ms, math.nan, ended=True)
    if len(record.value) > limits.max_record_bytes:
        raise Rejected(Reason.SIZE, f"{len(record.value)} bytes; at most {limits.max_record_bytes} are read")
    body = _decode_body(record.value)
    if body.stream is not msgspec.UNSET:
        if stream is not None and stream != body.stream:
            raise Rejected(Reason.KEY, "the key and the field `stream` name different streams")
        stream = check_stream(body.stream)
    if stream is None:
        raise Rejected(Reason.KEY, "no key, and no field `stream`")
    value = math.nan if body.value is None else check_value(body.value, limits.max_abs_value)
    covariates = tuple(read_covariates(body.covariates or NO_COVARIATES, limits))
    return Observation(stream, _time_of(record, body.ts, limits), value, covariates)


def _check_headers(headers: Headers) -> None:
    """A name that is not UTF-8 comes from the transport with surrogates in place of its odd bytes."""
    try:
        for name, _ in headers:
            name.encode()
    except UnicodeEncodeError as error:
        raise Rejected(Reason.UNDECODABLE, "the name of a header is not UTF-8") from error


def _decode_key(key: bytes | None) -> str | None:
    if not key:
        return None
    try:
        return check_stream(key.decode())
    except UnicodeDecodeError as error:
        raise Rejected(Reason.KEY, "the key is not UTF-8") from error


def check_stream(stream: str) -> str:
    """A usable stream id as it is. Raises Rejected for one that is empty, too long, unprintable or a path upwards.

    >>> check_stream("site 7/temperature")
    'site 7/temperature'
    """
    if not 0 < len(stream) <= STREAM_ID_MAX:
        raise Rejected(Reason.KEY, f"a stream id has 1 to {STREAM_ID_MAX} characters, not {len(stream)}")
    if not stream.isprintable():
        raise Rejected(Reason.KEY, "the stream id has characters that cannot be printed")
    if ".." in stream and ".." in stream.split("/"):
        raise Rejected(Reason.KEY, "the stream id has a part '..'")
    return stream


def _decode_body(value: bytes) -> _Body:
    try:
        return _decoder.decode(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _diagnosed(value, error) from error


def _diagnosed(value: bytes, error: Exception) -> Rejected:
    """Why a value could not be decoded; slower than decoding it, but only garbage comes this way.

    Python's own parser takes what is no JSON but written by many programs: NaN, Infinity, 1e400.
    """
    odd: list[str] = []

    def number(text: str) -> float:
        if math.isinf(float(text)):
            odd.append(text)
        return float(text)

    try:
        content = json.loads(value, parse_constant=odd.append, parse_float=number, parse_int=number)
    except (ValueError, RecursionError):
        return Rejected(Reason.DECODE, f"the value is not JSON: {error}")
    if not isinstance(content, dict):
        return Rejected(Reason.DECODE, "the value is not a JSON object")
    if odd:
        return Rejected(Reason.VALUE, "a number is not finite, or too large for a double")
    return Rejected(Reason.SCHEMA, str(error))


def check_value(value: float, max_abs_value: float) -> float:
    """The value as it is. Raises Rejected if it is not finite or beyond the range."""
    if not math.isfinite(value):
        raise Rejected(Reason.VALUE, "the value is not finite")
    if abs(value) > max_abs_value:
        raise Rejected(Reason.RANGE, f"the value lies beyond +-{max_abs_value:g}")
    return value


def read_covariates(given: dict[str, float | None], limits: Limits) -> list[float]:
    """The covariates in the model's order, NaN where missing. Raises Rejected for names that it does not know."""
    if unknown := set(given) - set(limits.covariates):
        known = ", ".join(limits.covariates) or "none"
        raise Rejected(Reason.SHAPE, f"{len(unknown)} covariates that the model does not know; it knows: {known}")
    values = (given.get(name) for name in limits.covariates)
    return [math.nan if value is None else check_value(value, limits.max_abs_value) for value in values]


def _time_of(record: Record, ts: Any, limits: Limits) -> int:
    ts_ms = record.timestamp_ms if ts is msgspec.UNSET else read_time(ts)
    if ts is msgspec.UNSET and ts_ms < 0:
        raise Rejected(Reason.TIME, "neither a field `ts` nor a timestamp of the record")
    check_time(ts_ms, limits)
    # Measured against the record's own timestamp, not our clock, so that a replay decides the same.
    if record.timestamp_ms >= 0 and ts_ms > record.timestamp_ms + limits.max_ahead_ms:
        raise Rejected(Reason.TIME, "the time lies too far ahead of the record's timestamp")
    return ts_ms


def check_time(ts_ms: int, limits: Limits) -> int:
    """The time as it is. Raises Rejected if it lies before the earliest that is accepted."""
    if ts_ms < limits.earliest_ts_ms:
        raise Rejected(Reason.TIME, "the time lies too far back; is it in seconds instead of milliseconds?")
    return ts_ms


def read_time(ts: Any) -> int:
    """Epoch milliseconds from epoch milliseconds or RFC 3339 text. Raises Rejected if it is neither.

    >>> read_time("2026-11-21T12:00:00+01:00") == read_time(1795258800000)
    True
    """
    if isinstance(ts, float) and ts.is_integer():
        ts = int(ts)
    if isinstance(ts, int) and not isinstance(ts, bool):
        if abs(ts) < TS_MAX:
            return ts
        raise Rejected(Reason.TIME, "the time is no number of milliseconds that a clock could show")
    if isinstance(ts, str) and len(ts) <= 64:
        try:
            moment = datetime.fromisoformat(ts)
        except ValueError as error:
            raise Rejected(Reason.TIME, "the time is not RFC 3339") from error
        if moment.tzinfo is None:
            raise Rejected(Reason.TIME, "the time has no offset from UTC: append Z, or +hh:mm")
        return math.floor(moment.timestamp() * SECOND_MS + 0.5)
    raise Rejected(Reason.TIME, "the time is neither epoch milliseconds nor RFC 3339 text")


def dead_letter(record: Record, error: Rejected, topic: str) -> Outgoing:
    """The record as it came, with why it was rejected in its headers.

    Where Kafka could not carry it with them, its value is cut off, and then its headers and its key if they must be;
    `carousel.errors.*` headers tell what was cut, how long it was, and the SHA-256 of the whole value.
    """
    key, value = record.key, record.value or b""
    headers = [
        (name.encode(errors="backslashreplace").decode(), content or b"") for name, content in record.headers
    ]  # a None cannot be sent again, nor can a name that is not UTF-8
    told: list[tuple[str, bytes]] = []
    room = DEAD_LETTER_BYTES_MAX
    if key and len(key) > room:
        told.append(("carousel.errors.key.bytes", b"%d" % len(key)))
        key = key[:STREAM_ID_MAX]
    room -= len(key or b"")
    header_bytes = sum(len(name.encode()) + len(content) + 8 for name, content in headers)
    if header_bytes > room:
        told.append(("carousel.errors.headers.bytes", b"%d" % header_bytes))
        headers, header_bytes = [], 0
    room -= header_bytes
    if len(value) > room:
        told.append(("carousel.errors.value.sha256", hashlib.sha256(value).hexdigest().encode()))
        told.append(("carousel.errors.value.bytes", b"%d" % len(value)))
        value = value[:room]
    told += [
        ("__streams.errors.exception", type(error).__name__.encode()),
        ("__streams.errors.message", str(error).encode()[:512]),
        ("__streams.errors.topic", record.topic.encode()),
        ("__streams.errors.partition", b"%d" % record.partition),
        ("__streams.errors.offset", b"%d" % record.offset),
        ("carousel.errors.reason", error.reason.encode()),
    ]
    return Outgoing(topic, record.partition, key, value, headers + told, record.timestamp_ms)
