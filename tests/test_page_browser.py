"""The live page in a genuine browser, on a genuine service: what one who looks at it sees, and what never happens."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, ViewportSize, expect, sync_playwright

from deploy.demo import SAMPLE, bundle_directory
from deploy.replay import ReplayConfig, replay
from service.page.data import COLUMNS
from tests.deploy.prometheus import free_port
from tests.served import Served, observation, random_bundle, serving, until
from training.table import Observed, read_table

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LIMIT_MS = 60_000
DESKTOP = ViewportSize(width=1280, height=900)
PHONE = ViewportSize(width=390, height=844)
HOSTILE = '<img src=x onerror="window.harmed = true"><script>window.harmed = true</script>'
LONG = "a-stream-whose-id-takes-all-the-room-that-there-is/" * 5
STREAMS = ("alpha", "beta/2", "gamma 100%", HOSTILE, LONG)
SEEN = 60
HELD_BACK = 336
LIVE = 60 if "CAROUSEL_SCREENSHOTS" in os.environ else 2
"""Of so many hours of the sample's series, so many are played while one looks."""
SHOTS = os.environ.get("CAROUSEL_SCREENSHOTS")
"""A directory: there the pictures of the page go, of the demo's own model, which the demo must have trained before."""

UNKNOWN = ("Failed to load resource: the server responded with a status of 404",)
AWAY = ("Failed to load resource: net::ERR_",)
"""What Chromium itself says of a page that is not there, and of a service that is away."""

