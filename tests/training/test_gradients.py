"""Gradients through time: the derivatives are those of the equations, and the reach is that of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.cells import GATES, Recurrence
from training.gradients import Unrolled, jacobians, product, reach, spectral_radius, unroll

CELLS = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
HIDDEN, STEPS = 5, 30


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(cell: str, layers: int = 2) -> tuple[Recurrence, Tensor, Tensor, Tensor]:
    """A random recurrence with x [2, STEPS, 3], h and c."""
    recurrence = Recurrence(cell, inputs=3, hidden_size=HIDDEN, layers=layers)
    start = torch.randn(2, 2, layers, HIDDEN)
    return recurrence, torch.randn(2, STEPS, 3), start[0], start[1] * (cell == "lstm")


def test_the_derivative_of_an_rnns_step_is_one_minus_h_squared_times_u() -> None:
    recurrence, *start = made("rnn")
    unrolled = unroll(recurrence, *start)
    for layer in (0, 1):
        ours = jacobians(recurrence, unrolled, layer)[..., :HIDDEN, :HIDDEN]
        u = recurrence.layer(layer)[1].double()
        torch.testing.assert_close(ours, (1 - unrolled.h[:, 1:, layer] ** 2)[..., None] * u)


def test_the_derivative_of_c_to_the_c_before_is_the_forget_gate_and_nothing_else() -> None:
    recurrence, *start = made("lstm")
    unrolled = unroll(recurrence, *start)
    for layer in (0, 1):
        ours = jacobians(recurrence, unrolled, layer)[..., HIDDEN:, HIDDEN:]
        torch.testing.assert_close(ours, torch.diag_embed(unrolled.gates[:, :, layer, GATES["lstm"].index("forget")]))


@CELLS
def test_the_product_is_the_derivative_over_that_many_steps(cell: str) -> None:
    """Of the upper layer, with the lower one left as it was: what autograd says of all steps taken together."""
    recurrence, *start = made(cell)
    unrolled = unroll(recurrence, *start)
    lag, layer = 7, 1
    upper = Recurrence(cell, HIDDEN, HIDDEN, 1).double()
    weights = {
        name.replace("_l1", "_l0"): w for name, w in recurrence.double().fused.state_dict().items() if "_l1" in name
    }
    upper.fused.load_state_dict(weights)
    x = unrolled.h[:1, STEPS - lag + 1 :, 0]

    def carried(before: Tensor) -> Tensor:
        h, c = unrolled.h[:1, STEPS - lag, layer:], unrolled.c[:1, STEPS - lag, layer:]
        _, state = upper(x, *((h, before) if cell == "lstm" else (before, c)))
        return (state.c if cell == "lstm" else state.h).flatten()

    before = (unrolled.c if cell == "lstm" else unrolled.h)[:1, STEPS - lag, layer:]
    expected = torch.autograd.functional.jacobian(carried, before).reshape(HIDDEN, HIDDEN)
    one = Unrolled(unrolled.x[:1], unrolled.h[:1], unrolled.c[:1], unrolled.gates[:1])
    ours = product(recurrence, one, layer, [lag])
    assert ours.full[0].item() == pytest.approx(torch.linalg.matrix_norm(expected, 2).item(), rel=1e-9)


@CELLS
def test_the_reach_is_the_gradient_that_autograd_finds(cell: str) -> None:
    recurrence, x, h, c = made(cell)
    toward = torch.randn(2, HIDDEN)
    norms_h, norms_c = reach(recurrence, x, h, c, toward)
    assert norms_h.shape == norms_c.shape == (2, STEPS)
    recurrence.double()
    lag = 4
    unrolled = unroll(recurrence, x, h, c)
    state = [part[:, STEPS - lag].clone().requires_grad_() for part in (unrolled.h, unrolled.c)]
    outputs, _ = recurrence(x[:, STEPS - lag :].double(), *state)
    (outputs[:, -1] * toward.double()).sum().backward()
    torch.testing.assert_close(norms_h[:, lag - 1], state[0].grad.flatten(1).norm(dim=1))
    if cell == "lstm":
        torch.testing.assert_close(norms_c[:, lag - 1], state[1].grad.flatten(1).norm(dim=1))
    else:
        assert not norms_c.any(), "only an LSTM has a C to carry it"


def test_in_an_rnn_gradients_vanish_by_its_spectral_radius_and_explode_above_one() -> None:
    """Of states near zero and a normal U the product is the radius to the power of the lag."""
    recurrence = Recurrence("rnn", inputs=3, hidden_size=HIDDEN, layers=1)
    for radius in (0.5, 1.5):
        with torch.no_grad():
            recurrence.fused.weight_hh_l0.copy_(radius * torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q)
            recurrence.fused.bias_hh_l0.zero_()
            recurrence.fused.bias_ih_l0.zero_()
        nothing = torch.zeros(1, 1, HIDDEN)
        unrolled = unroll(recurrence, torch.zeros(1, STEPS, 3), nothing, nothing)
        ours = product(recurrence, unrolled, 0, [1, 10, STEPS])
        assert spectral_radius(recurrence, 0) == pytest.approx(radius, rel=1e-5)
        assert ours.full.tolist() == pytest.approx([radius, radius**10, radius**STEPS], rel=1e-4)
        assert ours.direct is None


@pytest.mark.parametrize(("cell", "gate"), [("lstm", 1), ("gru", 1)])
def test_what_the_carousel_keeps_is_the_product_of_its_gates(cell: str, gate: int) -> None:
    """With the gate all but open, as chrono initialisation leaves it, hundreds of steps take almost nothing away."""
    recurrence = Recurrence(cell, inputs=3, hidden_size=HIDDEN, layers=1)
    with torch.no_grad():
        recurrence.fused.bias_ih_l0[gate * HIDDEN : (gate + 1) * HIDDEN] = 9.0
    nothing = torch.zeros(2, 1, HIDDEN)
    unrolled = unroll(recurrence, torch.randn(2, 300, 3), nothing, nothing)
    ours = product(recurrence, unrolled, 0, [1, 300])
    kept = unrolled.gates[:, :, 0, gate].prod(dim=1)
    assert ours.direct is not None
    assert ours.direct[1].item() == pytest.approx(kept.amax(-1).log().mean().exp().item())
    assert ours.middle[1].item() == pytest.approx(kept.median(-1).values.log().mean().exp().item())
    assert ours.full[1] > 0.5
