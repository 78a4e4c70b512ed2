"""Recurrent cells written out gate by gate, and stacks of them.

torch's fused kernels are faster over many steps, and hide everything. Here every gate has a name and can be looked
at; a test holds that both agree. The gates are those of Gers, Schmidhuber and Cummins (2000), "Learning to forget":
an LSTM (Hochreiter and Schmidhuber 1997) with a forget gate, as torch and every textbook have it.

    f_t = sigmoid(W_f x_t + U_f h_{t-1} + b_f)      what is kept of C_{t-1}
    i_t = sigmoid(W_i x_t + U_i h_{t-1} + b_i)      how much of the candidate is written
    g_t = tanh   (W_g x_t + U_g h_{t-1} + b_g)      the candidate, also written C-tilde
    o_t = sigmoid(W_o x_t + U_o h_{t-1} + b_o)      how much of the cell is shown
    C_t = f_t * C_{t-1} + i_t * g_t                 the constant error carousel
    h_t = o_t * tanh(C_t)

The GRU is that of Cho et al. (2014), "Learning phrase representations using RNN encoder-decoder", in torch's (and
cuDNN's) variant: the reset gate acts on U_n h_{t-1} with a bias of its own, where the paper has U_n (r_t * h_{t-1}).

    r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)              how much of h_{t-1} the candidate sees
    z_t = sigmoid(W_z x_t + U_z h_{t-1} + b_z)              what is kept of h_{t-1}: forget and input gate in one
    n_t = tanh   (W_n x_t + b_n + r_t * (U_n h_{t-1} + d_n))  the candidate, also written h-tilde
    h_t = z_t * h_{t-1} + (1 - z_t) * n_t                   its carousel is h itself
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

GATES: dict[str, tuple[str, ...]] = {
    "lstm": ("input", "forget", "candidate", "output"),
    "gru": ("reset", "update", "candidate"),
    "rnn": (),
}
"""The names of each cell's gates, in the order in which torch stacks their weights."""

KEEPS = {"lstm": "forget", "gru": "update"}
"""The gate that says what share of a unit is kept from step to step: how long it remembers."""


class CellState(NamedTuple):
    """After a step of one layer: h and C [B, hidden]; gates [B, gates, hidden]. Only an LSTM has a C: the others hand
    it through untouched. An RNN has no gates.
    """

    h: Tensor
    c: Tensor
    gates: Tensor


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w: Tensor, u: Tensor, b_w: Tensor, b_u: Tensor) -> CellState:
    """One step of an LSTM cell, gate by gate.

    x [B, inputs]; h, c [B, hidden]; w [4 hidden, inputs], u [4 hidden, hidden], b_w and b_u [4 hidden] as in
    `nn.LSTM`'s weight_ih, weight_hh, bias_ih and bias_hh (gates stacked i, f, g, o). The two biases act as one.
    """
    sums = torch.addmm(torch.addmm(b_w + b_u, x, w.T), h, u.T)
    input_sum, forget_sum, candidate_sum, output_sum = sums.chunk(4, dim=1)
    i, f = torch.sigmoid(input_sum), torch.sigmoid(forget_sum)
    g, o = torch.tanh(candidate_sum), torch.sigmoid(output_sum)
    c = f * c + i * g
    return CellState(o * torch.tanh(c), c, torch.stack((i, f, g, o), dim=1))


def gru_cell(x: Tensor, h: Tensor, c: Tensor, w: Tensor, u: Tensor, b_w: Tensor, b_u: Tensor) -> CellState:
    """One step of a GRU cell, gate by gate. Its C is left as it is.

    Shapes as for `lstm_cell`, with the weights of three gates, stacked r, z, n as in `nn.GRU`. The candidate's two
    biases, b_n and d_n, are two: the reset gate acts on one of them only.
    """
    reset_x, update_x, candidate_x = torch.addmm(b_w, x, w.T).chunk(3, dim=1)
    reset_h, update_h, candidate_h = torch.addmm(b_u, h, u.T).chunk(3, dim=1)
    r, z = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    n = torch.tanh(candidate_x + r * candidate_h)
    return CellState(z * h + (1 - z) * n, c, torch.stack((r, z, n), dim=1))


