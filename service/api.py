"""The HTTP API: routes, what they say of themselves in OpenAPI, and how errors are told.

Of all files only this one and the `page` import FastAPI. What routes answer is computed in `predict` and `views`; what
requests and answers look like stands in `schemas`.
"""
# No `from __future__ import annotations` here: FastAPI reads annotations, some of which name what is local.

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Annotated, Any, Protocol
from urllib.parse import quote

import orjson
from fastapi import Body, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from model.config import ModelConfig
from model.state import Rows
from service import schemas, views
from service.arena import StreamKey
from service.classify import Judge
from service.engine import Engine
from service.errors import Refused
from service.events import EventHub, Subscription
from service.guard import PROBLEM_TYPE, Guard, is_json, problem
from service.metrics import Metrics
from service.owners import PARTITION_HEADER, PARTITION_PATTERN, Answer, Owners, Pulse, Question
from service.page import add_classifier_page, add_page
from service.predict import Predictor, arrays_of
from service.settings import Settings
from service.straight import Straight
from service.views import Content, Fields, Partitions

DESCRIPTION = """Forecasts of live streams, and what is known of them.

Any worker answers for any stream: it asks the worker that has it. Where that cannot answer now, for one because the
stream is just moving from worker to worker, the status is 503, and `Retry-After` says when to come again.

Times are epoch milliseconds. Forecasts are quantiles, in each series' own unit. Errors are problems after RFC 9457.
A stream id may have slashes in a path as they are."""
CLASSIFIER_DESCRIPTION = """What a whole series is: its class, or its value.

Times are epoch milliseconds. Errors are problems after RFC 9457."""
EXAMPLE_STREAM = "sensor-1"
EXAMPLE_TS_MS = 1_795_132_800_000
"""2026-11-20, a Friday, 00:00 UTC: on most grids."""
ERRORS_TOLD_MAX = 10
STREAMS_ASKED_MAX = 100

WHY = {
    404: "No worker has heard such a stream.",
    408: "The body did not come in time.",
    413: "The body is larger than the service reads.",
    415: "The body is not JSON, or is compressed.",
    422: "Something is not as it must be: `errors` names the fields at fault, and never repeats a value.",
    500: "A fault of the service; `detail` has the id under which its log tells more.",
    503: "Not now: come again after `Retry-After` seconds.",
}

StreamPath = Annotated[schemas.StreamId, Path(examples=[EXAMPLE_STREAM])]
Partition = Annotated[schemas.Partition | None, Query(description=schemas.PARTITION_SAYS)]
Only = Annotated[str | None, Header(alias=PARTITION_HEADER, pattern=PARTITION_PATTERN, include_in_schema=False)]
"""Set by a worker that passes a request on."""


class Vitals(Pulse, Protocol):
    """What the API asks of the worker."""

    @property
    def alive(self) -> bool: ...


def create_app(
    engine: Engine, worker: Vitals, settings: Settings, metrics: Metrics, hub: EventHub, owners: Owners
) -> FastAPI:
    """The API of one worker as an ASGI application; `hub` is where the worker publishes its forecasts, `owners` answers
    about streams, be they this worker's or another's.
    """
    predictor = Predictor(engine)
    app = _bare_app(DESCRIPTION, worker, settings, metrics, Middleware(Straight, predictor=predictor, owners=owners))
    _add_predict(app, predictor, owners)
    _add_streams(app, engine, predictor, owners)
    _add_events(app, hub)
    _add_operations(app, worker, metrics)
    add_page(app, engine, predictor, owners, worker, metrics, hub)
    _describe(app)
    return app


