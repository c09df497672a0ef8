"""Networks see what the rules allow and nothing else; the AR half is the base model, whatever the drafter does."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import rules
from tidar.decode.cache import RowCache
from tidar.kernels.draft import candidates_eager
from tidar.layout import Layout, chain_layout, prefill_layout, step_layout
from tidar.model.attention import grouped_sdpa
from tidar.model.gated_lora import Gate, GatedLinear
from tidar.model.network import Network
from tidar.model.propose import CANDIDATES, propose
from tidar.sampling import SamplingParams
from tiny import ARCHITECTURES, VOCABULARY, tiny_lm, tiny_network

BLOCK = 3
DOCUMENTS = [0] * 5 + [1] * 6
ANCHORS = [1, 3, 3, 7, 9]
"""Two blocks at one anchor, blocks that overlap, and one that crosses its document's end."""

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
close = torch.testing.assert_close


def some_ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def packed() -> tuple[Tensor, Layout]:
    """Ids and training layout of two packed documents with several blocks."""
    layout = chain_layout(len(DOCUMENTS), torch.tensor([ANCHORS]), BLOCK, torch.tensor([DOCUMENTS]))
    return some_ids(len(DOCUMENTS)), layout


def influence(network: Network, ids: Tensor, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[N, N]: how much the state of token q (row) changes when only the input of token k (column) does."""
    n, clean = layout.size, layout.clean
    changed = ids.repeat(n + 1, 1)  # row k has token k changed, the last row is as it was
    changed[range(clean), range(clean)] = (ids[0] + 1) % VOCABULARY
    masks = network.mask_vector().repeat(n + 1, n - clean, 1)
    masks[range(clean, n), range(n - clean)] += torch.linspace(-2, 3, masks.shape[-1])
    monkeypatch.setattr(network, "mask_vector", lambda: masks)
    rows = layout.after(torch.zeros(n + 1, dtype=torch.long))
    states = network(changed, rows)
    return (states[:-1] - states[-1]).abs().amax(-1).T


@every_architecture
def test_tokens_notice_exactly_what_they_may_attend(arch, monkeypatch):
    ids, layout = packed()
    visible = rules.visibility(layout.clean, ANCHORS, BLOCK, DOCUMENTS)
    with torch.no_grad():
        noticed = influence(tiny_network(arch), ids, layout, monkeypatch)
    assert noticed[~visible].max() < 1e-5
    assert noticed[visible].min() > 1e-3


@every_architecture
@torch.no_grad()
def test_blocks_say_the_same_in_training_prefill_and_decoding(arch):
    network = tiny_network(arch)
    ids, layout = packed()
    states = network(ids, layout)
    for block, anchor in enumerate(ANCHORS):
        start = DOCUMENTS.index(DOCUMENTS[anchor])
        context = ids[:, start : anchor + 1]
        trained = network.head(states[:, layout.block(block)])
        close(prefilled(network, context), trained, atol=1e-4, rtol=0)
        for accepted in range(1, min(BLOCK, context.shape[1]) + 1):
            close(decoded(network, context, accepted), trained, atol=1e-4, rtol=0)


def prefilled(network: Network, context: Tensor) -> Tensor:
    """Logits of the block after context [1, n] in a batch's prefill, beside a longer row."""
    length = context.shape[1]
    batch = torch.cat((nn.functional.pad(context, (0, 2)), some_ids(length + 2, seed=1)))
    layout = prefill_layout(torch.tensor([length, length + 2]), length + 2, BLOCK)
    return network.head(network(batch, layout)[:1, layout.block(0)])


def decoded(network: Network, context: Tensor, accepted: int) -> Tensor:
    """Logits of the block after context [1, n] in a decode step whose last `accepted` tokens are drafts that stand."""
    prefix, drafts = context[:, : context.shape[1] - accepted], torch.zeros(1, BLOCK, dtype=torch.long)
    drafts[:, :accepted] = context[:, context.shape[1] - accepted :]
    cache = RowCache(1, 64, network.device)
    if length := prefix.shape[1]:
        prefill = prefill_layout(torch.tensor([length]), length, BLOCK)
        cache.reserve(prefill.size)
        network(prefix, prefill, cache)
        cache.lengths += length
    layout = step_layout(BLOCK, range(1, BLOCK + 1)).after(cache.lengths)
    cache.reserve(layout.size)
    return network.head(network(drafts, layout, cache)[:, layout.block(accepted - 1)])


@every_architecture
@torch.no_grad()
def test_drafting_walks_the_sampler_head_as_training_did(arch):
    """Drafts are the best candidates of the teacher-forced pass over the drafts themselves, or drawn from them."""
    network, (ids, layout) = tiny_network(arch), packed()
    block = network(ids, layout)[0, layout.clean :].view(len(ANCHORS), BLOCK, -1)
    first, noise = torch.arange(len(ANCHORS)) + 40, torch.rand(len(ANCHORS), BLOCK - 1)
    marginal = network.head(block[:, 1:])
    excluded = torch.ones_like(marginal, dtype=torch.bool).scatter(-1, candidates_eager(marginal, CANDIDATES)[1], False)
    for params in (SamplingParams(), SamplingParams(0.7, top_k=5)):
        drafts, _, _, probs = propose(network, block, marginal, first, torch.full_like(first, -1), params, noise)
        assert drafts[:, 0].equal(first)
        forced = network.head(network.drafter.sampler_head(block, network.embed(drafts[:, :-1])))[:, 1:]
        forced = forced.masked_fill(excluded, -torch.inf)
        if params.greedy:
            assert probs is None
            assert drafts[:, 1:].equal(forced.argmax(-1))
        else:
            close(params.probabilities(forced).gather(-1, probs.ids), probs.probs)
            assert ((probs.probs > 0) & (probs.ids == drafts[:, 1:, None])).any(-1).all()


@every_architecture
@torch.no_grad()
def test_clean_tokens_have_the_logits_of_the_base_model(arch):
    network, plain = tiny_network(arch), tiny_lm(arch, attn_implementation="eager")
    ids, layout = packed()
    logits = network.head(network(ids, layout)[:, : layout.clean])
    for document in (slice(0, 5), slice(5, 11)):
        close(logits[:, document], plain(ids[:, document]).logits, atol=1e-5, rtol=1e-5)


@every_architecture
@torch.no_grad()
def test_model_inside_stays_the_plain_model(arch):
    """Outside a Network forward the gate is shut: `hf_model` gives the base model's logits, bit for bit."""
    network, plain, ids = tiny_network(arch), tiny_lm(arch), some_ids(9)
    network(*packed())
    assert network.lm(ids).logits.equal(plain(ids).logits)


@torch.no_grad()
def test_drafter_acts_on_the_masks():
    ids, layout = packed()
    network = tiny_network("llama")
    before = network(ids, layout)
    for name, parameter in network.drafter.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    after = network(ids, layout)
    assert before[:, : layout.clean].equal(after[:, : layout.clean])
    assert ((before - after)[:, layout.clean :].abs().amax(-1) > 0.1).all()


@every_architecture
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_is_the_twin_of_dense_attention(arch):
    network = tiny_network(arch)
    ids, layout = packed()
    close(network(ids, layout, mask=layout.block_mask()), network(ids, layout), atol=1e-4, rtol=1e-4)


@every_architecture
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_clean_tokens_in_one_chain_need_no_mask(arch):
    network, ids = tiny_network(arch), torch.randint(VOCABULARY, (2, 10))
    layout = chain_layout(10, torch.tensor([[1, 6], [0, 8]]), 4)
    assert layout.one_chain
    whole = network(ids, layout, mask=layout.block_mask())
    for mask in (layout.dense_mask(), layout.block_mask(slice(10, None)), None):
        close(network(ids, layout, mask=mask), whole, atol=1e-4, rtol=1e-4)
    alone = chain_layout(10, torch.empty(2, 0, dtype=torch.long), 4)
    close(network(ids, alone), whole[:, :10], atol=1e-4, rtol=1e-4)


def test_grouped_attention_is_attention():
    query, key, value = torch.randn(2, 6, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = (torch.rand(2, 1, 4, 5) < 0.5) | (torch.arange(5) == 0)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    close(grouped_sdpa(query, key, value, mask, 0.3), wanted)


def test_gated_linear_changes_the_tail_alone():
    base, gate, x = nn.Linear(6, 5), Gate(), torch.randn(2, 4, 6)
    gated = GatedLinear(base, 2, 1.5, gate)
    nn.init.normal_(gated.lora_B.weight)
    assert gated(x).equal(base(x))
    full = base(x) + 1.5 * gated.lora_B(gated.lora_A(x))
    for start in range(5):
        with gate.opened(start):
            y = gated(x)
        assert y[:, :start].equal(base(x)[:, :start])
        close(y[:, start:], full[:, start:])
    assert gated(x).equal(base(x))


@every_architecture
def test_gradients_reach_the_drafter_alone(arch):
    network = tiny_network(arch)
    ids, layout = packed()
    states = network(ids, layout)
    blocks = states[:, layout.clean :].unflatten(1, (layout.blocks, BLOCK))
    rescored = network.drafter.sampler_head(blocks, network.embed(ids[:, :2]).expand(layout.blocks, 2, -1)[None])
    network.head(rescored).logsumexp(-1).sum().backward()
    own = set(network.drafter.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own)
    assert all(p.grad is None for p in network.lm.parameters() if p not in own)


@every_architecture
def test_clean_states_have_no_gradient_from_the_drafter(arch):
    network = tiny_network(arch)
    ids, layout = packed()
    clean = network(ids, layout)[:, : layout.clean]
    gradients = torch.autograd.grad(clean.square().sum(), list(network.drafter.parameters()), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)


def test_each_thread_has_a_gate_of_its_own():
    """Forwards of two threads that overlap: neither sees where the other's masks begin, and no gate stays open."""
    gate, both, seen = Gate(), threading.Barrier(2, timeout=10), {}

    def forward(start: int) -> None:
        with gate.opened(start):
            both.wait()
            seen[start] = gate.start
            both.wait()
        both.wait()
        seen[-start] = gate.start

    threads = [threading.Thread(target=forward, args=[start]) for start in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {3: 3, 5: 5, -3: None, -5: None}
    assert gate.start is None


def test_a_compiled_layer_reads_the_gate_as_it_is():
    """A graph that was made while it was closed, or opened elsewhere, is not used again."""
    layer = GatedLinear(nn.Linear(4, 4), 2, 1.0, Gate())
    nn.init.normal_(layer.lora_B.weight)
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False), torch.randn(2, 6, 4)
    plain = layer(x)
    assert torch.equal(compiled(x), plain)
    for start in (3, 5, 0):
        with layer.gate.opened(start):
            assert torch.equal(compiled(x), layer(x))
            assert not torch.equal(compiled(x)[:, start:], plain[:, start:])
        assert torch.equal(compiled(x), plain)


def test_a_network_can_be_copied():
    copied = copy.deepcopy(tiny_network("llama"))
    gates = {module.gate for module in copied.modules() if isinstance(module, GatedLinear)}
    assert gates == {copied.drafter.gate}
