"""The kernels that draft are the twins of the eager loop in `propose`; on a CPU they run in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tidar.kernels import draft as kernels
from tidar.kernels.judge import Judged, choose_outcomes_fused, decide_eager, decide_fused
from tidar.kernels.launch import triton
from tidar.kernels.weights import KINDS, QuantWeight, quantise
from tidar.model.network import Network
from tidar.model.propose import CANDIDATES, fold_head, propose
from tidar.model.quantised import quantise_model
from tidar.model.sampler_head import SamplerHead
from tidar.sampling import Leaves, SamplingParams, accept_greedy, likely_outcomes, outcome_probabilities
from tiny import tiny_network

NATIVE, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if NATIVE and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in the subprocess below")


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or NATIVE, reason="the tests below run here")
def test_kernels_in_the_interpreter():
    """In a process of their own: Triton reads the variable once, when its kernels are defined."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def grown(arch: str, vocabulary: int) -> Network:
    """A network whose sampler head matters (it starts at zero), and is of no round width."""
    network = tiny_network(arch, vocabulary=vocabulary)
    network.drafter.sampler_head = SamplerHead(32, 20)
    torch.nn.init.normal_(network.drafter.sampler_head.out.weight, std=0.3)
    return network.to(DEVICE)


def some_block(network: Network, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, their logits and verified tokens."""
    hidden = network.lm.get_input_embeddings().weight.shape[1]
    block = 2 * torch.randn(batch, length, hidden, device=DEVICE)
    return block, network.head(block[:, 1:]), torch.randint(network.vocabulary, (batch,), device=DEVICE)


@pytest.mark.parametrize("vocabulary", [5, 32, 33, 50, 512])
def test_candidates_are_the_best_two_of_each_group(vocabulary):
    logits, count = torch.randn(2, 3, vocabulary), 32
    scores, ids = kernels.candidates_eager(logits, count)
    assert scores.equal(logits.gather(-1, ids))
    if vocabulary <= count:
        assert ids.equal(torch.arange(vocabulary).expand(2, 3, -1))
        return
    for group in range(16):
        assert scores[..., group::16].equal(logits[..., group::16].topk(2).values)


@runs_kernels
@pytest.mark.parametrize(("vocabulary", "count"), [(129, 128), (300, 64), (9000, 128), (4097, 32)])
@torch.no_grad()
def test_candidate_kernels_choose_as_their_twin(vocabulary, count):
    network = grown("llama", vocabulary)
    block, logits, _ = some_block(network, 2, 3)
    logits[1, 0, : count // 2] = -torch.inf
    ids, scores = kernels.candidates(fold_head(network), block, logits, count)
    _, wanted = kernels.candidates_eager(logits, count)
    assert ids.equal(wanted.int())
    torch.testing.assert_close(scores, network.head(block[:, 1:]).gather(-1, wanted))
    logits[...] = -torch.inf  # the first ones of equals
    ids, _ = kernels.candidates(fold_head(network), block, logits, count)
    assert ids.equal(torch.arange(count, dtype=torch.int32, device=DEVICE).expand(2, 2, -1))


@runs_kernels
@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize(("arch", "batch", "length"), [("llama", 1, 8), ("qwen3", 3, 2), ("gemma", 2, 5)])
@torch.no_grad()
def test_walk_kernels_draft_as_the_eager_loop(arch, batch, length, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    network = grown(arch, 300)
    block, logits, first = some_block(network, batch, length)
    for after in (torch.full_like(first, -1), torch.arange(batch, device=DEVICE) - 1):
        drafts, confidence, others = kernels.draft(fold_head(network), block, logits, first, after, CANDIDATES)
        wanted = propose(network, block, logits, first, after, SamplingParams(), None)
        assert drafts.equal(wanted.drafts)
        unknown = torch.ones_like(confidence, dtype=torch.bool)
        unknown[:, 0] = after < 0
        assert others[unknown].equal(wanted.alternatives[unknown])
        torch.testing.assert_close(confidence, wanted.confidence, rtol=1e-3, atol=1e-5)
    # The walk has a say: without it, other drafts.
    assert not drafts[:, 1:].equal(logits.argmax(-1))


@runs_kernels
@torch.no_grad()
def test_bias_of_the_output_embedding_counts():
    network = grown("llama", 200)
    output = network.lm.get_output_embeddings()
    output.bias = torch.nn.Parameter(3 * torch.randn(200, device=DEVICE))
    block, logits, first = some_block(network, 2, 4)
    unknown = torch.full_like(first, -1)
    drafts, *_ = kernels.draft(fold_head(network), block, logits, first, unknown, CANDIDATES)
    assert drafts.equal(propose(network, block, logits, first, unknown, SamplingParams(), None).drafts)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_quantised_output_embedding_is_multiplied_out(kind):
    network = grown("llama", 300)
    quantise_model(network.lm, kind, keep_numbers=True)
    block, logits, first = some_block(network, 2, 4)
    walk, unknown = fold_head(network), torch.full_like(first, -1)
    drafts, confidence, _ = kernels.draft(walk, block, logits, first, unknown, CANDIDATES)
    wanted = propose(network, block, logits, first, unknown, SamplingParams(), None)
    assert isinstance(walk.embedding, QuantWeight)
    assert drafts.equal(wanted.drafts)
    torch.testing.assert_close(confidence, wanted.confidence, rtol=1e-3, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [64, 192, 96])
def test_candidates_score_by_interleaved_numbers(kind, hidden):
    numbers = quantise(torch.randn(300, hidden, device=DEVICE), kind)
    block = torch.randn(2, 3, hidden, device=DEVICE)
    logits = block[:, 1:] @ numbers.to(torch.float32).T
    tokens, rest = torch.zeros(300, 32, device=DEVICE), torch.zeros(300, 16, device=DEVICE)
    ids, scores = kernels.candidates(kernels.Walk(rest, tokens, rest, rest, rest, numbers, None), block, logits, 64)
    torch.testing.assert_close(scores, logits.gather(-1, ids.long()), rtol=1e-4, atol=1e-4)


@runs_kernels
@torch.no_grad()
def test_scores_that_are_no_numbers_give_tokens_all_the_same():
    network = grown("llama", 200)
    block, logits, first = some_block(network, 1, 4)
    nothing = block * torch.nan, logits * torch.nan, first, torch.full_like(first, -1)
    drafts, *_ = kernels.draft(fold_head(network), *nothing, CANDIDATES)
    assert ((drafts >= 0) & (drafts < 200)).all()


@runs_kernels
def test_confidences_that_are_no_numbers_stay_in_their_rows():
    confidence = torch.full((2, 7), 0.5, device=DEVICE)
    confidence[0] = torch.nan
    outcomes = choose_outcomes_fused(confidence, torch.tensor([8, 8], device=DEVICE), 3)
    assert outcomes.tolist() == [[1, 2, 3], [1, 2, 3]]


@runs_kernels
@pytest.mark.parametrize(("vocabulary", "batch", "length"), [(5, 1, 2), (4096, 2, 3), (10_000, 3, 8)])
def test_plain_drafts_are_the_likeliest_tokens(vocabulary, batch, length):
    logits = 3 * torch.randn(batch, length - 1, vocabulary, device=DEVICE)
    first = torch.randint(vocabulary, (batch,), device=DEVICE)
    after = torch.arange(batch, device=DEVICE) - 1
    got, wanted = kernels.draft_plain(logits, first, after), kernels.draft_plain_eager(logits, first, after)
    assert got.drafts.equal(wanted.drafts)
    assert got.alternatives.equal(wanted.alternatives)
    torch.testing.assert_close(got.confidence, wanted.confidence)


@runs_kernels
@pytest.mark.parametrize("value", [-torch.inf, -torch.nan, torch.nan])
def test_plain_drafts_exist_whatever_the_logits(value):
    """Also where a row has fewer tokens with any chance than are wanted."""
    logits = torch.full((1, 2, 5000), value, device=DEVICE)
    logits[0, 1, 4321] = 1.0
    drafts, _, others = kernels.draft_plain(logits, torch.tensor([7], device=DEVICE), torch.tensor([-1], device=DEVICE))
    assert drafts[0, 0] == 7
    assert ((drafts >= 0) & (drafts < 5000)).all()
    assert ((others >= 0) & (others < 5000)).all()
    if value == -torch.inf:
        assert drafts[0, 2] == 4321


@runs_kernels
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_judging_kernel_decides_as_its_twin(data):
    batch, length, slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), 40
    block_size = data.draw(st.integers(1, 6))
    parents = sorted(data.draw(st.lists(st.integers(0, length - 1), max_size=6)), reverse=True)
    count = data.draw(st.integers(0, length))

    def rows(width: int, most: int, least: int = 0) -> Tensor:
        values = [[data.draw(st.integers(least, most)) for _ in range(width)] for _ in range(batch)]
        return torch.tensor(values, dtype=torch.long, device=DEVICE).view(batch, width)

    anchors = [sorted(data.draw(st.permutations(range(length)))[:count]) for _ in range(batch)]
    judged = Judged(
        rows(length, 2),
        rows(1, length, 1)[:, 0],
        rows(1, 2, 1)[:, 0],
        torch.tensor(anchors, dtype=torch.long, device=DEVICE).view(batch, count),
        rows(1, 1)[:, 0].bool(),
        slots,
        length + len(parents),
    )
    leaves = None
    if parents:
        # Leaves of one parent are distinct.
        tokens = [[parents[:a].count(p) for a, p in enumerate(parents)]] * batch
        leaves = Leaves(torch.tensor(tokens, device=DEVICE), torch.tensor(parents, device=DEVICE))
    choice = rows(length + len(parents), 2)
    got = decide_fused(choice, leaves, judged, block_size)
    wanted = decide_eager(accept_greedy(choice, judged.drafts, judged.drafted, leaves), judged, block_size)
    for name in got._fields:
        if name != "masks" or count:
            assert getattr(got, name).equal(getattr(wanted, name)), name


@runs_kernels
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_outcomes_are_chosen_as_by_the_twin(data):
    batch, others = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    rows = [[data.draw(st.floats(0.01, 0.99)) for _ in range(others)] for _ in range(batch)]
    confidence = torch.tensor([[*row, 2.0] for row in rows], device=DEVICE)[:, :-1]  # a part, as in the engine
    drafted = torch.tensor([data.draw(st.integers(1, others + 1)) for _ in range(batch)], device=DEVICE)
    count = data.draw(st.integers(1, others + 1))
    got, chances = choose_outcomes_fused(confidence, drafted, count), outcome_probabilities(confidence, drafted)
    wanted = likely_outcomes(confidence, drafted, count)
    assert (got[:, 1:] > got[:, :-1]).all()
    # As likely as the twin's: ties may be broken differently.
    torch.testing.assert_close(chances.gather(1, got - 1).sort(1).values, chances.gather(1, wanted - 1).sort(1).values)
