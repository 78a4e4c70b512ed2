"""`carousel backtest`: replay a table as served, let the baselines forecast beside, and tell how good all were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from model.bundle import Bundle
from training.backtest import CAROUSEL, NAIVE, Backtest, backtest
from training.baselines import Beside, beside, history_steps, parse_baselines
from training.measures import (
    ERRORS,
    LEVELS,
    Difference,
    Measures,
    by_series,
    by_step,
    differences,
    overall,
    resampled_units,
)
from training.series import Series, to_grid
from training.table import Columns, read_table
from training.windows import find_split

ROWS = 20
"""Series and horizons shown one by one, at most."""


@dataclass(frozen=True)
class Evaluation:
    """What is told of a backtest. table: its name. shared: the origins at which the fitted baselines forecast too."""

    bundle: Bundle
    table: str
    series: Sequence[Series]
    result: Backtest
    shared: Beside | None = None

    @property
    def remarks(self) -> list[str]:
        """What a reader should know of the baselines."""
        if self.shared is None:
            return []
        season, count = self.bundle.config.season, len(self.shared.result.of)
        return [
            f"{' and '.join(self.shared.stood_in)} of statsforecast: fitted anew at each origin, to the last"
            f" {history_steps(season):,} steps before it, with a season of {season}; gaps are filled with the value a"
            f" season before. That is slow, hence {count:,} of {len(self.result.of):,} origins, spread evenly.",
            *(
                f"{method} could not be fitted at {failed:,} of them: there the seasonal naive stands in."
                for method, failed in self.shared.stood_in.items()
                if failed
            ),
        ]


def run(
    bundle: Bundle,
    table: Path,
    columns: Columns,
    *,
    last: int | None = None,
    every: int | None = None,
    baselines: str | None = None,
    baseline_origins: int | None = None,
    forecasts: Path | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Print how good the forecasts of a table were, and write them and a report where asked.

    last: how many steps at the end of each series are forecast (None: those held back when the bundle was trained);
    every: of the origins there, each so-manieth. baselines: such as "ets,theta" or "none" (None: those installed), from
    `baseline_origins` of the same origins. Covariates are those of the bundle, whatever `columns` says. Raises
    TableError if the table cannot be read or is too short, BaselineError, or OSError if a file cannot be written.
    """
    config, console = bundle.config, console or Console()
    wanted = parse_baselines(baselines)
    columns = dataclasses.replace(columns, covariates=config.covariates)
    series = to_grid(read_table(table, columns), config.grid, config.max_gap)
    lengths = [len(each.y) for each in series]
    if last is None:
        split = find_split(lengths, config.horizon, bundle.training.get("test_steps"))
        starts = [split.test_start(length) for length in lengths]
    else:
        starts = [max(1, length - last) for length in lengths]
    result = backtest(bundle.forecaster, series, starts, every)
    shared = beside(result, series, wanted, baseline_origins, console) if wanted else None
    evaluation = Evaluation(bundle, table.name, series, result, shared)
    console.print(f"{bundle.model_id}: {len(result.of):,} forecasts", *_printed(evaluation), sep="\n", highlight=False)
    if forecasts:
        result.write_forecasts(forecasts)
        console.print(f"forecasts written to {forecasts}")
    if report:
        from training.report import write_report  # with matplotlib, for which nobody else shall wait

        console.print(f"report written to {write_report(report, evaluation)}")
    return evaluation


def _printed(evaluation: Evaluation) -> Iterator[Table | str]:
    yield _summary(evaluation.result)
    yield from _beside(evaluation.result)
    if evaluation.shared:
        shared = evaluation.shared.result
        yield f"\nand at {len(shared.of):,} of these origins, spread evenly, beside models fitted there:"
        yield _summary(shared)
        yield from _beside(shared)
        yield from evaluation.remarks
    yield _by_step(evaluation.result)
    yield _by_series(evaluation.result)


def _table(heading: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(heading, vertical="bottom", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    return table


def _summary(result: Backtest) -> Table:
    """One row a method."""
    table = _table("method", *ERRORS, *(f"in {level:.0%}\n(width)" for level in LEVELS))
    for method, row in overall(result).items():
        within = [
            f"{row.coverage[level]:.0%} ({row.width[level]:.2f})" if level in row.coverage else "—" for level in LEVELS
        ]
        table.add_row(method, *(f"{getattr(row, name):.{4 if name == 'wql' else 3}f}" for name in ERRORS), *within)
    return table


def _beside(result: Backtest) -> Iterator[str]:
    for method, found in differences(result).items():
        yield f"carousel's wql beside that of {method}: {told(found['wql'])}"
    yield f"(in brackets: 95% of the resamples of {resampled_units(result)})"


def told(difference: Difference) -> str:
    """A difference in a few letters.

    >>> told(Difference(-0.204, -0.251, -0.149))
    '-20% (-25 ... -15)'
    """
    if math.isnan(difference.low):
        return f"{difference.value:+.0%}"
    return f"{difference.value:+.0%} ({100 * difference.low:+.0f} ... {100 * difference.high:+.0f})"


def _by_step(result: Backtest) -> Table:
    measures, horizon = by_step(result), result.config.horizon
    shown = sorted({round(step) for step in np.linspace(0, horizon - 1, ROWS // 2)})
    return _breakdown("step ahead", measures, {str(step + 1): step for step in shown})


def _by_series(result: Backtest) -> Table:
    measures, count = by_series(result), len(result.ids)
    hardest = np.argsort(-measures[CAROUSEL].mase.nan_to_num(0.0).numpy(), kind="stable")[:ROWS]
    heading = "series" if count <= ROWS else f"series (the hardest {ROWS} of {count:,})"
    return _breakdown(heading, measures, {result.ids[number]: int(number) for number in hardest})


def _breakdown(heading: str, measures: Mapping[str, Measures], rows: Mapping[str, int]) -> Table:
    levels = [level for level in LEVELS if level in measures[CAROUSEL].coverage]
    table = _table(
        heading, "wql", "seasonal\nnaive's", "mase", "seasonal\nnaive's", *(f"in {level:.0%}" for level in levels)
    )
    for name, index in rows.items():
        ours, naive = measures[CAROUSEL].at(index), measures[NAIVE].at(index)
        numbers = (f"{ours.wql:.4f}", f"{naive.wql:.4f}", f"{ours.mase:.3f}", f"{naive.mase:.3f}")
        table.add_row(name, *numbers, *(f"{ours.coverage[level]:.1%}" for level in levels))
    return table
