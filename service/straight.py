"""The straight way: a forecast of a live stream that this worker has, told on the event loop itself.

It stands before the API, which would take longer to find its route, its parameters and a thread than the forecast takes
to be told. Whatever is not plainly such a request, or cannot be answered at once, goes on to the API as it came: so
there is one who checks requests and says what is wrong with them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace

import orjson
from pydantic import ValidationError

from model.standing import Arrays
from service.engine import Engine
from service.errors import Refused
from service.guard import App, Message, Receive, Send, is_json, replay
from service.owners import PARTITION_HEADER, Owners
from service.predict import Predictor
from service.schemas import PredictRequest
from service.views import Partitions, first_row

PATH = "/v1/predict"
ROUTE = SimpleNamespace(path=PATH)
"""What the clock takes for the route."""
Found = asyncio.Future[Arrays | None]
Asked = tuple[str, Sequence[Partitions], Found]
Told = tuple[Found, Arrays | None]


class Straight:
    """ASGI middleware, inside the guard: bodies come in one piece, and `app` is asked where this has no answer."""

    def __init__(self, app: App, predictor: Predictor, owners: Owners) -> None:
        self.app, self._predictor, self._owners = app, predictor, owners
        self._reader = Reader(predictor.engine)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _may_be(scope):
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        answer = await self._answer(body)
        if answer is None:
            await self.app(scope, replay(body, receive), send)
            return
        scope["route"] = ROUTE
        headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, body: bytes) -> bytes | None:
        """The forecast that is asked for; None: it is not this worker's to tell at once, or something is wrong."""
        try:
            request = PredictRequest.model_validate(orjson.loads(body))
        except (orjson.JSONDecodeError, ValidationError):
            return None
        if request.stream is None or request.history is not None:
            return None
        looks = self._owners.at_hand(request.stream, request.partition)
        row = await self._reader.row(request.stream, looks) if looks else None
        if row is None or not self._owners.has(frozenset().union(*looks)):  # they may have been forgotten meanwhile
            return None
        try:
            return self._predictor.encode(request, row)
        except Refused:
            return None


def _may_be(scope: Message) -> bool:
    """Whether the head is that of such a request, and of none that another worker has passed on."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
        return False
    headers = dict(reversed(scope["headers"]))  # of several the first
    return PARTITION_HEADER.encode() not in headers and is_json(headers.get(b"content-type", b"").decode("latin-1"))


class Reader:
    """Reads rows for an event loop, which must not wait for the engine's lock, as everybody else would wait with it.
    Where a wave moves, a thread waits for its end, once for all who have asked by then.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: deque[Asked] = deque()
        self._waits = False

    async def row(self, stream: str, looks: Sequence[Partitions]) -> Arrays | None:
        """A copy of a stream's state, from the first of `looks` that has it; None if none has."""
        if self._engine.lock.acquire(blocking=False):
            try:
                return first_row(self._engine, stream, looks)
            finally:
                self._engine.lock.release()
        found: Found = asyncio.get_running_loop().create_future()
        self._asked.append((stream, looks, found))
        if not self._waits:
            self._wait()
        return await found

    def _wait(self) -> None:
        self._waits = True
        asyncio.get_running_loop().run_in_executor(None, self._read).add_done_callback(self._tell)

    def _read(self) -> list[Told]:
        with self._engine.lock:
            asked = [self._asked.popleft() for _ in range(len(self._asked))]
            return [(found, first_row(self._engine, stream, looks)) for stream, looks, found in asked]

    def _tell(self, read: asyncio.Future[list[Told]]) -> None:
        for found, row in read.result():
            if not found.done():  # its client may have gone
                found.set_result(row)
        self._waits = False
        if self._asked:
            self._wait()
