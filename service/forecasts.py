"""Forecasts out: what the forecasts topic and HTTP tell of them, and its bytes.

Numbers are told to five digits of their stream's scale: more would only be noise, and bytes. Writing them would be the
dearest part of a record; where numba is installed, `service.digits` does it for a whole wave at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from model.config import ModelConfig
from model.grid import Int64s

if TYPE_CHECKING:
    from service.digits import Form

DIGITS = 5
"""Of a stream's scale."""
DIGITS_MAX = 15
_POWERS = np.array([float(f"1e{n}") for n in range(DIGITS - DIGITS_MAX + 1, DIGITS + DIGITS_MAX + 1)])
"""At each of these a stream's scale deserves one decimal less."""
Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Issued:
    """Forecasts of B streams as they were issued, as columns.

    ts_ms, slot, count [B] int64; live [B] bool; observed, anomaly [B] float64, NaN where there is none; scale [B]
    float64; values [B, H, Q] float64.
    """

    streams: Sequence[str]
    ts_ms: Int64s
    slot: Int64s
    count: Int64s
    live: NDArray[np.bool_]
    observed: Float64s
    anomaly: Float64s
    scale: Float64s
    values: Float64s

    def part(self, chosen: Int64s) -> Issued:
        """Some of them."""
        columns = (self.ts_ms, self.slot, self.count, self.live, self.observed, self.anomaly, self.scale, self.values)
        return Issued([self.streams[n] for n in chosen.tolist()], *(column[chosen] for column in columns))  # type: ignore[arg-type]


def quantile_key(quantile: float) -> str:
    """How a quantile is written as a field's name: 0.1, 0.5, 0.975."""
    return f"{quantile:.10g}"


def decimals_of(scale: Float64s) -> Int64s:
    """How many decimals are told of a stream of this scale [B]; below 0: tens, hundreds ...

    >>> decimals_of(np.array([10.0, 1.0, 0.02, 3e7])).tolist()
    [4, 5, 7, -2]
    """
    return DIGITS_MAX - _POWERS.searchsorted(scale, side="right")


def rounded(values: Float64s, decimals: Int64s) -> Float64s:
    """Forecasts [B, ...] to so many decimals [B].

    >>> rounded(np.array([[[1234.56789]]]), np.array([4])).tolist()
    [[[1234.5679]]]
    """
    exponent = decimals.reshape(-1, *[1] * (values.ndim - 1))
    up, down = 10.0 ** np.maximum(exponent, 0), 10.0 ** np.maximum(-exponent, 0)
    return np.asarray(np.rint(values * up / down) / up * down)


def _compiled_form() -> type[Form] | None:
    try:
        from service.digits import Form
    except ImportError:  # without the extra `fast`
        return None
    return Form


FIELD, NUMBERS = "{field}", "{numbers}"
"""Stand where a record has them, until it is cut up there: an id of a model is no such text."""
FIELDS = 6
"""Before the numbers that differ from record to record."""
FORMS_KEPT = 64
"""One for each choice of quantiles."""


