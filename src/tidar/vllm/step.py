"""One step's tokens: which requests draft, where their drafts and masks lie, what they see, and what comes of it.

vLLM has put every request's tokens one after another: the last verified token, then placeholders. Here the
placeholders become drafts and masks. Everything that the model reads stays where it is in memory, as CUDA graphs want.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tidar.kernels.judge import Decision, choose_outcomes
from tidar.layout import Layout, chains, step_layout
from tidar.vllm.replay import Replay
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
    [R] their places in the worker; starts: [R] where their tokens begin. tokens [R, K] what is judged; anchors [R or 1,
    B] the drafts that blocks continue; prefix [R] cached tokens.
    """

    shape: Shape
    rows: np.ndarray
    index: Tensor | None
    slots: Tensor
    starts: Tensor
    tokens: Tensor
    anchors: Tensor
    prefix: Tensor

    def parts(self, most: int) -> list[Step]:
        """The same with at most so many requests each."""
        count = len(self.rows)
        if count <= most:
            return [self]
        index = sent(self.rows, self.slots.device) if self.index is None else self.index
        return [self._part(slice(start, start + most), index) for start in range(0, count, most)]

    def _part(self, rows: slice, index: Tensor) -> Step:
        anchors = self.anchors[rows] if len(self.anchors) == len(index) else self.anchors  # else one row for all
        rest = (self.slots[rows], self.starts[rows], self.tokens[rows], anchors, self.prefix[rows])
        return Step(self.shape, self.rows[rows], index[rows], *rest)


class Told(NamedTuple):
    """What R requests' drafting step has come to.

    tokens: [R, K] int64, of which the first ones count. counts: [4, R] int32: how many those are, how many of the slots
    are none, how many drafts were judged, and whether the true outcome had no block of its own.
    """

    tokens: Tensor
    counts: Tensor

    @classmethod
    def of(cls, decision: Decision, shape: Shape, anchors: Tensor) -> Told:
        """`anchors` [R or 1, B]: the drafts that the step's blocks continue."""
        accepted, drafted = decision.result[:, 0], decision.result[:, 1]
        missed = torch.zeros_like(accepted)
        if shape.outcomes < shape.draft_length:
            missed = (anchors != accepted[:, None] - 1).all(1)
        counts = torch.stack((accepted, shape.slots - accepted, drafted, missed))
        return cls(decision.result[:, 3:].contiguous(), counts.int())


