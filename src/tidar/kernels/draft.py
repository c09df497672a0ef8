"""Greedy drafting from one block: candidates out of the logits, then the sampler head's walk, a kernel a position.

Candidates are the two likeliest tokens of each of C / 2 interleaved groups of the vocabulary (token v is in group
v % (C / 2)): one pass without sorting, and the likeliest tokens of all are always among them.

The walk is a chain of K - 1 cells, each too small to fill a GPU, so what counts is how often they must meet. The head's
state is s_m = W_out Z_m with Z_m = z_1 + ... + z_m as wide as the bottleneck, so the head can live there:

    W_state s_m = (W_state W_out) Z_m,  |s_m| = |R Z_m| for W_out = Q R,  e . (h_m + s_m) = e . h_m + (W_out^T e) . Z_m

and what it reads of a token, W_token n(e) and W_out^T e, is a row of a table. That leaves one meeting a position: every
program computes all of z_m (a few thousand numbers), then its own share of the three products, for the next position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, prefetch, tl, triton
from tidar.kernels.weights import QuantWeight, natural

EPS = 1e-2
"""Of the sampler head's norms."""
CHUNK = 4096
"""Logits a program looks through."""
PROGRAMS = 64
"""Programs that share a position of one row; a power of two."""
WARPS = 4
ALTERNATIVES = 3
"""Next best tokens that are kept for every draft."""
ROWS = 8192
"""Vocabulary rows of the tables that are computed at a time."""


@dataclass(frozen=True)
class Walk:
    """A sampler head folded into its bottleneck (width W, model width H, vocabulary V), in the model's dtype.

    The tables are the price: 3 W numbers a token, 151 MB for SmolLM2-135M, 467 MB for a vocabulary of 152k.

    Attributes:
        hidden_in: [2W, H] W_hidden.
        tokens: [V, 2W] W_token n(e) of every input embedding e.
        corrections: [V, W] W_out^T e of every output embedding e.
        mixing: [2W, W] W_state W_out.
        factor: [min(W, H), W] R of W_out = Q R.
        embedding: [V, H] output embedding.
        bias: [V] of the output embedding.
    """

    hidden_in: Tensor
    tokens: Tensor
    corrections: Tensor
    mixing: Tensor
    factor: Tensor
    embedding: Tensor | QuantWeight
    bias: Tensor | None


@torch.inference_mode()
def fold(
    hidden_in: Tensor,
    token_in: Tensor,
    state_in: Tensor,
    out: Tensor,
    embed: Callable[[Tensor], Tensor],
    embedding: Tensor | QuantWeight,
    bias: Tensor | None,
    kind: torch.dtype,
) -> Walk:
    """The walk of a sampler head with these weights, in the dtype `kind`.

    `embed` gives input embeddings, `embedding` is the output's.
    """
    vocabulary = len(embedding)
    tokens = token_in.new_empty(vocabulary, len(token_in), dtype=kind)
    corrections = token_in.new_empty(vocabulary, out.shape[1], dtype=kind)
    for start in range(0, vocabulary, ROWS):
        rows = torch.arange(start, min(start + ROWS, vocabulary), device=token_in.device)
        embedded = embed(rows)
        tokens[rows] = F.linear(F.rms_norm(embedded, embedded.shape[-1:], eps=EPS), token_in.to(kind))
        corrections[rows] = embedding[rows].to(kind) @ out.to(kind)
    factor = torch.linalg.qr(out.float(), mode="r").R.to(kind).contiguous()
    mixing = (state_in.float() @ out.float()).to(kind)
    return Walk(hidden_in.to(kind), tokens, corrections, mixing, factor, embedding, bias)


