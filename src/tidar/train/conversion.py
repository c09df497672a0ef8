"""The module that trains: one forward over clean tokens and mask blocks, one loss (paper Sec. 3.2, or lossless)."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tidar.errors import TidarError
from tidar.layout import Layout, chain_layout, tiled_anchors
from tidar.model.network import Network
from tidar.train.objective import (
    acceptance_weights,
    chunked,
    hard_cross_entropy,
    paper_loss,
    soft_cross_entropy,
)

CHUNK = 2048
"""Rows of logits that exist at once, [CHUNK, V]."""


class LossWeights(NamedTuple):
    """ar and diffusion: the paper's two weights. marginal: weight, beside the sampler head's loss, of the loss on the
    masks' own logits (they pick the head's candidates). teacher_temperature: see `soft_cross_entropy`."""

    ar: float = 1.0
    diffusion: float = 1.0
    marginal: float = 0.3
    teacher_temperature: float = 1.0


class Conversion(nn.Module):
    """Wraps a Network for the Trainer: `forward` returns the loss of a batch, normalised by global counts."""

    accepts_loss_kwargs = True  # tells the Trainer that the loss is already divided by the whole batch's counts

    def __init__(
        self,
        network: Network,
        weights: LossWeights | None = None,
        compiled: bool = False,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        assert network.config is not None
        if network.weights is not None:
            raise TidarError("a model with quantised weights does not train: load it without `weights`")
        self.network, self.weights = network, weights or LossWeights()
        network.fused = network.runner = network.fused_from = None  # they hold copies of what is about to change
        self.recompute = recompute
        self.block_size, self.objective = network.config.block_size, network.config.objective
        self.soft_terms = torch.compile(soft_cross_entropy) if compiled else soft_cross_entropy
        if compiled:
            for layer in decoder_layers(network):
                layer.compile(dynamic=False)
        block = self.block_size
        self.sums = torch.zeros(3, block)  # matches, cross-entropy, targets; divided only when logged

    def uncompile(self) -> None:
        """Back to eager layers: decoding has other shapes at every step."""
        for layer in decoder_layers(self.network):
            layer._compiled_call_impl = None

    def layout(self, batch: dict[str, Tensor]) -> Layout:
        """Random anchors come with the batch; the paper's objective tiles every row."""
        ids, block = batch["input_ids"], self.block_size
        anchors = batch["anchors"]
        if self.objective == "paper":
            anchors = tiled_anchors(ids.shape[1], block, ids.device).expand(len(ids), -1)
        return chain_layout(ids.shape[1], anchors, block, batch["documents"])

    def targets(self, layout: Layout, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The layout's targets [B, blocks, K] that belong to answers: (clean index, valid)."""
        index, valid = layout.targets()
        return index, valid & answers.gather(1, index.flatten(1)).view_as(valid)

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """[2] int64: tokens in the AR term, targets in the diffusion term."""
        _, valid = self.targets(self.layout(batch), batch["answers"])
        return torch.stack((_ar_labels(batch)[1].sum(), valid.sum()))

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Loss of a batch (see train/data.py `collate`); `num_items_in_batch` [2] are the global `counts`."""
        ids, layout = batch["input_ids"], self.layout(batch)
        counts = self.counts(batch) if num_items_in_batch is None else num_items_in_batch
        hidden = self.network(ids, layout, mask=layout.block_mask() if ids.is_cuda else None)
        clean, masks = hidden[:, : layout.clean], hidden[:, layout.clean :]
        blocks = masks.unflatten(1, (layout.blocks, layout.block_size))
        index, valid = self.targets(layout, batch["answers"])
        if self.objective == "paper":
            loss = self._paper(batch, clean, blocks, index, valid, counts)
        else:
            loss = self._lossless(ids, clean, blocks, index, valid) / counts[1].clamp(min=1)
        return {"loss": loss}

    def _lossless(self, ids: Tensor, clean: Tensor, blocks: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """Sum over targets of acceptance weight times soft cross-entropy to the AR logits of the same forward."""
        flat = (index - 1).clamp(min=0).flatten(1)[..., None].expand(-1, -1, clean.shape[-1])
        teacher = clean.detach().gather(1, flat).flatten(0, 1)
        drafter = self.network.drafter
        assert drafter is not None
        students = [blocks]
        if drafter.sampler_head is not None:
            previous = ids.gather(1, index[..., :-1].flatten(1)).view_as(index[..., :-1])
            students.append(drafter.sampler_head(blocks, self.network.embed(previous)))
        *marginal, loss, overlap, match = self._terms(students, teacher)
        self._record(match.view_as(index), loss.view_as(index), valid)
        if marginal:
            loss = loss + self.weights.marginal * marginal[0]
        weights = acceptance_weights(overlap.view_as(index), valid)
        return (weights * loss.view_as(weights)).sum()

    def _terms(self, students: list[Tensor], teacher: Tensor) -> list[Tensor]:
        """Loss, overlap and match [M] of each student's states [..., H] against teacher [M, H], by the model's head."""
        head = self.network.head

        def terms(teacher: Tensor, *students: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                target = head(teacher)
            return tuple(
                t for s in students for t in self.soft_terms(head(s), target, self.weights.teacher_temperature)
            )

        return chunked(terms, CHUNK, self.recompute, teacher, *[s.flatten(0, -2) for s in students])

    def _paper(
        self, batch: dict[str, Tensor], clean: Tensor, blocks: Tensor, index: Tensor, valid: Tensor, counts: Tensor
    ) -> Tensor:
        ids, head = batch["input_ids"], self.network.head

        def loss_sum(states: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
            rows = states.flatten(0, -2), labels.flatten()
            (loss,) = chunked(lambda h, y: (hard_cross_entropy(head(h), y),), CHUNK, self.recompute, *rows)
            return (loss * counted.flatten()).sum()

        labels, counted = _ar_labels(batch)
        ar = loss_sum(clean[:, :-1], labels, counted)
        diffusion = loss_sum(blocks, ids.gather(1, index.flatten(1)), valid)
        return paper_loss(ar, counts[0], diffusion, counts[1], self.weights.ar, self.weights.diffusion)

    @torch.no_grad()
    def _record(self, match: Tensor, loss: Tensor, valid: Tensor) -> None:
        """Add a batch's sums over each block position."""
        sums = torch.stack([(x * valid).sum((0, 1)) for x in (match, loss, torch.ones_like(loss))])
        self.sums = self.sums.to(sums.device) + sums

    def pop_metrics(self) -> dict[str, Any]:
        """What happened since the last call; empty if nothing was counted.

        cross_entropy: mean soft cross-entropy per target, in nats. The loss itself weighs each position by how likely
        it is to be reached, so it may rise while this falls. match: teacher-forced argmax agreement of block positions
        1..K. accepted_if_independent: the tokens a step would gain if positions failed independently at these rates.
        """
        (matches, losses, totals), self.sums = self.sums.tolist(), torch.zeros_like(self.sums)
        if not all(totals):
            return {}
        rates = [m / t for m, t in zip(matches, totals, strict=True)]
        expected = 1 + sum(accumulate(rates[1:], mul))
        return {
            "cross_entropy": round(sum(losses) / sum(totals), 4),
            "match": [round(rate, 4) for rate in rates],
            "accepted_if_independent": round(expected, 3),
        }


def _ar_labels(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Next tokens [B, S-1] and which of them count: answers that continue their document."""
    ids, documents, answers = batch["input_ids"], batch["documents"], batch["answers"]
    return ids[:, 1:], answers[:, 1:] & (documents[:, 1:] == documents[:, :-1])


def decoder_layers(network: Network) -> nn.ModuleList:
    """The backbone's list of layers."""
    count = network.lm.config.get_text_config().num_hidden_layers
    lists = [m for m in network.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0]
