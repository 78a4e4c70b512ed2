"""The cells, written out gate by gate, are torch's cells and the textbook's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from model.cells import GATES, Recurrence, gru_cell, lstm_cell, rnn_cell

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["double", "float"]
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def weights_of(cell: nn.LSTMCell | nn.GRUCell | nn.RNNCell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


@PRECISIONS
def test_an_lstm_step_is_that_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    theirs = nn.LSTMCell(5, 7, dtype=dtype)
    x, h, c = torch.randn(3, 5, dtype=dtype), torch.randn(3, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    ours = lstm_cell(x, h, c, *weights_of(theirs))
    expected_h, expected_c = theirs(x, (h, c))
    torch.testing.assert_close(ours.h, expected_h, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.c, expected_c, atol=tolerance, rtol=0)


@PRECISIONS
def test_an_rnn_step_is_that_of_torch_and_leaves_c_alone(dtype: torch.dtype, tolerance: float) -> None:
    theirs = nn.RNNCell(5, 7, dtype=dtype)
    x, h, c = torch.randn(3, 5, dtype=dtype), torch.randn(3, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    ours = rnn_cell(x, h, c, *weights_of(theirs))
    torch.testing.assert_close(ours.h, theirs(x, h), atol=tolerance, rtol=0)
    assert torch.equal(ours.c, c)
    assert ours.gates.shape == (3, 0, 7)


@PRECISIONS
def test_a_gru_step_is_that_of_torch_and_leaves_c_alone(dtype: torch.dtype, tolerance: float) -> None:
    theirs = nn.GRUCell(5, 7, dtype=dtype)
    x, h, c = torch.randn(3, 5, dtype=dtype), torch.randn(3, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    ours = gru_cell(x, h, c, *weights_of(theirs))
    torch.testing.assert_close(ours.h, theirs(x, h), atol=tolerance, rtol=0)
    assert torch.equal(ours.c, c)


@PRECISIONS
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_stack_of_layers_is_that_of_torch(
    cell: str, layers: int, steps: int, dtype: torch.dtype, tolerance: float
) -> None:
    recurrence = Recurrence(cell, inputs=5, hidden_size=7, layers=layers).to(dtype)
    theirs = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](5, 7, layers, batch_first=True, dtype=dtype)
    theirs.load_state_dict(recurrence.fused.state_dict())
    x = torch.randn(4, steps, 5, dtype=dtype)
    h, c = torch.randn(4, layers, 7, dtype=dtype), torch.randn(4, layers, 7, dtype=dtype)

    outputs, state = recurrence(x, h, c)

    first_h, first_c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
    if cell == "lstm":
        expected, (last_h, last_c) = theirs(x, (first_h, first_c))
    else:
        (expected, last_h), last_c = theirs(x, first_h), first_c
    torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(state.h, last_h.transpose(0, 1), atol=tolerance, rtol=0)
    torch.testing.assert_close(state.c, last_c.transpose(0, 1), atol=tolerance, rtol=0)
    assert state.gates.shape == (4, layers, len(GATES[cell]), 7)


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gates_are_those_of_the_last_step_however_many_steps_there_are(cell: str, steps: int) -> None:
    recurrence = Recurrence(cell, inputs=5, hidden_size=7, layers=2).double()
    x = torch.randn(4, steps, 5, dtype=torch.float64)
    h, c = torch.randn(4, 2, 7, dtype=torch.float64), torch.randn(4, 2, 7, dtype=torch.float64)
    _, at_once = recurrence(x, h, c)
    for step in range(steps):
        _, one_by_one = recurrence(x[:, step : step + 1], h, c)
        h, c = one_by_one.h, one_by_one.c
    torch.testing.assert_close(at_once.gates, one_by_one.gates, atol=1e-12, rtol=0)


def test_the_gates_named_are_the_gates_of_an_lstms_equations() -> None:
    recurrence = Recurrence("lstm", inputs=5, hidden_size=7, layers=2).double()
    x = torch.randn(4, 1, 5, dtype=torch.float64)
    h, c = torch.randn(4, 2, 7, dtype=torch.float64), torch.randn(4, 2, 7, dtype=torch.float64)
    _, state = recurrence(x, h, c)
    gate = {name: state.gates[:, :, number] for number, name in enumerate(GATES["lstm"])}
    torch.testing.assert_close(state.c, gate["forget"] * c + gate["input"] * gate["candidate"], atol=1e-12, rtol=0)
    torch.testing.assert_close(state.h, gate["output"] * torch.tanh(state.c), atol=1e-12, rtol=0)


def test_the_gates_named_are_the_gates_of_a_grus_equations() -> None:
    recurrence = Recurrence("gru", inputs=5, hidden_size=7, layers=1).double()
    x, h = torch.randn(4, 1, 5, dtype=torch.float64), torch.randn(4, 1, 7, dtype=torch.float64)
    _, state = recurrence(x, h, torch.zeros_like(h))
    gate = {name: state.gates[:, :, number] for number, name in enumerate(GATES["gru"])}
    torch.testing.assert_close(state.h, gate["update"] * h + (1 - gate["update"]) * gate["candidate"])
    w, u, b_w, b_u = (part[-7:] for part in recurrence.layer(0))  # the candidate's
    candidate = torch.tanh(x[:, 0] @ w.T + b_w + gate["reset"][:, 0] * (h[:, 0] @ u.T + b_u))
    torch.testing.assert_close(gate["candidate"][:, 0], candidate)


def test_dropout_falls_between_layers_and_only_while_training() -> None:
    recurrence = Recurrence("lstm", inputs=5, hidden_size=50, layers=2, dropout=0.5)
    x, nothing = torch.randn(4, 1, 5), torch.zeros(4, 2, 50)
    _, first = recurrence(x, nothing, nothing)
    _, second = recurrence(x, nothing, nothing)
    assert torch.equal(first.h[:, 0], second.h[:, 0])
    assert not torch.equal(first.h[:, 1], second.h[:, 1])
    recurrence.eval()
    assert torch.equal(recurrence(x, nothing, nothing)[0], recurrence(x, nothing, nothing)[0])


# A widely taught LSTM of one unit and one input. By gate: the weights of h and of x, and the bias.
TEXTBOOK = {
    "forget": (2.70, 1.63, 1.62),
    "input": (2.00, 1.65, 0.62),
    "candidate": (1.41, 0.94, -0.32),
    "output": (4.38, -0.19, 0.59),
}


@pytest.fixture
def textbook() -> Recurrence:
    recurrence = Recurrence("lstm", inputs=1, hidden_size=1, layers=1).double()
    rows = torch.tensor([TEXTBOOK[gate] for gate in GATES["lstm"]], dtype=torch.float64)
    with torch.no_grad():
        recurrence.fused.weight_hh_l0.copy_(rows[:, 0:1])
        recurrence.fused.weight_ih_l0.copy_(rows[:, 1:2])
        recurrence.fused.bias_ih_l0.copy_(rows[:, 2])
        recurrence.fused.bias_hh_l0.zero_()
    return recurrence


@pytest.mark.parametrize(
    ("series", "h", "c"),
    [((0.0, 0.5, 0.25, 1.0), 0.00639, None), ((1.0, 0.5, 0.25, 1.0), 0.96939, 2.40909)],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "step by step"])
def test_it_remembers_what_the_textbook_says(
    textbook: Recurrence, series: tuple[float, ...], h: float, c: float | None, at_once: bool
) -> None:
    x = torch.tensor(series, dtype=torch.float64)[None, :, None]
    state_h = state_c = torch.zeros(1, 1, 1, dtype=torch.float64)
    for part in [x] if at_once else x.split(1, dim=1):
        outputs, state = textbook(part, state_h, state_c)
        state_h, state_c = state.h, state.c
    assert state.h.item() == outputs[0, -1].item() == pytest.approx(h, abs=5e-6)
    if c is not None:
        assert state.c.item() == pytest.approx(c, abs=5e-6)


def test_the_textbooks_forget_gate_sums_to_5_95(textbook: Recurrence) -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    _, state = textbook(one, one, one)
    forget = state.gates[0, 0, GATES["lstm"].index("forget"), 0].item()
    assert forget == pytest.approx(1 / (1 + math.exp(-5.95)), abs=1e-12)
