"""Which worker has a stream, and passing requests on to it: so that any worker answers for any stream.

A stream is looked for in the same order whichever worker is asked, so all answer alike: first where producers' own
partitioners put its id, then everywhere; of several streams of that id the one last heard counts. What a worker has
live it answers itself, without asking anybody. Nobody is taken at another's word: that a partition has no such stream
is said by the worker that has it live, or it is not said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, takewhile
from typing import Protocol, TypeVar
from urllib.parse import urlencode

import httpx
import orjson

from service.engine import Engine
from service.errors import Refused
from service.guard import problem
from service.metrics import Metrics
from service.roster import Roster, first
from service.schemas import Page
from service.transport.contract import Described, Group
from service.views import Content, Fields, Partitions

PARTITION_HEADER = "carousel-partition"
"""With a request passed on: the partition that it is about, or `any`. It is not passed on again."""
PARTITIONS_HEADER = "carousel-partitions"
"""With its answer: the partitions whose streams were all seen to, by commas. Without it "not found" proves nothing."""
ANY = "any"
PARTITION_PATTERN = rf"^({ANY}|[0-9]{{1,9}})$"
PASSED_BACK = ("content-type", "retry-after")

FRESH_S = 1.0
"""Age at which what is known of the group is asked for anew."""
ALONE_FRESH_S = 10.0
"""The same for a worker that has all partitions: only one that is added could surprise it."""
AWAY_S = 5.0
"""Time for which Kafka is left alone after it did not answer."""
CONNECT_S = 1.0
WHOLE_S = 4.0
"""Time in which all others that a request needs must have answered: many clients wait for 5 s."""
AT_ONCE = 16
"""Requests that may wait for others at a time: fewer than there are threads, so that those remain for answers."""

T = TypeVar("T")


class Pulse(Protocol):
    """What is asked of the worker."""

    @property
    def unready(self) -> str: ...

    @property
    def live(self) -> Partitions: ...


class Moved(Refused):
    """Nobody answered for a partition. answer: what its owner said instead, if anything."""

    def __init__(self, detail: str, answer: Answer | None = None) -> None:
        super().__init__(503, detail, retry_after_s=1)
        self.answer = answer


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP, with the headers that count."""

    status: int
    headers: dict[str, str]
    body: bytes


Told = tuple[Answer, Partitions]
"""What another worker answers, and the partitions that it looked into."""


@dataclass(frozen=True)
class Question:
    """A request about one stream. partition: where one of several streams of this id is meant; answer: what is said
    from the streams of these partitions, raises Refused; path and body: how to ask another worker the same, by POST if
    there is a body.
    """

    stream: str
    partition: int | None
    answer: Callable[[Partitions], Content]
    path: str
    body: bytes | None = None