def candidates_eager(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and ids, both [..., count], of the two likeliest tokens of each group: the best ones, then the second.

    `count` is even; a vocabulary that is no larger is taken whole.
    """
    vocabulary = logits.shape[-1]
    if vocabulary <= count:
        return logits, torch.arange(vocabulary, device=logits.device).expand(logits.shape)
    groups = count // 2
    grouped = F.pad(logits, (0, -vocabulary % groups), value=-torch.inf).unflatten(-1, (-1, groups))
    scores, index = grouped.topk(2, -2)
    ids = index * groups + torch.arange(groups, device=logits.device)
    return scores.flatten(-2), ids.flatten(-2)


def candidates(walk: Walk, block: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [B, K-1, count] by the rule of `candidates_eager`, and their scores before the walk, recomputed in float32.

    `count` is a power of two below V. See `draft` for the rest.
    """
    batch, length, hidden = block.shape
    rows, vocabulary, width = batch * (length - 1), logits.shape[-1], walk.corrections.shape[1]
    chunks, groups = triton.cdiv(vocabulary, CHUNK), count // 2
    keys = logits.new_empty(rows, chunks, 2, groups, dtype=torch.int64)
    _groups[(chunks, rows)](
        logits, keys, vocabulary, GROUPS=groups, ROWS=CHUNK // groups, num_warps=8, **options(logits.device)
    )
    ids = logits.new_empty(batch, length - 1, count, dtype=torch.int32)
    scores = logits.new_empty(batch, length - 1, count, dtype=torch.float32)
    share = min(8, groups)
    embedding, scale = walk.embedding, None
    if isinstance(embedding, QuantWeight):
        embedding, scale = embedding.values, embedding.scale
    _merge_groups[(groups // share, rows, 2)](
        keys,
        block,
        embedding,
        scale if scale is not None else embedding,
        walk.bias if walk.bias is not None else embedding,
        walk.tokens,
        walk.corrections,
        ids,
        scores,
        vocabulary,
        2 * chunks,
        length - 1,
        width,
        H=hidden,
        GROUPS=groups,
        SHARE=share,
        KEYS=triton.next_power_of_2(2 * chunks),
        BLOCK=min(512, triton.next_power_of_2(hidden)),
        BIAS=walk.bias is not None,
        SCALED=scale is not None,
        INTERLEAVED=isinstance(walk.embedding, QuantWeight) and walk.embedding.interleaved,
        LINES=triton.next_power_of_2(triton.cdiv(2 * width, 64)),
        num_warps=4,
        **options(logits.device),
    )
    return ids, scores


class Drafted(NamedTuple):
    """drafts [B, K]; confidence [B, K-1], the probability of all but the first; alternatives [B, K-1, ALTERNATIVES]."""

    drafts: Tensor
    confidence: Tensor
    alternatives: Tensor

    def with_known(self, after: Tensor) -> Drafted:
        """The same with the second draft replaced where the token `after` [B] the first is known (not -1)."""
        drafts, confidence = self.drafts.clone(), self.confidence.clone()
        known = after >= 0
        drafts[:, 1] = torch.where(known, after, drafts[:, 1])
        confidence[:, 0] = torch.where(known, 1.0, confidence[:, 0])
        return self._replace(drafts=drafts, confidence=confidence)


def draft(walk: Walk, block: Tensor, logits: Tensor, first: Tensor, after: Tensor, count: int) -> Drafted:
    """Greedy drafts of one block, as `model.propose.propose` says them, probabilities being those among candidates.

    Args:
        block: [B, K, H] final hidden states of the block's masks.
        logits: [B, K-1, V] of all but the first of them.
        first: [B] verified next tokens.
        after: [B] the tokens after them where they are known, else -1.
        count: candidates a position; a power of two below V.
    """
    block, logits = block.contiguous(), logits.contiguous()
    batch, length, hidden = block.shape
    width, others = walk.corrections.shape[1], length - 1
    inputs = _hidden_inputs(walk, block)
    ids, scores = candidates(walk, block, logits, count)
    memory = scores.new_empty(others, batch, width)
    mixed = scores.new_empty(others, batch, 2 * width)
    energy = scores.new_empty(others, batch, PROGRAMS)

    def share(rows: int) -> int:
        return triton.next_power_of_2(triton.cdiv(rows, PROGRAMS))

    for m in range(others):
        _position[(PROGRAMS, batch)](
            first,
            after,
            inputs,
            walk.tokens,
            walk.corrections,
            walk.mixing,
            walk.factor,
            ids,
            scores,
            memory,
            mixed,
            energy,
            m,
            others,
            batch,
            hidden,
            width,
            len(walk.factor),
            EPS=EPS,
            C=count,
            W=triton.next_power_of_2(width),
            MIX=share(2 * width),
            FACTOR=share(len(walk.factor)),
            SHARE=share(count),
            PROGRAMS=PROGRAMS,
            FIRST=m == 0,
            num_warps=WARPS,
            **options(block.device),
        )
    drafted = _empty(first, batch, length)
    finish = options(block.device)
    _finish[(others, batch)](first, after, ids, scores, *drafted, C=count, MORE=ALTERNATIVES, num_warps=1, **finish)
    return drafted


def draft_plain(logits: Tensor, first: Tensor, after: Tensor) -> Drafted:
    """Drafts of logits [B, K-1, V] alone: the likeliest token at each position, as `draft_plain_eager`."""
    batch, others, vocabulary = logits.shape
    logits, chunks = logits.contiguous(), triton.cdiv(vocabulary, CHUNK)
    drafted, kept = _empty(first, batch, others + 1), ALTERNATIVES + 1
    keys = logits.new_empty(batch * others, chunks, kept, dtype=torch.int64)
    sums = logits.new_empty(batch * others, chunks, dtype=torch.float32)
    _chunk_best[(chunks, batch * others)](
        logits, keys, sums, vocabulary, KEPT=kept, ROWS=CHUNK, num_warps=8, **options(logits.device)
    )
    _pick[(others, batch)](
        first,
        after,
        keys,
        sums,
        *drafted,
        chunks,
        KEPT=kept,
        CHUNKS=triton.next_power_of_2(chunks),
        KEYS=triton.next_power_of_2(chunks * kept),
        num_warps=1,
        **options(logits.device),
    )
    return drafted


def draft_plain_eager(logits: Tensor, first: Tensor, after: Tensor) -> Drafted:
    """See `draft_plain`; `after` takes the place of the second draft where it is known."""
    scores = logits.float()
    best, ids = scores.topk(ALTERNATIVES + 1, -1)
    confidence = (best[..., 0] - scores.logsumexp(-1)).exp()
    return Drafted(torch.cat((first[:, None], ids[..., 0]), 1), confidence, ids[..., 1:]).with_known(after)


def _empty(first: Tensor, batch: int, length: int) -> Drafted:
    confidence = torch.empty(batch, length - 1, dtype=torch.float32, device=first.device)
    return Drafted(first.new_empty(batch, length), confidence, first.new_empty(batch, length - 1, ALTERNATIVES))


def _hidden_inputs(walk: Walk, block: Tensor) -> Tensor:
    """[B, K-1, 2W] float32: W_hidden n(h) of all masks but the first."""
    batch, length, hidden = block.shape
    rows, out = batch * (length - 1), len(walk.hidden_in)
    inputs = block.new_empty(batch, length - 1, out, dtype=torch.float32)
    tile = 16 if rows <= 16 else 32
    _inputs[(triton.cdiv(out, 16), triton.cdiv(rows, tile))](
        block,
        walk.hidden_in,
        inputs,
        rows,
        length - 1,
        hidden,
        out,
        EPS=EPS,
        OUT=16,
        ROWS=tile,
        BLOCK=512 // block.element_size(),
        num_warps=4,
        num_stages=4,
        **options(block.device),
    )
    return inputs


if triton is not None:

    @triton.jit
    def _key(value, id):
        """An int64 that is the larger the larger the value, then the smaller the id."""
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)

    @triton.jit
    def _token(key):
        """The id that a key was made of."""
        return 0x7FFFFFFF - (key & 0x7FFFFFFF)

    @triton.jit
    def _nothing():
        """A key below all others; its token is 0, which exists."""
        return -0x7FFFFFFF80000001

    @triton.jit
    def _without(keys, best):
        return tl.where(keys == best, _nothing(), keys)

    @triton.jit
    def _best_two(keys):
        """The two largest of each column; keys are distinct or repeated whole."""
        best = tl.max(keys, 0)
        return best, tl.max(_without(keys, best[None, :]), 0)

    @triton.jit
    def _groups(logits, keys, vocabulary, GROUPS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
        """The best two of each group in one chunk of one row of logits."""
        chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        group = tl.arange(0, GROUPS)
        id = (chunk * ROWS + tl.arange(0, ROWS))[:, None] * GROUPS + group[None, :]
        value = tl.load(logits + row * vocabulary + id, mask=id < vocabulary, other=float("-inf"))
        best, second = _best_two(_key(value, id))
        at = keys + (row * tl.num_programs(0) + chunk) * 2 * GROUPS + group
        tl.store(at, best)
        tl.store(at + GROUPS, second)

    @triton.jit
    def _merge_groups(
        keys,
        block,
        embedding,
        scales,
        bias,
        tokens,
        corrections,
        ids,
        scores,
        vocabulary,
        count,
        others,
        width,
        H: tl.constexpr,
        GROUPS: tl.constexpr,
        SHARE: tl.constexpr,
        KEYS: tl.constexpr,
        BLOCK: tl.constexpr,
        BIAS: tl.constexpr,
        SCALED: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        LINES: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """The best or second of some groups over all chunks, and the score that the mask's state gives them."""
        row = tl.program_id(1).to(tl.int64)
        group = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        # Some keys twice rather than a mask; and an id that exists even for logits that are not numbers.
        part = tl.minimum(tl.arange(0, KEYS), count - 1)
        found = tl.load(keys + (row * count + part)[:, None] * GROUPS + group[None, :])
        best, second = _best_two(found)
        rank = tl.program_id(2)
        chosen = tl.where(rank == 0, best, second)
        id = tl.minimum(_token(chosen), vocabulary - 1)
        column = tl.arange(0, BLOCK)
        state = block + (row // others * (others + 1) + row % others + 1) * H
        total = tl.zeros((SHARE, BLOCK), tl.float32)
        for at in tl.static_range(0, H, BLOCK):
            inside = at + column < H
            known = natural(at + column) if INTERLEAVED else at + column
            h = tl.load(state + known, mask=inside, other=0.0).to(tl.float32)
            e = tl.load(embedding + id[:, None] * H + (at + column)[None, :], mask=inside[None, :], other=0.0)
            total += e.to(tl.float32) * h[None, :]
        score = tl.sum(total, 1)
        if SCALED:
            score *= tl.load(scales + id)
        if BIAS:
            score += tl.load(bias + id).to(tl.float32)
        at = (row * 2 + rank) * GROUPS + group
        tl.store(ids + at, id.to(tl.int32))
        tl.store(scores + at, score)
        if PDL:
            line = tl.arange(0, LINES)[None, :] * 64
            prefetch(tokens + id[:, None] * (2 * width) + line, line < 2 * width, tokens)
            prefetch(corrections + id[:, None] * width + line, line < width, corrections)

    @triton.jit
    def _inputs(
        block,
        weight,
        inputs,
        rows,
        others,
        hidden,
        out,
        EPS: tl.constexpr,
        OUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """weight (x / rms(x)), the rms known only at the end of the product."""
        n = tl.program_id(0) * OUT + tl.arange(0, OUT)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        known, real = row < rows, n < out
        column = tl.arange(0, BLOCK)
        w_row = weight + n[:, None].to(tl.int64) * hidden
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            lines = tl.arange(0, 8) * 64
            prefetch(w_row + lines[None, :], real[:, None] & (lines < hidden)[None, :], weight)
            tl.extra.cuda.gdc_wait()
        state = block + (row // others * (others + 1) + row % others + 1).to(tl.int64)[:, None] * hidden
        y = tl.zeros((OUT, ROWS), tl.float32)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for at in range(0, hidden, BLOCK):
            inside = (at + column < hidden)[None, :]
            w = tl.load(w_row + (at + column)[None, :], mask=real[:, None] & inside, other=0.0)
            x = tl.load(state + (at + column)[None, :], mask=known[:, None] & inside, other=0.0)
            y = tl.dot(w, tl.trans(x), y, input_precision="ieee")
            squares += x.to(tl.float32) * x.to(tl.float32)
        y = y * tl.rsqrt(tl.sum(squares, 1) / hidden + EPS)[None, :]
        tl.store(inputs + row[None, :] * out + n[:, None], y, mask=known[None, :] & real[:, None])

    @triton.jit
    def _best(scores, ids, at, C: tl.constexpr):
        """Token with the best score of position `at`; the smallest one of equals."""
        c = at * C + tl.arange(0, C)
        return _token(tl.max(_key(tl.load(scores + c), tl.load(ids + c)), 0))

    @triton.jit(do_not_specialize=["m"])
    def _position(
        first,
        after,
        inputs,
        tokens,
        corrections,
        mixing,
        factor,
        ids,
        scores,
        memory,
        mixed,
        energy,
        m,
        others,
        batch,
        hidden,
        width,
        rank,
        EPS: tl.constexpr,
        C: tl.constexpr,
        W: tl.constexpr,
        MIX: tl.constexpr,
        FACTOR: tl.constexpr,
        SHARE: tl.constexpr,
        PROGRAMS: tl.constexpr,
        FIRST: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """The cell of position m, all of it; then this program's share of the scores and of what the next one reads."""
        share, b = tl.program_id(0), tl.program_id(1)
        k = tl.arange(0, W)
        inside = k < width
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        mix_row = share * MIX + tl.arange(0, MIX)
        mix_real = (mix_row < 2 * width)[:, None] & inside[None, :]
        mix = tl.load(mixing + mix_row[:, None] * width + k[None, :], mask=mix_real, other=0.0)
        factor_row = share * FACTOR + tl.arange(0, FACTOR)
        factor_real = (factor_row < rank)[:, None] & inside[None, :]
        triangle = tl.load(factor + factor_row[:, None] * width + k[None, :], mask=factor_real, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        # What does not depend on the token comes first: it is on its way while the token is chosen.
        at = b * others + m
        group = share * SHARE + tl.arange(0, SHARE)
        candidate = tl.load(ids + at * C + group, mask=group < C, other=0).to(tl.int64)
        score = tl.load(scores + at * C + group, mask=group < C, other=0.0)
        correction_at = corrections + candidate[:, None] * width + k[None, :]
        correction = tl.load(correction_at, mask=(group < C)[:, None] & inside[None, :], other=0.0)
        x = inputs + at * (2 * width) + k
        gate = tl.load(x, mask=inside, other=0.0)
        value = tl.load(x + width, mask=inside, other=0.0)
        total = tl.zeros((W,), tl.float32)
        if FIRST:
            token = tl.load(first + b)
        else:
            before = (m - 1) * batch + b
            total += tl.load(memory + before * width + k, mask=inside, other=0.0)
            u = mixed + before * (2 * width) + k
            gate_state = tl.load(u, mask=inside, other=0.0)
            value_state = tl.load(u + width, mask=inside, other=0.0)
            squares = tl.load(energy + before * PROGRAMS + tl.arange(0, PROGRAMS))
            token = _best(scores, ids, at - 1, C)
            if m == 1:
                known = tl.load(after + b)
                token = tl.where(known >= 0, known, token)
            scale = tl.rsqrt(tl.sum(squares, 0) / hidden + EPS)
            gate += scale * gate_state
            value += scale * value_state
        t = tokens + token * (2 * width) + k
        gate += tl.load(t, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(t + width, mask=inside, other=0.0).to(tl.float32)
        total += gate * tl.sigmoid(gate) * value
        score += tl.sum(correction.to(tl.float32) * total[None, :], 1)
        tl.store(scores + at * C + group, score, mask=group < C)
        here = m * batch + b
        if share == 0:
            tl.store(memory + here * width + k, total, mask=inside)
        u = tl.sum(mix.to(tl.float32) * total[None, :], 1)
        tl.store(mixed + here * (2 * width) + mix_row, u, mask=mix_row < 2 * width)
        y = tl.sum(triangle.to(tl.float32) * total[None, :], 1)
        tl.store(energy + here * PROGRAMS + share, tl.sum(y * y, 0))

    @triton.jit
    def _finish(
        first,
        after,
        ids,
        scores,
        drafts,
        confidence,
        alternatives,
        C: tl.constexpr,
        MORE: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One draft, the probability of it among its candidates, and the next best ones."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        c = _place() * C + tl.arange(0, C)
        score = tl.load(scores + c)
        sure = 1 / tl.sum(tl.exp(score - tl.max(score, 0)), 0)
        _store_draft(_key(score, tl.load(ids + c)), sure, first, after, drafts, confidence, alternatives, MORE)

    @triton.jit
    def _place():
        """Index of this program's position among all drafts but the first: a program a position and row."""
        return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)

    @triton.jit
    def _store_draft(keys, sure, first, after, drafts, confidence, alternatives, MORE: tl.constexpr):
        """The best of distinct keys as a draft, unless it is known better, and the MORE next ones as alternatives."""
        m, b, at = tl.program_id(0) + 1, tl.program_id(1), _place()
        draft = drafts + at + b + 1  # rows of drafts are one longer
        best = tl.max(keys, 0)
        token = _token(best)
        if m == 1:
            tl.store(draft - 1, tl.load(first + b))
            known = tl.load(after + b)
            token = tl.where(known >= 0, known, token)
            sure = tl.where(known >= 0, 1.0, sure)
        tl.store(draft, token)
        tl.store(confidence + at, sure)
        for rank in tl.static_range(MORE):
            keys = _without(keys, best)
            best = tl.max(keys, 0)
            tl.store(alternatives + at * MORE + rank, _token(best))

    @triton.jit
    def _chunk_best(logits, keys, sums, vocabulary, KEPT: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
        """The best keys of one chunk of one row, and the sum of exp(logit - the chunk's largest)."""
        chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        id = chunk * ROWS + tl.arange(0, ROWS)
        value = tl.load(logits + row * vocabulary + id, mask=id < vocabulary, other=float("-inf")).to(tl.float32)
        tl.store(sums + row * tl.num_programs(0) + chunk, tl.sum(tl.exp(value - tl.max(value, 0)), 0))
        found = tl.where(id < vocabulary, _key(value, id), _nothing())
        at = keys + (row * tl.num_programs(0) + chunk) * KEPT
        for rank in tl.static_range(KEPT):
            best = tl.max(found, 0)
            tl.store(at + rank, best)
            found = _without(found, best)

    @triton.jit
    def _pick(
        first,
        after,
        keys,
        sums,
        drafts,
        confidence,
        alternatives,
        chunks,
        KEPT: tl.constexpr,
        CHUNKS: tl.constexpr,
        KEYS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """A draft from the best keys of all chunks of its row."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        at = _place() * chunks
        k = tl.arange(0, KEYS)
        found = tl.load(keys + at * KEPT + k, mask=k < chunks * KEPT, other=_nothing())
        c = tl.arange(0, CHUNKS)
        highest = _value(tl.load(keys + (at + c) * KEPT, mask=c < chunks, other=0))
        part = tl.load(sums + at + c, mask=c < chunks, other=0.0)
        top = _value(tl.max(found, 0))
        sure = 1 / tl.sum(tl.where(c < chunks, part * tl.exp(highest - top), 0.0), 0)
        _store_draft(found, sure, first, after, drafts, confidence, alternatives, KEPT - 1)

    @triton.jit
    def _value(key):
        """The number that a key was made of."""
        bits = (key >> 32).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
