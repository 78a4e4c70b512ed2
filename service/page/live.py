"""What the page says: the list of streams, or one of them, as HTML and as what goes into its charts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, Field

from service import schemas
from service.classify import Judge
from service.engine import Engine
from service.errors import Refused
from service.metrics import Metrics
from service.owners import Answer, Owners, Pulse, Question
from service.page import data
from service.page.data import Vitals
from service.page.statics import HERE, Static, url_of
from service.predict import Predictor
from service.records import STREAM_ID_MAX

ROWS = 50
"""Streams on a page of the list."""
ORDERS = {"id": "by name", "anomaly": "oddest", "error": "least accurate", "heard": "last heard"}

Told = dict[str, dict[str, Any]]
"""What a page says: by kind (`html`, `charts`, `inside`), by the name of the part."""


class Asked(BaseModel):
    """What is looked at: a stream, or the list of those that match."""

    stream: schemas.StreamId | None = None
    partition: schemas.Partition | None = None
    inside: bool = False
    q: Annotated[str, Field(max_length=STREAM_ID_MAX)] = ""
    after: Annotated[str, Field(max_length=STREAM_ID_MAX)] = ""
    order: schemas.Order = "id"

    def query(self, **other: Any) -> str:
        """The query of a URL that asks for the same but for what is `other`."""
        fields = self.model_dump(exclude_defaults=True) | other
        return urlencode({name: int(value) if value is True else value for name, value in fields.items() if value})


class LivePage:
    """Says what there is to see. May be used from any thread."""

    def __init__(self, engine: Engine, predictor: Predictor, owners: Owners, worker: Pulse, metrics: Metrics) -> None:
        self._engine, self._predictor, self._owners = engine, predictor, owners
        self._vitals = Vitals(worker, metrics)
        self.charts = cache(self._charts)

    def whole(self, asked: Asked) -> tuple[int, str]:
        """The page as it comes: its status and its HTML."""
        status, told = self._told(asked)
        template = _templates().get_template("list.html" if asked.stream is None else "stream.html")
        config, model = self._engine.config, self._engine.bundle.model_id
        known = {"orders": ORDERS, "maps": data.MAP_SAYS[config.cell], "config": config, "model": model}
        return status, template.render(known, asked=asked, told=told["html"], static=url_of)

    def told(self, asked: Asked) -> Told:
        """What the page says now."""
        return self._told(asked)[1]

    def seen(self, asked: Asked, only: str | None) -> Answer:
        """All that there is to see of a stream, wherever it is. Raises Refused."""
        if asked.stream is None:
            raise Refused(422, "name a stream", ("query", "stream"))
        look = partial(data.look, self._engine, self._predictor, asked.stream, asked.inside)
        path = f"/page/data?{Asked(stream=asked.stream, inside=asked.inside).query()}"
        return self._owners.answer(Question(asked.stream, asked.partition, look, path), only)

    def _charts(self, scheme: str) -> Static:
        if scheme not in ("light", "dark"):
            raise Refused(404, "there is a light and a dark scheme")
        from service.page import charts  # Bokeh takes a second to load: not before somebody looks

        colours = charts.DARK if scheme == "dark" else charts.LIGHT
        return Static(charts.documents(self._engine.config, colours).encode(), "application/json")

    def _told(self, asked: Asked) -> tuple[int, Told]:
        tell = self._list if asked.stream is None else self._stream
        try:
            return tell(asked)
        except Refused as refused:
            return refused.status, {"html": {"notice": self._part("notice", refused.status, str(refused), asked)}}

    def _list(self, asked: Asked) -> tuple[int, Told]:
        page = schemas.Page(limit=ROWS, q=asked.q, after=asked.after, order=asked.order, stream=None)
        answer = self._owners.page(page, None)
        html = {
            "notice": "",
            "worker": self._part("worker", self._vitals.told()),
            "streams": self._part("streams", orjson.loads(answer.body), asked, self._engine.settings),
        }
        return answer.status, {"html": html}

    def _stream(self, asked: Asked) -> tuple[int, Told]:
        answer = self.seen(asked, None)
        if answer.status != 200:  # of another worker
            raise Refused(answer.status, orjson.loads(answer.body)["detail"])
        seen, config = orjson.loads(answer.body), self._engine.config
        html = {
            "notice": "",
            "facts": self._part("facts", seen),
            "scores": self._part("scores", seen, config),
            "steps": self._part("steps", seen),
            **{f"doings-{n}": data.doings(layer, config.cell) for n, layer in enumerate(seen["layers"])},
        }
        inside = {"step": {"count": seen["count"], "maps": data.column_of(seen, config.cell)}} if asked.inside else {}
        return 200, {"html": html, "charts": data.columns_of(seen, config), "inside": inside}

    def _part(self, name: str, *known: Any) -> str:
        macro: Callable[..., str] = getattr(_parts(), name)
        return macro(*known)


def classifier_page(judge: Judge) -> str:
    """The page of a model that follows no stream."""
    known = judge.model()
    return _templates().get_template("classifier.html").render(known=known, model=known["id"], static=url_of)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {each.__name__: each for each in (number, brief, percent, when, iso, odds)}
    return environment


@cache
def _parts() -> Any:
    return _templates().get_template("parts.html").module


def number(value: float | None) -> str:
    """To four digits or so.

    >>> [number(value) for value in (None, 0.51234, 23.456, 1234.5, 7654321.0, 1.5e-7)]
    ['–', '0.5123', '23.46', '1,234.5', '7,654,321', '1.5e-07']
    """
    if value is None:
        return "–"
    if abs(value) < 1_000 or abs(value) >= 1e12:
        return f"{value:.4g}"
    return f"{value:,.1f}" if abs(value) < 10_000 and value != round(value) else f"{value:,.0f}"


def brief(value: float | None) -> str:
    """To two digits or so.

    >>> [brief(value) for value in (None, 0.512, 2.345, 19.11, 1234.5)]
    ['–', '0.51', '2.3', '19', '1,234']
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def percent(share: float | None) -> str:
    """A share.

    >>> percent(0.8251)
    '83%'
    """
    return "–" if share is None else f"{share:.0%}"


def when(ts_ms: int) -> str:
    """A time of day, in UTC, with seconds where there are some; what no calendar has, in epoch milliseconds.

    >>> when(1_795_132_800_000), when(1_795_132_801_000), when(10**17)
    ('2026-11-20 00:00', '2026-11-20 00:00:01', '100000000000000000 ms')
    """
    try:
        time = datetime.fromtimestamp(ts_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{ts_ms} ms"
    return f"{time:%Y-%m-%d %H:%M:%S}" if time.second else f"{time:%Y-%m-%d %H:%M}"


def iso(ts_ms: int) -> str:
    """The same for programs; empty where there is no such time."""
    told = when(ts_ms)
    return "" if told.endswith("ms") else f"{told.replace(' ', 'T')}Z"


def odds(anomaly: float) -> str:
    """How odd an observation was, as a fraction.

    >>> odds(0.0), odds(1.9), odds(6.2)
    ('1 in 1', '1 in 79', '1 in 1,584,893')
    """
    return f"1 in {10**anomaly:,.0f}"