def create_classifier_app(judge: Judge, settings: Settings, metrics: Metrics) -> FastAPI:
    """The API of a classifier as an ASGI application."""
    app = _bare_app(CLASSIFIER_DESCRIPTION, judge, settings, metrics)
    step_ms = judge.config.series.step_ms or 1_000
    history = [{"ts": EXAMPLE_TS_MS + n * step_ms, "value": 20.0 + n} for n in range(3)]

    @app.post(
        "/v1/predict",
        summary="Tell what a history is",
        response_model=schemas.Classified,
        responses=failures(408, 413, 415, 422),
    )
    def predict(
        request: Annotated[
            schemas.ClassifyRequest, Body(openapi_examples={"A history": {"value": {"history": history}}})
        ],
    ) -> Response:
        """The class of the whole history, with the probability of each; or its value."""
        return json_answer(judge.answer(request))

    @app.get("/v1/model", summary="The model that is served", response_model=schemas.ClassifierModel)
    def model() -> Response:
        """What it tells, how it was trained and how it did on series held back."""
        return json_answer(judge.model())

    _add_operations(app, judge, metrics)
    add_classifier_page(app, judge)
    _describe(app)
    return app


def _bare_app(description: str, worker: Vitals, settings: Settings, metrics: Metrics, *inside: Middleware) -> FastAPI:
    """An application that guards itself and tells errors, and has no routes yet. inside: what comes after the guard."""
    app = FastAPI(
        title="Carousel",
        version="1",
        description=description,
        docs_url=None,  # these pages would load scripts from the internet
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it would look for it with each request
        responses=failures(500),
        middleware=[
            Middleware(Guard, max_body_bytes=settings.max_body_bytes, seconds=metrics.http_seconds),
            *inside,
        ],
    )
    app.router.route_class = JsonRoute
    _add_errors(app, worker)
    return app


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How OpenAPI tells the errors that a route may answer."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": WHY[status], "content": content} for status in statuses}


def _describe(app: FastAPI) -> None:
    """Add the schema of problems, which FastAPI takes from no route, to the API's description."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        described = plain()
        models = schemas.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        described["components"]["schemas"] |= models.pop("$defs") | {"Problem": models}
        return described

    app.openapi = openapi  # type: ignore[method-assign]


class JsonRequest(Request):
    """A request whose body is read by orjson."""

    async def json(self) -> Any:
        """The body. Raises JSONDecodeError if it is not JSON in UTF-8."""
        body = await self.body()
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            try:  # Python's parser takes NaN and 1e400 too: so validation can say which field has them
                return json.loads(body.decode())
            except (ValueError, RecursionError):
                pass
            raise


class JsonRoute(APIRoute):
    """A route that takes no body but JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field and not is_json(request.headers.get("content-type", "")):
                raise Refused(415, "send the body as Content-Type: application/json")
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def json_answer(content: Any) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def passed(answer: Answer) -> Response:
    return Response(answer.body, answer.status, answer.headers)


def _add_errors(app: FastAPI, worker: Vitals) -> None:
    @app.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> Response:
        """Of Starlette: no such path, or no such method on it."""
        headers, body = problem(error.status_code, str(error.detail))
        return Response(body, error.status_code, {**headers, **(error.headers or {})})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _unprocessable([(one["loc"], one["msg"]) for one in error.errors()[:ERRORS_TOLD_MAX]])

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        if error.status == 422:
            return _unprocessable([(error.loc, str(error))])
        status, detail = error.status, str(error)
        if status == 404 and worker.unready:
            status, detail = 503, f"{detail}, but this worker is not ready: {worker.unready}"
        headers, body = problem(status, detail, retry_after_s=error.retry_after_s)
        if status == 503:
            headers["connection"] = "close"  # its place is free at once, and a balancer may try another worker
        return Response(body, status, headers)


def _unprocessable(errors: Sequence[tuple[Sequence[str | int], str]]) -> Response:
    """422: what is wrong with each field. Names of fields may come from the request: they are made harmless."""
    told = [
        {"loc": [part if isinstance(part, int) else _printable(part) for part in loc], "msg": msg}
        for loc, msg in errors
    ]
    detail = f"{'.'.join(map(str, told[0]['loc']))}: {told[0]['msg']}"
    headers, body = problem(422, detail, told)
    return Response(body, 422, headers)


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:64])


