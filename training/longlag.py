"""Tasks that only a memory solves, for any cell: what was marked must be known hundreds of steps later.

Each step shows a value, uniform in [0, 1], and whether it is marked. The answer is read from the last h.

- *adding* (Hochreiter and Schmidhuber 1997, in the form of Le, Jaitly and Hinton 2015): two values are marked, one in
  each half; the answer is their sum. Who always says 1 has a mean squared error of 1/6 = 0.167.
- *needle*: only the very first value is marked; the answer is that value. Who always says 1/2 has 1/12 = 0.083.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.cells import Recurrence
from model.config import Cell
from training.gradients import geometric_mean, reach

SOLVED = 0.06
"""A task is solved below this share of the error of guessing: the adding problem below 0.01, the needle below 0.005."""
PATIENCE = 50
"""Training ends when the mean loss of so many updates is half of that."""


@dataclass(frozen=True)
class Task:
    """Sequences of `steps` steps; needle: one value to remember instead of two to add."""

    steps: int
    needle: bool = False

    @property
    def guess(self) -> float:
        """The mean squared error of the best constant answer."""
        return 1 / 12 if self.needle else 1 / 6

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences x [count, steps, 2] (value, mark) and their answers [count]."""
        values = torch.rand(count, self.steps, generator=generator)
        marks = torch.zeros(count, self.steps)
        half = self.steps // 2
        if self.needle:
            marks[:, 0] = 1
        else:
            for first, stop in ((0, half), (half, self.steps)):
                marks.scatter_(1, torch.randint(first, stop, (count, 1), generator=generator), 1.0)
        return torch.stack((values, marks), dim=-1), (values * marks).sum(1)


@dataclass(frozen=True)
class Learner:
    """A cell and how it is trained: Adam, for `updates` updates at most, and no longer than until it has solved it."""

    cell: Cell = "lstm"
    remember: bool = False
    """Begin with gates that remember over the whole sequence (`Recurrence.remember`)."""
    hidden_size: int = 32
    layers: int = 1
    batch: int = 32
    learning_rate: float = 1e-2
    clip: float | None = 1.0
    """The largest norm of a gradient; None: whatever it is."""
    updates: int = 1000
    seed: int = 0
    gain: float | None = None
    """Begin with an orthogonal U times this: above 1 gradients explode, and clipping has something to do."""
    plain: bool = False
    """Plain gradient descent instead of Adam, which would divide by the size of a gradient that explodes."""

    @property
    def name(self) -> str:
        return {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[self.cell] + (", chrono" if self.remember else "")


class Reader(nn.Module):
    """A recurrence that reads a sequence, and answers with one number from its last h."""

    def __init__(self, learner: Learner, steps: int) -> None:
        super().__init__()
        self.recurrence = Recurrence(learner.cell, 2, learner.hidden_size, learner.layers)
        self.answer = nn.Linear(learner.hidden_size, 1)
        if learner.remember:
            self.recurrence.remember(steps)
        if learner.gain is not None:
            nn.init.orthogonal_(self.recurrence.fused.weight_hh_l0, learner.gain)

    def start(self, count: int) -> Tensor:
        """h or C before the first step."""
        return torch.zeros(count, self.recurrence.fused.num_layers, self.recurrence.fused.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, 2] -> [B]."""
        outputs, _ = self.recurrence(x, self.start(len(x)), self.start(len(x)))
        answers: Tensor = self.answer(outputs[:, -1])
        return answers[:, 0]


@dataclass(frozen=True)
class Learnt:
    """How it went. losses, norms: before each update, the mean squared error and the gradient's norm (unclipped).

    mse: on 1,000 sequences never seen. reach_before, reach_after [T]: the norm of the gradient with respect to the
    state k = 1 ... T steps before the answer (C of an LSTM, h of the others), over that with respect to the last h.
    """

    learner: Learner
    task: Task
    losses: list[float]
    norms: list[float]
    mse: float
    reach_before: Tensor
    reach_after: Tensor

    @property
    def solved(self) -> bool:
        return self.mse < SOLVED * self.task.guess


def learn(task: Task, learner: Learner) -> Learnt:
    """Train a new cell on a task. Equal seeds give equal results, on the same machine and with as many threads."""
    generator = torch.Generator().manual_seed(learner.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learner.seed)
        reader = Reader(learner, task.steps)
    sample = task.draw(16, generator)[0]
    before = _reach(reader, sample)
    optimizer = (torch.optim.SGD if learner.plain else torch.optim.Adam)(reader.parameters(), lr=learner.learning_rate)
    good_enough = SOLVED * task.guess / 2
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(learner.updates):
        x, y = task.draw(learner.batch, generator)
        loss = (reader(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reader.parameters(), learner.clip or math.inf)
        losses.append(loss.item())
        norms.append(norm.item())
        if not math.isfinite(norms[-1]):
            break  # exploded: there is nothing to go on from
        optimizer.step()
        if len(losses) >= PATIENCE and sum(losses[-PATIENCE:]) < PATIENCE * good_enough:
            break
    return Learnt(learner, task, losses, norms, _error(reader, task, generator), before, _reach(reader, sample))


def _error(reader: Reader, task: Task, generator: torch.Generator) -> float:
    with torch.no_grad():
        parts = [task.draw(100, generator) for _ in range(10)]
        return float(torch.stack([(reader(x) - y).square().mean() for x, y in parts]).mean())


def _reach(reader: Reader, x: Tensor) -> Tensor:
    toward = reader.answer.weight.detach().expand(len(x), -1)
    by_h, by_c = reach(reader.recurrence, x, reader.start(len(x)), reader.start(len(x)), toward)
    carried = by_c if reader.recurrence.cell == "lstm" else by_h
    return geometric_mean(carried / toward.double().norm(dim=1, keepdim=True))
