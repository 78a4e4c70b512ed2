"""The live page as the service gives it: whole without a script, harmless whatever streams are called, bounded."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from model.config import ModelConfig
from model.grid import Grid
from service import page
from service.page import READERS_MAX, charts
from service.page.data import COLUMNS, MAP_SAYS, ODD
from service.page.statics import HERE, statics
from tests.served import until
from tests.service.conftest import (
    CONFIG,
    EXAMPLE_STREAM,
    HOUR_MS,
    STREAMS,
    Running,
    record,
    time_at,
    value_at,
)
from tests.service.test_api import connect, ok, problem_of, read_events
from tests.service.test_owners import feed, named, share

Start = Callable[..., Running]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "a/b?c=d&e#f",
    "100%25 & more",
    "./x",
    "zürich/температура/温度",
]


class Seen(HTMLParser):
    """What a browser finds in a page: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        """An attribute of all elements of a kind."""
        return [value for kind, attributes in self.elements if kind == tag and (value := attributes.get(name))]


def got(api: Running, path: str = "/", status: int = 200, **params: Any) -> Seen:
    answer = api.client.get(path, params=params or None)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Seen(answer.text)


def streams_of(seen: Seen) -> list[str]:
    """The ids that a list leads to."""
    queries = [parse_qs(urlsplit(href).query) for href in seen.all("a", "href")]
    return [query["stream"][0] for query in queries if "stream" in query]


def kinds(seen: Seen) -> Counter[str]:
    """How many elements there are of each kind."""
    return Counter(kind for kind, _ in seen.elements)