async def read_body(request: Request) -> bytes:
    """The body as it came: it was read already."""
    return await request.body()


def _add_predict(app: FastAPI, predictor: Predictor, owners: Owners) -> None:
    examples = _predict_examples(predictor.config)

    @app.post(
        "/v1/predict",
        summary="Forecast a live stream, a history, or what if",
        response_model=schemas.Forecast,
        responses=failures(404, 408, 413, 415, 422, 503),
    )
    def predict(
        request: Annotated[schemas.PredictRequest, Body(openapi_examples=examples)],
        body: Annotated[bytes, Depends(read_body)],
        only: Only = None,
    ) -> Response:
        """With `stream` alone: the forecast that stands open in the stream's live state, as it was last written to
        the forecasts topic. With `history` alone: from nothing but these observations. With both: a what-if that goes
        on from the live state, and leaves it as it was.
        """
        if request.stream is None:
            return json_answer(predictor.predict(request))
        question = Question(request.stream, request.partition, partial(predictor.predict, request), "/v1/predict", body)
        return passed(owners.answer(question, only))


def _predict_examples(config: ModelConfig) -> dict[str, Any]:
    """Requests that run, given a stream of that name which was last heard before."""
    step_ms = config.step_ms or 1_000
    history = [{"ts": EXAMPLE_TS_MS + n * step_ms, "value": 20.0 + n} for n in range(3)]
    few = [config.quantiles[0], config.quantiles[-1]]
    bodies = {
        "A live stream": {"stream": EXAMPLE_STREAM},
        "A history": {"history": history, "horizon": min(3, config.horizon), "quantiles": few},
        "A what-if": {"stream": EXAMPLE_STREAM, "history": history},
    }
    return {name: {"value": body} for name, body in bodies.items()}


def _once(request: Request) -> None:
    """A parameter that stands twice is not silently taken as it stands last."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if names.count(name) > 1:
            raise Refused(422, "give it once", ("query", name))


def _add_streams(app: FastAPI, engine: Engine, predictor: Predictor, owners: Owners) -> None:
    once = Depends(_once)

    @app.get("/v1/model", summary="The model that is served", response_model=schemas.Model)
    def model() -> Response:
        """Its sizes, how it was trained and how it did in its backtest."""
        return json_answer(views.model(engine))

    @app.get(
        "/v1/streams",
        summary="List live streams",
        response_model=schemas.StreamPage,
        responses=failures(422, 503),
        dependencies=[once],
    )
    def streams(page: Annotated[schemas.Page, Query()], only: Only = None) -> Response:
        """In the order of their ids, a page at a time: those of all workers, or 503 while one cannot be asked."""
        return passed(owners.page(page, only))

    def ask(
        stream: str, partition: int | None, only: str | None, part: str, tell: Callable[[StreamKey, Rows], Content]
    ) -> Response:
        path = f"/v1/streams/{quote(stream, safe='')}{part}"
        answer = partial(_told, engine, stream, tell)
        return passed(owners.answer(Question(stream, partition, answer, path), only))

    errors = failures(404, 422, 503)

    @app.get(
        "/v1/streams/{stream:path}/state",
        summary="What the model remembers of a stream",
        response_model=schemas.StreamState,
        responses=errors,
        dependencies=[once],
    )
    def state(stream: StreamPath, partition: Partition = None, only: Only = None) -> Response:
        """Hidden state h, cell state C and the last step's gates, layer by layer, and the units it is seen in."""
        return ask(stream, partition, only, "/state", partial(views.inside, engine.config))

    @app.get(
        "/v1/streams/{stream:path}/history",
        summary="A stream's recent past",
        response_model=schemas.StreamHistory,
        responses=errors,
        dependencies=[once],
    )
    def history(stream: StreamPath, partition: Partition = None, only: Only = None) -> Response:
        """The last observations, each beside what had been forecast for it one step before."""
        return ask(stream, partition, only, "/history", partial(views.history, engine))

    @app.get(
        "/v1/streams/{stream:path}/forecast",
        summary="A stream's open forecast, to be drawn",
        response_model=list[schemas.ForecastRow],
        responses=errors,
        dependencies=[once],
    )
    def forecast(stream: StreamPath, partition: Partition = None, only: Only = None) -> Response:
        """What `/v1/predict` tells of it, as flat rows, one a step: Grafana's Infinity data source, a spreadsheet or a
        data frame takes them as they are.
        """

        def tell(_: StreamKey, state: Rows) -> list[Fields]:
            return views.curve(predictor.tell(stream, arrays_of(state)))

        return ask(stream, partition, only, "/forecast", tell)

    @app.get(
        "/v1/streams/{stream:path}",
        summary="A live stream",
        response_model=schemas.StreamDetail,
        responses=errors,
        dependencies=[once],
    )
    def detail(stream: StreamPath, partition: Partition = None, only: Only = None) -> Response:
        """Its last value, count and live scores, and its open forecast."""

        def tell(key: StreamKey, state: Rows) -> Fields:
            (summary,) = views.summaries(engine, [key], state)
            return {**summary, "forecast": predictor.tell(stream, arrays_of(state))}

        return ask(stream, partition, only, "", tell)


