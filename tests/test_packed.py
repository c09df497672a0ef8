"""The packed CPU backbone says what the stock modules say, follows their weights, and knows when it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tidar import TidarModel
from tidar.decode.cache import RowCache
from tidar.decode.engine import Engine, Limits
from tidar.decode.runner import runner_for
from tidar.decode.step import Plan
from tidar.layout import Layout, prefill_layout, step_layout
from tidar.model import packed
from tidar.model.network import Network
from tidar.model.packed import PackedBackbone, PackedLinear, PlainLinear, can_pack, fast_bfloat16
from tiny import PROMPTS, VOCABULARY, continuations, generate, tiny_lm, tiny_network

packable = pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch cannot pack weights")
LLAMAS = ("llama", "qwen2", "qwen3")


def biased(network: Network) -> Network:
    """Biases start at zero, norms at one: random ones, so that leaving one out shows."""
    with torch.no_grad():
        for name, parameter in network.lm.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return network


NETWORKS = {(arch, draft): biased(tiny_network(arch, draft)) for arch in LLAMAS for draft in (True, False)}


def run(network: Network, fused: PackedBackbone | None, ids: Tensor, layout: Layout, cache: RowCache) -> Tensor:
    """Logits, the stock modules' for `fused` None."""
    network.fused = fused
    cache.reserve(layout.size)
    with torch.inference_mode():
        return network.head(network(ids, layout, cache, fused=True))


@given(st.data())
def test_equals_the_stock_modules(data):
    """A prefill of rows of different lengths, then a step behind it, keys and values included."""
    network = NETWORKS[data.draw(st.sampled_from(LLAMAS)), data.draw(st.booleans())]
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4)))
    draft_length, width = data.draw(st.integers(1, 5)), int(lengths.max())
    outcomes = range(1, 1 + data.draw(st.integers(0, draft_length))) if network.can_draft else ()
    torch.manual_seed(data.draw(st.integers(0, 9)))
    prompts, drafts = (torch.randint(VOCABULARY, (len(lengths), n)) for n in (width, draft_length))
    fused, said = network.build_fused(), []
    assert isinstance(fused, PackedBackbone)
    for backbone in (None, fused):
        cache = RowCache(len(lengths), 128, network.device)
        first = run(network, backbone, prompts, prefill_layout(lengths, width, 4 if network.can_draft else 0), cache)
        cache.lengths.copy_(lengths)
        cache.reserve(draft_length * 6, width)
        then = run(network, backbone, drafts, step_layout(draft_length, outcomes).after(lengths), cache)
        said.append((first, then, *(k[b, :, :n] for k in cache.keys + cache.values for b, n in enumerate(lengths))))
    for stock, ours in zip(*said, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))


@packable
@settings(max_examples=100)
@given(st.data())
def test_packed_linear_equals_its_plain_twin(data):
    rows, inner, out = (data.draw(st.integers(1, 40)) for _ in range(3))
    dtype = data.draw(st.sampled_from([d for d in (torch.float32, torch.bfloat16) if can_pack(d)]))
    rank = data.draw(st.none() | st.integers(1, 8))
    x, weight, times = (torch.randn(*shape, dtype=dtype) for shape in ((rows, inner), (out, inner), (rows, out)))
    bias = torch.randn(out, dtype=dtype) if data.draw(st.booleans()) else None
    b = None if rank is None else torch.randn(rank, out, dtype=dtype)
    a = torch.randn(rows, rank, dtype=dtype) if rank is not None and data.draw(st.booleans()) else None
    how = {"silu": data.draw(st.booleans())} if data.draw(st.booleans()) else {"times": times}
    ours, plain = (kind(weight, bias, b)(x, a, **how) for kind in (PackedLinear, PlainLinear))
    error = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, plain, rtol=error, atol=error * float(plain.abs().max()))


def tokens(network: Network, draft_length: int = 4) -> list[list[int]]:
    answers = {}
    for updates in Engine(network, Plan(draft_length)).run(PROMPTS, Limits(24)):
        answers |= {update.answer.row: update.answer.token_ids for update in updates}
    return [answers[row] for row in range(len(PROMPTS))]


