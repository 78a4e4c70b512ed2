"""A model opened up: what is recorded is what went on, and every number of the summary can be worked out again."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.bundle import Bundle
from model.cells import GATES
from tests.training.synthetic import forecaster, observed, series
from training.inspect import Trace, find_series, gradients, run, summary, trace
from training.table import Columns, TableError
from training.windows import block_of

CELLS = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
LENGTH, LAST = 120, 40


def traced_of(cell: str) -> Trace:
    return trace(forecaster(cell=cell), series(LENGTH), LAST)


@CELLS
def test_the_trace_ends_in_the_state_that_serving_ends_in(cell: str) -> None:
    model, traced = forecaster(cell=cell), traced_of(cell)
    forecast, state = model.advance(model.initial_state(1), block_of([series(LENGTH)]))
    torch.testing.assert_close(traced.h[-1], state["h"][0].double(), atol=1e-5, rtol=0)
    assert traced.h.shape == (LAST, 2, 8)
    if cell == "lstm":
        torch.testing.assert_close(traced.c[-1], state["c"][0].double(), atol=1e-5, rtol=0)
    else:
        assert traced.c is None, "only an LSTM has one"
    assert tuple(traced.gates) == GATES[cell]
    for number, gate in enumerate(traced.gates.values()):
        torch.testing.assert_close(gate[-1], state["gates"][0, :, number].double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(traced.next_step, forecast.values[0, -LAST:, 0], atol=1e-3, rtol=0)
    assert traced.values.tolist() == series(LENGTH).y[-LAST:].tolist()


def test_a_unit_remembers_as_long_as_its_forget_gates_say() -> None:
    """After that many steps of gates as they were, 1/e is left."""
    traced = traced_of("lstm")
    forget = traced.gates["forget"]
    kept_a_step = forget.prod(0) ** (1 / LAST)
    torch.testing.assert_close(kept_a_step ** traced.memory_steps(), torch.full((2, 8), math.exp(-1)).double())
    assert traced_of("rnn").memory_steps() is None


def test_the_summary_counts_what_is_saturated() -> None:
    traced = traced_of("lstm")
    layer = summary(traced, None)["layers"][1]
    output, candidate = (traced.gates[name][:, 1].numpy() for name in ("output", "candidate"))
    assert layer["gates"]["output"]["saturated_low"] == np.mean(output < 0.1)
    assert layer["gates"]["output"]["saturated_high"] == np.mean(output > 0.9)
    assert layer["gates"]["candidate"]["saturated_low"] == np.mean(candidate < -0.9)
    assert layer["gates"]["forget"]["mean"] == pytest.approx(traced.gates["forget"][:, 1].mean().item())
    unit = layer["memory_steps"]["unit"]
    assert (
        layer["memory_steps"]["units"][unit] == layer["memory_steps"]["longest"] == max(layer["memory_steps"]["units"])
    )


@CELLS
def test_gradients_are_followed_back_half_of_what_is_looked_at(cell: str) -> None:
    found = gradients(forecaster(cell=cell), traced_of(cell))
    assert found is not None
    assert len(found.loss_h) == LAST // 2
    assert (found.loss_h > 0).all()
    assert (found.loss_c is None) == (cell != "lstm")
    assert [each.lags[-1] for each in found.products] == [LAST // 2] * 2
    assert (found.radius is None) == (cell != "rnn")


def test_where_no_truth_came_there_is_no_gradient() -> None:
    nothing = series(LENGTH)
    nothing.y[-LAST:] = np.nan
    model = forecaster()
    assert gradients(model, trace(model, nothing, LAST)) is None


class Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_it_writes_a_page_that_needs_no_other_file_and_the_numbers_behind_it(cell: str, tmp_path: Path) -> None:
    each = observed(LENGTH)
    frame = pd.DataFrame({"unique_id": each.unique_id, "ds": pd.to_datetime(each.ts_ms, unit="ms"), "y": each.y})
    frame.to_csv(tmp_path / "load.csv", index=False)
    out = tmp_path / "out"
    run(Bundle(forecaster(cell=cell), "tiny", "0" * 64), tmp_path / "load.csv", Columns(), "s0", last=LAST, out=out)
    page = Images()
    page.feed((out / "index.html").read_text())
    pictures = sorted(out.glob("*.png"))
    assert len(page.sources) == len(pictures) >= 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    told = json.loads((out / "summary.json").read_text())
    assert (told["cell"], told["stream"], told["steps"], len(told["layers"])) == (cell, "s0", LAST, 2)
    recorded = pd.read_parquet(out / "trace.parquet")
    assert len(recorded) == LAST * 2 * 8
    assert set(recorded) == {"ds", "layer", "unit", "h", *(["c"] if cell == "lstm" else []), *GATES[cell]}
    assert recorded.ds.max() == frame.ds.max()


def test_a_stream_that_is_not_there_is_refused_with_some_that_are() -> None:
    many = [series(20, name=f"zone {number}") for number in range(9)]
    with pytest.raises(TableError, match=r"no series 'zone12'; there are 'zone [12]', .* and 4 more$"):
        find_series(many, "zone12", Path("load.csv"))


def test_of_a_series_broken_by_a_gap_the_last_part_is_shown() -> None:
    first, last = series(20, name="a"), series(30, name="a")
    assert find_series([first, series(9, name="b"), last], "a", Path("load.csv")) is last
