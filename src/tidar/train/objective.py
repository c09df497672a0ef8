"""The losses, as pure functions of logits and hidden states; the functions of states never hold logits of all tokens.

Every term comes as a sum with its count; dividing happens once, by the global count over ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**27
"""Most logits that exist at once: rows of a chunk times vocabulary."""

LK_ETA = 3.0
"""How fast the LK loss turns from KL to total variation as drafts get better; the best setting of its paper."""

IGNORED = -100
"""Label of a token that is not counted, as in transformers and liger-kernel."""


class TokenTerms(NamedTuple):
    """Per token, each [M] float32: loss (differentiable), overlap = sum_v min(p, q) in [0, 1], and argmax agreement."""

    loss: Tensor
    overlap: Tensor
    match: Tensor


Terms = Callable[[Tensor, Tensor | None, Tensor], TokenTerms]
"""From logits [M, V], the teacher's logits [M, V] or None, and token ids [M]."""


def token_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, loss: str = "soft", temperature: float = 1.0
) -> TokenTerms:
    """The loss called `loss` of logits [M, V], and how well they draft.

    p is the softmax of `teacher` [M, V] / temperature, or without a teacher all weight on the token in `labels` [M].
    q is the softmax of `student`. A temperature below 1 sharpens the teacher towards what greedy decoding will take.
    """
    student = _wide(student)
    if teacher is None:
        likelihood = student.detach().softmax(-1).gather(-1, labels[:, None])[:, 0]
        return TokenTerms(hard_cross_entropy(student, labels), likelihood, (student.argmax(-1) == labels).float())
    log_p = (_wide(teacher) / temperature).log_softmax(-1)
    match = (student.argmax(-1) == teacher.argmax(-1)).float()
    log_q = student.log_softmax(-1)
    overlap = torch.minimum(log_p, log_q if loss == "lk" else log_q.detach()).exp().sum(-1)
    if loss == "lk":
        value = lk_loss(log_p, log_q, overlap)
    else:
        value = hard_cross_entropy(student, labels) if loss == "hard" else soft_cross_entropy(log_p, log_q)
    return TokenTerms(value, overlap.detach(), match)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_v p log q, [M], of log-probabilities [M, V]: self-distillation."""
    return -(log_p.exp() * log_q).sum(-1)


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [M] of logits [M, V] to token ids [M]."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def lk_loss(log_p: Tensor, log_q: Tensor, overlap: Tensor) -> Tensor:
    """Hybrid LK loss [M] (arXiv 2602.23881) of log-probabilities [M, V]: what the chance of acceptance itself asks for.

    L = lambda KL(p || q) + (1 - lambda) (1 - alpha), lambda = exp(-3 alpha) detached, alpha = sum_v min(p, q) the
    probability that a drawn draft is accepted. Alone, 1 - alpha has no gradient to speak of while drafts are bad.
    """
    share = (-LK_ETA * overlap.detach()).exp()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return share * divergence + (1 - share) * (1 - overlap)


def acceptance_weights(overlap: Tensor, valid: Tensor) -> Tensor:
    """Weights [..., K] of a block's positions by what they contribute to the accepted length (D-PACE).

    The expected number of accepted drafts is sum_m prod_{2<=i<=m} q_i, and its derivative by log q_m is the suffix sum
    of those products from m on. q is the smoothed acceptance probability 0.5 * overlap + 0.5. The first position is
    never judged (the verifier supplies that token), so it has the weight of the last one, which keeps "trust" mixing
    trained. Weights are divided by K, not by their own mean, so that they add up over ranks.

    Args:
        overlap: [..., K] detached acceptance probabilities.
        valid: [..., K] bool; positions that do not exist weigh nothing.
    """
    smoothed = torch.where(valid, 0.5 * overlap + 0.5, 0.0)
    products = smoothed[..., 1:].cumprod(-1)
    suffix = products.flip(-1).cumsum(-1).flip(-1) / overlap.shape[-1]
    return torch.cat((suffix[..., -1:], suffix), -1) * valid


def until_failure_weights(match: Tensor, valid: Tensor) -> Tensor:
    """1 through the first position at which greedy drafting would fail, then 0 (accept-until-fail), [..., K].

    Failures are argmax mismatches, teacher-forced. As in `acceptance_weights` the first position is never judged.
    """
    stands = (match * valid)[..., 1:-1].cumprod(-1)
    return torch.cat((torch.ones_like(match[..., :2]), stands), -1) * valid


def decay_weights(valid: Tensor, gamma: float) -> Tensor:
    """exp(-(k - 1) / gamma) at position k = 1 .. K, [..., K]: later drafts are rarely reached (DFlash, 2602.06036)."""
    return torch.exp(-torch.arange(valid.shape[-1], device=valid.device) / gamma) * valid


def random_masks(counted: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random part of each block's `counted` [..., K] positions, which stay masked; the others are shown.

    Their number is uniform in 1 .. k, k the counted positions of the block, and so is the choice among them: masked
    diffusion's uniform mask ratio, in whole tokens.
    """
    count = counted.sum(-1, keepdim=True)
    most = (torch.rand(count.shape, generator=generator, device=counted.device) * count).long() + 1
    lottery = torch.rand(counted.shape, generator=generator, device=counted.device)
    rank = torch.where(counted, lottery, 2.0).argsort(-1).argsort(-1)
    return counted & (rank < most)


