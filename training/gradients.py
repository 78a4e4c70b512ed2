"""How far gradients reach back: the product of derivatives that vanishes or explodes, and what C_t carries.

Backpropagation through time multiplies one Jacobian a step. In a plain RNN each is diag(1 - h_t^2) U: the product
shrinks or grows exponentially with the lag (Hochreiter 1991; Bengio, Simard and Frasconi 1994; Pascanu, Mikolov and
Bengio 2013). Along C_t of an LSTM it is the product of the forget gates, as far as gates do not depend on h_{t-1}
(Hochreiter and Schmidhuber 1997: the constant error carousel). Here both are measured on a trained recurrence, by
autograd and in double precision, so that what vanishes is still a number.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cells import CELLS, GATES, KEEPS, CellState, Recurrence


@dataclass(frozen=True)
class Unrolled:
    """T steps of a recurrence, one by one: x [B, T, inputs]; the states before each step and after the last,
    h, c [B, T + 1, layers, hidden]; gates [B, T, layers, gates, hidden]. In double precision.
    """

    x: Tensor
    h: Tensor
    c: Tensor
    gates: Tensor


def unroll(recurrence: Recurrence, x: Tensor, h: Tensor, c: Tensor) -> Unrolled:
    """Open up T steps from a state. x [B, T, inputs]; h, c [B, layers, hidden]."""
    states, _ = _steps(_in_double(recurrence), x.double(), h.double(), c.double())
    return Unrolled(
        x.double(),
        torch.stack([state.h for state in states], dim=1),
        torch.stack([state.c for state in states], dim=1),
        torch.stack([state.gates for state in states[1:]], dim=1),
    )


def reach(recurrence: Recurrence, x: Tensor, h: Tensor, c: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a loss at the last of T steps with respect to each earlier state.

    x [B, T, inputs]; h, c [B, layers, hidden] before the first step; toward [B, hidden]: the derivative of the loss
    to the last output. -> the norms of dL/dh_{t-k} and dL/dC_{t-k}, [B, T] for k = 1 ... T.
    """
    states, output = _steps(
        _in_double(recurrence), x.double(), h.double().requires_grad_(), c.double().requires_grad_()
    )
    loss = (output * toward.double()).sum()
    latest_first = states[-2::-1]
    gradients = torch.autograd.grad(
        loss, [s.h for s in latest_first] + [s.c for s in latest_first], materialize_grads=True, allow_unused=True
    )
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients], dim=1)
    return norms[:, : x.shape[1]], norms[:, x.shape[1] :]


def jacobians(recurrence: Recurrence, unrolled: Unrolled, layer: int) -> Tensor:
    """The derivative of a layer's state to the one a step before: h_t and C_t to h_{t-1} and C_{t-1}.

    -> [B, T, 2 hidden, 2 hidden] double, h before C. Of an RNN's the first block is diag(1 - h_t^2) U; of an LSTM's
    the last is diag(f_t). Layers above never reach down, so products of these are exact within a stack too.
    """
    weights = [part.detach().double() for part in recurrence.layer(layer)]

    def step(x: Tensor, state: Tensor) -> Tensor:
        after = CELLS[recurrence.cell](x[None], *state[None].chunk(2, dim=1), *weights)
        return torch.cat((after.h[0], after.c[0]))

    x = unrolled.x if layer == 0 else unrolled.h[:, 1:, layer - 1]
    before = torch.cat((unrolled.h[:, :-1, layer], unrolled.c[:, :-1, layer]), dim=-1)
    each = torch.func.vmap(torch.func.jacrev(step, argnums=1))(x.flatten(0, 1), before.flatten(0, 1))
    return each.unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Product:
    """How a perturbation of what a layer carries (C of an LSTM, h of the others) arrives k steps later, by lag k.

    full: the largest singular value of d carried_t / d carried_{t-k}, all paths taken. direct [lags]: the same along
    the carousel alone, where it is a product of gates: the most that any unit keeps; middle: what the median unit
    keeps. None for an RNN, which has no such path. Each is the geometric mean over B.
    """

    lags: list[int]
    full: Tensor
    direct: Tensor | None
    middle: Tensor | None


def product(recurrence: Recurrence, unrolled: Unrolled, layer: int, lags: list[int]) -> Product:
    """The product of derivatives of a layer from the last step back, at the lags given (increasing, at most T)."""
    hidden = recurrence.fused.hidden_size
    carried = slice(hidden, None) if recurrence.cell == "lstm" else slice(hidden)
    each = jacobians(recurrence, unrolled, layer)
    so_far = torch.eye(2 * hidden, dtype=torch.float64).expand(len(each), -1, -1)
    full = []
    for lag in range(1, lags[-1] + 1):
        so_far = so_far @ each[:, -lag]
        if lag in lags:
            full.append(geometric_mean(torch.linalg.matrix_norm(so_far[:, carried, carried], 2)))
    direct = middle = None
    if keeps := KEEPS.get(recurrence.cell):
        gate = unrolled.gates[:, :, layer, GATES[recurrence.cell].index(keeps)]
        kept = gate.log().flip(1).cumsum(1)[:, torch.tensor(lags) - 1].exp()  # [B, lags, hidden]
        direct, middle = geometric_mean(kept.amax(-1)), geometric_mean(kept.median(-1).values)
    return Product(lags, torch.stack(full), direct, middle)


def spectral_radius(recurrence: Recurrence, layer: int) -> float:
    """Of a layer's recurrent weights U in an RNN, |1 - h^2| being at most 1: gradients must vanish where it is below
    1, and can explode only where it is above (Pascanu et al. 2013, section 2.1).
    """
    _, u, _, _ = recurrence.layer(layer)
    return float(torch.linalg.eigvals(u.detach()).abs().max())


def spread_lags(most: int, count: int = 40) -> list[int]:
    """About `count` lags from 1 to `most`, evenly spread by their logarithms.

    >>> spread_lags(100, 8)
    [1, 2, 4, 7, 14, 27, 52, 100]
    """
    return sorted({round(float(lag)) for lag in torch.logspace(0, torch.tensor(most).log10().item(), count)})


def geometric_mean(norms: Tensor) -> Tensor:
    """The geometric mean over B; what underflowed counts as the least there is."""
    return norms.clamp_min(torch.finfo(torch.float64).tiny).log().mean(0).exp()


def _in_double(recurrence: Recurrence) -> Recurrence:
    return copy.deepcopy(recurrence).double().eval().requires_grad_(False)


def _steps(recurrence: Recurrence, x: Tensor, h: Tensor, c: Tensor) -> tuple[list[CellState], Tensor]:
    """The states before the first step and after each, and the last output."""
    states = [CellState(h, c, h.new_empty(0))]
    for t in range(x.shape[1]):
        states.append(recurrence.step(x[:, t], states[-1].h, states[-1].c)[1])
    return states, states[-1].h[:, -1]