@contextmanager
def events(api: Running, **asked: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """What a page is told, one event after another."""
    with api.client.stream("GET", "/page/events", params=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(event["data"]) for event in read_events(answer, 1_000))


class TestList:
    def test_it_lists_every_stream_with_its_numbers(self, api: Running) -> None:
        seen = got(api)
        assert streams_of(seen) == sorted(STREAMS)
        for told in ok(api.client.get("/v1/streams"))["streams"]:
            assert f"{told['observed']:.4g}" in seen.text
            assert f"{told['scores']['mase']:.2f}" in seen.text
        assert "2026-11-19 23:00" in seen.text

    def test_it_can_be_searched_and_put_into_order(self, api: Running) -> None:
        assert streams_of(got(api, q="7/temp")) == ["site 7/temperature"]
        assert "No stream has “nobody” in its id" in got(api, q="nobody").text
        for order in ("anomaly", "error", "heard"):
            expected = [each["stream"] for each in ok(api.client.get(f"/v1/streams?order={order}"))["streams"]]
            assert streams_of(got(api, order=order)) == expected

    def test_many_are_listed_page_by_page(self, start: Start) -> None:
        api = start()
        ids = sorted(f"s{n}" for n in range(120))
        api.feed([record(stream, time_at(0), 1.0) for stream in ids])
        seen, path = [], "/"
        while path:
            listed = got(api, path)
            assert len(streams_of(listed)) <= 50
            seen += streams_of(listed)
            path = next((href for href in listed.all("a", "href") if "after=" in href), "")
        assert seen == ids
        assert "The first 50 of 120" in got(api, order="heard").text

    def test_without_any_stream_it_tells_how_to_begin_one(self, start: Start) -> None:
        api = start(bootstrap_servers="kafka:9092", observations_topic="meters")
        text = got(api).text
        assert "carousel replay TABLE.csv --bootstrap-servers kafka:9092 --topic meters --speed 3600" in text

    def test_it_says_how_the_worker_fares(self, start: Start) -> None:
        api = start()
        assert "ready" in got(api).text
        api.worker.unready = "partitions are being restored"
        assert "partitions are being restored" in got(api).text

    def test_where_some_worker_cannot_be_asked_it_says_so_and_tries_again(self, start: Start) -> None:
        api = start()
        share({"here": api}, {"here": {0, 1}})
        assert "This page tries again by itself" in got(api, status=503).text
        share({"here": api}, {"here": {0, 1, 2, 3}})
        with events(api) as told:
            assert "No stream yet" in next(told)["html"]["streams"]


class TestStream:
    def test_it_shows_what_the_api_tells(self, api: Running) -> None:
        seen = got(api, stream=EXAMPLE_STREAM)
        detail = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}"))
        for number in (detail["observed"], detail["forecast"]["quantiles"]["0.5"][0]):
            assert f"{number:.4g}" in seen.text
        assert f"1 in {10 ** detail['anomaly']:,.0f}" in seen.text
        for measures in detail["scores"]["by_horizon"].values():
            assert f"{measures['mase']:.3f}" in seen.text
        assert "2026-11-20 00:00" in seen.text, "the first step of the forecast"

    def test_its_charts_have_what_was_and_what_comes(self, api: Running) -> None:
        with events(api, stream=EXAMPLE_STREAM) as told:
            shown = next(told)["charts"]
        past = ok(api.client.get(f"/v1/streams/{EXAMPLE_STREAM}/history"))["observations"]
        forecast = ok(api.predict({"stream": EXAMPLE_STREAM}))
        assert shown["past"]["time"] == [each["ts"] for each in past]
        assert shown["past"]["value"] == [each["value"] for each in past]
        for column, quantile in (("low", "0.1"), ("middle", "0.5"), ("high", "0.9")):
            assert shown["past"][column] == [each["forecast"][quantile] for each in past]
        assert shown["fan"]["time"] == [forecast["ts"], *forecast["timestamps"]]
        for column, quantile in (("q0", "0.1"), ("q1", "0.5"), ("q2", "0.9")):
            assert shown["fan"][column] == [forecast["observed"], *forecast["quantiles"][quantile]]
        assert shown["odd"]["time"] == [each["ts"] for each in past if (each["anomaly"] or 0) >= ODD]
        assert shown["now"] == {"time": [forecast["ts"]], "value": [forecast["observed"]]}

    def test_a_gap_is_not_drawn_over(self, start: Start) -> None:
        api = start()
        for n in (0, 1, 2, 6, 7):
            api.feed([record("a", time_at(n), None if n == 1 else float(n))])
        with events(api, stream="a") as told:
            past = next(told)["charts"]["past"]
        assert past["time"] == [time_at(0), time_at(1), time_at(2), time_at(4), time_at(6), time_at(7)]
        assert past["value"] == [0.0, None, 2.0, None, 6.0, 7.0]

    def test_only_what_has_changed_is_told_again(self, start: Start) -> None:
        api = start()
        api.feed([record("a", time_at(0), 1.0), record("b", time_at(0), 2.0)])
        with events(api, stream="a") as told:
            assert next(told)["charts"]["past"]["value"] == [1.0]
            api.feed([record("b", time_at(1), 3.0)])
            api.feed([record("a", time_at(1), 4.0)])
            fresh = next(told)
        assert fresh["charts"]["past"]["value"] == [1.0, 4.0]
        assert "notice" not in fresh["html"]

    def test_who_is_unknown_is_said_and_shown_once_it_begins(self, start: Start) -> None:
        api = start()
        assert "No worker has heard a stream of this id" in got(api, stream="a", status=404).text
        with events(api, stream="a") as told:
            assert "No worker has heard" in next(told)["html"]["notice"]
            api.feed([record("a", time_at(0), 1.0)])
            fresh = next(told)
        assert fresh["html"]["notice"] == ""
        assert fresh["charts"]["past"]["value"] == [1.0]

    def test_every_worker_shows_it(self, start: Start) -> None:
        pair = start(), start()
        share({"first": pair[0], "second": pair[1]}, {"first": {0, 1}, "second": {2, 3}})
        stream = named(0, 1)
        feed(pair, stream, 2)
        shown = []
        for worker in pair:
            with events(worker, stream=stream, inside=1) as told:
                shown.append(next(told))
        assert shown[0] == shown[1]
        assert shown[0]["charts"]["past"]["value"] == [20.0, 21.0, 22.0]
        assert "No worker has heard" in got(pair[0], stream="nobody", status=404).text


