"""The page's charts as Bokeh documents: what they look like, without any data. They are the same for all streams of a
model; `data` says what goes into their sources, and the page's script puts it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.core.json_encoder import serialize_json
from bokeh.embed import json_item
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    DatetimeTickFormatter,
    HoverTool,
    LinearColorMapper,
)
from bokeh.plotting import figure

from model.config import ModelConfig
from model.scoring import middle
from service.page.data import COLUMNS, SIGNED, maps_of, quantile_columns

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
SHADES = 64
"""Of a heat map."""


@dataclass(frozen=True)
class Colours:
    """Of one scheme; `page.css` has the same."""

    ink: str
    quiet: str
    line: str
    paper: str
    accent: str
    odd: str
    warm: str


LIGHT = Colours("#1c1f24", "#6a7280", "#e7e8ea", "#ffffff", "#2b62c9", "#c8432b", "#c77a1f")
DARK = Colours("#e8eaed", "#98a1ae", "#2a2f38", "#171b21", "#82aaff", "#ff8a6c", "#f0a94e")


def documents(config: ModelConfig, colours: Colours) -> str:
    """JSON: by the name of the element that it belongs into, each chart as BokehJS embeds it."""
    charts = {"forecast": _forecast(config, colours)}
    for layer in range(config.layers):
        for name in maps_of(config.cell):
            charts[f"{name}-{layer}"] = _heat(config, colours, f"{name}-{layer}", signed=name in SIGNED)
    return serialize_json({name: json_item(chart) for name, chart in charts.items()})


def _bare(**options: Any) -> Any:
    """A figure of nothing but its contents."""
    return figure(
        toolbar_location=None,
        tools="",
        sizing_mode="stretch_both",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )


def _forecast(config: ModelConfig, colours: Colours) -> Any:
    """What was observed, what had been forecast for it one step before, and the fan of what comes."""
    clock = config.grid is not None
    chart = _bare(x_axis_type="datetime" if clock else "linear", min_border_left=56, min_border_right=12)
    past, fan, odd, now = (ColumnDataSource({}, name=name) for name in ("past", "fan", "odd", "now"))
    for source, columns in (
        (past, ("time", "value", "low", "middle", "high")),
        (fan, ("time", *quantile_columns(config))),
        (odd, ("time", "value", "anomaly")),
        (now, ("time", "value")),
    ):
        source.data = {column: [] for column in columns}
    chart.vspan("time", source=now, line_color=colours.quiet, line_width=1, line_dash=[2, 4])
    chart.varea("time", "low", "high", source=past, fill_color=colours.accent, fill_alpha=0.13)
    chart.line("time", "middle", source=past, line_color=colours.accent, line_width=1.2, line_alpha=0.6)
    quantiles = quantile_columns(config)
    for low, high in zip(quantiles, reversed(quantiles), strict=True):
        if low < high:
            chart.varea("time", low, high, source=fan, fill_color=colours.accent, fill_alpha=0.14)
    chart.line("time", quantiles[middle(config)], source=fan, line_color=colours.accent, line_width=2)
    observed = chart.line("time", "value", source=past, line_color=colours.ink, line_width=1.8, line_join="round")
    chart.scatter("time", "value", source=odd, size=12, fill_color=None, line_color=colours.odd, line_width=2)
    chart.scatter("time", "value", source=now, size=7, fill_color=colours.ink, line_color=None)
    chart.add_tools(_hover(observed, clock))
    _quiet_axes(chart, colours, clock)
    return chart


def _hover(renderer: Any, clock: bool) -> HoverTool:
    time = ("", "@time{%a %d %b %Y %H:%M} UTC") if clock else ("step", "@time")
    numbers: dict[str, Any] = dict.fromkeys(("@value", "@low", "@middle", "@high"), "printf")
    return HoverTool(
        renderers=[renderer],
        mode="vline",
        line_policy="nearest",
        tooltips=[time, ("observed", "@value{%.5g}"), ("forecast", "@middle{%.5g} (@low{%.5g} to @high{%.5g})")],
        formatters={"@time": "datetime", **numbers} if clock else numbers,
    )


def _quiet_axes(chart: Any, colours: Colours, clock: bool) -> None:
    chart.grid.grid_line_color = colours.line
    chart.xgrid.grid_line_color = None
    chart.axis.axis_line_color = None
    chart.axis.major_tick_line_color = None
    chart.axis.minor_tick_line_color = None
    chart.axis.major_label_text_color = colours.quiet
    chart.axis.major_label_text_font = FONT
    chart.axis.major_label_text_font_size = "13px"
    chart.axis.axis_label_text_color = colours.quiet
    chart.axis.axis_label_text_font = FONT
    chart.axis.axis_label_text_font_size = "13px"
    chart.axis.axis_label_text_font_style = "normal"
    chart.xaxis.axis_label = "time, UTC" if clock else "steps from the last observation"
    chart.x_range.range_padding = 0.01
    chart.yaxis.formatter = BasicTickFormatter(power_limit_high=7, power_limit_low=-4)
    chart.yaxis.ticker.desired_num_ticks = 5
    chart.xaxis.ticker.desired_num_ticks = 6
    if clock:
        chart.xaxis.formatter = DatetimeTickFormatter(
            seconds="%H:%M:%S", minsec="%H:%M:%S", minutes="%H:%M", hourmin="%H:%M", hours="%H:%M",
            days="%d %b", months="%b %Y", years="%Y",
            context=DatetimeTickFormatter(
                seconds="%d %b %Y", minsec="%d %b %Y", minutes="%d %b %Y", hourmin="%d %b %Y", hours="%d %b %Y",
                days="%Y", months="", years="",
            ),
            context_which="start", context_location="below", hide_repeats=True,
        )  # fmt: skip


def _heat(config: ModelConfig, colours: Colours, name: str, *, signed: bool) -> Any:
    """A heat map, units by steps; the newest step on the right. It begins empty."""
    image = np.full((config.hidden_size, COLUMNS), np.nan, dtype=np.float32)
    source = ColumnDataSource({"image": [image]}, name=name)
    chart = _bare(x_range=(-COLUMNS, 0), y_range=(0, config.hidden_size), min_border=0)
    chart.axis.visible = False
    chart.grid.grid_line_color = None
    stops = (colours.warm, colours.paper, colours.accent) if signed else (colours.paper, colours.accent)
    mapper = LinearColorMapper(
        palette=_between(stops), low=-1.0 if signed else 0.0, high=1.0, nan_color="rgba(0, 0, 0, 0)"
    )
    drawn = chart.image("image", source=source, x=-COLUMNS, y=0, dw=COLUMNS, dh=config.hidden_size, color_mapper=mapper)
    drawn.nonselection_glyph = drawn.muted_glyph = None
    return chart


def _between(stops: Sequence[str]) -> list[str]:
    """Colours from the first stop to the last.

    >>> _between(["#000000", "#ffffff"])[::63]
    ['#000000', '#ffffff']
    """
    parts = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in stops], dtype=float)
    at = np.linspace(0, len(stops) - 1, SHADES)
    channels = [np.interp(at, np.arange(len(stops)), channel) for channel in parts.T]
    return [f"#{bytes(colour).hex()}" for colour in np.rint(channels).astype(int).T.tolist()]
