"""The live page: its routes. What it shows stands in `data`, how its charts look in `charts`, its text in `parts.html`.

A page is whole as it comes, and is then kept up with by one stream of server-sent events: what has changed of its text,
as HTML, and of its charts. What there is to say is found out about once a second for each reader, by few threads of the
page's own, and not at all while nobody looks.
"""
# No `from __future__ import annotations` here: FastAPI reads annotations, some of which name what is local.

import asyncio
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Annotated

import orjson
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.classify import Judge
from service.engine import Engine
from service.errors import Refused
from service.events import EventHub
from service.metrics import Metrics
from service.owners import PARTITION_HEADER, PARTITION_PATTERN, Owners, Pulse
from service.page.live import Asked, LivePage, Told, classifier_page
from service.page.statics import Static, statics
from service.predict import Predictor

READERS_MAX = 32
EVERY_S = 1.0
"""Time between two looks of a reader."""
INSIDE_EVERY_S = 0.5
"""The same where one looks inside: few steps shall be missed."""
THREADS = 4
"""That the page may use at a time: other routes need some too."""
SECURITY = {
    # Bokeh sets styles by elements of its own; scripts come from here, and from nowhere else.
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
NO_BOKEH = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Carousel</title>
<p>Carousel is running. Its live page needs Bokeh: <code>pip install 'carousel[page]'</code>, then start it again.</p>
<p>What there is without: <a href="/v1/streams">streams</a>, <a href="/openapi.json">API</a>,
<a href="/metrics">metrics</a>.</p></html>"""


def add_page(
    app: FastAPI, engine: Engine, predictor: Predictor, owners: Owners, worker: Pulse, metrics: Metrics, hub: EventHub
) -> None:
    """Add the page's routes. hub: while it is open, pages are kept up with."""
    page, readers = LivePage(engine, predictor, owners, worker, metrics), Readers(hub)
    threads = CapacityLimiter(THREADS)

    @app.get("/page/data", include_in_schema=False)
    def seen(
        asked: Annotated[Asked, Query()],
        only: Annotated[str | None, Header(alias=PARTITION_HEADER, pattern=PARTITION_PATTERN)] = None,
    ) -> Response:
        """What there is to see of a stream of this worker, for a page of another one."""
        answer = page.seen(asked, only)
        return Response(answer.body, answer.status, answer.headers)

    if find_spec("bokeh") is None:
        _add_plain(app)
        return
    _add_statics(app)

    async def reader() -> AsyncIterator[None]:
        with readers:
            yield

    @app.get("/", include_in_schema=False)
    async def look(asked: Annotated[Asked, Query()]) -> Response:
        return _html(*await to_thread.run_sync(page.whole, asked, limiter=threads))

    @app.get("/page/charts/{scheme}", include_in_schema=False)
    async def charts(request: Request, scheme: str) -> Response:
        """The charts of a `light` or a `dark` page, empty."""
        made = await to_thread.run_sync(page.charts, scheme, limiter=threads)
        return _static(request, made)

    @app.get(
        "/page/events", include_in_schema=False, response_class=EventSourceResponse, dependencies=[Depends(reader)]
    )
    async def events(asked: Annotated[Asked, Query()]) -> AsyncIterator[ServerSentEvent]:
        """What the page says, and from then on what of it has changed."""
        before: Told = {}
        while readers.welcome:
            now = await to_thread.run_sync(page.told, asked, limiter=threads)
            if fresh := news(now, before):
                yield ServerSentEvent(raw_data=orjson.dumps(fresh).decode())
            before = now
            await asyncio.sleep(INSIDE_EVERY_S if asked.inside else EVERY_S)


def add_classifier_page(app: FastAPI, judge: Judge) -> None:
    """A classifier follows no stream: its page says what it does, and how to ask."""
    _add_statics(app)

    @app.get("/", include_in_schema=False)
    def look() -> Response:
        return _html(200, classifier_page(judge))


def _add_plain(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def plain() -> Response:
        return _html(200, NO_BOKEH)


def _add_statics(app: FastAPI) -> None:
    @app.get("/page/static/{name}", include_in_schema=False)
    def static(request: Request, name: str) -> Response:
        """A file of the page, which may be kept for ever under the URL with its version `v`."""
        if name not in statics():
            raise Refused(404, "the page has no such file")
        return _static(request, statics()[name])


def _static(request: Request, static: Static) -> Response:
    packed = "gzip" in request.headers.get("accept-encoding", "")
    for_ever = request.query_params.get("v") == static.version
    headers = {
        **SECURITY,
        "cache-control": "public, max-age=31536000, immutable" if for_ever else "no-cache",
        "vary": "accept-encoding",
        **({"content-encoding": "gzip"} if packed else {}),
    }
    return Response(static.packed if packed else static.content, 200, headers, media_type=static.media_type)


def news(now: Told, before: Told) -> Told:
    """What is said now and was not said before.

    >>> news({"html": {"a": 1, "b": 2}, "charts": {"c": 3}}, {"html": {"a": 1, "b": 1}, "charts": {"c": 3}})
    {'html': {'b': 2}}
    """
    fresh = {
        kind: {name: part for name, part in parts.items() if before.get(kind, {}).get(name) != part}
        for kind, parts in now.items()
    }
    return {kind: parts for kind, parts in fresh.items() if parts}


def _html(status: int, text: str) -> Response:
    headers = {**SECURITY, "cache-control": "no-store"}
    return Response(text, status, headers, media_type="text/html")


class Readers:
    """How many pages are kept up with. To be used on the event loop."""

    def __init__(self, hub: EventHub) -> None:
        self._hub, self._count = hub, 0

    @property
    def welcome(self) -> bool:
        return not self._hub.closed

    def __enter__(self) -> None:
        """Raises Refused (503) if there are too many already."""
        if self._count >= READERS_MAX:
            raise Refused(503, f"{READERS_MAX} live pages are open already, the most")
        self._count += 1

    def __exit__(self, *_: object) -> None:
        self._count -= 1