class Buffers:
    """What the model reads of a step beside vLLM's own buffers.

    gate [most tokens, 1] in the model's dtype, 1 at masks; enter, exit: see Visibility.
    """

    def __init__(self, most_tokens: int, most_requests: int, dtype: torch.dtype, device: torch.device):
        self.gate = torch.zeros(most_tokens, 1, dtype=dtype, device=device)
        self.enter = torch.zeros(most_tokens, dtype=torch.int32, device=device)
        self.exit = torch.ones(most_tokens, dtype=torch.int32, device=device)
        self.requests = torch.arange(most_requests, dtype=torch.int32, device=device)
        self.gated = False
        # On a GPU our attention runs requests that draft, and no others.
        self.seen_by_all = device.type == "cpu"

    def visibility(self, requests: Tensor | None, count: int, slots: int) -> Visibility:
        """`requests` None: the first `count`, which is all."""
        chosen = self.requests[:count] if requests is None else requests
        return Visibility(self.enter, self.exit, chosen, slots, requests is None)

    def fill_plain(self, batch: Any, full_graph: bool) -> None:
        """Every request is a chain, as in plain decoding; what drafts is filled in over it.

        `full_graph`: whether a recorded forward is replayed. It may be one in which all requests draft, also for
        prompts that happen to have as many tokens as a step has slots.
        """
        if self.gated:
            self.gate.zero_()
            self.gated = False
        if self.seen_by_all or (full_graph and batch.num_tokens > batch.num_reqs):
            bounds = chains(batch.num_scheduled_tokens[: batch.num_reqs].tolist())
            enter, exit_ = (sent(bound.numpy(), self.enter.device) for bound in bounds)
            self.enter[: len(enter)], self.exit[: len(exit_)] = enter.int(), exit_.int()

    def fill_step(self, batch: Any, starts: Tensor, tokens: Tensor, layout: Layout, last_position: int) -> None:
        """A drafting step's token ids, positions, gate and visibility; `tokens` [R, N] are drafts and masks.

        vLLM has used its positions by now, one after another, to place keys and values.
        """
        place = torch.arange(layout.size, device=starts.device)
        where = starts[:, None] + place
        # Whole tensors: a number would be sent to the device, and the host would wait for that.
        batch.input_ids[where] = tokens.int()
        self.gate[where] = (place >= layout.clean).to(self.gate.dtype)[:, None].expand(len(where), -1, -1)
        # Masks may stand past the context's end; no token there is ever committed.
        batch.positions[where] = layout.position.clamp(max=last_position)
        self.enter[where], self.exit[where] = layout.enter.int(), layout.exit.int()


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers on the device, int64, in the order of its work.

    The host does not wait: it would for memory that is not pinned, until all that was launched before is done.
    """
    held = torch.from_numpy(numbers.astype(np.int64))
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


def find_rows(batch: Any, curve: Curve) -> tuple[Shape, np.ndarray]:
    """The shape of a step, and the requests of its batch that have it: those with that many placeholders."""
    placed = batch.num_draft_tokens_per_req
    if placed is None or not placed.any():
        return Shape(1, 0), np.empty(0, dtype=np.int64)
    shape = curve.of_slots(int(placed.max()) + 1)
    return shape, np.flatnonzero(placed == shape.slots - 1) if shape.drafting else np.empty(0, dtype=np.int64)


class StepMaker:
    """Makes the drafting part of steps and fills it into the batch.

    Args:
        buffers, drafts: what the model reads, and what requests carry.
        mask_token, last_position: the token id of masks, and the last position of the model's context.
        causal_blocks: as the model was trained.
        replay: runs what is the same in every step of a shape.
    """

    def __init__(
        self, buffers: Buffers, drafts: Drafts, mask_token: int, last_position: int, causal_blocks: bool, replay: Replay
    ) -> None:
        self.buffers, self.drafts, self.replay = buffers, drafts, replay
        self.mask_token, self.last_position, self.causal_blocks = mask_token, last_position, causal_blocks

    def make(self, batch: Any, shape: Shape, rows: np.ndarray) -> Step:
        """What the requests `rows` of a batch judge and draft."""
        self.buffers.gated = True
        count = len(rows)
        if count == batch.num_reqs:
            read = batch.input_ids, batch.positions, batch.query_start_loc
            fill = partial(self._fill, batch, shape, None)
            given, size = batch.idx_mapping[:count], count * shape.slots
            made = self.replay(("inputs", shape, count), fill, given, tokens=size, fixed=read)
            return Step(shape, rows, None, *made)
        index = sent(rows, batch.input_ids.device)
        return Step(shape, rows, index, *self._fill(batch, shape, index, batch.idx_mapping[index]))

    def _fill(self, batch: Any, shape: Shape, index: Tensor | None, slots: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a `Step`, from `slots` on."""
        length, slots, drafts = shape.draft_length, slots.long(), self.drafts
        starts = (batch.query_start_loc[: len(slots)] if index is None else batch.query_start_loc[index]).long()
        outcomes: Tensor | range = range(1, length + 1)
        if shape.outcomes < length:
            counts = drafts.count[slots].clamp(max=length)
            outcomes = choose_outcomes(drafts.confidence[slots, : length - 1].contiguous(), counts, shape.outcomes)
        layout = step_layout(length, outcomes, slots.device, (), self.causal_blocks).after(batch.positions[starts])
        tokens = torch.cat((batch.input_ids[starts][:, None].long(), drafts.tokens[slots, 1:length]), 1)
        masks = tokens.new_full((len(slots), layout.size - length), self.mask_token)
        self.buffers.fill_step(batch, starts, torch.cat((tokens, masks), 1), layout, self.last_position)
        return slots, starts, tokens, layout.anchors, layout.prefix
