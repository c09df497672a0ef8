"""The module that trains: one forward over clean tokens and mask blocks, one loss (paper Sec. 3.2, or lossless)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_layers import GradientCheckpointingLayer

from tidar.config import Objective
from tidar.errors import TidarError
from tidar.layout import Layout, block_causal_layout, chain_layout, tiled_anchors
from tidar.model.attention import forget, half
from tidar.model.drafter import Drafter
from tidar.model.network import MASKED, Network
from tidar.train.blocks import at_targets
from tidar.train.objective import (
    Head,
    TokenTerms,
    acceptance_weights,
    cross_entropy_sum,
    decay_weights,
    diffusion_weights,
    linear_sum,
    linear_terms,
    paper_loss,
    token_terms,
    until_failure_weights,
)


class LossOptions(NamedTuple):
    """What is added up.

    Attributes:
        ar, diffusion: the paper's two weights.
        marginal: weight, beside the sampler head's loss, of the loss on the masks' own logits (they pick the head's
            candidates).
        teacher_temperature, loss: see `token_terms`.
        position_weights: "acceptance", "accept-until-fail", "decay" or "uniform".
        decay_gamma: see `decay_weights`.
    """

    ar: float = 1.0
    diffusion: float = 1.0
    marginal: float = 0.3
    teacher_temperature: float = 1.0
    loss: str = "soft"
    position_weights: str = "acceptance"
    decay_gamma: float = 4.0


class Targets(NamedTuple):
    """What each mask slot should predict, each [B, blocks, K].

    Attributes:
        place: the clean token there.
        answer: bool, whether it exists and belongs to an answer.
        shown: bool, whether the block shows it, instead of a mask.
    """

    place: Tensor
    answer: Tensor
    shown: Tensor

    @property
    def counted(self) -> Tensor:
        return self.answer & ~self.shown


class Conversion(nn.Module):
    """Wraps a Network for the Trainer: `forward` returns the loss of a batch, normalised by global counts."""

    accepts_loss_kwargs = True  # tells the Trainer that the loss is already divided by the whole batch's counts

    def __init__(
        self,
        network: Network,
        options: LossOptions | None = None,
        compiled: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        assert network.config is not None
        if network.weights is not None:
            raise TidarError("a model with quantised weights does not train: load it without `weights`")
        self.network = network
        network.fused = network.runner = network.fused_from = None  # they hold copies of what is about to change
        self.block_size: int = network.config.block_size
        self.objective: Objective = network.config.objective
        lossless = self.objective == "lossless"
        self.options = options or (LossOptions() if lossless else LossOptions(loss="hard", position_weights="uniform"))
        self.token_terms = torch.compile(token_terms) if compiled else token_terms
        self.checkpointed = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_layers(network, compiled)
        if compiled:
            for layer in decoder_layers(network):
                layer.compile(dynamic=False)
        # Matches, cross-entropy and targets of the AR term, and of each block position; divided only when logged.
        self.sums = torch.zeros(3, 1 + self.block_size)
        self.constant_masks: dict[tuple[int, int], BlockMask] = {}

    def uncompile(self) -> None:
        """Back to eager layers that keep their activations: decoding has other shapes at every step."""
        for layer in decoder_layers(self.network):
            layer._compiled_call_impl = None
        forget(self.network)
        if self.checkpointed:
            _checkpointing(self.network, "disable")()

    def layout(self, batch: dict[str, Tensor]) -> Layout:
        """The batch's anchors, or without any the paper's: all tiles of every row."""
        ids, block, documents = batch["input_ids"], self.block_size, batch.get("documents")
        anchors = batch.get("anchors")
        if self.objective == "ar":
            anchors = ids.new_empty(len(ids), 0)
        elif anchors is None:
            anchors = tiled_anchors(ids.shape[1], block, ids.device).expand(len(ids), -1)
        if self.objective == "block-diffusion":
            return block_causal_layout(ids.shape[1], anchors, block, documents)
        return chain_layout(ids.shape[1], anchors, block, documents, causal_blocks=self.network.causal_blocks)

    def block_mask(self, layout: Layout, batch: dict[str, Tensor]) -> BlockMask | None:
        """The layout's mask for FlexAttention; made once where it is the same for all batches of a shape.

        Only of the tokens that need one; None if none does.
        """
        if layout.masked.start == layout.size:
            return None
        if "anchors" in batch or "documents" in batch:
            return layout.block_mask(layout.masked)
        shape = len(layout.anchors), layout.size
        if shape not in self.constant_masks:
            self.constant_masks[shape] = layout.block_mask(layout.masked)
        return self.constant_masks[shape]

    def targets(self, layout: Layout, batch: dict[str, Tensor]) -> Targets:
        index, inside = layout.targets()
        shown = batch.get("shown", torch.zeros_like(inside))
        return Targets(index, inside & at_targets(batch["answers"], index), inside & shown)

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """[2] int64: tokens in the AR term, targets in the diffusion term.

        Block diffusion's bound is one on all tokens of a block, whichever are masked, so it counts them all.
        """
        targets = self.targets(self.layout(batch), batch)
        counted = targets.answer if self.objective == "block-diffusion" else targets.counted
        return torch.stack((_ar_labels(batch)[1].sum(), counted.sum()))

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Loss of a batch (see train/blocks.py); `num_items_in_batch` [2] are the global `counts`."""
        ids, layout = batch["input_ids"], self.layout(batch)
        targets = self.targets(layout, batch)
        counts = self.counts(batch) if num_items_in_batch is None else num_items_in_batch
        tokens = at_targets(ids, targets.place)
        shown = torch.where(targets.shown, tokens, MASKED).flatten(1) if "shown" in batch else None
        if self.objective == "lossless":
            masks = half_masks(layout) if ids.is_cuda else None
            clean, states = self.network.halves(ids, layout, masks, shown)
            blocks = states.unflatten(1, (layout.blocks, layout.block_size))
            return {"loss": self._lossless(clean, blocks, tokens, targets) / counts[1].clamp(min=1)}
        mask = self.block_mask(layout, batch) if ids.is_cuda else None
        hidden = self.network(ids, layout, mask=mask, block_ids=shown)
        clean, states = hidden[:, : layout.clean], hidden[:, layout.clean :]
        blocks = states.unflatten(1, (layout.blocks, layout.block_size))
        ar_weight, diffusion_weight = self.term_weights
        ar = self._ar_sum(batch, clean) if ar_weight else hidden.new_zeros(())
        diffusion = self._diffusion_sum(clean, blocks, tokens, targets) if diffusion_weight else hidden.new_zeros(())
        return {"loss": paper_loss(ar, counts[0], diffusion, counts[1], ar_weight, diffusion_weight)}

    @property
    def term_weights(self) -> tuple[float, float]:
        """Weights of the AR and the diffusion term; a term of weight 0 is not computed."""
        fixed = {"lossless": (0.0, 1.0), "ar": (1.0, 0.0), "block-diffusion": (0.0, 1.0)}
        return fixed.get(self.objective, (self.options.ar, self.options.diffusion))

    @property
    def _head(self) -> Head:
        output = self.network.lm.get_output_embeddings()
        return Head(output.weight, getattr(output, "bias", None))

    def _terms(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> TokenTerms:
        return self.token_terms(student, teacher, labels, self.options.loss, self.options.teacher_temperature)

    def _lossless(self, clean: Tensor, blocks: Tensor, tokens: Tensor, targets: Targets) -> Tensor:
        """Sum over targets of position weight times the drafter's loss against the AR logits of the same forward."""
        drafter = self.network.drafter
        assert drafter is not None
        students = [blocks]
        if drafter.sampler_head is not None:
            students.append(drafter.sampler_head(blocks, self.network.embed(tokens[..., :-1])))
        flat = [student.flatten(0, -2) for student in students]
        *marginal, own = linear_terms(self._terms, self._head, flat, teacher_states(clean, targets), tokens.flatten())
        self._record(own, targets)
        loss = own.loss + sum(self.options.marginal * terms.loss for terms in marginal)
        return (self._position_weights(own, targets) * loss.view_as(tokens)).sum()

    def _ar_sum(self, batch: dict[str, Tensor], clean: Tensor) -> Tensor:
        labels, counted = _ar_labels(batch)
        states = clean[:, :-1].flatten(0, 1)
        total = cross_entropy_sum(self._head, states, labels.flatten(), counted.flatten(), self._terms)
        self._add(slice(0, 1), total.new_zeros(()), total.detach(), counted.sum())
        return total

    def _diffusion_sum(self, clean: Tensor, blocks: Tensor, tokens: Tensor, targets: Targets) -> Tensor:
        """Sum over targets of position weight times the masks' loss, through a head that trains too."""
        teacher = None if self.options.loss == "hard" else teacher_states(clean, targets)
        rows = self._head, blocks.flatten(0, -2), teacher, tokens.flatten()
        terms = None
        if self.options.position_weights in ("acceptance", "accept-until-fail"):
            with torch.no_grad():  # the gradient of the head needs the weights beforehand
                terms = linear_sum(self._terms, *rows, torch.ones_like(tokens.flatten(), dtype=torch.float32))[1]
        weights = self._position_weights(terms, targets)
        if self.objective == "block-diffusion":
            weights = weights * diffusion_weights(targets.answer, targets.counted)
        total, terms = linear_sum(self._terms, *rows, weights.flatten())
        self._record(terms, targets)
        return total

    @torch.no_grad()
    def _position_weights(self, terms: TokenTerms | None, targets: Targets) -> Tensor:
        """[B, blocks, K] float32, 0 where nothing is counted. Tokens that the block shows are no risk to a draft."""
        counted, kind = targets.counted, self.options.position_weights
        if kind == "uniform":
            return counted.float()
        if kind == "decay":
            return decay_weights(counted, self.options.decay_gamma)
        assert terms is not None
        there, shown = targets.answer | targets.shown, targets.shown
        overlap, match = (torch.where(shown, 1.0, x.view_as(shown)) for x in (terms.overlap, terms.match))
        weights = acceptance_weights(overlap, there) if kind == "acceptance" else until_failure_weights(match, there)
        return weights * counted

    @torch.no_grad()
    def _record(self, terms: TokenTerms, targets: Targets) -> None:
        """Add a batch's sums over each block position."""
        counted = targets.counted
        rows = (x.view_as(counted) * counted for x in (terms.match, terms.loss, torch.ones_like(terms.loss)))
        self._add(slice(1, None), *(row.sum((0, 1)) for row in rows))

    def _add(self, places: slice, *sums: Tensor) -> None:
        self.sums = self.sums.to(sums[0].device)
        self.sums[:, places] += torch.stack([x.float().reshape(-1) for x in sums])

    def pop_metrics(self) -> dict[str, Any]:
        """What happened since the last call; nothing about a term that counted nothing.

        ar_cross_entropy: mean loss of the AR term, in nats. cross_entropy: mean unweighted loss per target of the
        masks, in nats. The loss itself may weigh each position by how likely it is to be reached, and so rise while
        this falls. match: teacher-forced argmax agreement of block positions 1..K with the AR model, or with the data
        where that is the target. accepted_if_independent: the tokens a step would gain if positions failed
        independently at these rates.
        """
        sums, self.sums = self.sums.tolist(), torch.zeros_like(self.sums)
        (_, ar_loss, ar_total), (matches, losses, totals) = [row[0] for row in sums], [row[1:] for row in sums]
        metrics: dict[str, Any] = {"ar_cross_entropy": round(ar_loss / ar_total, 4)} if ar_total else {}
        if not all(totals):
            return metrics
        rates = [m / t for m, t in zip(matches, totals, strict=True)]
        metrics |= {"cross_entropy": round(sum(losses) / sum(totals), 4), "match": [round(rate, 4) for rate in rates]}
        if self.objective != "block-diffusion":  # which drafts nothing
            metrics["accepted_if_independent"] = round(1 + sum(accumulate(rates[1:], mul)), 3)
        return metrics


def _ar_labels(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Next tokens [B, S-1] and which of them count: answers that continue their document."""
    ids, documents, answers = batch["input_ids"], batch.get("documents"), batch["answers"][:, 1:]
    return ids[:, 1:], answers if documents is None else answers & (documents[:, 1:] == documents[:, :-1])


def teacher_states(clean: Tensor, targets: Targets) -> Tensor:
    """[B * blocks * K, H], detached: the AR states that predict the targets, of clean states [B, S, H]."""
    before = (targets.place - 1).clamp(min=0).flatten(1)
    return clean.detach().gather(1, before[..., None].expand(-1, -1, clean.shape[-1])).flatten(0, 1)


def half_masks(layout: Layout) -> tuple[BlockMask | None, BlockMask]:
    """Masks of the clean tokens and of the blocks for FlexAttention, see `Network.halves`."""
    clean = None if layout.one_chain else layout.block_mask(slice(layout.clean))
    return clean, layout.block_mask(slice(layout.clean, None))


def decoder_layers(network: Network) -> nn.ModuleList:
    """The backbone's list of layers."""
    count = network.lm.config.get_text_config().num_hidden_layers
    lists = [m for m in network.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0]


def checkpoint_layers(network: Network, compiled: bool) -> None:
    """Keep the layers' inputs alone for the backward pass, which runs them again: less memory, a third more time."""
    if not network.lm.supports_gradient_checkpointing:
        raise TidarError(
            f"{type(network.lm).__name__} has no gradient checkpointing: leave --gradient-checkpointing out"
        )

    @contextmanager
    def again(drafter: Drafter, start: int) -> Iterator[None]:
        with half("blocks"), drafter.gate.opened(start):
            yield

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a layer's first and second run: when the backward pass comes, the half that it is of is over."""
        drafter = network.drafter
        if drafter is None or drafter.gate.start is None:
            return nullcontext(), nullcontext()
        return nullcontext(), again(drafter, drafter.gate.start)

    # Within a compiled layer the gate's place is a constant of the graph, both times, and contexts are not allowed;
    # older transformers checkpoint around the layer's call instead.
    within = compiled and "__call__" not in vars(GradientCheckpointingLayer)
    options = {"use_reentrant": False} if within else {"use_reentrant": False, "context_fn": contexts}
    _checkpointing(network, "enable")(options)


def _checkpointing(network: Network, verb: str) -> Callable[..., None]:
    """transformers' method by its new name, or in older versions by its old one."""
    old = f"gradient_checkpointing_{verb}"
    return getattr(network.lm, f"activation_checkpointing_{verb}", None) or getattr(network.lm, old)
