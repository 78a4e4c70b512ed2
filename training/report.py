"""The report of a backtest: one HTML page that needs nothing else, for people who know nothing of the code."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Template
from typing import SupportsFloat

import numpy as np
import pandas as pd

from model.bundle import Bundle
from training import pictures
from training.backtest import CAROUSEL, NAIVE, Backtest
from training.evaluate import Evaluation
from training.measures import ERRORS, LEVELS, Difference, Measures, by_series, differences, overall, resampled_units

PAGE = Path(__file__).with_name("report.html")
SERIES_MAX = 500
"""Series in the table of the report, the hardest first."""


def write_report(path: Path, evaluation: Evaluation) -> Path:
    """Write the page to a file .html, or as index.html into a directory. -> the file. Raises OSError."""
    if path.suffix.lower() not in (".html", ".htm"):
        path = path / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(evaluation), encoding="utf-8")
    return path


def page(evaluation: Evaluation) -> str:
    """The page, as text. Equal backtests give equal pages."""
    result, bundle = evaluation.result, evaluation.bundle
    shared = evaluation.shared.result if evaluation.shared else None
    config = bundle.config
    first, last = (pd.Timestamp(int(ms), unit="ms") for ms in (result.origin_ms.min(), result.origin_ms.max()))
    values = {
        "title": html.escape(bundle.name),
        "model_id": html.escape(bundle.model_id),
        "table": html.escape(evaluation.table),
        "headline": _headline(result),
        "forecasts": f"{len(result.of):,}",
        "series_count": f"{len(result.ids):,} series" if len(result.ids) > 1 else "one series",
        "horizon": f"{config.horizon:,} steps" if config.horizon > 1 else "one step",
        "period": f"{first.day} {first:%B %Y} to {last.day} {last:%B %Y}",
        "summary": _summary(result),
        "shared": _shared(evaluation),
        "of_which": ", of the series forecast best, middling and worst" if len(result.ids) > 2 else "",
        "fans": "".join(_fans(evaluation)),
        "reliability": pictures.reliability(result, shared),
        "coverage": pictures.coverage_by_step(result),
        "errors": "".join(
            f"<div><p class=note>{len(each.of):,} forecasts</p>{pictures.error_by_step(each)}</div>"
            for each in (result, shared)
            if each
        ),
        "series": _series_table(result),
        "units": resampled_units(result),
        "model": _model(bundle),
    }
    return Template(PAGE.read_text(encoding="utf-8")).substitute(values)


def _headline(result: Backtest) -> str:
    """The one thing to take away, in a sentence."""
    found = differences(result)[NAIVE]["wql"]
    if math.isnan(found.value):
        return "Nothing could be scored."
    way = "smaller" if found.value < 0 else "larger"
    sentence = f"Its errors are <b>{abs(found.value):.0%} {way}</b> than those of repeating the last season"
    if math.isnan(found.low):
        return f"{sentence}."
    if found.low < 0 < found.high:
        return f"{sentence}, but that may be chance (95% interval: {_span(found)})."
    return f"{sentence} (95% interval: {_span(found)})."


def _span(difference: Difference) -> str:
    return f"{100 * difference.low:+.0f}% to {100 * difference.high:+.0f}%".replace("-", "−")


def _cells(cells: Iterable[str], tag: str = "td") -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)


def _number(value: SupportsFloat, digits: int = 3) -> str:
    number = float(value)
    return "—" if math.isnan(number) else f"{number:.{digits}f}"


def _share(value: SupportsFloat) -> str:
    number = float(value)
    return "—" if math.isnan(number) else f"{number:.1%}"


def _summary(result: Backtest) -> str:
    rows, lower = overall(result), differences(result)
    best = {name: min(float(getattr(row, name)) for row in rows.values()) for name in ERRORS}
    head = _cells(
        (
            "method",
            "weighted quantile loss",
            "Carousel beside it",
            "scaled quantile loss",
            "MASE",
            "RMSSE",
            *(f"{level:.0%} interval holds <small>(width)</small>" for level in LEVELS),
        ),
        "th",
    )
    body = "".join(
        f"<tr{' class=ours' if method == CAROUSEL else ''}>"
        + _cells((_label(method), *_summary_row(row, best, lower.get(method))))
        + "</tr>"
        for method, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _summary_row(row: Measures, best: Mapping[str, float], lower: Mapping[str, Difference] | None) -> Iterator[str]:
    for name in ERRORS:
        value = float(getattr(row, name))
        text = _number(value, 4 if name == "wql" else 3)
        yield f"<b>{text}</b>" if value == best[name] else text
        if name == "wql":
            yield _beside(lower["wql"]) if lower else ""
    for level in LEVELS:
        known = level in row.coverage
        yield f"{_share(row.coverage[level])} <small>({_number(row.width[level], 2)})</small>" if known else "—"


def _beside(found: Difference) -> str:
    value = f"{100 * found.value:+.1f}%".replace("-", "−")
    sure = not found.low <= 0 <= found.high and not math.isnan(found.low)
    kind = ("better" if found.value < 0 else "worse") if sure else "unsure"
    span = "" if math.isnan(found.low) else f" <small>{_span(found)}</small>"
    return f"<span class={kind}>{value}</span>{span}"


def _label(method: str) -> str:
    swatch = f'<i style="background:{pictures.colour(method)}"></i>'
    return swatch + html.escape("Carousel" if method == CAROUSEL else method)


def _shared(evaluation: Evaluation) -> str:
    if not evaluation.shared:
        return ""
    count = len(evaluation.shared.result.of)
    return (
        f"<h3>Beside models fitted to each series, at {count:,} of these origins</h3>"
        + _summary(evaluation.shared.result)
        + "".join(f"<p class=note>{html.escape(remark)}</p>" for remark in evaluation.remarks)
    )


def _fans(evaluation: Evaluation) -> Iterator[str]:
    result = evaluation.result
    mase = by_series(result)[CAROUSEL].mase.numpy()
    known = np.flatnonzero(~np.isnan(mase))
    order = known[np.argsort(mase[known], kind="stable")] if len(known) else np.arange(len(result.ids))[:1]
    picked = {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}
    shown = {int(number): word for word, number in reversed(picked.items())}
    for number, word in reversed(shown.items()):
        title = f"The {word} series: " if len(order) > 1 else ""
        error = f" <small>MASE {_number(mase[number], 2)}</small>" if not math.isnan(mase[number]) else ""
        yield f"<h3>{title}{html.escape(result.ids[number])}{error}</h3>"
        yield pictures.fan(result, evaluation.series, number)


def _series_table(result: Backtest) -> str:
    measures = by_series(result)
    ours, naive = measures[CAROUSEL], measures[NAIVE]
    hardest = np.argsort(-ours.mase.nan_to_num(0.0).numpy(), kind="stable")[:SERIES_MAX]
    levels = [level for level in LEVELS if level in ours.coverage]
    widest = max(float(each.mase[hardest].nan_to_num(0.0).max()) for each in (ours, naive)) or 1.0
    head = _cells(
        (
            "series",
            "truths",
            "MASE",
            "",
            "seasonal naive's",
            "weighted quantile loss",
            "seasonal naive's",
            *(f"{level:.0%} interval holds" for level in levels),
        ),
        "th",
    )
    rows = "".join(
        "<tr>"
        + _cells(
            (
                html.escape(result.ids[number]),
                f"{int(ours.count[number]):,}",
                _number(ours.mase[number]),
                _bars(float(ours.mase[number]) / widest, float(naive.mase[number]) / widest),
                _number(naive.mase[number]),
                _number(ours.wql[number], 4),
                _number(naive.wql[number], 4),
                *(_share(ours.coverage[level][number]) for level in levels),
            )
        )
        + "</tr>"
        for number in map(int, hardest)
    )
    left_out = len(result.ids) - len(hardest)
    note = f"<p class=note>The {SERIES_MAX} hardest; {left_out:,} more are not shown.</p>" if left_out else ""
    return f"<table class=series><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _bars(ours: float, naive: float) -> str:
    """Two bars, one above the other, as long as the shares say."""
    widths = [0.0 if math.isnan(share) else 100 * share for share in (ours, naive)]
    colours = (pictures.colour(CAROUSEL), pictures.colour(NAIVE))
    return "".join(
        f'<u style="width:{width:.1f}%;background:{colour}"></u>' for width, colour in zip(widths, colours, strict=True)
    )


def _model(bundle: Bundle) -> str:
    config = bundle.config
    grid = f"{pd.Timedelta(milliseconds=config.grid.step_ms)}" if config.grid else "each observation"
    facts = {
        "network": f"{config.layers} layers of {config.hidden_size} {config.cell.upper()} cells",
        "step": grid,
        "season": f"{config.season:,} steps" if config.season > 1 else "none",
        "quantiles": ", ".join(f"{quantile:g}" for quantile in config.quantiles),
        "covariates": ", ".join(config.covariates) or "none",
        **{str(key).replace("_", " "): value for key, value in bundle.training.items() if not isinstance(value, dict)},
    }
    return "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts.items())