class Teller:
    """Tells the forecasts of one model."""

    def __init__(
        self,
        model: str,
        config: ModelConfig,
        quantiles: Sequence[float] = (),
        horizons: Sequence[int] = (),
        decimals: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        """quantiles, horizons (steps ahead, from 1): those to be told; empty: all. decimals: None: as many as the
        stream's scale deserves. compiled: write numbers by `service.digits`, if numba is installed. Raises ValueError
        for what the model does not forecast.
        """
        self.model, self.step_ms, self.decimals, self.horizons = model, config.step_ms, decimals, list(horizons)
        known = [quantile_key(quantile) for quantile in config.quantiles]
        self.keys = [quantile_key(quantile) for quantile in quantiles or config.quantiles]
        if odd := set(self.keys) - set(known):
            raise ValueError(f"the model has the quantiles {', '.join(known)}, not {', '.join(sorted(odd))}")
        if any(not 1 <= horizon <= config.horizon for horizon in horizons):
            raise ValueError(f"the model forecasts the steps 1 ... {config.horizon}, not {list(horizons)}")
        self._columns = [known.index(key) for key in self.keys] if quantiles else None
        self._ahead = [horizon - 1 for horizon in horizons] if horizons else None
        form = _compiled_form() if compiled else None
        self.form = lru_cache(maxsize=FORMS_KEPT)(partial(self._form, form)) if form else None
        """The record with some of the quantiles, by their numbers."""

    def describe(self, issued: Issued) -> Iterator[dict[str, Any]]:
        """The fields of each forecast's record."""
        by_quantile = np.ascontiguousarray(rounded(self._values(issued), self._decimals(issued)))
        columns = (issued.streams, *(column.tolist() for column in self._columns_of(issued)))
        for fields, values, live in zip(map(self._fields, *columns), by_quantile, issued.live.tolist(), strict=True):
            quantiles = dict(zip(self.keys, values, strict=True))
            yield {**fields, "quantiles": quantiles, "status": "live" if live else "warming"}

    def encode(self, issued: Issued) -> list[bytes]:
        """The same fields of each forecast's record, as JSON."""
        if self.form is None:
            return [orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY) for fields in self.describe(issued)]
        texts = self._fill(self.form(*range(len(self.keys))), issued, self._values(issued))
        return [text or self._encode_odd(issued, n) for n, text in enumerate(texts)]

    def encode_cut(self, issued: Issued, horizon: int, chosen: Sequence[int], times: bytes) -> bytes | None:
        """Of one forecast its first steps and some of its quantiles, by their numbers, as JSON; times: JSON, too. None
        where nothing but `describe` can tell it.
        """
        if self.form is None:
            return None
        values = issued.values.transpose(0, 2, 1)[..., :horizon]
        if len(chosen) < len(self.keys):
            values = values[:, chosen]
        (text,) = self._fill(self.form(*chosen), issued, values)
        return text and b'%b,"timestamps":%b}' % (text[:-1], times)

    def _fill(self, form: Form, issued: Issued, values: Float64s) -> Iterator[bytes | None]:
        """The records with these numbers, [B, Q, H]; None for one with more digits than are written so."""
        status = ["live" if live else "warming" for live in issued.live.tolist()]
        return form.fill((issued.streams, *self._columns_of(issued), status), values, self._decimals(issued))

    def _form(self, form: type[Form], *chosen: int) -> Form:
        """A record with these quantiles, to be filled in with what differs from one to the other."""
        fields = self._fields(*[FIELD] * FIELDS)
        text = orjson.dumps({**fields, "quantiles": {self.keys[n]: [NUMBERS] for n in chosen}, "status": FIELD})
        pieces = re.split(b'"(%b|%b)"' % (FIELD.encode(), NUMBERS.encode()), text)
        return form(pieces[::2], [hole == NUMBERS.encode() for hole in pieces[1::2]])

    def _encode_odd(self, issued: Issued, number: int) -> bytes:
        """One with more digits than are written so."""
        (fields,) = self.describe(issued.part(np.array([number])))
        return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)

    def _columns_of(self, issued: Issued) -> tuple[NDArray[Any], ...]:
        """What is told of each before the numbers, beside its stream."""
        anomaly = np.rint(issued.anomaly * 1e3) / 1e3  # half the time of np.round
        return issued.ts_ms, issued.slot, issued.count, issued.observed, anomaly

    def _fields(self, stream: Any, ts_ms: Any, slot: Any, count: Any, observed: Any, anomaly: Any) -> dict[str, Any]:
        fields = {
            "stream": stream,
            "ts": ts_ms,
            "slot": slot,
            "step_ms": self.step_ms,
            "model": self.model,
            "count": count,
            "observed": None if observed != observed else observed,  # NaN
            "anomaly": None if anomaly != anomaly else anomaly,
        }
        return {**fields, "horizons": self.horizons} if self.horizons else fields

    def _values(self, issued: Issued) -> Float64s:
        """The numbers that are told, [B, Q, H]."""
        values = issued.values.transpose(0, 2, 1)
        values = values if self._columns is None else values[:, self._columns]
        return values if self._ahead is None else values[..., self._ahead]

    def _decimals(self, issued: Issued) -> Int64s:
        return decimals_of(issued.scale) if self.decimals is None else np.full(len(issued.scale), self.decimals)
