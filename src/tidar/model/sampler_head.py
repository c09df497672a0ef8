"""A small recurrent head that re-scores each draft position given the tokens drafted before it.

One-step diffusion guesses every position of a block at once, so its marginals may disagree with each other, and none of
them knows d_1, which the verifier chooses in the same forward. This head (after the sampler head of Apple MTP, arXiv
2507.11851, with a state, as in recurrent drafters) walks through the block once and tells each position what came
before:

    s_m = s_{m-1} + W_out(silu(a) * b),   (a, b) = W_hidden n(h_m) + W_token n(e(d_{m-1})) + W_state n(s_{m-1}),
    g_m = h_m + s_m,                      n(x) = x / sqrt(mean(x^2) + 0.01)

with h_m the mask's final hidden state and e the frozen input embedding; the frozen output embedding scores g_m. In
training d_{m-1} is the true token: a draft only counts while all drafts before it are right, so nothing is lost by it.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn


KIND = os.environ.get("TIDAR_HEAD", "recurrent")
"""Experiment: "recurrent", "stateless" or "markov"."""


class SamplerHead(nn.Module):
    """The cell above; hidden is the model width, width the bottleneck. W_out starts at zero: no correction."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.hidden_in = nn.Linear(hidden, 2 * width, bias=False)
        self.token_in = nn.Linear(hidden, 2 * width, bias=False)
        self.state_in = nn.Linear(hidden, 2 * width, bias=False)
        self.out = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.out.weight)

    @property
    def width(self) -> int:
        return self.out.in_features

    def inputs(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """What the cell takes from mask state [..., H] and previous token's embedding [..., H]: [..., 2 * width]."""
        if KIND == "markov":  # a low-rank bias by the previous token alone
            return _linear(self.token_in, _norm(embedded))
        return _linear(self.hidden_in, _norm(hidden)) + _linear(self.token_in, _norm(embedded))

    def advance(self, state: Tensor, inputs: Tensor) -> Tensor:
        """s_m, float32, from s_{m-1} [..., H] and `inputs` of position m."""
        if KIND == "markov":
            return _linear(self.out, inputs[..., : self.width]).float()
        if KIND == "stateless":  # mask state and previous token, as Apple MTP's
            gate, value = inputs.chunk(2, -1)
            return _linear(self.out, F.silu(gate) * value).float()
        gate, value = (inputs + _linear(self.state_in, _norm(state).to(inputs.dtype))).chunk(2, -1)
        return state + _linear(self.out, F.silu(gate) * value).float()

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Teacher-forced pass over whole blocks.

        Args:
            hidden: [..., K, H] final hidden states of a block's masks.
            embedded: [..., K-1, H] embeddings of the true tokens at the block's first K-1 positions.

        Returns:
            [..., K, H]: hidden, re-scored from the second position on.
        """
        inputs = self.inputs(hidden[..., 1:, :], embedded)
        state = torch.zeros_like(hidden[..., 0, :], dtype=torch.float32)
        states = [state]
        for m in range(inputs.shape[-2]):
            state = self.advance(state, inputs[..., m, :])
            states.append(state)
        return hidden + torch.stack(states, -2).to(hidden.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in x's dtype: master weights stay float32 in training, activations bf16."""
    return F.linear(x, layer.weight.to(x.dtype))


def _norm(x: Tensor) -> Tensor:
    # The large epsilon keeps gradients tame while the state is near its start, zero.
    return F.rms_norm(x, x.shape[-1:], eps=1e-2)
