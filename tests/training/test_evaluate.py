"""`carousel backtest`: from a bundle and a table to what is printed, written and drawn."""

from __future__ import annotations

import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from model.bundle import Bundle, save_bundle
from model.network import Forecaster
from tests.training.synthetic import forecaster, series
from training.backtest import CAROUSEL, NAIVE, backtest
from training.evaluate import Evaluation, run
from training.measures import overall
from training.report import page, write_report
from training.series import Series
from training.table import Columns, TableError


@pytest.fixture
def model() -> Forecaster:
    return forecaster()


@pytest.fixture
def bundle(model: Forecaster, tmp_path: Path) -> Bundle:
    return save_bundle(tmp_path / "bundle", model, name="tiny", training={"test_steps": 16}, scores={})


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    frames = [
        pd.DataFrame({"id": each.unique_id, "ds": pd.to_datetime(each.ts_ms, unit="ms"), "y": each.y})
        for each in (series(90, 0), series(80, 1))
    ]
    pd.concat(frames).to_csv(tmp_path / "load.csv", index=False)
    return tmp_path / "load.csv"


def test_it_forecasts_what_was_held_back_and_prints_how_good_that_was(
    bundle: Bundle, csv: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=160)
    file = tmp_path / "forecasts.parquet"
    result = run(bundle, csv, Columns(unique_id="id"), baselines="none", forecasts=file, console=console).result
    assert len(result.of) == 2 * (16 - 4 + 1)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"tiny-{bundle.weights_sha256[:8]}: 26 forecasts" in printed
    for words in (CAROUSEL, NAIVE, "s0", "s1", "step ahead", "rmsse", f"{overall(result)[CAROUSEL].wql:.4f}"):
        assert words in printed
    assert len(pd.read_parquet(file)) == 26 * 4


def test_baselines_stand_in_a_table_of_their_own_with_carousel_on_the_same_origins(bundle: Bundle, csv: Path) -> None:
    pytest.importorskip("statsforecast")
    console = Console(file=io.StringIO(), width=160)
    made = run(bundle, csv, Columns(unique_id="id"), baselines="theta", baseline_origins=5, console=console)
    assert made.shared is not None
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "at 5 of these origins" in printed
    assert "5 of 26 origins" in printed
    for result in (made.result, made.shared.result):
        assert f"{overall(result)[CAROUSEL].wql:.4f}" in printed
    assert f"{overall(made.shared.result)['AutoTheta'].wql:.4f}" in printed


def test_it_takes_last_and_every(bundle: Bundle, csv: Path) -> None:
    console = Console(file=io.StringIO())
    result = run(bundle, csv, Columns(unique_id="id"), last=30, every=9, baselines="none", console=console).result
    assert len(result.of) == 2 * 3
    whole = run(bundle, csv, Columns(unique_id="id"), last=10_000, every=1, baselines="none", console=console).result
    assert len(whole.of) == 90 + 80 - 2 * 4, "from the first observation on, where there are no more"


def test_a_table_without_the_models_covariates_is_refused(csv: Path, tmp_path: Path) -> None:
    heated = save_bundle(tmp_path / "heated", forecaster(covariates=("heat",)), name="h", training={}, scores={})
    with pytest.raises(TableError, match="heat"):
        run(heated, csv, Columns(unique_id="id"))


# --- The report -------------------------------------------------------------------------------------------------


def evaluated(bundle: Bundle, many: list[Series]) -> Evaluation:
    result = backtest(bundle.forecaster, many, [len(each.y) - 30 for each in many], 1)
    return Evaluation(bundle, "load.csv", many, result)


class Tags(HTMLParser):
    """Counts elements, collects what a browser would fetch, and refuses what is never closed."""

    VOID = ("meta", "br", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_page_that_fetches_nothing(bundle: Bundle, tmp_path: Path) -> None:
    made = evaluated(bundle, [series(90 + 10 * seed, seed) for seed in range(6)])
    written = write_report(tmp_path / "report", made)
    assert written == tmp_path / "report" / "index.html"
    text = written.read_text()
    tags = Tags(text)
    assert tags.fetched == []
    assert not re.search(r"@import|<script|url\((?!#)", text)
    assert tags.count["svg"] == 3 + 2 + 1, "three fans, reliability and coverage, error by horizon"
    assert write_report(tmp_path / "a" / "b.html", made) == tmp_path / "a" / "b.html"


def test_the_report_says_what_was_measured(bundle: Bundle) -> None:
    made = evaluated(bundle, [series(90, seed) for seed in range(6)])
    text = page(made)
    for row in overall(made.result).values():
        for words in (f"{row.wql:.4f}", f"{row.rmsse:.3f}", f"{row.coverage[0.8]:.1%}"):
            assert words in text
    assert all(f"<td>s{number}</td>" in text for number in range(6))
    for place in ("best", "median", "worst"):
        assert f"The {place} series: s" in text


def test_equal_backtests_give_equal_pages(bundle: Bundle) -> None:
    many = [series(90), series(90, 1)]
    assert page(evaluated(bundle, many)) == page(evaluated(bundle, many))


def test_names_are_shown_as_they_are_whatever_they_hold(bundle: Bundle) -> None:
    text = page(evaluated(bundle, [series(90, name="<script>$1 & co")]))
    assert "&lt;script&gt;$1 &amp; co" in text
    assert "<script>" not in text


def test_one_flat_series_makes_a_page_too(bundle: Bundle) -> None:
    flat = dataclasses.replace(series(90), y=np.full(90, 5.0))
    text = page(evaluated(bundle, [flat]))
    assert Tags(text).count["svg"] == 1 + 2 + 1
    assert "—" in text


def test_a_horizon_of_one_step_and_no_clock_make_a_page_too(tmp_path: Path) -> None:
    single = forecaster(horizon=1, quantiles=(0.5,), grid=None)
    made = save_bundle(tmp_path, single, name="single", training={}, scores={})
    assert "one step" in page(evaluated(made, [series(90)]))


def test_a_gap_in_what_is_forecast_makes_a_page_too(bundle: Bundle) -> None:
    broken = series(90)
    broken.y[70:75] = np.nan
    assert "The best series" in page(evaluated(bundle, [broken, series(90, 1)]))
