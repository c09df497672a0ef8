"""One step's tokens: which requests draft, where their drafts and masks lie, and what they see.

vLLM has put every request's tokens one after another: the last verified token, then placeholders. Here the
placeholders become drafts and masks. Everything that the model reads stays where it is in memory, as CUDA graphs want.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tidar.kernels.judge import choose_outcomes
from tidar.layout import Layout, chains, step_layout
from tidar.vllm.shapes import Curve, Shape


class Visibility(NamedTuple):
    """What tokens of a step see of its own tokens: `enter[k] <= enter[q] < exit[k]`, see layout.py.

    enter, exit: [most tokens] int32, numbers within each request. requests: [n] int32, those that draft; slots: how
    many tokens each of them has; 0 where none drafts. all: whether these are all of the step.
    """

    enter: Tensor
    exit: Tensor
    requests: Tensor
    slots: int
    all: bool


@dataclass
class Drafts:
    """What requests carry from step to step, by their place in the worker ("slot"), up to K drafts each.

    tokens [slots, K] int64 (the first column is unused: vLLM keeps the verified token); count [slots] int64, how many
    are any, 1..K; confidence [slots, K-1].
    """

    tokens: Tensor
    count: Tensor
    confidence: Tensor

    @staticmethod
    def empty(slots: int, most: int, device: torch.device) -> Drafts:
        return Drafts(
            torch.zeros(slots, most, dtype=torch.long, device=device),
            torch.ones(slots, dtype=torch.long, device=device),
            torch.zeros(slots, most - 1, device=device),
        )


@dataclass
class Step:
    """The drafting part of one step.

    rows: which requests of the batch draft, on the host; index: the same on the device, None for all of them. slots:
    [R] their places in the worker; starts: [R] where their tokens begin. tokens [R, K] what is judged; layout: behind
    their prefixes.
    """

    shape: Shape
    rows: np.ndarray
    index: Tensor | None
    slots: Tensor
    starts: Tensor
    tokens: Tensor
    layout: Layout


class Buffers:
    """What the model reads of a step beside vLLM's own buffers.

    gate [most tokens, 1] in the model's dtype, 1 at masks; positions [most tokens] int64; enter, exit: see Visibility.
    """

    def __init__(self, curve: Curve, most_tokens: int, most_requests: int, dtype: torch.dtype, device: torch.device):
        self.curve = curve
        self.gate = torch.zeros(most_tokens, 1, dtype=dtype, device=device)
        self.positions = torch.zeros(most_tokens, dtype=torch.long, device=device)
        self.enter = torch.zeros(most_tokens, dtype=torch.int32, device=device)
        self.exit = torch.ones(most_tokens, dtype=torch.int32, device=device)
        self.requests = torch.arange(most_requests, dtype=torch.int32, device=device)
        self.gated = False

    def visibility(self, requests: Tensor | None, count: int, slots: int) -> Visibility:
        """`requests` None: the first `count`, which is all."""
        chosen = self.requests[:count] if requests is None else requests
        return Visibility(self.enter, self.exit, chosen, slots, requests is None)

    def fill_plain(self, batch: Any) -> None:
        """Every request is a chain, as in plain decoding; what drafts is filled in over it."""
        if self.gated:
            self.gate.zero_()
            self.gated = False
        if self.enter.is_cpu:  # elsewhere our attention runs requests that draft, and no others
            enter, exit_ = chains(batch.num_scheduled_tokens[: batch.num_reqs].tolist())
            self.enter[: len(enter)], self.exit[: len(exit_)] = enter, exit_

    def fill_step(self, batch: Any, step: Step, mask_token: int, last_position: int) -> None:
        """A drafting step's token ids, positions, gate and visibility."""
        layout, clean = step.layout, step.layout.clean
        where = step.starts[:, None] + torch.arange(layout.size, device=step.starts.device)
        batch.input_ids[where[:, 1:clean]] = step.tokens[:, 1:].int()
        batch.input_ids[where[:, clean:]] = mask_token
        self.gate[where[:, :clean]], self.gate[where[:, clean:]] = 0, 1
        self.gated = True
        # Masks may stand past the context's end; no token there is ever committed.
        self.positions[where] = layout.position.clamp(max=last_position)
        self.enter[where], self.exit[where] = layout.enter.int(), layout.exit.int()


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers on the device, int64, in the order of its work and without waiting for it."""
    return torch.from_numpy(numbers.astype(np.int64)).to(device, non_blocking=True)


def find_rows(batch: Any, curve: Curve) -> tuple[Shape, np.ndarray]:
    """The shape of a step, and the requests of its batch that have it: those with that many placeholders."""
    placed = batch.num_draft_tokens_per_req
    if placed is None or not placed.any():
        return Shape(1, 0), np.empty(0, dtype=np.int64)
    shape = curve.of_slots(int(placed.max()) + 1)
    return shape, np.flatnonzero(placed == shape.slots - 1) if shape.drafting else np.empty(0, dtype=np.int64)


def make_step(batch: Any, shape: Shape, rows: np.ndarray, drafts: Drafts, causal_blocks: bool) -> Step:
    """What the requests `rows` of a batch judge and draft."""
    device = batch.input_ids.device
    index = None if len(rows) == batch.num_reqs else sent(rows, device)
    slots = (batch.idx_mapping if index is None else batch.idx_mapping[index])[: len(rows)].long()
    starts = batch.query_start_loc[: batch.num_reqs]
    starts = (starts if index is None else starts[index]).long()
    length = shape.draft_length
    outcomes: Tensor | range = range(1, length + 1)
    if shape.outcomes < length:
        counts = drafts.count[slots].clamp(max=length)
        outcomes = choose_outcomes(drafts.confidence[slots, : length - 1].contiguous(), counts, shape.outcomes)
    layout = step_layout(length, outcomes, device, (), causal_blocks).after(batch.positions[starts])
    tokens = torch.cat((batch.input_ids[starts][:, None].long(), drafts.tokens[slots, 1:length]), 1)
    return Step(shape, rows, index, slots, starts, tokens, layout)