class TestInside:
    @pytest.mark.parametrize("cell", MAP_SAYS)
    def test_a_column_is_what_each_unit_did_at_the_last_step(self, start: Start, cell: str) -> None:
        api = start(
            ModelConfig(grid=Grid(HOUR_MS), season=2, horizon=2, quantiles=(0.1, 0.9), cell=cell, hidden_size=4)
        )
        for n in range(3):
            api.feed([record("a", time_at(n), value_at(n))])
        state = ok(api.client.get("/v1/streams/a/state"))["layers"]
        with events(api, stream="a", inside=1) as told:
            first = next(told)
        maps = first["inside"]["step"]["maps"]
        assert sorted(maps) == sorted(f"{name}-{layer}" for name in MAP_SAYS[cell] for layer in (0, 1))
        for layer in (0, 1):
            assert maps[f"hidden-{layer}"] == pytest.approx(state[layer]["h"], abs=1e-3)
            for gate, values in state[layer]["gates"].items():
                assert maps[f"{gate}-{layer}"] == pytest.approx(values, abs=1e-3)
            if cell == "lstm":
                keeps = sum(state[layer]["gates"]["forget"]) / 4
                assert f"keeps {keeps:.0%} of its cell" in first["html"][f"doings-{layer}"]

    def test_nobody_looks_inside_unless_asked(self, api: Running) -> None:
        with events(api, stream=EXAMPLE_STREAM) as told:
            first = next(told)
        assert "inside" not in first
        assert not [name for name in first["html"] if name.startswith("doings")]


class TestCharts:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_each_is_for_an_element_of_the_page(self, api: Running, scheme: str) -> None:
        made = ok(api.client.get(f"/page/charts/{scheme}"))
        elements = {attributes.get("id") for _, attributes in got(api, stream=EXAMPLE_STREAM).elements}
        assert set(made) == {"forecast", *(f"{name}-{layer}" for name in MAP_SAYS["lstm"] for layer in (0, 1))}
        assert set(made) <= elements
        assert f'"shape":[{CONFIG.hidden_size},{COLUMNS}]' in json.dumps(made["cell-0"], separators=(",", ":"))
        problem_of(api.client.get("/page/charts/blue"), 404)

    def test_they_have_the_pages_colours(self) -> None:
        light, dark = (HERE / "page.css").read_text().split("prefers-color-scheme: dark", 1)
        for colours, scheme in ((charts.LIGHT, light), (charts.DARK, dark)):
            for name, colour in vars(colours).items():
                assert f"--{name}: {colour};" in scheme

    def test_a_model_without_a_clock_counts_steps(self, start: Start) -> None:
        api = start(ModelConfig(season=1, horizon=2, quantiles=(0.5,), cell="rnn", hidden_size=4))
        for n in range(3):
            api.feed([record("a", time_at(n), float(n))])
        with events(api, stream="a") as told:
            shown = next(told)["charts"]
        assert (shown["past"]["time"], shown["fan"]["time"], shown["now"]["time"]) == ([-2, -1, 0], [0, 1, 2], [0])
        assert "steps from the last observation" in api.client.get("/page/charts/light").text
        assert "Steps ahead" in got(api, stream="a").text