expect.set_options(timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None and os.environ.get("CI"):
        pytest.fail("chromium is not installed: .ci/run installs Debian's package")
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that has heard some hours of each stream; its port stays the same when it is started again."""
    directory = tmp_path_factory.mktemp("page")
    with serving(random_bundle(directory / "bundle"), bootstrap_servers, directory, http_port=free_port()) as served:
        produce(served, range(SEEN))
        served.read(served.forecasts, SEEN * len(STREAMS))
        yield served


def value_at(step: int, stream: str) -> float:
    return round(50 + 10 * math.sin(2 * math.pi * step / 24) + len(stream) + step * 7919 % 13 / 13, 3)


def produce(served: Served, steps: range, *streams: str) -> None:
    each = [(stream, step) for step in steps for stream in streams or STREAMS]
    served.produce([(stream.encode(), observation(step, value_at(step, stream))) for stream, step in each])


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page: `open_page(url, **how)`. Fails where any said an error that is not `allowed`, or asked another host
    for anything.
    """
    wrong: list[str] = []
    contexts = []

    def opened(url: str, viewport: ViewportSize = DESKTOP, allowed: tuple[str, ...] = (), **how: Any) -> Page:
        contexts.append(browser.new_context(viewport=viewport, **how))
        contexts[-1].set_default_timeout(LIMIT_MS)
        page = contexts[-1].new_page()

        def noted(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not message.text.startswith(allowed):
                wrong.append(message.text)

        def asked(request: Request) -> None:
            if urlsplit(request.url).netloc != urlsplit(url).netloc and not request.url.startswith("data:"):
                wrong.append(f"asked for {request.url}")

        page.on("console", noted)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def url_of(served: Served, **asked: str) -> str:
    return f"{served.url}/?{urlencode(asked)}"


def last_drawn(page: Page, value: float) -> None:
    """Wait until the chart ends with a value."""
    page.wait_for_function(
        "value => window.Bokeh?.documents[0]?.get_model_by_name('past')?.data.value?.at(-1) === value", arg=value
    )


def columns_drawn(page: Page, name: str) -> int:
    """How many steps a heat map shows."""
    script = """([name, steps]) => {
      const source = Bokeh.documents.map((doc) => doc.get_model_by_name(name)).find((model) => model);
      const row = source ? Array.from(source.data.image[0]).slice(0, steps) : [];
      return row.filter((value) => !Number.isNaN(value)).length;
    }"""
    return int(page.evaluate(script, [name, COLUMNS]))


def test_new_points_appear_in_list_and_chart(served: Served, open_page: Callable[..., Page]) -> None:
    listed, shown = open_page(served.url), open_page(url_of(served, stream="alpha"))
    last_drawn(shown, value_at(SEEN - 1, "alpha"))
    chart = shown.locator("#forecast")
    before = chart.screenshot()
    produce(served, range(SEEN, SEEN + 2), "alpha")
    last_drawn(shown, value_at(SEEN + 1, "alpha"))
    told = f"{value_at(SEEN + 1, 'alpha'):.4g}"
    expect(shown.locator("#facts")).to_contain_text(told)
    expect(listed.locator("tr", has_text="alpha")).to_contain_text(told)
    until("the chart is drawn anew", lambda: chart.screenshot() != before)


def test_the_gates_grow_while_one_looks(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(url_of(served, stream="gamma 100%"))
    inside = page.get_by_text("Inside the LSTM, layer 2 of 2")
    inside.click()
    expect(page.locator("#doings-1")).to_contain_text("reveals")
    until("the first column", lambda: columns_drawn(page, "forget-1") == 1)
    before = page.locator("#cell-1").screenshot()
    produce(served, range(SEEN, SEEN + 1), "gamma 100%")
    until("a second column", lambda: columns_drawn(page, "forget-1") == 2)
    until("it is drawn", lambda: page.locator("#cell-1").screenshot() != before)
    assert columns_drawn(page, "forget-0") == 0, "nobody looks at the other layer"


def test_it_can_be_searched_and_put_into_order(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    expect(page.locator(".streams tbody tr")).to_have_count(len(STREAMS))
    page.get_by_label("Search").press_sequentially("beta")
    expect(page.locator(".streams tbody tr")).to_have_count(1)
    assert page.url.endswith("?q=beta")
    page.get_by_label("Search").fill("nobody")
    expect(page.locator("#streams")).to_contain_text("No stream has “nobody” in its id")
    page.get_by_label("Search").fill("")
    expect(page.locator(".streams tbody tr")).to_have_count(len(STREAMS))
    page.get_by_role("link", name="oddest").click()
    page.wait_for_url("**/?order=anomaly")
    expect(page.locator(".streams tbody tr")).to_have_count(len(STREAMS))
    oddness = [float(text.split()[0]) for text in page.locator(".streams td:nth-child(5)").all_inner_texts()]
    assert oddness == sorted(oddness, reverse=True)


def test_a_keyboard_reaches_a_stream(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    page.keyboard.press("Tab")
    assert focused(page, "textContent") == "Skip to the content"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.get_by_label("Search").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = focused(page, "textContent")
    assert second == sorted(STREAMS)[1]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    produce(served, range(SEEN + 2, SEEN + 3), "alpha")
    expect(page.locator("tr", has_text="alpha")).to_contain_text(f"{value_at(SEEN + 2, 'alpha'):.4g}")
    assert focused(page, "textContent") == second, "what comes in takes the focus away from nobody"
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(second)


def focused(page: Page, name: str) -> str:
    return str(page.evaluate(f"document.activeElement.{name}")).strip()


def test_an_id_is_shown_and_never_run(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    page.get_by_role("link", name="onerror").click()
    last_drawn(page, value_at(SEEN - 1, HOSTILE))
    expect(page.locator("h1")).to_have_text(HOSTILE)
    produce(served, range(SEEN, SEEN + 1), HOSTILE)
    last_drawn(page, value_at(SEEN, HOSTILE))
    assert page.evaluate("window.harmed") is None
    page.goto(served.url)
    expect(page.locator("tr", has_text="onerror")).to_contain_text(f"{value_at(SEEN, HOSTILE):.4g}")
    assert page.evaluate("window.harmed") is None


@pytest.mark.parametrize("stream", ["", "alpha", LONG])
def test_a_phone_is_wide_enough(served: Served, open_page: Callable[..., Page], stream: str) -> None:
    page = open_page(url_of(served, stream=stream) if stream else served.url, PHONE)
    if stream:
        last_drawn(page, value_at(SEEN - 1, stream) if stream == LONG else value_at(SEEN + 2, stream))
        for summary in page.locator("summary").all():
            summary.click()
        until("the first column", lambda: columns_drawn(page, "forget-1"))
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_in_the_dark_it_is_dark(served: Served, open_page: Callable[..., Page]) -> None:
    shots = []
    for scheme in ("light", "dark"):
        page = open_page(url_of(served, stream="alpha"), color_scheme=scheme)
        last_drawn(page, value_at(SEEN + 2, "alpha"))
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(","))
        assert (brightness > 600) if scheme == "light" else (brightness < 100)
        shots.append(page.locator("#forecast").screenshot())
    assert shots[0] != shots[1]


def test_who_is_unknown_is_said_and_appears_once_it_begins(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(url_of(served, stream="late comer"), allowed=UNKNOWN)
    expect(page.locator("#notice")).to_contain_text("No worker has heard a stream of this id")
    expect(page.locator("#forecast")).to_be_hidden()
    produce(served, range(1), "late comer")
    last_drawn(page, value_at(0, "late comer"))
    expect(page.locator("#forecast")).to_be_visible()
    expect(page.locator("#notice")).to_have_text("")


def test_it_goes_on_when_the_service_was_away(served: Served, open_page: Callable[..., Page]) -> None:
    """Without being loaded again: what was put on it by hand is still there."""
    page = open_page(url_of(served, stream="beta/2"), allowed=AWAY)
    last_drawn(page, value_at(SEEN - 1, "beta/2"))
    page.evaluate("window.stays = true")
    served.stop()
    expect(page.locator("#connection")).to_contain_text("Connection lost")
    served.start()
    produce(served, range(SEEN, SEEN + 2), "beta/2")
    last_drawn(page, value_at(SEEN + 1, "beta/2"))
    expect(page.locator("#connection")).to_be_hidden()
    assert page.evaluate("window.stays") is True


@pytest.fixture(scope="module")
def sample(
    request: pytest.FixtureRequest, bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, list[Observed]]]:
    """A service that has heard the last weeks of the sample but for their end, which is handed over."""
    series = read_table(SAMPLE)
    ids = {each.unique_id for each in series}
    with ExitStack() as stack:
        if SHOTS:
            directory = tmp_path_factory.mktemp("sample")
            served = stack.enter_context(serving(bundle_directory(), bootstrap_servers, directory, compiled=True))
        else:
            served = request.getfixturevalue("served")
        play(served, [rows(each, slice(-HELD_BACK, -LIVE)) for each in series])

        def heard() -> int:
            listed = served.get("/v1/streams?limit=1000")["streams"]
            return sum(each["count"] for each in listed if each["stream"] in ids)

        until("the sample", lambda: heard() == len(series) * (HELD_BACK - LIVE))
        yield served, [rows(each, slice(-LIVE, None)) for each in series]


def rows(series: Observed, part: slice) -> Observed:
    return replace(series, ts_ms=series.ts_ms[part], y=series.y[part], covariates=series.covariates[part])


def play(served: Served, series: Sequence[Observed]) -> None:
    replay(series, ReplayConfig(served.servers, served.observations, speed=0, align=True))


def keep(picture: bytes, path: Path) -> None:
    """Save a picture in half as many bytes; nobody sees the difference."""
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def test_pictures_of_it_can_be_taken(
    sample: tuple[Served, list[Observed]], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    """On a desk and on a phone, by day and by night; of the list, and of a stream with its insides."""
    served, series = sample
    directory = Path(SHOTS) if SHOTS else tmp_path
    streams, lists = (
        {
            f"{name}-{scheme}": open_page(url, viewport, color_scheme=scheme)
            for name, viewport in (("desktop", DESKTOP), ("phone", PHONE))
            for scheme in ("light", "dark")
        }
        for url in (url_of(served, stream="VIC"), served.url)
    )
    for page in streams.values():
        page.locator("summary", has_text="layer 1").click()
        until("the first column", lambda page=page: columns_drawn(page, "forget-0"))
    for step in range(LIVE):
        play(served, [rows(each, slice(step, step + 1)) for each in series])
        for page in streams.values():
            until("a column more", lambda page=page, step=step: columns_drawn(page, "forget-0") > min(step + 1, 59))
    for name, page in lists.items():
        expect(page.locator("#worker")).to_contain_text("99% within")
        keep(page.screenshot(), directory / f"list-{name}.png")
    for name, page in streams.items():
        page.evaluate("scrollTo(0, 0)")
        keep(page.screenshot(full_page=name.startswith("desktop")), directory / f"stream-{name}.png")
        keep(page.locator("details[open]").screenshot(), directory / f"inside-{name}.png")
    taken = list(directory.glob("*.png"))
    assert len(taken) == 12
    assert all(picture.stat().st_size > 10_000 for picture in taken)
