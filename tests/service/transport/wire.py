"""The line between a broker and its clients, on which a test may hold requests and answers, or which it may cut."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

PRODUCE = 0
FETCH = 1
OFFSET_FETCH = 9
ADD_OFFSETS_TO_TXN = 25
END_TXN = 26
TXN_OFFSET_COMMIT = 28


@dataclass(frozen=True)
class Message:
    """A request, or the answer to one: who sent it, and which call of Kafka's protocol it is."""

    client: str
    api: int
    ends: frozenset[socket.socket] = field(repr=False)
    """Of its connection."""


Tell = Callable[[bytes, frozenset[socket.socket], dict[bytes, Message]], None]


class Wire:
    """Relays what clients say to `port` to the broker at `target`, and its answers."""

    def __init__(self) -> None:
        self.target = 0
        self.on_request: Callable[[Message], None] = lambda message: None
        """Told of each request, on a thread of its connection, before it goes on: it waits as long as this takes."""
        self.on_answer: Callable[[Message], None] = lambda message: None
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket()
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Let everything through, and whoever calls in."""
        self.on_request = self.on_answer = lambda message: None
        with self._lock:
            if self._listener in self._connections:
                return
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listener.getsockname()[1]
            self._connections.add(self._listener)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self, spared: Message | None = None) -> None:
        """End all connections but that of the message; new ones are refused until `mend`."""
        with self._lock:
            ended = self._connections - (spared.ends if spared else set())
            self._connections -= ended
        for connection in ended:
            with suppress(OSError):  # wakes the threads that wait for it; a close alone would not
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                broker = socket.create_connection(("127.0.0.1", self.target))
                with self._lock:
                    if listener not in self._connections:
                        client.close()
                        broker.close()
                        return
                    self._connections |= {client, broker}
                asked: dict[bytes, Message] = {}
                for args in (
                    (self._tell_request, client, broker, asked),
                    (self._tell_answer, broker, client, asked),
                ):
                    threading.Thread(target=self._relay, args=args, daemon=True).start()

    def _relay(
        self,
        tell: Tell,
        source: socket.socket,
        target: socket.socket,
        asked: dict[bytes, Message],
    ) -> None:
        with suppress(OSError, struct.error), source.makefile("rb") as stream:
            while content := _content(stream):
                tell(content, frozenset({source, target}), asked)
                target.sendall(struct.pack(">i", len(content)) + content)
        for connection in (source, target):
            with self._lock:
                self._connections.discard(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _tell_request(self, content: bytes, ends: frozenset[socket.socket], asked: dict[bytes, Message]) -> None:
        (api,) = struct.unpack_from(">h", content)
        (length,) = struct.unpack_from(">h", content, 8)
        request = asked[content[4:8]] = Message(content[10 : 10 + length].decode(), api, ends)
        self.on_request(request)

    def _tell_answer(self, content: bytes, ends: frozenset[socket.socket], asked: dict[bytes, Message]) -> None:
        self.on_answer(asked.pop(content[:4]))


def _content(stream: BinaryIO) -> bytes:
    (size,) = struct.unpack(">i", stream.read(4))
    return stream.read(size)