def rnn_cell(x: Tensor, h: Tensor, c: Tensor, w: Tensor, u: Tensor, b_w: Tensor, b_u: Tensor) -> CellState:
    """One step of the plain recurrent cell of Elman (1990): h_t = tanh(W x_t + U h_{t-1} + b). Its C is left as it is.

    Shapes as for `lstm_cell`, with one gate's weights instead of four.
    """
    h = torch.tanh(torch.addmm(torch.addmm(b_w + b_u, x, w.T), h, u.T))
    return CellState(h, c, x.new_empty(x.shape[0], 0, h.shape[1]))


CELLS: dict[str, Callable[..., CellState]] = {"lstm": lstm_cell, "gru": gru_cell, "rnn": rnn_cell}


class Recurrence(nn.Module):
    """A stack of recurrent layers, with every gate of the last step in the open.

    The steps before the last go through torch's fused kernel, the last one through the cell written out above; so
    one step at a time (T = 1) and a whole series at once are the same function.
    """

    def __init__(self, cell: str, inputs: int, hidden_size: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell = cell
        fused = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
        self.fused = fused(inputs, hidden_size, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def remember(self, steps: int) -> Self:
        """Start with units that remember for 1 ... `steps` steps: chrono initialisation (Tallec and Ollivier 2018).

        The forget gate's bias is ln u with u uniform in 1 ... steps - 1, so that a unit keeps 1 - 1/(1 + u) of itself
        a step; the input gate's is -ln u, so that it writes what it forgets. A GRU's update gate does both. Raises
        ValueError for a cell without such a gate.
        """
        if self.cell not in KEEPS:
            raise ValueError(f"a cell that keeps nothing cannot remember: {self.cell}")
        hidden = self.fused.hidden_size
        for number in range(self.fused.num_layers):
            _, _, b_w, b_u = self.layer(number)
            bias = torch.empty(hidden).uniform_(1, max(steps - 1, 1)).log()
            of = {name: slice(n * hidden, (n + 1) * hidden) for n, name in enumerate(GATES[self.cell])}
            for gate, value in ((KEEPS[self.cell], bias), ("input", -bias)):
                if gate in of:
                    b_w[of[gate]] = value
                    b_u[of[gate]] = 0.0
        return self

    def layer(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights w, u, b_w, b_u of a layer, as the cells take them."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w, u, b_w, b_u = (getattr(self.fused, f"{name}_l{number}") for name in names)
        return w, u, b_w, b_u

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, CellState]:
        """One step of all layers. x [B, inputs]; h, c [B, layers, hidden] -> output [B, hidden], the new state
        with h, c [B, layers, hidden] and gates [B, layers, gates, hidden].
        """
        cell = CELLS[self.cell]
        after: list[CellState] = []
        for number in range(self.fused.num_layers):
            x = self.dropout(x) if number else x
            after.append(cell(x, h[:, number], c[:, number], *self.layer(number)))
            x = after[-1].h
        return x, CellState(*(torch.stack(parts, dim=1) for parts in zip(*after, strict=True)))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, CellState]:
        """T steps of all layers. x [B, T, inputs]; h, c [B, layers, hidden] -> outputs [B, T, hidden], last state."""
        if x.shape[1] == 1:
            output, state = self.step(x[:, 0], h, c)
            return output[:, None], state
        before = (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        if self.cell == "lstm":
            outputs, (hs, cs) = self.fused(x[:, :-1], before)
            c = cs.transpose(0, 1)
        else:
            outputs, hs = self.fused(x[:, :-1], before[0])
        output, state = self.step(x[:, -1], hs.transpose(0, 1), c)
        return torch.cat((outputs, output[:, None]), dim=1), state
