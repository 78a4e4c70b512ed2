"""The limits of HTTP: servers that answer the same bytes to whatever is asked, on uvicorn as anyone starts it. Each
tells its URL.

python -m deploy.bench.answer asyncio|asgi|fastapi ANSWER.json
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from service.server import listen, url_of

Message = MutableMapping[str, Any]


class _Question(BaseModel):
    stream: str


def fastapi_app(answer: bytes) -> FastAPI:
    """One route, of which FastAPI reads the body."""
    app = FastAPI(openapi_url=None)

    @app.post("/v1/predict")
    async def predict(question: _Question) -> Response:  # noqa: ARG001
        return Response(answer, media_type="application/json")

    return app


def asgi_app(answer: bytes) -> Callable[..., Awaitable[None]]:
    """What every framework stands on."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]

    async def app(
        _scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


class _Parrot(asyncio.Protocol):
    """Says the same whatever it hears: a request that comes in one piece."""

    def __init__(self, answer: bytes) -> None:
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, _: bytes) -> None:
        self._transport.write(self._answer)


async def parrot(answer: bytes) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Parrot(answer), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    _tell(f"http://{host}:{port}")
    await server.serve_forever()


def _tell(url: str) -> None:
    print(f"answering: {url}", flush=True)  # noqa: T201


def main() -> None:
    """Answer until ended by a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("asyncio", "asgi", "fastapi"))
    parser.add_argument("answer", type=Path)
    given = parser.parse_args()
    answer = given.answer.read_bytes()
    if given.kind == "asyncio":
        asyncio.run(parrot(answer))
        return
    app = fastapi_app(answer) if given.kind == "fastapi" else asgi_app(answer)
    with listen("127.0.0.1", 0) as listener:
        _tell(url_of(listener))
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])


if __name__ == "__main__":
    main()