def _told(engine: Engine, stream: str, tell: Callable[[StreamKey, Rows], Content], partitions: Partitions) -> Content:
    return tell(*views.find(engine, stream, partitions))


class EventStream(StreamingResponse):
    """Server-sent events, written already."""

    media_type = "text/event-stream"


def _add_events(app: FastAPI, hub: EventHub) -> None:
    async def subscribe(
        stream: Annotated[
            list[schemas.StreamId],
            Query(
                default_factory=list,
                max_length=STREAMS_ASKED_MAX,
                description="Only events of this stream; may be given many times. Without it, those of all.",
            ),
        ],
    ) -> AsyncIterator[Subscription]:
        with hub.subscribe(frozenset(stream)) as subscription:
            yield subscription

    @app.get(
        "/v1/events",
        summary="Forecasts as they are made",
        response_class=EventStream,
        responses=failures(422, 503) | {200: {"content": {EventStream.media_type: {"schema": {"type": "string"}}}}},
    )
    async def events(subscription: Annotated[Subscription, Depends(subscribe)]) -> Response:
        """Server-sent events named `forecast`, from now on, of the streams that this worker has: for those of others
        ask each worker, or read the forecasts topic. The data of each is a record of that topic, which has the
        observation too. Ids count up from 1; a gap in them tells how many events were dropped because they
        were read too slowly. A comment comes every 15 s when nothing else does.
        """
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return EventStream(_as_written(subscription), headers=headers)


async def _as_written(subscription: Subscription) -> AsyncIterator[bytes]:
    """Events as they go over the wire. Many at a time, and without FastAPI's model for each: whoever reads all that a
    busy worker says has the worker's interpreter busy.
    """
    async for events in subscription:
        told = b"".join(b"id: %d\nevent: forecast\ndata: %b\n\n" % event for event in events)
        yield told or b": nothing yet\n\n"


def _add_operations(app: FastAPI, worker: Vitals, metrics: Metrics) -> None:
    # Asynchronous, so that they answer even while every thread for requests is busy.
    @app.get("/livez", summary="Is the worker alive?", response_model=schemas.Health, responses=failures(503))
    async def livez() -> Response:
        """200 while the worker's loop turns; else restart it."""
        if not worker.alive:
            raise Refused(503, "the worker's loop has not turned for too long")
        return json_answer({"status": "alive"})

    @app.get("/readyz", summary="Is the worker ready?", response_model=schemas.Health, responses=failures(503))
    async def readyz() -> Response:
        """200 while the worker takes part in its group and has its streams."""
        if worker.unready:
            raise Refused(503, worker.unready)
        return json_answer({"status": "ready"})

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def exposition(request: Request) -> Response:
        """In the text format that the scraper asks for."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})