def diffusion_weights(counted: Tensor, masked: Tensor) -> Tensor:
    """k / n at the n masked of a block's k counted positions, 0 elsewhere: the 1/t of masked diffusion, [..., K].

    With n as `random_masks` draws it, the expected sum over a block is its bound on -log p(block | context) (LLaDA,
    arXiv 2502.09992, Eq. 6; block by block it is the loss of BD3-LM, arXiv 2503.09573).
    """
    return counted.sum(-1, keepdim=True) / masked.sum(-1, keepdim=True).clamp(min=1) * masked


def paper_loss(
    ar_sum: Tensor,
    ar_count: Tensor,
    diffusion_sum: Tensor,
    diffusion_count: Tensor,
    ar_weight: float,
    diffusion_weight: float,
) -> Tensor:
    """(ar_weight * mean AR loss + diffusion_weight * mean mask loss) / (ar_weight + diffusion_weight), Sec. 3.2."""
    ar, diffusion = ar_sum / ar_count.clamp(min=1), diffusion_sum / diffusion_count.clamp(min=1)
    return (ar_weight * ar + diffusion_weight * diffusion) / (ar_weight + diffusion_weight)


class Head(NamedTuple):
    """The output embedding: weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias)

    @property
    def trains(self) -> bool:
        return any(x is not None and x.requires_grad for x in self)

    @property
    def chunk(self) -> int:
        """Rows whose logits may exist at once, in whole tiles of a matrix product."""
        return max(64, LOGITS // len(self.weight) // 64 * 64)


def linear_terms_eager(
    terms: Terms, head: Head, students: Sequence[Tensor], teacher: Tensor | None, labels: Tensor
) -> list[TokenTerms]:
    """The readable twin of `linear_terms` and `linear_sum`: all logits, plain autograd."""
    target = None if teacher is None else head(teacher).detach()
    return [terms(head(student), target, labels) for student in students]


def linear_terms(
    terms: Terms, head: Head, students: Sequence[Tensor], teacher: Tensor | None, labels: Tensor, chunk: int = 0
) -> list[TokenTerms]:
    """`terms` of each student's states [M, H] through a frozen head, a chunk of rows at a time.

    A row's loss depends on its own state alone, so the gradient of the unweighted losses is taken while a chunk's
    logits exist, [M, H] a student, and the backward pass only scales its rows: logits are neither kept nor made twice,
    and the weights of the rows may depend on what comes out here.

    Args:
        teacher: [M, H] states that the same head turns into the target, or None.
        labels: [M] token ids.
        chunk: rows at a time; by the size of the vocabulary if 0.
    """
    if head.trains:
        raise ValueError("the gradient of a head that trains needs the rows' weights beforehand: use linear_sum")
    outputs = _LinearTerms.apply(
        terms, chunk or head.chunk, torch.is_grad_enabled(), *head, None, teacher, labels, *students
    )
    return [TokenTerms(*outputs[i + 1 : i + 4]) for i in range(0, len(outputs), 4)]


def linear_sum(
    terms: Terms,
    head: Head,
    states: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    chunk: int = 0,
) -> tuple[Tensor, TokenTerms]:
    """Sum of `weights` [M] times losses, and the detached terms: `linear_terms` for a head that may train as well."""
    total, *rows = _LinearTerms.apply(
        terms, chunk or head.chunk, torch.is_grad_enabled(), *head, weights.detach(), teacher, labels, states
    )
    return total, TokenTerms(*(row.detach() for row in rows))


class _LinearTerms(torch.autograd.Function):
    """Four outputs a student: weighted sum, loss, overlap, match. Gradients are made in the forward pass.

    With `row_weights` the sum has a gradient, by states and head; without, the losses have one, by states alone.
    `recording`: whether a backward pass may follow, which cannot be asked inside.
    """

    @staticmethod
    def forward(
        ctx: Any,
        terms: Terms,
        chunk: int,
        recording: bool,
        weight: Tensor,
        bias: Tensor | None,
        row_weights: Tensor | None,
        teacher: Tensor | None,
        labels: Tensor,
        *students: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = _compute_dtype(students[0])
        head = Head(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        of_weight = _accumulator(weight) if recording and ctx.needs_input_grad[3] else None
        of_bias = _accumulator(bias) if bias is not None and recording and ctx.needs_input_grad[4] else None
        of_states = [torch.empty_like(s, dtype=dtype) if recording else None for s in students]
        pieces: list[list[TokenTerms]] = [[] for _ in students]
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            target = None if teacher is None else head(teacher[rows].to(dtype))
            for student, gradient, parts in zip(students, of_states, pieces, strict=True):
                states = student[rows].to(dtype)
                logits = head(states)
                if gradient is None:
                    parts.append(terms(logits, target, labels[rows]))
                    continue
                with torch.enable_grad():
                    part = terms(logits.requires_grad_(), target, labels[rows])
                    scaled = part.loss if row_weights is None else part.loss * row_weights[rows]
                    (of_logits,) = torch.autograd.grad(scaled.sum(), logits)
                parts.append(TokenTerms(*(x.detach() for x in part)))
                gradient[rows] = of_logits @ head.weight
                if of_weight is not None:
                    of_weight += of_logits.T @ states
                if of_bias is not None:
                    of_bias += of_logits.sum(0)
        ctx.set_materialize_grads(False)
        ctx.summed = row_weights is not None
        ctx.save_for_backward(of_weight, of_bias, *of_states)
        ctx.types = weight.dtype, *(s.dtype for s in students)
        outputs = []
        for parts in pieces:
            loss, overlap, match = (torch.cat(column) for column in zip(*parts, strict=True))
            outputs += [(loss if row_weights is None else loss * row_weights).sum(), loss, overlap, match]
        unused = [x for i in range(0, len(outputs), 4) for x in (outputs[i + ctx.summed], *outputs[i + 2 : i + 4])]
        ctx.mark_non_differentiable(*unused)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_weight, of_bias, *of_states = ctx.saved_tensors
        weight_type, *types = ctx.types
        given = gradients[0::4] if ctx.summed else gradients[1::4]
        back = [
            None if g is None else (of * g[..., None].to(of.dtype)).to(dtype)
            for g, of, dtype in zip(given, of_states, types, strict=True)
        ]
        if given[0] is None:
            of_weight = of_bias = None
        return (
            *(None, None, None),
            None if of_weight is None else (of_weight * given[0]).to(weight_type),
            None if of_bias is None else (of_bias * given[0]).to(weight_type),
            *(None, None, None),
            *back,
        )


def cross_entropy_sum(
    head: Head, states: Tensor, labels: Tensor, counted: Tensor, terms: Terms = token_terms
) -> Tensor:
    """Cross-entropy to `labels` [M], summed over the `counted` [M] rows of states [M, H], without [M, V] logits.

    On a GPU by liger-kernel's fused linear cross-entropy where it is installed (`tidar[train]`), else by `linear_sum`
    of `terms`, which may be compiled.
    """
    liger = _liger() if states.is_cuda else None
    if liger is not None:
        dtype = _compute_dtype(states)
        bias = None if head.bias is None else head.bias.to(dtype)
        # Its own chunks are so short that adding up the head's gradient took 45 of 170 ms at 1.5B.
        room = max(1, LOGITS // states.numel())
        wanted = torch.where(counted, labels, IGNORED)
        return liger(states.to(dtype), head.weight.to(dtype), wanted, bias, chunk_mem_const=room)
    return linear_sum(terms, head, states, None, labels, counted.float())[0]


@cache
def _liger() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    # Gradients of the head add up over many chunks: in bf16 the small ones would be lost.
    return partial(liger_fused_linear_cross_entropy, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _accumulator(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
