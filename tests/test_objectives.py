"""Every training objective against a double loop, its fused losses against eager ones, and what its masks may see."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rules
from test_layout import assert_drawn, chains, rows_of
from tidar import TidarError, TidarModel
from tidar.config import TidarConfig
from tidar.decode import step as steps
from tidar.decode.cache import RowCache
from tidar.layout import Layout, block_causal_layout, chain_layout, prefill_layout, step_layout, tiled_anchors
from tidar.model.attention import NAME, forget
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.model.network import MASKED, Network
from tidar.train import objective as objectives
from tidar.train.blocks import BlockDraw, collate_blocks
from tidar.train.config import TrainConfig
from tidar.train.conversion import Conversion, LossOptions
from tidar.train.convert import convert
from tidar.train.objective import (
    Head,
    TokenTerms,
    acceptance_weights,
    cross_entropy_sum,
    decay_weights,
    diffusion_weights,
    linear_sum,
    linear_terms,
    linear_terms_eager,
    random_masks,
    token_terms,
    until_failure_weights,
)
from tiny import ARCHITECTURES, VOCABULARY, tiny_lm, tiny_network
from train_options import curve, options

close = torch.testing.assert_close
LOSSES = ("soft", "hard", "lk")
K = 4


# Layouts


def causal_rules(clean: int, anchors: list[int], block_size: int, documents: list[int]) -> Tensor:
    everyone = rules.tokens(clean, anchors, block_size)
    return torch.tensor(
        [[rules.may_attend(q, k, documents) and k.offset <= max(q.offset, 0) for k in everyone] for q in everyone]
    )


@given(chains())
def test_masks_of_causal_blocks_see_the_earlier_ones(chain):
    clean, anchors, block_size, documents = chain
    layout = chain_layout(clean, rows_of(anchors), block_size, rows_of(documents), causal_blocks=True)
    plain = chain_layout(clean, rows_of(anchors), block_size, rows_of(documents))
    assert layout.position.equal(plain.position)
    assert all(a.equal(b) for a, b in zip(layout.targets(), plain.targets(), strict=True))
    for row, (row_anchors, row_documents) in enumerate(zip(anchors, documents, strict=True)):
        wanted = causal_rules(clean, row_anchors, block_size, row_documents)
        assert layout.dense_mask()[row, 0].equal(wanted)


@given(st.integers(1, 5), st.data())
def test_steps_with_causal_blocks_are_the_tree_with_chains(length, draw):
    """Whole and pruned, with leaves and without."""
    outcomes = sorted(draw.draw(st.sets(st.integers(1, length))))
    leaves = tuple(sorted(draw.draw(st.lists(st.integers(0, length - 1), max_size=3)), reverse=True))
    whole = step_layout(length, outcomes, leaves=leaves, causal_blocks=True)
    pruned = step_layout(length, rows_of([outcomes] * 2), leaves=leaves, causal_blocks=True)
    both_ways = step_layout(length, outcomes, leaves=leaves).dense_mask()[0, 0]
    slot = torch.arange(whole.size) - whole.clean
    block, offset = slot.div(length, rounding_mode="floor"), slot % length
    later = (slot >= 0) & (block == block[:, None]) & (offset > offset[:, None])
    assert whole.dense_mask()[0, 0].equal(both_ways & ~later)
    for row in range(2):
        assert pruned.dense_mask()[row, 0].equal(both_ways & ~later)
        assert pruned.position[row].equal(whole.position[0])


@given(st.integers(1, 12), st.integers(1, 4), st.data())
def test_block_diffusion_sees_whole_tiles(clean, block_size, draw):
    starts = draw.draw(st.lists(st.booleans(), min_size=clean, max_size=clean))
    documents = torch.tensor(starts).cumsum(0).tolist()
    tiles = tiled_anchors(clean, block_size)[0].tolist()
    anchors = sorted(draw.draw(st.sets(st.sampled_from(tiles)))) if tiles else []
    layout = block_causal_layout(clean, rows_of([anchors]), block_size, rows_of([documents]))

    def may_attend(q: rules.Token, k: rules.Token) -> bool:
        if k.block is not None or q.block is not None:
            return rules.may_attend(q, k, documents)
        return k.index // block_size <= q.index // block_size and documents[k.index] == documents[q.index]

    everyone = rules.tokens(clean, anchors, block_size)
    wanted = torch.tensor([[may_attend(q, k) for k in everyone] for q in everyone])
    assert layout.dense_mask()[0, 0].equal(wanted)
    plain = chain_layout(clean, rows_of([anchors]), block_size, rows_of([documents]))
    assert all(a.equal(b) for a, b in zip(layout.targets(), plain.targets(), strict=True))


def test_picture_of_block_diffusion():
    assert_drawn(
        block_causal_layout(6, tiled_anchors(6, 2), 2).dense_mask()[0, 0],
        """
        11....  .. ..
        11....  .. ..
        1111..  .. ..
        1111..  .. ..
        111111  .. ..
        111111  .. ..

        11....  11 ..
        11....  11 ..
        1111..  .. 11
        1111..  .. 11
        """,
    )


# Losses of logits, one number at a time


def terms_by_hand(student: Tensor, teacher: Tensor | None, label: int, loss: str, temperature: float) -> list[float]:
    """Loss, overlap and match of one token."""

    def softmax(logits: list[float]) -> list[float]:
        weights = [math.exp(x) for x in logits]
        return [w / sum(weights) for w in weights]

    q = softmax(student.tolist())
    if teacher is None:
        return [-math.log(q[label]), q[label], float(q.index(max(q)) == label)]
    p = softmax([x / temperature for x in teacher.tolist()])
    overlap = sum(min(a, b) for a, b in zip(p, q, strict=True))
    cross = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    if loss == "lk":
        share = math.exp(-3 * overlap)
        cross = share * (cross + sum(a * math.log(a) for a in p)) + (1 - share) * (1 - overlap)
    if loss == "hard":
        cross = -math.log(q[label])
    return [cross, overlap, float(q.index(max(q)) == p.index(max(p)))]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("taught", [True, False])
def test_token_terms_are_their_formulas(loss, taught):
    student, teacher, labels = 2 * torch.randn(6, 11), torch.randn(6, 11), torch.randint(11, (6,))
    teacher[0] = student[0]
    terms = token_terms(student, teacher if taught else None, labels, loss, 0.7)
    for m in range(6):
        wanted = terms_by_hand(student[m], teacher[m] if taught else None, int(labels[m]), loss, 0.7)
        close(torch.stack([x[m] for x in terms]), torch.tensor(wanted))


def test_lk_loss_is_zero_and_flat_for_a_perfect_draft_and_grows_from_kl_to_overlap():
    teacher = torch.randn(1, 9)
    student = teacher.clone().requires_grad_()
    (terms, _, _) = token_terms(student, teacher, torch.zeros(1, dtype=torch.long), "lk")
    close(terms, torch.zeros(1), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(terms.sum(), student)
    assert gradient.abs().max() < 0.5


def test_bfloat16_logits_are_judged_in_float32():
    student, teacher, labels = torch.randn(3, 11).bfloat16(), torch.randn(3, 11).bfloat16(), torch.randint(11, (3,))
    for loss in LOSSES:
        got = token_terms(student, teacher, labels, loss)
        assert got.loss.dtype == torch.float32
        close(got, token_terms(student.float(), teacher.float(), labels, loss))


# Weights of positions and blocks


@st.composite
def blocks_of_numbers(draw):
    """overlap, match and valid of one block, as lists."""
    k = draw(st.integers(2, 6))
    some = st.lists(st.booleans(), min_size=k, max_size=k)
    return draw(st.lists(st.floats(0, 1), min_size=k, max_size=k)), draw(some), draw(some)


@given(blocks_of_numbers())
def test_position_weights_are_their_definitions(block):
    overlap, match, valid = block
    k = len(overlap)
    there = torch.tensor(valid)
    until = until_failure_weights(torch.tensor(match).float(), there).tolist()
    reach = [math.prod((0.5 * overlap[i] + 0.5) * valid[i] for i in range(1, m + 1)) for m in range(1, k)]
    by_length = acceptance_weights(torch.tensor(overlap), there).tolist()
    for m in range(k):
        judged_before = [match[i] and valid[i] for i in range(1, m)]
        assert until[m] == (all(judged_before) and valid[m])
        wanted = sum(reach[max(m, 1) - 1 if m else k - 2 :]) / k
        assert by_length[m] == pytest.approx(wanted * valid[m], abs=1e-5)
        assert decay_weights(there, 2.5)[m].item() == pytest.approx(math.exp(-m / 2.5) * valid[m])


def test_random_masks_have_a_uniform_number_and_spread_evenly():
    counted = torch.tensor([1, 0, 1, 1, 0]).bool().expand(6000, 5)
    masked = random_masks(counted)
    assert not (masked & ~counted).any()
    numbers = masked.sum(1).bincount(minlength=4)[1:]
    assert (numbers / 6000).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert masked.float().mean(0).tolist() == pytest.approx([2 / 3, 0, 2 / 3, 2 / 3, 0], abs=0.03)
    assert not random_masks(torch.zeros(3, 5, dtype=torch.bool)).any()


def test_diffusion_weights_make_every_number_of_masks_count_the_same():
    counted = torch.tensor([1, 1, 0, 1]).bool().expand(50, 4)
    masked = random_masks(counted)
    weights = diffusion_weights(counted, masked)
    close(weights.sum(1), torch.full((50,), 3.0))
    assert (weights > 0).equal(masked)


# Fused losses against eager ones


def fused_inputs(dtype: torch.dtype = torch.float32, bias: bool = True, students: int = 2):
    make = {"dtype": dtype, "generator": torch.Generator().manual_seed(3)}
    head = Head(torch.randn(19, 8, **make), torch.randn(19, **make) if bias else None)
    states = [torch.randn(23, 8, **make).requires_grad_() for _ in range(students)]
    return head, states, torch.randn(23, 8, **make), torch.randint(19, (23,)), torch.rand(23, **make)


def of_loss(loss: str):
    return lambda student, teacher, labels: token_terms(student, teacher, labels, loss, 0.8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [0, 7, 23])
@pytest.mark.parametrize("taught", [True, False])
def test_fused_rows_are_the_eager_ones(loss, chunk, taught):
    head, states, teacher, labels, weights = fused_inputs()
    results = []
    for form in (linear_terms_eager, lambda *a: linear_terms(*a, chunk=chunk)):
        terms = form(of_loss(loss), head, states, teacher if taught else None, labels)
        # Weights that depend on what came out, as the acceptance weights do.
        total = sum(i * (weights * t.overlap * t.loss).sum() for i, t in enumerate(terms, 1))
        results.append([*(x for t in terms for x in t), *torch.autograd.grad(total, states)])
    for eager, fused in zip(*results, strict=True):
        close(eager, fused)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 7])
def test_fused_sum_is_the_eager_one_with_the_gradient_of_the_head(loss, bias, chunk):
    head, (states,), teacher, labels, weights = fused_inputs(bias=bias, students=1)
    trained = [x.requires_grad_() for x in head if x is not None]
    (eager,) = linear_terms_eager(of_loss(loss), head, [states], teacher, labels)
    total, terms = linear_sum(of_loss(loss), head, states, teacher, labels, weights, chunk)
    wanted = (weights * eager.loss).sum()
    close(total, wanted)
    close(terms, TokenTerms(eager.loss.detach(), *eager[1:]))
    got = torch.autograd.grad(3 * total, [states, *trained])
    close(got, torch.autograd.grad(3 * wanted, [states, *trained]))


@pytest.mark.parametrize("loss", LOSSES)
def test_fused_gradients_are_those_of_finite_differences(loss):
    head, students, teacher, labels, weights = fused_inputs(torch.float64)
    weight, bias = head.weight.requires_grad_(), head.bias.requires_grad_()

    def rows(*states):
        frozen = Head(weight.detach(), bias.detach())
        return tuple(t.loss for t in linear_terms(of_loss(loss), frozen, states, teacher, labels, 7))

    def total(states, weight, bias):
        return linear_sum(of_loss(loss), Head(weight, bias), states, None, labels, weights, 7)[0]

    if loss == "lk":  # its adaptive share is detached, so only the eager twin knows the gradient
        frozen = Head(weight.detach(), bias.detach())
        eager = linear_terms_eager(of_loss(loss), frozen, students, teacher, labels)
        wanted = torch.autograd.grad(sum(t.loss.sum() for t in eager), students)
        close(torch.autograd.grad(sum(x.sum() for x in rows(*students)), students), wanted)
    else:
        assert torch.autograd.gradcheck(rows, students)
    assert torch.autograd.gradcheck(total, (students[0], weight, bias))


def test_logits_of_all_rows_never_exist():
    head, states, teacher, labels, weights = fused_inputs()
    most = []

    def spy(student, target, pieces):
        most.append(len(student))
        return token_terms(student, target, pieces)

    linear_terms(spy, head, states, teacher, labels, 5)
    linear_sum(spy, head, states[0], teacher, labels, weights, 5)
    assert max(most) == 5
    assert Head(torch.empty(200_000, 2)).chunk * 200_000 <= objectives.LOGITS


def test_a_head_that_trains_needs_weights_beforehand():
    head, states, teacher, labels, _ = fused_inputs()
    head.weight.requires_grad_()
    with pytest.raises(ValueError, match="linear_sum"):
        linear_terms(token_terms, head, states, teacher, labels)


def test_nothing_is_kept_without_a_backward_pass():
    head, states, teacher, labels, weights = fused_inputs()
    with torch.no_grad():
        (terms,) = linear_terms(token_terms, head, states[:1], teacher, labels)
        total, _ = linear_sum(token_terms, head, states[0], teacher, labels, weights)
    assert not terms.loss.requires_grad
    assert not total.requires_grad
    close(total, (terms.loss * weights).sum())


def test_autocast_multiplies_in_bfloat16_and_adds_up_in_float32():
    head, (states,), _, labels, weights = fused_inputs(students=1)
    head.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_sum(token_terms, head, states, None, labels, weights, 7)
        (eager,) = linear_terms_eager(token_terms, head, [states], None, labels)
    got = torch.autograd.grad(total, [states, head.weight])
    wanted = torch.autograd.grad((weights * eager.loss).sum(), [states, head.weight])
    assert [g.dtype for g in got] == [torch.float32] * 2
    close(total, (weights * eager.loss).sum(), atol=0.05, rtol=0.01)
    close(got, wanted, atol=0.02, rtol=0.02)


def hard_sums(head, states, labels, counted):
    """Fused, eager, and where there is one torch's own."""
    yield cross_entropy_sum(head, states, labels, counted)
    yield (F.cross_entropy(head(states), labels, reduction="none") * counted).sum()
    if hasattr(F, "linear_cross_entropy"):
        ignored = torch.where(counted, labels, -100)
        some = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=7, chunking_method=None)
        yield F.linear_cross_entropy(states, head.weight, ignored, linear_bias=head.bias, reduction="sum", options=some)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_hard_sum_has_the_twins_value_and_gradients(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    head, (states,), _, labels, weights = fused_inputs(students=1)
    head = Head(*(x.to(device).requires_grad_() for x in head))
    states = states.detach().to(device).requires_grad_()
    leaves, results = [states, *head], []
    for total in hard_sums(head, states, labels.to(device), (weights > 0.4).to(device)):
        results.append([total, *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b, atol=1e-4, rtol=1e-4)


# Whole objectives against a double loop over blocks and masks

LENGTH = 14
BATCH = {
    "input_ids": torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(5)),
    "documents": torch.tensor([[0] * 8 + [1] * 6, [0] * 11 + [-1] * 3]),
    "answers": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    > 0,
    "anchors": torch.tensor([[1, 2, 6, 9], [0, 3, 5, 9]]),
}
"""Two documents in a row, padding, prompts and gaps inside answers, blocks that overlap and cross a document's end."""


def documents_of(batch: dict[str, Tensor]) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    for row, ids in enumerate(batch["documents"].tolist()):
        for document in sorted({d for d in ids if d >= 0}):
            yield row, ids.index(document), len(ids) - ids[::-1].index(document)


def drawn(masking: str, tiled: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return BlockDraw(K, tiled=tiled, random=masking == "random").draw(dict(BATCH))


def network_for(objective: str, attention: str = "bidirectional") -> Network:
    if objective == "lossless":
        network = tiny_network("llama", block_size=K)
        network.config = replace(network.config, block_attention=attention)
        return network
    mask = None if objective == "ar" else 96
    return Network(tiny_lm("llama"), config=TidarConfig(K, objective, mask, attention))


def block_states(network: Network, text: Tensor, shown: list[int]) -> Tensor:
    """[K, H] states of the block after `text` [n] that shows the tokens `shown`, alone in the world."""
    length = torch.tensor([len(text)])
    layout = prefill_layout(length, len(text), K, network.causal_blocks)
    return network(text[None], layout, block_ids=torch.tensor([shown]))[0, len(text) :]


def loss_by_hand(network: Network, options: LossOptions, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a lossless, paper or ar conversion, without packing, chunks or batches."""
    kind = network.config.objective
    ar, drafts, count = [], torch.zeros(()), 0
    for row, start, end in documents_of(BATCH):
        text, answers = BATCH["input_ids"][row], BATCH["answers"][row]

        def next_logits(p: int, text: Tensor = text, start: int = start) -> Tensor:
            return network.lm(text[None, start:p]).logits[0, -1]

        ar += [F.cross_entropy(next_logits(p), text[p]) for p in range(start + 1, end) if answers[p]]
        anchors = batch["anchors"][row].tolist() if "anchors" in batch else tiled_anchors(LENGTH, K)[0].tolist()
        for b, anchor in enumerate(anchors):
            if not start <= anchor < end or kind == "ar":
                continue
            places = range(anchor + 1, min(anchor + K + 1, end))
            shown = [bool(batch["shown"][row, b, p - anchor - 1]) if "shown" in batch else False for p in places]
            inputs = [int(text[p]) if s else MASKED for p, s in zip(places, shown, strict=True)]
            context = text[start : anchor + 1]
            states = block_states(network, context, inputs + [MASKED] * (K - len(inputs)))
            all_states = [states]
            if kind == "lossless":
                before = F.pad(text[anchor + 1 : anchor + K], (0, max(0, anchor + K - LENGTH)))
                all_states.append(network.drafter.sampler_head(states[None], network.embed(before)[None])[0])
            losses, overlap, match = torch.zeros(K), torch.zeros(K), torch.zeros(K)
            counted, there = torch.zeros(K, dtype=torch.bool), torch.zeros(K, dtype=torch.bool)
            for m, p in enumerate(places):
                teacher = None if kind != "lossless" and options.loss == "hard" else next_logits(p)[None]
                temperature = options.teacher_temperature
                *marginal, own = [
                    token_terms(network.head(s[m])[None], teacher, text[p, None], options.loss, temperature)
                    for s in all_states
                ]
                losses[m] = own.loss[0] + sum(options.marginal * t.loss[0] for t in marginal)
                overlap[m], match[m] = (1, 1) if shown[m] else (own.overlap[0], own.match[0])
                counted[m], there[m] = answers[p] and not shown[m], answers[p] or shown[m]
            weights = {
                "uniform": counted.float(),
                "decay": decay_weights(counted, options.decay_gamma),
                "acceptance": acceptance_weights(overlap, there),
                "accept-until-fail": until_failure_weights(match, there),
            }[options.position_weights]
            drafts = drafts + (weights * losses * counted).sum()
            count += int(counted.sum())
    if kind == "ar":
        return torch.stack(ar).mean()
    if kind == "lossless":
        return drafts / count
    return (options.ar * torch.stack(ar).mean() + options.diffusion * drafts / count) / (options.ar + options.diffusion)


@pytest.mark.parametrize("objective", ["lossless", "paper"])
@pytest.mark.parametrize(
    ("loss", "position_weights", "masking", "attention", "tiled"),
    [
        ("soft", "acceptance", "full", "causal", False),
        ("hard", "uniform", "random", "bidirectional", False),
        ("lk", "decay", "random", "causal", True),
        ("soft", "accept-until-fail", "random", "bidirectional", False),
        ("hard", "acceptance", "full", "bidirectional", True),
    ],
)
@torch.no_grad()
def test_a_batchs_loss_is_a_double_loop(objective, loss, position_weights, masking, attention, tiled):
    network = network_for(objective, attention)
    options = LossOptions(0.5, 1.5, 0.3, 0.7, loss, position_weights, 2.5)
    batch = drawn(masking, tiled)
    assert ("shown" in batch) == (masking == "random")
    assert ("anchors" in batch) == (not tiled)
    close(Conversion(network, options)(**batch)["loss"], loss_by_hand(network, options, batch))


@torch.no_grad()
def test_plain_fine_tuning_is_the_mean_over_answers():
    network = network_for("ar")
    batch = drawn("full", True)
    close(Conversion(network)(**batch)["loss"], loss_by_hand(network, LossOptions(), batch))


@torch.no_grad()
def test_block_diffusion_is_its_bound_tile_by_tile():
    """Contexts are run alone, under masks written by hand: whole tiles of the document so far, then the block."""
    network = network_for("block-diffusion")
    batch = drawn("random", True)
    total, count = 0.0, 0
    for row, start, end in documents_of(BATCH):
        text = BATCH["input_ids"][row]
        for b, anchor in enumerate(tiled_anchors(LENGTH, K)[0].tolist()):
            if not start <= anchor < end:
                continue
            places = range(anchor + 1, min(anchor + K + 1, end))
            answer = [bool(BATCH["answers"][row, p]) for p in places]
            shown = [bool(batch["shown"][row, b, p - anchor - 1]) for p in places]
            masked = sum(a and not s for a, s in zip(answer, shown, strict=True))
            assert masked >= any(answer)
            tokens = [int(text[p]) if s else 96 for p, s in zip(places, shown, strict=True)]
            ids = [*text[start : anchor + 1].tolist(), *tokens, *[96] * (K - len(tokens))]
            tile = torch.tensor([p // K for p in range(start, start + len(ids))])
            mask = (tile[None] <= tile[:, None])[None, None]
            position = torch.arange(len(ids))[None]
            hidden = network.backbone(torch.tensor([ids]), attention_mask=mask, position_ids=position)
            logits = network.head(hidden.last_hidden_state)[0]
            for p, a, s in zip(places, answer, shown, strict=True):
                count += a
                if a and not s:
                    total += sum(answer) / masked * F.cross_entropy(logits[p - start], text[p])
    close(Conversion(network)(**batch)["loss"], total / count)


EVERY = [
    ("lossless", {}, {}),
    ("lossless", {"loss": "lk", "position_weights": "decay"}, {"random": True}),
    ("lossless", {"loss": "hard", "position_weights": "accept-until-fail"}, {"tiled": True}),
    ("paper", {"loss": "hard", "position_weights": "uniform"}, {"tiled": True}),
    ("paper", {"loss": "soft", "position_weights": "acceptance"}, {"random": True}),
    ("ar", {"loss": "hard", "position_weights": "uniform"}, {"tiled": True}),
    ("block-diffusion", {"loss": "hard", "position_weights": "uniform"}, {"tiled": True, "random": True}),
]
every_objective = pytest.mark.parametrize(("objective", "losses", "blocks"), EVERY)


@every_objective
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_gradients_of_parts_add_up_to_those_of_the_batch(objective, losses, blocks, attention):
    network = network_for(objective, attention)
    if objective != "lossless":
        network.lm.requires_grad_(True)
    trained = [p for p in network.parameters() if p.requires_grad]
    batch = BlockDraw(K, **blocks).draw(dict(BATCH))
    module = Conversion(network, LossOptions(**losses))
    counts = module.counts(batch)
    halves = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    assert torch.stack([module.counts(half) for half in halves]).sum(0).equal(counts)
    sums = []
    for parts in ([batch], halves):
        for p in trained:
            p.grad = None
        for part in parts:
            module(num_items_in_batch=counts, **part)["loss"].backward()
        sums.append([p.grad for p in trained])
        assert any(g is not None and g.abs().max() > 0 for g in sums[-1])
    for whole, parts in zip(*sums, strict=True):
        close(whole, parts, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_forward_in_halves_is_the_whole_forward(arch, packed, causal):
    """Its states, and every gradient of the drafter: clean tokens owe nothing to it."""
    documents = BATCH["documents"] if packed else None
    shown = torch.where(torch.rand(2, 3 * K) < 0.3, torch.randint(VOCABULARY, (2, 3 * K)), MASKED)
    layout = chain_layout(LENGTH, torch.tensor([[2, 5, 9], [0, 1, LENGTH - 2]]), K, documents, causal_blocks=causal)
    network = tiny_network(arch, block_size=K)
    clean, blocks = network.halves(BATCH["input_ids"], layout, block_ids=shown)
    whole = network(BATCH["input_ids"], layout, block_ids=shown)
    close(clean, whole[:, :LENGTH])
    close(blocks, whole[:, LENGTH:])
    assert not clean.requires_grad
    trained = [p for name, p in network.named_parameters() if p.requires_grad and "sampler_head" not in name]
    toward = torch.randn_like(blocks)
    wanted = torch.autograd.grad((whole[:, LENGTH:] * toward).sum(), trained)
    for got, gradient in zip(torch.autograd.grad((blocks * toward).sum(), trained), wanted, strict=True):
        close(got, gradient, atol=1e-4, rtol=1e-4)
    forget(network)
    assert not any("clean_key" in vars(module) for module in network.modules())


@every_objective
def test_gradient_checkpointing_changes_no_gradient(objective, losses, blocks):
    batch, results = BlockDraw(K, **blocks).draw(dict(BATCH)), []
    for checkpointing in (False, True):
        network = network_for(objective)
        if objective != "lossless":
            network.lm.requires_grad_(True)
        module = Conversion(network, LossOptions(**losses), gradient_checkpointing=checkpointing).train()
        runs = []
        hook = network.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss = module(**batch)["loss"]
        loss.backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing + (objective == "lossless")  # which runs in halves
        results.append([loss, *(p.grad for p in network.parameters() if p.requires_grad and p.grad is not None)])
        module.uncompile()
        assert not any(getattr(m, "gradient_checkpointing", False) for m in network.lm.modules())
    for plain, again in zip(*results, strict=True):
        close(plain, again)


# On a GPU: FlexAttention, compiled layers and losses

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wide_network(objective: str, attention: str) -> Network:
    """Heads of 16, the narrowest that FlexAttention's kernels take."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)
    lm.requires_grad_(objective != "lossless")
    drafter = Drafter(lm, DrafterSpec(4, 8.0, None, 8)) if objective == "lossless" else None
    for name, parameter in () if drafter is None else drafter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    mask = 96 if objective in ("paper", "block-diffusion") else None
    return Network(lm, drafter, TidarConfig(K, objective, mask, attention))


@needs_gpu
@every_objective
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_trains_what_a_cpu_does(objective, losses, blocks, checkpointing):
    attention = "bidirectional" if objective == "block-diffusion" else "causal"
    batch, results = BlockDraw(K, **blocks).draw(dict(BATCH)), []
    for device in ("cpu", "cuda"):
        network = wide_network(objective, attention).to(device)
        on_gpu = device == "cuda"
        module = Conversion(network, LossOptions(**losses), on_gpu, on_gpu and checkpointing).train()
        for _ in range(2):  # the second time with all that is cached
            network.zero_grad()
            loss = module(**{name: value.to(device) for name, value in batch.items()})["loss"]
            loss.backward()
        gradients = [p.grad.cpu() for p in network.parameters() if p.grad is not None]
        results.append([loss.detach().cpu(), *gradients])
    for cpu, gpu in zip(*results, strict=True):
        close(cpu, gpu, atol=1e-3, rtol=1e-2)


@needs_gpu
def test_the_fused_loss_takes_less_memory_than_the_logits():
    rows, hidden, vocabulary = 16_384, 576, 49_152
    head = Head(torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16) / 24)
    states = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels, compiled = torch.randint(vocabulary, (rows,), device="cuda"), torch.compile(token_terms)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (terms,) = linear_terms(compiled, head, [states], states.detach(), labels)
    terms.loss.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < rows * vocabulary * 2


# Who notices what


def noticed(network: Network, layout: Layout, ids: Tensor, block_ids: Tensor) -> Tensor:
    """[N, N]: how much the state of token q (row) changes with the id of token k (column), masks left alone."""
    everything = torch.cat((ids, block_ids), 1)[0]
    n = layout.size
    changed = everything.repeat(n + 1, 1)
    places = (everything != MASKED).nonzero()[:, 0]
    changed[places, places] = (everything[places] + 1) % 96
    rows = layout.after(torch.zeros(n + 1, dtype=torch.long))
    states = network(changed[:, : layout.clean], rows, block_ids=changed[:, layout.clean :])
    return (states[:-1] - states[-1]).abs().amax(-1).T


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("objective", ["lossless", "block-diffusion"])
@torch.no_grad()
def test_no_token_notices_what_it_may_not_see(attention, objective):
    """Nothing of another document, nothing behind the anchor but what the block shows, no other block."""
    if (objective, attention) == ("block-diffusion", "causal"):
        pytest.skip("not an option")
    network = network_for(objective, attention)
    torch.manual_seed(4)
    batch = BlockDraw(K, tiled=objective == "block-diffusion", random=True).draw(dict(BATCH))
    module = Conversion(network)
    layout = module.layout(batch)
    targets = module.targets(layout, batch)
    block_ids = torch.where(
        targets.shown, BATCH["input_ids"].gather(1, targets.place.flatten(1)).view_as(targets.place), MASKED
    )
    seen = 0
    for row in range(2):
        one = replace(
            layout,
            **{name: getattr(layout, name)[row : row + 1] for name in ("depth", "enter", "exit", "anchors", "prefix")},
        )
        shown = block_ids[row].flatten()
        changes = noticed(network, one, BATCH["input_ids"][row : row + 1], shown[None])
        documents, anchors = BATCH["documents"][row].tolist(), layout.anchors[row].tolist()
        everyone = rules.tokens(LENGTH, anchors, K)
        for q, query in enumerate(everyone):
            for k, key in enumerate(everyone):
                allowed = rules.may_attend(query, key, documents)
                if attention == "causal":
                    allowed &= key.offset <= query.offset
                if objective == "block-diffusion" and query.block is None and key.block is None:
                    allowed = documents[key.index] == documents[query.index] and key.index // K <= query.index // K
                if key.block is not None and shown[k - LENGTH] == MASKED:
                    continue
                if allowed:
                    assert changes[q, k] > 1e-3
                    seen += key.block is not None and q != k
                else:
                    assert changes[q, k] < 1e-5
    assert seen > 3


@torch.no_grad()
def test_causal_blocks_say_the_same_in_training_prefill_and_decoding():
    network = network_for("lossless", "causal")
    ids = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([[2, 5, 8]])
    states = network(ids, chain_layout(9, anchors, K, causal_blocks=True))
    for block, anchor in enumerate(anchors[0].tolist()):
        trained = states[:, 9 + block * K : 9 + (block + 1) * K]
        context = ids[:, : anchor + 1]
        for accepted in range(1, 4):
            cache = RowCache(1, 64, network.device)
            before = context.shape[1] - accepted
            if before:
                prefill = prefill_layout(torch.tensor([before]), before, K, causal_blocks=True)
                cache.reserve(prefill.size)
                network(context[:, :before], prefill, cache)
                cache.lengths += before
            drafts = F.pad(context[:, before:], (0, K - accepted))
            layout = step_layout(K, range(1, K + 1), causal_blocks=True).after(cache.lengths)
            cache.reserve(layout.size)
            close(network(drafts, layout, cache)[:, layout.block(accepted - 1)], trained, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_decoder_takes_the_layout_that_the_config_names():
    """The states that the real prefill and step propose from are those of training."""
    network, found = network_for("lossless", "causal"), []

    def spy(network, block, logits, next_token, *more):
        found.append((block[0].clone(), int(next_token[0])))
        return steps.propose(network, block, logits, next_token, *more)

    prompt = torch.randint(VOCABULARY, (7,), generator=torch.Generator().manual_seed(1)).tolist()
    plan = steps.Plan(K, propose=spy)
    state = steps.prefill(network, [prompt], [0], plan)
    text = list(prompt)
    for _ in range(4):
        block, next_token = found.pop()
        ids = torch.tensor([text])
        trained = network(ids, chain_layout(len(text), torch.tensor([[len(text) - 1]]), K, causal_blocks=True))
        close(block, trained[0, len(text) :], atol=1e-4, rtol=0)
        drafts = state.drafts[0].tolist()
        accepted = int(steps.step(network, state, plan).accepted[0])
        text += drafts[:accepted]
        assert drafts[0] == next_token


# Blocks of a batch


def test_a_budget_of_tiles_takes_those_with_answers_first():
    torch.manual_seed(0)
    for _ in range(20):
        batch = BlockDraw(2, 3, tiled=True).draw(dict(BATCH))
        index, inside = chain_layout(LENGTH, batch["anchors"], 2, BATCH["documents"]).targets()
        answer = inside & BATCH["answers"].gather(1, index.flatten(1)).view_as(index)
        assert answer.any(-1).all()
        assert ((batch["anchors"] + 1) % 2 == 0).all()
        assert (batch["anchors"].diff(dim=1) > 0).all()
    assert "anchors" not in BlockDraw(2, 6, tiled=True).draw(dict(BATCH))


def test_blocks_show_prompts_and_never_another_document():
    torch.manual_seed(0)
    for _ in range(20):
        batch = BlockDraw(K, random=True).draw(dict(BATCH))
        index, inside = chain_layout(LENGTH, batch["anchors"], K, BATCH["documents"]).targets()
        answer = inside & BATCH["answers"].gather(1, index.flatten(1)).view_as(index)
        assert not (batch["shown"] & ~inside).any()
        assert (batch["shown"] | answer | ~inside).all()
        masked = answer & ~batch["shown"]
        assert masked.any(-1).equal(answer.any(-1))


def test_what_is_the_same_for_all_batches_is_left_out_and_its_mask_is_made_once():
    rows = {"ids": np.arange(12), "documents": np.zeros(12, np.int16), "answers": np.ones(12, bool)}
    packed_rows = {**rows, "documents": np.repeat([0, 1], 6).astype(np.int16)}
    batch = collate_blocks(BlockDraw(K, tiled=True), [rows, rows])
    assert batch.keys() == {"input_ids", "answers"}
    assert "documents" in collate_blocks(BlockDraw(K, tiled=True), [rows, packed_rows])
    module = Conversion(network_for("paper"))
    layout = module.layout(batch)
    assert module.block_mask(layout, batch) is module.block_mask(module.layout(batch), batch)
    packed = {**batch, "documents": torch.tensor([[0] * 5 + [1] * 7] * 2)}
    assert module.block_mask(module.layout(packed), packed) is not module.block_mask(module.layout(packed), packed)
    assert module.block_mask(layout, batch) is module.block_mask(layout, batch)
    everyone = {**batch, "documents": torch.zeros(2, 12, dtype=torch.long)}
    close(module(**batch)["loss"], module(**everyone)["loss"])


# Options and checkpoints


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective": "gan"}, "objective is 'gan', but must be 'lossless', 'paper', 'ar' or 'block-diffusion'"),
        ({"loss": "mse"}, "loss is 'mse', but must be 'soft', 'hard' or 'lk'"),
        ({"position_weights": "none"}, "position-weights is 'none', but must be 'acceptance'"),
        ({"masking": "half"}, "masking is 'half', but must be 'full' or 'random'"),
        ({"anchor_mode": "all"}, "anchor-mode is 'all', but must be 'random' or 'tiled'"),
        ({"block_attention": "both"}, "block-attention is 'both', but must be 'bidirectional' or 'causal'"),
        (
            {"position_weights": "decay", "decay_gamma": 0.0},
            "decay-gamma is 0.0, but must be a finite number above 0",
        ),
        ({"decay_gamma": 2.0}, "decay-gamma is 2.0, but it belongs to position-weights 'decay'"),
        ({"objective": "paper", "rank": 64}, "rank is 64, but objective 'paper' makes no use of it"),
        ({"objective": "ar", "masking": "full"}, "masking is 'full', but objective 'ar' makes no use of it"),
        ({"ar_weight": 0.5}, "ar-weight is 0.5, but objective 'lossless' makes no use of it"),
        ({"objective": "paper", "teacher_temperature": 0.5}, "teacher-temperature is 0.5, but hard targets have none"),
        ({"sampler_width": 0, "marginal_weight": 1.0}, "marginal-weight is 1.0, but without a sampler head"),
        ({"objective": "block-diffusion", "masking": "full"}, "masking is 'full', but objective 'block-diffusion' is"),
        ({"objective": "block-diffusion", "loss": "soft"}, "loss is 'soft', but objective 'block-diffusion' is"),
        ({"objective": "block-diffusion", "block_attention": "causal"}, "block-attention is 'causal', but objective"),
    ],
)
def test_options_that_cannot_be_meant_are_named(more, message, tmp_path):
    config = TrainConfig("some", tmp_path, [tmp_path / "rows.jsonl"], **more)
    with pytest.raises(TidarError) as error:
        config.check()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_every_objective_has_its_own_defaults(tmp_path):
    def chosen(objective):
        config = TrainConfig("some", tmp_path, [Path("hf:some/rows")], objective=objective)
        config.check()
        return [config.chosen(name) for name in ("loss", "position_weights", "masking", "anchor_mode")]

    assert chosen("lossless") == ["soft", "acceptance", "full", "random"]
    assert chosen("paper") == ["hard", "uniform", "full", "tiled"]
    assert chosen("block-diffusion") == ["hard", "uniform", "random", "tiled"]


@pytest.mark.parametrize("objective", ["ar", "block-diffusion"])
def test_training_for_comparison_lowers_the_loss_and_says_what_it_made(objective, folder, data, tmp_path):
    config = options(folder, data, tmp_path, objective=objective, learning_rate=2e-3, steps=40)
    convert(config)
    again = TidarModel.from_pretrained(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert again.config.objective == objective
    assert not again.network.can_draft
    losses = [row["loss"] for row in curve(config) if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    if objective == "ar":
        assert again.generate("say b", mode="ar", max_new_tokens=5).new_tokens
        with pytest.raises(TidarError, match="no drafter"):
            again.generate("say b")
    else:
        for mode in ("ar", "tidar"):
            with pytest.raises(TidarError, match="block-diffusion model"):
                again.generate("say b", mode=mode)


@pytest.mark.parametrize(
    "more",
    [
        {"block_attention": "causal"},
        {"masking": "random", "loss": "lk", "position_weights": "decay"},
        {"anchor_mode": "tiled", "loss": "hard", "position_weights": "accept-until-fail"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_each_option_trains_a_drafter_that_decodes_exactly(more, folder, data, tmp_path):
    made = convert(options(folder, data, tmp_path, steps=3, **more))
    again = TidarModel.from_pretrained(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert again.config.block_attention == more.get("block_attention", "bidirectional")
    assert made.config.block_attention == again.config.block_attention
    greedy = again.generate("say b", mode="ar", max_new_tokens=20).token_ids
    assert again.generate("say b", max_new_tokens=20, draft_length=4).token_ids == greedy


def test_a_config_names_an_unknown_block_attention():
    with pytest.raises(TidarError, match="block_attention is 'both'"):
        TidarConfig(block_attention="both")
