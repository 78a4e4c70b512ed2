"""What was measured, told: a table, JSON with the same figures, and a picture of them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.bench.figures import BenchError, Figure
from deploy.bench.load import BenchConfig

PACKAGES = ("carousel", "torch", "numpy", "kafka-python", "confluent-kafka", "fastapi", "uvicorn", "orjson", "msgspec")
STYLES = {"limit": "dim", "carousel": "bold", "rival": ""}
COLOURS = {"limit": "#9aa5b1", "carousel": "#2563eb", "rival": "#d97706"}
WIDTH = 160
"""Letters, of a table that no terminal shows."""
BAR_INCHES = 0.28
WIDTH_INCHES = 11.0
LOGARITHMIC_FROM = 50
"""Times that the longest bar is as long as the shortest."""


def check(out: Path) -> None:
    """Raises BenchError for a place that cannot be written to, before anything is measured."""
    directory, _ = _place(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write to {directory}: {error.strerror}") from error


def tell(config: BenchConfig, figures: Sequence[Figure], console: Console) -> None:
    """Print; and write what is asked for. Raises BenchError where that cannot be written."""
    tables = tables_of(figures)
    for table in tables:
        console.print(table)
    if not config.out:
        return
    directory, stem = _place(config.out)
    try:
        (directory / f"{stem}.json").write_text(json.dumps(document(config, figures), indent=1) + "\n")
        with (directory / f"{stem}.txt").open("w") as file:
            page = Console(file=file, width=WIDTH)
            for table in tables:
                page.print(table)
        drawn = plot(figures, directory / f"{stem}.png")
    except OSError as error:
        raise BenchError(f"cannot write to {directory}: {error.strerror}") from error
    written = ("json", "txt", "png") if drawn else ("json", "txt")
    console.print(f"written: {', '.join(str(directory / f'{stem}.{kind}') for kind in written)}", markup=False)
    if not drawn:
        console.print("no picture: matplotlib is not installed; pip install 'carousel[train]'", markup=False)


def _place(out: Path) -> tuple[Path, str]:
    """The directory that is written to, and how its files are called."""
    return (out.parent, out.stem) if out.suffix == ".json" else (out, "bench")


def document(config: BenchConfig, figures: Sequence[Figure]) -> dict[str, Any]:
    """All that is known of a run, as JSON has it."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"processors": os.cpu_count(), "processor": _processor(), "system": platform.platform()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "config": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _processor() -> str:
    """As Linux names it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tables_of(figures: Sequence[Figure]) -> list[Table]:
    """A table a measurement; what was measured as work grows stands side by side."""
    tables = []
    for what in dict.fromkeys(figure.what for figure in figures):
        some = [figure for figure in figures if figure.what == what]
        tables.append(_grown(what, some) if some[0].axis else _table(what, some))
    return tables


def _table(what: str, figures: Sequence[Figure]) -> Table:
    """Figures whose names begin alike, up to a colon, stand under that beginning."""
    table = Table(title=what, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("measured")
    for heading in ("median", "beside its limit", "least", "most"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for beginning, some in groupby(figures, key=lambda figure: figure.name.partition(": ")[0]):
        group = list(some)
        if len(group) > 1:
            table.add_row(_literal(beginning), style="italic")
        for figure in group:
            name = f"  {figure.name.partition(': ')[2]}" if len(group) > 1 else figure.name
            table.add_row(*map(_literal, (name, *_cells(figure))), style=STYLES[figure.role])
    return table


def _cells(figure: Figure) -> tuple[str, ...]:
    beside = "" if figure.beside is None else f"{figure.beside:.2f} x"
    spread = (number(figure.low), number(figure.high)) if figure.rounds > 1 else ("", "")
    return f"{number(figure.value)} {figure.unit}", beside, *spread, figure.note


def _literal(text: str) -> str:
    """Brackets are no markup."""
    return text.replace("[", r"\[")


def _grown(what: str, figures: Sequence[Figure]) -> Table:
    units = list(dict.fromkeys(figure.unit for figure in figures))
    table = Table(title=what, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("as it grows")
    for unit in units:
        table.add_column(unit, justify="right")
    table.add_column("where the time goes")
    for axis, at in dict.fromkeys((figure.axis, figure.at) for figure in figures):
        of = {figure.unit: figure for figure in figures if (figure.axis, figure.at) == (axis, at)}
        cells = [number(of[unit].value) if unit in of else "" for unit in units]
        table.add_row(f"{axis} {at:,.0f}", *cells, next(iter(of.values())).note)
    return table


def number(value: float) -> str:
    """Three digits, and no more than are of use.

    >>> number(12345.6), number(123.4), number(12.34), number(0.1234)
    ('12,346', '123', '12.3', '0.123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(figures: Sequence[Figure], path: Path) -> bool:
    """Draw all figures: bars with their spread, and lines of what grows. -> False without matplotlib."""
    if not find_spec("matplotlib") or not figures:
        return False
    from matplotlib.figure import Figure as Page
    from matplotlib.patches import Patch

    rows = _rows(figures)
    heights = [
        2.0 if next(iter(row.values()))[0].axis else 0.8 + BAR_INCHES * sum(map(len, row.values())) for _, row in rows
    ]
    page = Page(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    parts = page.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (title, row), part in zip(rows, parts, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
        for (unit, some), axis in zip(row.items(), part.subplots(1, len(row), squeeze=False)[0], strict=True):
            (_draw_line if some[0].axis else _draw_bars)(axis, some, unit)
    page.legend(handles=[Patch(color=colour, label=role) for role, colour in COLOURS.items()], ncols=3, fontsize=8)
    page.savefig(path, dpi=110)
    return True


def _rows(figures: Sequence[Figure]) -> list[tuple[str, dict[str, list[Figure]]]]:
    """What is drawn side by side, by unit, under its title: of what grows, all that was measured along one axis."""
    rows: dict[tuple[str, str], dict[str, list[Figure]]] = {}
    for figure in figures:
        key = (f"{figure.what}: {figure.axis}", "") if figure.axis else (figure.what, figure.unit)
        rows.setdefault(key, {}).setdefault(figure.unit, []).append(figure)
    return [(title, row) for (title, _), row in rows.items()]


def _draw_bars(axis: Any, figures: Sequence[Figure], unit: str) -> None:
    values = [figure.value for figure in figures]
    spread = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    colours = [COLOURS[figure.role] for figure in figures]
    axis.barh(range(len(figures)), values, xerr=spread, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axis.set_yticks(range(len(figures)), [figure.name for figure in figures], fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    above = [value for value in values if value > 0]
    if above and max(above) > LOGARITHMIC_FROM * min(above):
        axis.set_xscale("log")
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)


def _draw_line(axis: Any, figures: Sequence[Figure], unit: str) -> None:
    at, values = [figure.at for figure in figures], [figure.value for figure in figures]
    spread = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(at, values, yerr=spread, marker="o", color=COLOURS["carousel"], capsize=2)
    axis.set_xscale("log")
    axis.set_xticks(at, [f"{value:,.0f}" for value in at])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=7)
