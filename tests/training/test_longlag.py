"""Tasks that only a memory solves: they ask what they say, and what the cells make of them is repeatable."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from model.cells import GATES, Recurrence
from training.longlag import Learner, Task, learn
from training.memory import MemoryConfig, run


def drawn(task: Task, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    return task.draw(count, torch.Generator().manual_seed(0))


def test_adding_asks_for_the_sum_of_two_values_one_marked_in_each_half() -> None:
    x, y = drawn(Task(40))
    values, marks = x.unbind(-1)
    assert x.shape == (2000, 40, 2)
    assert (marks[:, :20].sum(1) == 1).all()
    assert (marks[:, 20:].sum(1) == 1).all()
    assert marks.sum(0).min() > 50, "anywhere in its half"
    torch.testing.assert_close(y, (values * marks).sum(1))
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() <= 1


def test_a_needle_is_the_first_value_asked_for_at_the_end() -> None:
    x, y = drawn(Task(40, needle=True))
    assert torch.equal(x[:, :, 1].sum(0).nonzero()[:, 0], torch.tensor([0]))
    assert torch.equal(y, x[:, 0, 0])


@pytest.mark.parametrize(("task", "middle"), [(Task(10), 1.0), (Task(10, needle=True), 0.5)])
def test_guessing_the_middle_has_the_error_that_is_told(task: Task, middle: float) -> None:
    _, y = drawn(task, 20_000)
    assert float((y - middle).square().mean()) == pytest.approx(task.guess, rel=0.03)


def test_the_lstm_remembers_what_the_rnn_forgets_and_the_gradient_says_why() -> None:
    task = Task(60, needle=True)
    lstm = learn(task, Learner("lstm", remember=True, updates=400))
    rnn = learn(task, Learner("rnn", updates=150))
    assert lstm.solved
    assert lstm.mse < 0.005
    assert not rnn.solved
    assert rnn.mse > 0.8 * task.guess
    assert lstm.reach_before[-1] > 1e-2
    assert rnn.reach_before[-1] < 1e-6
    assert rnn.reach_after[-1] < 1e-6 < 1e-2 < lstm.reach_after[-1]


def test_equal_seeds_give_equal_results() -> None:
    first, again, other = (learn(Task(12), Learner(updates=5, hidden_size=4, seed=seed)) for seed in (0, 0, 1))
    assert first.losses == again.losses != other.losses
    assert first.mse == again.mse
    assert torch.equal(first.reach_after, again.reach_after)


def test_it_ends_when_it_has_learnt() -> None:
    quick = learn(Task(4, needle=True), Learner(updates=1000, hidden_size=8, learning_rate=3e-2))
    assert quick.solved
    assert len(quick.losses) < 1000


def test_clipping_tames_a_gradient_that_explodes() -> None:
    free, clipped = (
        learn(Task(50), Learner("rnn", gain=1.5, plain=True, learning_rate=0.1, clip=clip, updates=120))
        for clip in (None, 1.0)
    )
    assert max(clipped.norms) > 10, "it explodes here too"
    assert max(clipped.losses[20:]) < 1
    assert not math.isfinite(free.norms[-1])
    assert max(free.losses) > 1e6


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrence_told_to_remember_keeps_each_unit_for_up_to_that_many_steps(cell: str) -> None:
    torch.manual_seed(0)
    recurrence = Recurrence(cell, inputs=3, hidden_size=500, layers=2).remember(100)
    nothing = torch.zeros(1, 2, 500)
    recurrence.fused.weight_ih_l1.data.zero_()
    _, state = recurrence(torch.zeros(1, 1, 3), nothing, nothing)
    gates = dict(zip(GATES[cell], state.gates[0].unbind(1), strict=True))
    keeps = gates["forget" if cell == "lstm" else "update"]
    steps = 1 / (1 - keeps)
    assert 1.9 < steps.min() < 5
    assert 95 < steps.max() < 100.1
    assert steps.mean(1).tolist() == pytest.approx([51.0, 51.0], rel=0.1), "uniform between them"
    if cell == "lstm":
        torch.testing.assert_close(gates["input"], 1 - keeps)


def test_a_plain_rnn_cannot_be_told_to_remember() -> None:
    with pytest.raises(ValueError, match="rnn"):
        Recurrence("rnn", inputs=3, hidden_size=5, layers=1).remember(100)


def test_the_report_has_every_cell_as_page_and_numbers(tmp_path: Path) -> None:
    config = MemoryConfig(steps=20, needle_steps=(10, 15), updates=3, needle_updates=2, seed=3)
    run(config, tmp_path)
    told = json.loads((tmp_path / "memory.json").read_text())
    assert [each["learner"] for each in told["adding"]] == ["RNN", "GRU", "LSTM", "LSTM, chrono"]
    needles = [(cell, steps) for steps in (10, 15) for cell in ("RNN", "LSTM", "LSTM, chrono")]
    assert [(each["learner"], each["steps"]) for each in told["needle"]] == needles
    assert [each["clip"] for each in told["clipping"]] == [None, 1.0]
    assert len(told["adding"][0]["reach_after_by_lag"]) == 20
    assert len(told["adding"][0]["losses"]) == 3
    assert (tmp_path / "index.html").read_text().count("data:image/png") == len(list(tmp_path.glob("*.png"))) == 4