class TestSafety:
    @pytest.mark.parametrize("stream", HOSTILE)
    def test_an_id_is_text_and_nothing_else(self, start: Start, stream: str) -> None:
        api = start()
        nothing = kinds(got(api, q="x"))
        lists = []
        for one in ("harmless", "another", stream):
            api.feed([record(one, time_at(0), 0.0)])
            lists.append(kinds(got(api)))
        assert lists[2] - lists[1] == lists[1] - lists[0], "a row like any other"
        assert kinds(got(api, q=stream + "x")) == nothing
        links = got(api).all("a", "href")
        (href,) = [href for href in links if parse_qs(urlsplit(href).query).get("stream") == [stream]]
        shown = got(api, href)
        assert stream in shown.text
        assert kinds(shown) == kinds(got(api, stream="harmless"))
        with events(api, stream=stream) as told:
            assert next(told)["charts"]["past"]["value"] == [0.0]
        with events(api) as told:
            rows = Seen(next(told)["html"]["streams"])
        assert stream in rows.text
        assert kinds(rows)["tr"] == 4
        assert not kinds(rows).keys() & {"script", "img"}

    def test_nothing_comes_from_elsewhere(self, api: Running) -> None:
        for params in ({}, {"stream": EXAMPLE_STREAM}):
            answer = api.client.get("/", params=params)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self';" in policy
            assert "script-src" not in policy, "scripts are only those of the service"
            assert answer.headers["x-content-type-options"] == "nosniff"
            seen = Seen(answer.text)
            addresses = [value for _, each in seen.elements for name in ("href", "src") if (value := each.get(name))]
            assert addresses
            assert all(address.startswith(("/", "#")) and not address.startswith("//") for address in addresses)
            assert not [each for _, each in seen.elements if any(name.startswith("on") for name in each)]

    def test_what_never_changes_is_kept_by_the_browser(self, api: Running) -> None:
        seen = got(api, stream=EXAMPLE_STREAM)
        loaded = seen.all("script", "src") + seen.all("link", "href")
        assert sorted(urlsplit(url).path.rpartition("/")[2] for url in loaded) == sorted(statics())
        for url in loaded:
            answer = api.client.get(url)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
            plain = api.client.get(url, headers={"accept-encoding": "identity"})
            assert "content-encoding" not in plain.headers
            assert plain.content == answer.content
        assert api.client.get("/page/static/page.js").headers["cache-control"] == "no-cache"
        for unknown in ("nothing.js", "__init__.py", "..%2f__init__.py"):
            problem_of(api.client.get(f"/page/static/{unknown}"), 404)

    def test_readers_are_bounded_and_leave(self, start: Start) -> None:
        api = start()
        readers = [connect(api) for _ in range(READERS_MAX)]
        for reader in readers:
            reader.sendall(b"GET /page/events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert reader.recv(12) == b"HTTP/1.1 200"
        answer = api.client.get("/page/events")
        assert "retry-after" in answer.headers
        assert str(READERS_MAX) in problem_of(answer, 503)["detail"]
        for reader in readers:
            reader.shutdown(socket.SHUT_RDWR)
            reader.close()

        def admitted() -> bool:
            with api.client.stream("GET", "/page/events") as answer:
                return answer.status_code == 200

        until("a place among the readers", admitted)

    def test_stopping_ends_them(self, start: Start) -> None:
        api = start()
        begun, ended = threading.Event(), threading.Event()

        def read() -> None:
            with httpx.stream("GET", f"{api.server.url}/page/events", timeout=20) as answer:
                for _ in answer.iter_lines():
                    begun.set()
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        assert begun.wait(10)
        api.server.stop()
        assert ended.wait(3), "it was cut off, and did not end"

    def test_nothing_is_looked_up_while_nobody_looks(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        looks: list[object] = []
        genuine = page.LivePage.told
        monkeypatch.setattr(page.LivePage, "told", lambda self, asked: looks.append(asked) or genuine(self, asked))
        monkeypatch.setattr(page, "EVERY_S", 0.01)
        api = start()
        with events(api) as told:
            next(told)
            until("some looks", lambda: len(looks) > 3)

        def still() -> bool:
            before = len(looks)
            ok(api.client.get("/livez"))
            return not threading.Event().wait(0.1) and len(looks) == before

        until("no more of them", still)

    def test_the_api_does_not_tell_of_the_page(self, api: Running) -> None:
        assert not [path for path in ok(api.client.get("/openapi.json"))["paths"] if "page" in path or path == "/"]


def test_without_bokeh_it_says_how_to_get_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    api = start()
    assert "pip install 'carousel[page]'" in got(api).text


def test_the_worker_is_timed_while_one_looks(start: Start) -> None:
    api = start()
    with events(api) as told:
        next(told)
        api.metrics.forecasts.inc(50)
        api.metrics.end_to_end_seconds.observe([0.004] * 99 + [0.4])
        paces = (Seen(event["html"]["worker"]).text for event in told if "worker" in event.get("html", {}))
        shown = next(text for text in paces if "99% within" in text)
    assert re.search(r"Forecasts a second\s*[1-9]", shown)
    assert re.search(r"Latency\s*[2-5](\.\d+)? ms", shown)


def test_a_classifiers_page_tells_what_it_does(tmp_path: Path) -> None:
    from tests.service.test_classify import LABELS, bundle, serve

    for client in serve(bundle(LABELS)):
        answer = client.get("/")
        assert answer.status_code == 200
        seen = Seen(answer.text)
        assert all(label in seen.text for label in LABELS)
        (body,) = re.findall(r"-d '(.*)'", seen.text)
        asked = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
        assert asked.status_code == 200, "what the page says to ask is answered"
        for url in seen.all("link", "href"):
            assert client.get(url).status_code == 200


def test_statics_are_packed_well() -> None:
    for static in statics().values():
        assert gzip.decompress(static.packed) == static.content
