"""The HTTP server: uvicorn on a thread of its own, on a socket bound before anything else starts."""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import resource
import socket
import threading
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import ServiceError
from service.guard import HEADERS_MAX_BYTES, WHOLE
from service.settings import Settings

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 4_000
"""Connections beyond this are answered 503 by uvicorn itself, in plain text."""
FILES = 2 * CONNECTIONS_MAX
"""Open at a time: connections must never be so many that none is left for Kafka."""
KEEP_ALIVE_S = 30
HEAD_S = 15.0
"""Time in which a connection must have brought a request's headers."""
START_S = 30.0
CHUNK_BYTES_MAX = 8
"""Sent for a chunk of one byte, which nobody needs to send: 6, and some more for its extension."""
STOP_S = 5
"""Time that requests have to end when the server stops."""


class HttpServer:
    """Listens at once, so that `url` is known and a taken port is found out before the worker joins its group.

    Raises ServiceError where it cannot listen.
    """

    def __init__(self, settings: Settings) -> None:
        allow_files(FILES)
        self._socket = listen(settings.http_host, settings.http_port)
        self.url = url_of(self._socket)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._on_stop: Callable[[], None] | None = None

    def start(self, app: Any, on_stop: Callable[[], None] | None = None) -> None:
        """Serve the ASGI app; when this returns, it answers. on_stop: ends answers that never end by themselves.

        Raises ServiceError if it does not come up.
        """
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server, self._on_stop = _Server(config), on_stop
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)
        self._thread.start()
        if not self._server.up.wait(START_S):
            raise ServiceError(f"the HTTP server did not start within {START_S:g} s")

    def stop(self) -> None:
        """Answer what was asked, take nothing new, end; within STOP_S and a little."""
        if self._on_stop:
            self._on_stop()
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(STOP_S + 5.0)
            if self._thread.is_alive():
                log.warning("the HTTP server did not stop in time; it ends with the process")
        self._socket.close()


def allow_files(count: int) -> None:
    """Let this process open so many files, or all that it may: often it is 1,024, and far more to who asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServiceError in one line that names the flag to change."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} on {host} is taken: choose another by --http-port (0: any free one)"
        elif error.errno == errno.EACCES:
            reason = f"port {port} on {host} is not allowed: choose one above 1023 by --http-port"
        else:
            reason = f"cannot listen on {host} port {port}: {error.strerror}; see --http-host and --http-port"
        raise ServiceError(reason) from error
    # Connections inherit it. Without it each answer waits 40 ms for an ACK: asyncio sets it only on its own sockets.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches it.

    >>> with listen("127.0.0.1", 0) as listener:
    ...     url_of(listener).rpartition(":")[0]
    'http://127.0.0.1'
    """
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - bound to all, named as one
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is up. Off the main thread it touches no signal handlers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class _Parser(httptools.HttpRequestParser):
    """httptools' parser, which leaves off where a request asks for another protocol, as Java's client does of its first
    one. None is spoken here, so such a request is read again as if it had not asked.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does: the request itself is answered

    def feed_data(self, data: bytes | bytearray | memoryview | array.array[int]) -> None:
        """Raises HttpParserError for what is no HTTP."""
        rest = memoryview(data)
        while True:
            try:
                return super().feed_data(rest)
            except httptools.HttpParserUpgrade as asked:
                if self.get_method() == b"CONNECT":
                    return None
                super().feed_data(self._plain_head())
                rest = rest[asked.args[0] :]

    def _plain_head(self) -> bytes:
        version = self.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.get_method(), self._protocol.url, version)]
        lines += [b"%s: %s" % pair for pair in self._protocol.headers if pair[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))


class _Together:
    """A transport by which all goes at once that is written in one turn of the event loop, as an answer's head and body
    are. Each by itself would be a call of the system, the dearest part of an answer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._written = transport, list[bytes]()
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._written:
            asyncio.get_running_loop().call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._written:
            self._transport.write(b"".join(self._written))
            self._written.clear()


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which would wait for ever for a request's headers, and take any number of them; this one
    closes such connections.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        self._overdue: asyncio.TimerHandle | None = None
        self._spent = 0
        """Bytes that the request at hand has taken and that are no body, less what chunks may need."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = _Together(transport)  # type: ignore[assignment]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._spent += len(data)
        super().data_received(data)
        if self._spent > HEADERS_MAX_BYTES and not self.transport.is_closing():
            self.send_400_response("Too much that is no body.")
        if self._idle and self._overdue is None:
            self._await_head()
        elif not self._idle:
            self._forget()

    def on_body(self, body: bytes) -> None:
        self._spent -= CHUNK_BYTES_MAX * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._spent = 0
        self.scope[WHOLE] = True  # type: ignore[literal-required]
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Asked of a request that `_Parser` will read again: True: it is not answered yet."""
        return self.parser.get_method() != b"CONNECT"

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._overdue = asyncio.get_running_loop().call_later(HEAD_S, self.transport.close)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