class Owners:
    """Answers from this worker's streams and from those of others. May be used from any thread.

    url: under which the others know this worker.
    """

    def __init__(self, engine: Engine, worker: Pulse, group: Group, url: str, metrics: Metrics) -> None:
        self._worker, self._group, self._url = worker, group, url
        self._roster = Roster(engine)
        self._forwarded = metrics.forwarded
        self._described: Described | None = None
        self._described_at = self._away_at = -float("inf")
        self._describing = threading.Lock()
        # Proxies of the environment are for the world outside, not for the next worker.
        self._http = httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=None))
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._threads = ThreadPoolExecutor(2 * AT_ONCE, thread_name_prefix="forward")

    def close(self) -> None:
        """Hang up, in bounded time."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()
        self._group.close()

    def answer(self, question: Question, only: str | None) -> Answer:
        """The answer to a question, wherever its stream is. only: the `PARTITION_HEADER` that came with it, if any.

        Raises Refused: 404 if the stream is nowhere, 503 where that cannot be known.
        """
        if only is not None:
            return self._for_another(only, question.answer)
        try:
            return self._twice(partial(self._find, question))
        except Moved as moved:
            if self._away_at > self._described_at:
                return self._without_kafka(question, moved)
            if moved.answer:
                return moved.answer
            raise

    def at_hand(self, stream: str, partition: int | None) -> list[Partitions]:
        """Where `answer` would look for a stream, one after another, as long as that is live here and nobody has to be
        asked about it or the group.
        """
        group, live = self._described, self._worker.live
        if group is None or self._stale(time.monotonic() - self._fresh_s()):
            return []
        if partition is not None:
            return [frozenset({partition})] if partition in live else []
        likely = self._group.candidates(stream.encode(), group.partitions)
        looks = [frozenset({one}) for one in takewhile(live.__contains__, likely)]
        return [*looks, live] if live.issuperset(range(group.partitions)) else looks

    def has(self, partitions: Partitions) -> bool:
        """Whether partitions are live here now."""
        return partitions <= self._worker.live

    def page(self, asked: Page, only: str | None) -> Answer:
        """A page of the streams of all workers; with `only`, of this one alone. Raises Refused (503) where one of them
        cannot be asked.
        """
        if only is not None:
            return self._for_another(only, partial(self._roster.page, asked))
        return _said(self._twice(partial(self._pages, asked)))

    def _for_another(self, only: str, answer: Callable[[Partitions], Content]) -> Answer:
        """What this worker says of its own streams, and of which partitions. Raises Refused, but not 404."""
        partitions = self._worker.live if only == ANY else frozenset({int(only)})
        try:
            said = _said(self._here(partitions, answer))
        except Refused as refused:
            if refused.status != 404 or self._worker.unready:
                raise
            said = Answer(404, *problem(404, str(refused)))
        return replace(said, headers=said.headers | {PARTITIONS_HEADER: ",".join(map(str, sorted(partitions)))})

    def _twice(self, attempt: Callable[[Described, float], T]) -> T:
        """Attempt it with what is known of the group; if a partition turns out to have moved, once more with news."""
        begun = time.monotonic()
        deadline = begun + WHOLE_S
        try:
            return attempt(self._group_since(begun - self._fresh_s(), wait=False), deadline)
        except Moved:
            if time.monotonic() > deadline:
                raise
            return attempt(self._group_since(begun, wait=True), deadline)

    def _find(self, question: Question, group: Described, deadline: float) -> Answer:
        """Ask for the stream where it may be. Raises Refused: 404 or Moved."""
        if question.partition is not None:
            likely: Sequence[int] = (question.partition,)
        else:
            likely = self._group.candidates(question.stream.encode(), group.partitions)
        for partition in likely:
            if answer := self._ask(question, partition, group, deadline):
                return answer
        if question.partition is None:
            exact = Page(limit=1, after="", q="", stream=question.stream, order="id")
            for found in self._pages(exact, group, deadline)["streams"]:
                if answer := self._ask(question, found["partition"], group, deadline):
                    return answer
        raise Refused(404, "no stream of this id was heard")

    def _ask(self, question: Question, partition: int, group: Described, deadline: float) -> Answer | None:
        """What a partition's owner answers; None: it has no such stream. Raises Moved."""
        if partition in self._worker.live:
            try:
                return _said(self._here(frozenset({partition}), question.answer))
            except Refused as refused:
                if refused.status == 404:
                    return None
                raise
        if partition >= group.partitions:
            return None
        url = group.owners.get(partition)
        if url is None:
            raise Moved("the stream's partition is just moving from worker to worker; come again in a moment")
        if url == self._url:
            raise Moved(
                f"this worker, {url}, shall have the stream's partition, and has not: either it is just coming (come"
                f" again in a moment), or another worker has the same advertised_url"
            )
        with self._turn():
            answer, about = _wait(self._send(url, str(partition), question.path, question.body, deadline), deadline)
        if answer.status in (200, 404) and partition not in about:
            raise Moved("at the address of the worker that has the stream somebody else answers")
        return None if answer.status == 404 else answer

    def _pages(self, asked: Page, group: Described, deadline: float) -> Fields:
        """What all workers list together, once each partition was answered for. Raises Moved."""
        everywhere, live = frozenset(range(group.partitions)), self._worker.live
        here = partial(self._here, live, partial(self._roster.page, asked))
        if everywhere <= live:
            return here()
        others = {url for partition, url in group.owners.items() if partition not in live} - {self._url}
        path = f"/v1/streams?{urlencode(asked.model_dump(exclude_defaults=True))}"
        with self._turn():
            sent = [self._send(url, ANY, path, None, deadline) for url in others]
            pages, covered = [here()], live
            for answer, about in [_wait(each, deadline) for each in sent]:
                if answer.status == 200 and about:
                    pages.append(orjson.loads(answer.body))
                    covered |= about
        if not everywhere <= covered:
            raise Moved("some partitions are just moving from worker to worker; come again in a moment")
        return merge(pages, asked)

    def _here(self, partitions: Partitions, answer: Callable[[Partitions], T]) -> T:
        """What this worker says of its own streams. Raises Moved unless these are live, before and after."""
        with self._live(partitions):
            return answer(partitions)

    @contextmanager
    def _live(self, partitions: Partitions) -> Iterator[None]:
        moved = Moved("the partition is not, or not yet, with this worker; come again in a moment")
        if not partitions <= self._worker.live:
            raise moved
        try:
            yield
        finally:
            if not partitions <= self._worker.live:  # its streams may have been forgotten meanwhile
                raise moved

    def _without_kafka(self, question: Question, moved: Moved) -> Answer:
        """What this worker knows of the stream: better than nothing while Kafka is away. Raises `moved` if nothing."""
        live = self._worker.live
        try:
            partitions = live if question.partition is None else live & {question.partition}
            return _said(self._here(partitions, question.answer))
        except Refused as refused:
            if refused.status == 404:
                raise moved from refused
            raise

    def _fresh_s(self) -> float:
        group = self._described
        return ALONE_FRESH_S if group and self._worker.live == frozenset(range(group.partitions)) else FRESH_S

    def _group_since(self, since: float, *, wait: bool) -> Described:
        """The group as it was then or later, or as it was last seen: where Kafka does not answer and, unless `wait`,
        while another request asks it. Raises Moved if it never was.
        """
        if self._described_at < since and self._describing.acquire(blocking=wait or self._described is None):
            try:
                asked_at = time.monotonic()
                if self._described_at < since and asked_at > self._away_at + AWAY_S:
                    self._learn(self._group.describe(), asked_at)
            finally:
                self._describing.release()
        if self._described is None:
            raise Moved("Kafka does not say which worker has the stream; come again in a moment")
        return self._described

    def _stale(self, since: float) -> bool:
        """Whether `_group_since` would ask Kafka, without waiting for others who do."""
        away = time.monotonic() <= self._away_at + AWAY_S
        return self._described_at < since and not away and not self._describing.locked()

    def _learn(self, group: Described | None, asked_at: float) -> None:
        if group is None:
            self._away_at = time.monotonic()
            return
        if not group.stable and self._described:
            group = replace(group, owners=self._described.owners)  # most keep what they had
        self._described, self._described_at = group, asked_at

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(blocking=False):
            self._forwarded["busy"].inc()
            raise Refused(503, "too many requests wait for other workers; come again in a moment", retry_after_s=1)
        try:
            yield
        finally:
            self._turns.release()

    def _send(self, url: str, only: str, path: str, body: bytes | None, deadline: float) -> Future[Told]:
        return self._threads.submit(self._request, url + path, only, body, deadline)

    def _request(self, url: str, only: str, body: bytes | None, deadline: float) -> Told:
        """Ask another worker. Raises Moved if it cannot be reached, or has not what it is asked for."""
        headers = {PARTITION_HEADER: only} | ({} if body is None else {"content-type": "application/json"})
        left_s = max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(left_s, connect=min(CONNECT_S, left_s))
        try:
            got = self._http.request(
                "GET" if body is None else "POST", url, content=body, headers=headers, timeout=timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._forwarded["unreachable"].inc()
            raise Moved("the worker that has the stream does not answer; come again in a moment") from error
        passed = {name: got.headers[name] for name in PASSED_BACK if name in got.headers}
        answer = Answer(got.status_code, passed, got.content)
        if answer.status == 503:
            self._forwarded["refused"].inc()
            raise Moved("the worker that has the stream cannot answer now", answer)
        self._forwarded["answered"].inc()
        about = got.headers.get(PARTITIONS_HEADER, "")
        return answer, frozenset(int(partition) for partition in about.split(",") if partition.isdecimal())


def merge(pages: Sequence[Fields], asked: Page) -> Fields:
    """One page of several workers' pages of the same request: complete as far as it goes. A stream that more than one
    has is told by who heard it last.
    """
    streams: dict[str, Fields] = {}
    for one in chain.from_iterable(page["streams"] for page in pages):
        other = streams.setdefault(one["stream"], one)
        streams[one["stream"]] = max(one, other, key=lambda each: (each["ts"], each["partition"]))
    end = min((page["next"] for page in pages if page["next"] is not None), default=None)
    within = first([told for stream, told in streams.items() if end is None or stream <= end], asked.order)
    chosen = within[: asked.limit]
    return {
        "streams": chosen,
        "total": sum(page["total"] for page in pages),
        "next": chosen[-1]["stream"] if len(within) > len(chosen) and asked.order == "id" else end,
    }


def _said(content: Content) -> Answer:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Answer(200, {"content-type": "application/json"}, body)


def _wait(sent: Future[Told], deadline: float) -> Told:
    try:
        return sent.result(max(deadline - time.monotonic(), 0))
    except (TimeoutError, CancelledError) as error:
        sent.cancel()
        raise Moved("the worker that has the stream does not answer in time; come again in a moment") from error
