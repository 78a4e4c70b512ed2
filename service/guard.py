"""What stands before the API, as bare ASGI: limits on what a request may bring, the last word on errors, a clock.

It reads the whole body, up to the limit and within a time, before anything else runs: so no handler ever waits for a
client, and memory stays bounded whatever is sent.
"""

from __future__ import annotations

import asyncio
import email.message
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import cache, lru_cache
from http import HTTPStatus
from itertools import chain
from typing import Any

import orjson
from prometheus_client import Histogram

from service.errors import RETRY_AFTER_S, Refused

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

BODY_S = 30.0
"""Time in which a body must have come."""
HEADERS_MAX_BYTES = 16_384
WHOLE = "carousel.whole"
"""Set in a request's scope by a server that has its body whole, so that nobody needs to watch the time for it."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PROBLEM_TYPE = "application/problem+json"


class Disconnected(Exception):
    """The client went before it had sent its body."""


def problem(
    status: int, detail: str, errors: Sequence[dict[str, Any]] = (), retry_after_s: int = RETRY_AFTER_S
) -> tuple[dict[str, str], bytes]:
    """The headers and the body of an error's answer, after RFC 9457. errors: `loc` and `msg` of each field at fault."""
    headers = {"content-type": PROBLEM_TYPE}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(retry_after_s)
    fields = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return headers, orjson.dumps({**fields, "errors": list(errors)} if errors else fields)


class Guard:
    """ASGI middleware: bounds the request, turns what nobody caught into a 500, measures."""

    def __init__(self, app: App, max_body_bytes: int, seconds: Histogram) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self._seconds = cache(
            seconds.labels
        )  # of few routes, methods and statuses; to find one takes longer than to count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s = time.perf_counter()
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._observe(scope, message["status"], time.perf_counter() - started_s)
            await send(message)

        try:
            check_head(scope, self.max_body_bytes)
            body = await read_body(scope, receive, self.max_body_bytes)
            await self.app(scope, replay(body, receive), answer)
        except Disconnected:
            pass
        except Refused as error:
            await respond(answer, error.status, str(error), {"connection": "close"})  # the rest of it is not read
        except Exception:
            error_id = uuid.uuid4().hex
            log.exception("HTTP request failed; its caller was told %s", error_id, extra={"error_id": error_id})
            if answered:
                raise
            await respond(answer, 500, f"this should not have happened; the service's log tells more under {error_id}")

    def _observe(self, scope: Message, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._seconds(handler, method, status).observe(seconds)


def check_head(scope: Message, max_body_bytes: int) -> None:
    """Raises Refused for a request whose headers or path alone are reason enough."""
    headers = scope["headers"]
    names = [name for name, _ in headers]
    if sum(map(len, chain.from_iterable(headers))) > HEADERS_MAX_BYTES:
        raise Refused(400, f"the headers are larger than {HEADERS_MAX_BYTES} bytes")
    if scope["http_version"] == "1.1" and names.count(b"host") != 1:
        raise Refused(400, "a request of HTTP/1.1 names its Host, once")
    if b"transfer-encoding" in names and b"content-length" in names:  # request smuggling begins like this
        raise Refused(400, "Transfer-Encoding and Content-Length exclude each other")
    if ".." in scope["path"] and ".." in scope["path"].split("/"):
        raise Refused(404, "no path has a part '..'")
    if any(value.lower() != b"identity" for name, value in headers if name == b"content-encoding"):
        raise Refused(415, "bodies are read as they are, without any Content-Encoding")
    if any(int(value) > max_body_bytes for name, value in headers if name == b"content-length"):
        raise Refused(413, f"the body is larger than {max_body_bytes} bytes")


@lru_cache(maxsize=64)
def is_json(content_type: str) -> bool:
    """Whether a body of this type is JSON, whatever is told besides.

    >>> is_json("Application/JSON; charset=utf-8"), is_json("application/jsonx")
    (True, False)
    """
    message = email.message.Message()
    message["content-type"] = content_type
    return message.get_content_type() == "application/json"


async def read_body(scope: Message, receive: Receive, max_bytes: int) -> bytes:
    """The request's body. Raises Refused if it is too large or too slow, Disconnected if it never ends."""
    if WHOLE in scope:  # a timer takes longer than such a body
        return await _read_to_end(receive, max_bytes)
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_to_end(receive, max_bytes)
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {BODY_S:g} s") from error


async def _read_to_end(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise Refused(413, f"the body is larger than {max_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had just come, in one piece."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def respond(send: Send, status: int, detail: str, more: dict[str, str] | None = None) -> None:
    """Send a problem."""
    headers, body = problem(status, detail)
    named = {**headers, **(more or {}), "content-length": str(len(body))}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