@pytest.mark.parametrize("arch", LLAMAS)
def test_the_engine_decodes_with_it(arch):
    network = tiny_network(arch)
    assert tokens(network) == [continuation[:24] for continuation in continuations(arch)]
    assert isinstance(network.fused, PackedBackbone)


@pytest.mark.parametrize("arch", ["ernie4_5", "helium", "glm", "smollm3"])
def test_models_that_only_look_like_a_llama_keep_their_stock_modules(arch):
    """Theirs rotate neighbours, or half of each head, or only in some layers."""
    lm = tiny_lm(arch)
    if arch == "smollm3":
        lm.model.layers[1].self_attn.use_rope = 0
    network = Network(lm).eval()
    runner_for(network)
    assert network.fused is None


@pytest.mark.parametrize("arch", ["gemma", "gpt_neox"])
def test_other_architectures_keep_their_stock_modules(arch):
    network = tiny_network(arch)
    assert tokens(network) == [continuation[:24] for continuation in continuations(arch)]
    assert network.fused is None


@pytest.mark.parametrize("why", ["no packed products", "no memory"])
def test_without_packed_weights_it_still_says_the_same(why, monkeypatch):
    monkeypatch.setattr(
        packed, *("can_pack", lambda dtype: False) if why != "no memory" else ("_fits", lambda size: False)
    )
    network = tiny_network("llama")
    assert tokens(network) == [continuation[:24] for continuation in continuations("llama")]
    assert type(network.fused.head) is PlainLinear


def changed(network: Network, what: str) -> None:
    with torch.no_grad():
        if what == "drafter":
            network.drafter.load_state_dict({k: v * 2 for k, v in network.drafter.state_dict().items()})
        elif what == "base":
            network.lm.load_state_dict(tiny_lm("llama", seed=1).state_dict(), strict=False)
        elif what == "optimizer":
            parameter = network.backbone.layers[0].mlp.down_proj.weight.requires_grad_(True)
            optimizer = torch.optim.SGD([parameter], lr=1.0)
            parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        else:
            network.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("what", ["drafter", "base", "optimizer", "precision"])
def test_follows_weights_that_change_after_decoding(what):
    network = tiny_network("llama")
    runner_for(network)
    before = network.fused
    runner_for(network)
    assert network.fused is before  # not built anew for every answer
    changed(network, what)
    runner_for(network)
    lengths = torch.tensor([6])
    layout, said = prefill_layout(lengths, 6, 4), []
    assert network.fused is not before
    for backbone in (network.fused, None):
        said.append(run(network, backbone, torch.tensor([PROMPTS[0]]), layout, RowCache(1, 64, network.device)))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-3)


def test_a_model_that_has_decoded_trains_and_saves_as_before(tmp_path):
    network, fresh = tiny_network("llama", draft=False), tiny_lm("llama")
    parameter = network.backbone.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with torch.inference_mode():  # as a caller may
        runner_for(network)
    network.lm(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert parameter is network.backbone.layers[0].self_attn.q_proj.weight
    assert parameter.grad.abs().sum() > 0
    network.lm.save_pretrained(tmp_path)
    saved = type(fresh).from_pretrained(tmp_path).state_dict()
    assert all(saved[name].equal(tensor) for name, tensor in fresh.state_dict().items())
    prompt = torch.tensor([PROMPTS[0]])
    assert generate(network.lm, prompt, max_new_tokens=8).equal(generate(fresh, prompt, max_new_tokens=8))


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_default_precision_is_the_fast_one(arch, tmp_path):
    tiny_lm(arch).save_pretrained(tmp_path)
    model = TidarModel.from_pretrained(str(tmp_path), device="cpu")
    wanted = torch.bfloat16 if arch == "llama" and fast_bfloat16() else torch.float32
    assert model.hf_model.dtype == wanted
    assert TidarModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32").hf_model.dtype == torch.float32
