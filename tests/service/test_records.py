"""What a record's bytes mean: the bad-input matrix, and the good ones."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Reason, Rejected
from service.records import (
    Limits,
    Observation,
    Record,
    dead_letter,
    parse,
    read,
    read_time,
)

NOW_MS = 1_700_000_000_000
LIMITS = Limits(covariates=("temperature",))


def record(value: bytes | None, key: bytes | None = b"a", timestamp_ms: int = NOW_MS) -> Record:
    return Record("observations", 3, 17, timestamp_ms, key, value, [("trace", b"1")])


def observed(value: bytes | None, key: bytes | None = b"a", timestamp_ms: int = NOW_MS) -> Observation:
    return parse(record(value, key, timestamp_ms), LIMITS)


BAD_VALUES = {
    "empty": (b"", Reason.DECODE),
    "not UTF-8": (b"\xff\xfe", Reason.DECODE),
    "not UTF-8 within": (b'{"value":1,"ts":"\xff"}', Reason.DECODE),
    "not JSON": (b"garbage", Reason.DECODE),
    "cut off": (b'{"value":1', Reason.DECODE),
    "two values": (b'{"value":1}{"value":2}', Reason.DECODE),
    "an array": (b"[1]", Reason.DECODE),
    "a number": (b"3", Reason.DECODE),
    "null": (b"null", Reason.DECODE),
    "10,000 brackets": (b"[" * 10_000, Reason.DECODE),
    "10,000 brackets within": (b'{"value":' + b"[" * 10_000 + b"]" * 10_000 + b"}", Reason.DECODE),
    "no value": (b"{}", Reason.SCHEMA),
    "an unknown field": (b'{"value":1,"vlaue":2}', Reason.SCHEMA),
    "value is text": (b'{"value":"1.5"}', Reason.SCHEMA),
    "value is true": (b'{"value":true}', Reason.SCHEMA),
    "value is a list": (b'{"value":[1]}', Reason.SCHEMA),
    "covariates no object": (b'{"value":1,"covariates":3}', Reason.SCHEMA),
    "covariate is text": (b'{"value":1,"covariates":{"temperature":"hot"}}', Reason.SCHEMA),
    "NaN": (b'{"value":NaN}', Reason.VALUE),
    "Infinity": (b'{"value":Infinity}', Reason.VALUE),
    "-Infinity": (b'{"value":-Infinity}', Reason.VALUE),
    "1e400": (b'{"value":1e400}', Reason.VALUE),
    "400 digits": (b'{"value":' + b"1" * 400 + b"}", Reason.VALUE),
    "5,000 digits": (b'{"value":' + b"1" * 5_000 + b"}", Reason.VALUE),
    "covariate is NaN": (b'{"value":1,"covariates":{"temperature":NaN}}', Reason.VALUE),
    "1e300": (b'{"value":1e300}', Reason.RANGE),
    "covariate 1e300": (b'{"value":1,"covariates":{"temperature":1e300}}', Reason.RANGE),
    "unknown covariate": (b'{"value":1,"covariates":{"wind":1}}', Reason.SHAPE),
    "time is garbage": (b'{"value":1,"ts":"yesterday"}', Reason.TIME),
    "time has no offset": (b'{"value":1,"ts":"2023-11-14T22:13:20"}', Reason.TIME),
    "time is null": (b'{"value":1,"ts":null}', Reason.TIME),
    "time is true": (b'{"value":1,"ts":true}', Reason.TIME),
    "time in seconds": (b'{"value":1,"ts":1700000000}', Reason.TIME),
    "time far ahead": (b'{"value":1,"ts":4102444800000}', Reason.TIME),
    "time of 400 digits": (b'{"value":1,"ts":' + b"9" * 300 + b"}", Reason.TIME),
    "another stream than the key": (b'{"value":1,"stream":"b"}', Reason.KEY),
    "larger than the limit": (b'{"value":1' + b" " * 70_000 + b"}", Reason.SIZE),
}


@pytest.mark.parametrize(("value", "reason"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_value_that_cannot_be_used_is_rejected_with_its_reason(value: bytes, reason: Reason) -> None:
    with pytest.raises(Rejected) as rejected:
        observed(value)
    assert rejected.value.reason is reason
    assert "\n" not in str(rejected.value)
    assert len(str(rejected.value)) < 200


BAD_KEYS = {
    "none": None,
    "empty": b"",
    "not UTF-8": b"\xff",
    "10 KB": b"x" * 10_240,
    "a line break": b"a\nb",
    "a NUL": b"a\0b",
    "upwards": b"../a",
    "upwards within": b"a/../b",
}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS.keys())
@pytest.mark.parametrize("value", [b'{"value":1}', None], ids=["observation", "tombstone"])
def test_a_key_that_names_no_stream_is_rejected(key: bytes | None, value: bytes | None) -> None:
    with pytest.raises(Rejected) as rejected:
        observed(value, key)
    assert rejected.value.reason is Reason.KEY


def test_an_observation_is_read_as_it_was_meant() -> None:
    got = observed(b'{"ts":"2023-11-14T23:13:20.5+01:00","value":-2.5e3,"covariates":{"temperature":7}}')
    assert (got.stream, got.ts_ms, got.value, got.covariates) == ("a", NOW_MS + 500, -2500.0, (7.0,))


def test_what_was_not_observed_is_nan() -> None:
    got = observed(b'{"value":null}')
    assert math.isnan(got.value)
    assert math.isnan(got.covariates[0])
    assert not got.ended


def test_a_record_without_a_value_ends_its_stream() -> None:
    assert observed(None).ended


def test_without_a_key_the_field_names_the_stream_and_may_repeat_the_key() -> None:
    assert observed(b'{"value":1,"stream":"b"}', None).stream == "b"
    assert observed(b'{"value":1,"stream":"a"}').stream == "a"


def test_without_a_time_the_records_own_counts_and_without_both_it_is_rejected() -> None:
    assert observed(b'{"value":1}').ts_ms == NOW_MS
    with pytest.raises(Rejected) as rejected:
        observed(b'{"value":1}', timestamp_ms=-1)
    assert rejected.value.reason is Reason.TIME


def test_a_field_that_stands_twice_counts_as_it_stands_last() -> None:
    assert observed(b'{"value":1,"value":2}').value == 2.0


def test_how_far_ahead_a_time_may_lie_is_measured_from_the_records_own_timestamp() -> None:
    ahead = json.dumps({"ts": NOW_MS + LIMITS.max_ahead_ms, "value": 1}).encode()
    assert observed(ahead).ts_ms == NOW_MS + LIMITS.max_ahead_ms
    with pytest.raises(Rejected):
        observed(ahead, timestamp_ms=NOW_MS - 1)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_rejected(value: bytes) -> None:
    for key in (b"a", value):
        with suppress(Rejected):
            observed(value, key)


@given(st.datetimes(timezones=st.timezones()))
def test_a_time_is_the_same_as_text_and_as_a_number(moment: object) -> None:
    text = moment.isoformat()  # type: ignore[attr-defined]
    if moment.utcoffset().total_seconds() % 60:  # type: ignore[attr-defined]  # RFC 3339 knows no seconds there
        return
    assert abs(read_time(text) - moment.timestamp() * 1000) <= 0.5 + 1e-3  # type: ignore[attr-defined]


def test_a_dead_letter_is_the_record_as_it_came_with_why_it_was_rejected() -> None:
    bad = Record("observations", 3, 17, NOW_MS, b"k", b"\xff", [("trace", b"1"), ("trace", b"2"), ("none", None)])
    letter = dead_letter(bad, Rejected(Reason.DECODE, "no JSON"), "dlq")
    assert (letter.topic, letter.partition, letter.key, letter.value) == ("dlq", 3, b"k", b"\xff")
    assert list(letter.headers) == [
        ("trace", b"1"),
        ("trace", b"2"),
        ("none", b""),
        ("__streams.errors.exception", b"Rejected"),
        ("__streams.errors.message", b"no JSON"),
        ("__streams.errors.topic", b"observations"),
        ("__streams.errors.partition", b"3"),
        ("__streams.errors.offset", b"17"),
        ("carousel.errors.reason", b"decode"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "header", "cut"),
    [
        (b"k", b"v" * 1_040_000, b"h", {"value"}),
        (b"k" * 500_000, b"v" * 540_000, b"h", {"value"}),
        (b"k" * 200_000, b"v" * 200_000, b"h" * 640_000, {"value"}),
        (b"k" * 400_000, b"v" * 2_000, b"h" * 640_000, {"headers"}),
        (b"k" * 1_040_000, b"v", b"h", {"key"}),
        (b"k" * 5_000_000, b"v" * 5_000_000, b"h" * 5_000_000, {"key", "headers", "value"}),
        (b"k" * 10_240, b"v" * 900_000, b"h", set()),
    ],
)
def test_a_dead_letter_always_fits_and_tells_what_was_cut(
    key: bytes, value: bytes, header: bytes, cut: set[str]
) -> None:
    large = Record("observations", 3, 17, NOW_MS, key, value, [("trace", header)])
    letter = dead_letter(large, Rejected(Reason.SIZE, "large"), "dlq")
    headers = dict(letter.headers)
    sizes = {"key": len(key), "value": len(value), "headers": len("trace") + len(header) + 8}
    for part, size in sizes.items():
        assert headers.get(f"carousel.errors.{part}.bytes") == (b"%d" % size if part in cut else None)
    assert (letter.key == key, letter.value == value, "trace" in headers) == (
        "key" not in cut,
        "value" not in cut,
        "headers" not in cut,
    )
    if "value" in cut:
        assert headers["carousel.errors.value.sha256"] == hashlib.sha256(value).hexdigest().encode()
        assert value.startswith(letter.value)
    whole = len(letter.key or b"") + len(letter.value) + sum(len(n) + len(v or b"") for n, v in letter.headers)
    assert whole < 1_048_576 - 1_000


SHIFTING = (
    [b'{"value":1}{"value":2}', b'{"value":3}', b""],
    [b"", b'{"value":3}', b'{"value":1} {"value":2}'],
    [b'{"value":1,"covariates":', b'{"a":1}}', b'{"value":3}', b'{"value":1}{"value":2}'],
    [b'{"value":1,"covariates":{"a":1}', b'{"value":3}', b'{"value":1}{"value":2}'],
    [b'{"value":1}\n{"value":2}', b'{"value":3}', b" \t"],
    [b'{"value":1}\r{"value":2}', b'{"value":3}', b"\r"],
)


@pytest.mark.parametrize("values", SHIFTING)
def test_no_record_among_others_can_give_them_another_value(values: list[bytes]) -> None:
    """Records are decoded together: those that hold two values, or none, must not move those of their neighbours."""
    values = [value.replace(b'{"value"', b'{"ts":%d,"value"' % NOW_MS) for value in values]
    records = [Record("in", 0, n, NOW_MS, b"s%d" % n, value) for n, value in enumerate(values)]
    seen, rejected = read(records, LIMITS)
    good = b'{"ts":%d,"value":3}' % NOW_MS
    assert [(stream, value) for stream, value in zip(seen.streams, seen.values, strict=True)] == [
        (f"s{values.index(good)}", 3.0)
    ]
    assert [one.value for one, _ in rejected] == [value for value in values if value != good]
    assert {error.reason for _, error in rejected} == {Reason.DECODE}


def test_nor_can_one_of_two_lines_fill_the_place_of_one_that_is_not_decoded() -> None:
    values = [b'{"value":1}\n{"value":2}', None, b'{"value":3%b}' % (b" " * LIMITS.max_record_bytes)]
    for other in values[1:]:
        records = [Record("in", 0, n, NOW_MS, b"s%d" % n, value) for n, value in enumerate((values[0], other))]
        seen, rejected = read(records, LIMITS)
        assert (seen.streams, seen.ended.tolist()) == ((["s1"], [True]) if other is None else ([], []))
        assert [error.reason for _, error in rejected] == [Reason.DECODE, Reason.SIZE][: 2 - len(seen.streams)]
