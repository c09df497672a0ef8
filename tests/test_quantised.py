"""Quantised base weights: near the original ones, and one model in every engine and mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidar import TidarError, TidarModel
from tidar.bench import shapes
from tidar.decode.cache import RowCache
from tidar.decode.costs import _fingerprint
from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.kernels.linear import Tiling, choose, linear, linear_eager, tile_rows
from tidar.kernels.weights import KINDS, quantise, unpacking
from tidar.layout import prefill_layout, step_layout
from tidar.model import fused
from tidar.model.gated_lora import GatedLinear
from tidar.model.network import Network
from tidar.model.quantised import kernel_reads, quantise_model, stored_weight
from tidar.sampling import SamplingParams
from tidar.train.conversion import Conversion
from tiny import PROMPTS, generate, some_prompt, tiny_folder, tiny_lm, tiny_network

kinds = pytest.mark.parametrize("kind", KINDS)


def quantised(arch: str, kind: str, keep_numbers: bool, draft: bool = True) -> Network:
    network = tiny_network(arch, draft)
    quantise_model(network.lm, kind, keep_numbers)
    network.weights = kind
    return network


def put_lora_on_the_grid(network: Network, kind: str) -> None:
    """The fused backbone quantises A with the weights it is stacked under; this makes that exact."""
    for module in network.modules():
        if isinstance(module, GatedLinear):
            module.lora_A.weight.copy_(quantise(module.lora_A.weight, kind).to(torch.float32))


@given(st.sampled_from(list(KINDS)), st.integers(0, 1000), st.floats(-6, 4), st.booleans())
def test_numbers_are_the_nearest_there_are(kind, seed, size, bfloat16):
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * 10**size
    weight[2], weight[3, 1:] = 0, 0
    weight = weight.bfloat16() if bfloat16 else weight
    numbers = quantise(weight, kind)
    said, scale = numbers.to(torch.float64), numbers.scale.double()[:, None]
    away = (said - weight.double()).abs()
    if kind == "int8":
        assert (away <= scale * 0.5001).all()
    else:  # three bits behind the leading one, and a smallest step
        assert (away <= torch.maximum(weight.double().abs() / 16, scale / 1024) * 1.0001).all()
    assert (said[2] == 0).all()
    largest = weight.double().abs().amax(-1)
    torch.testing.assert_close(said.abs().amax(-1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [64, 192, 33])
@kinds
def test_rows_are_interleaved_where_blocks_fit(kind, columns):
    weight = torch.randn(3, columns)
    numbers = quantise(weight, kind)
    assert numbers.interleaved == (columns != 33)
    torch.testing.assert_close(numbers.to(torch.float32), weight, rtol=0.07, atol=0.05)
    torch.testing.assert_close(numbers[1:].to(torch.float32), numbers.to(torch.float32)[1:], rtol=0, atol=0)
    if numbers.interleaved:
        bytes_of = numbers.values.float() * numbers.scale[:, None]
        column = [64 * (p // 64) + 16 * (p % 4) + p % 64 // 4 for p in range(columns)]
        assert bytes_of.equal(numbers.to(torch.float32)[:, column])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_numbers_are_unpacked_exactly(kind, dtype, monkeypatch):
    """The instructions for it, followed one by one, for every number there is."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    text, kept = unpacking(KINDS[kind][0], dtype), KINDS[kind][0]
    numbers = torch.arange(256).to(torch.uint8)
    numbers = numbers[numbers.view(kept).float().isfinite()]
    numbers = torch.cat((numbers, numbers[: -len(numbers) % 4]))[torch.randperm(256)]
    words = numbers.view(torch.int32).tolist()
    for one, other in zip(words, words[1:] + words[:1], strict=True):
        wanted = torch.tensor([one, other], dtype=torch.int32).view(kept).float().view(2, 4).T
        pairs = torch.tensor(run_ptx(text, one, other)).to(torch.uint32).view(dtype).view(4, 2).float()
        assert pairs.equal(wanted), (pairs, wanted)


@pytest.mark.parametrize("wrong", [None, "numbers", "compiler"])
def test_a_kernel_that_fails_here_is_not_used(wrong, monkeypatch, capsys):
    def product(x, weight):
        if wrong == "compiler":
            raise RuntimeError("no such instruction\nmore")
        return linear_eager(x, weight) * (2 if wrong == "numbers" else 1)

    monkeypatch.setattr("tidar.model.quantised.available", lambda device: True)
    monkeypatch.setattr("tidar.model.quantised.linear", product)
    reads = kernel_reads.__wrapped__("int8", torch.device("cpu"), torch.bfloat16)
    assert reads == (wrong is None)
    said = {None: "", "numbers": "its results are wrong here\n", "compiler": "no such instruction\n"}[wrong]
    assert capsys.readouterr().err.endswith(said)


def test_steps_hold_whole_blocks():
    with pytest.raises(ValueError, match="32 columns a step"):
        linear(torch.randn(1, 128), quantise(torch.randn(4, 128), "int8"), Tiling(32, 32, 1, 4, 2))


def run_ptx(text, one, other):
    """Registers $0 to $3 after these instructions, from $4 and $5."""
    at = {"$4": one & 0xFFFFFFFF, "$5": other & 0xFFFFFFFF}

    def floats(value, kind):
        halves = torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.uint16)
        return halves.view(torch.bfloat16 if kind == "bf16x2" else torch.float16).double()

    def bits(value, kind):
        rounded = value.to(torch.bfloat16 if kind == "bf16x2" else torch.float16)
        low, high = rounded.view(torch.uint16).tolist()
        return low | high << 16

    for line in text.strip("{} \n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, to, *given = line.replace(",", " ").split()
        a, *rest = (at[word] if word in at else int(word, 16) for word in given)
        operation, *_, kind = name.split(".")
        if operation == "mov":
            at[to] = a
        elif operation == "prmt":
            whole = a | rest[0] << 32
            at[to] = sum((whole >> 8 * (rest[1] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
        elif operation == "and":
            at[to] = a & rest[0]
        elif operation == "shr":
            at[to] = a >> rest[0]
        elif operation == "lop3":
            b, c, table = rest
            at[to] = sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))
        else:
            a, b, *c = (floats(value, kind) for value in (a, *rest))
            at[to] = bits({"fma": a * b + sum(c), "add": a + b, "mul": a * b}[operation], kind)
    return [at[f"${i}"] for i in range(4)]


@given(st.integers(1, 2000), st.integers(1, 200_000), st.integers(16, 16384), st.booleans())
def test_tilings_hold_their_rows(tokens, out, inner, numbers):
    tiling = choose(tokens, out, inner, numbers, torch.device("cpu"))
    assert (tiling is None) == (tokens > 272 if numbers else tokens > 128 or (tokens > 16 and out > 8192))
    if tiling is not None:
        assert sum(tile_rows(tokens, numbers)) >= tokens
        assert tiling.split == 1 or -(-inner // tiling.columns) >= 2 * tiling.split


@kinds
@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt_neox", "gpt_bigcode"])
@torch.no_grad()
def test_kept_numbers_and_rounded_weights_are_the_same_model(arch, kind):
    ids = torch.tensor([some_prompt(9)])
    original = tiny_network(arch)
    embedding = original.lm.get_input_embeddings().weight
    rounded, numbers = (quantised(arch, kind, keep) for keep in (False, True))
    layout = prefill_layout(torch.tensor([9]), 9, 4)
    assert rounded.lm(ids).logits.equal(numbers.lm(ids).logits)
    assert rounded(ids, layout).equal(numbers(ids, layout))
    assert not rounded.lm(ids).logits.equal(original.lm(ids).logits)
    for network in (rounded, numbers):
        assert network.lm.get_input_embeddings().weight.equal(embedding)  # even where the output embedding was tied
        assert network.lm.dtype == torch.float32


@kinds
@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_fused_backbone_runs_the_same_model_on_the_numbers(arch, draft, kind):
    network = quantised(arch, kind, keep_numbers=True, draft=draft)
    put_lora_on_the_grid(network, kind)
    twin = fused.fuse(network.backbone)
    prompt, drafts = torch.tensor([some_prompt(6)]), torch.tensor([some_prompt(3, 5)])
    said = []
    for network.fused in (None, twin):
        cache = RowCache(1, 64, network.device)
        cache.reserve(6)
        network(prompt, prefill_layout(torch.tensor([6]), 6, 0), cache, fused=True)
        cache.lengths.fill_(6)
        layout = step_layout(3, (1, 3) if draft else ()).after(cache.lengths)
        cache.reserve(layout.size)
        said.append(network(drafts, layout, cache, fused=True))
    torch.testing.assert_close(said[1], said[0], atol=2e-4, rtol=2e-4)
    with torch.inference_mode():
        torch.testing.assert_close(network.head(said[0]), network.lm.get_output_embeddings()(said[0]))


@kinds
def test_the_numbers_are_in_memory_once(kind):
    network = quantised("llama", kind, keep_numbers=True, draft=False)
    attention = network.backbone.layers[0].self_attn
    before = attention.k_proj.weight.clone()
    qkv = fused.fuse(network.backbone).layers[0].qkv
    places = [stored_weight(x).values.untyped_storage().data_ptr() for x in (attention.q_proj, attention.v_proj)]
    assert places == [qkv.weight.values.untyped_storage().data_ptr()] * 2
    assert attention.k_proj.weight.equal(before)
    float32 = shapes.weight_bytes(tiny_network("llama", draft=False))
    assert shapes.weight_bytes(network) < float32 / 3
    assert shapes.weight_count(network) > float32 / 4


@kinds
@pytest.mark.parametrize("keep_numbers", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_greedy_output_is_that_of_the_quantised_model_in_both_modes(arch, keep_numbers, kind):
    network = quantised(arch, kind, keep_numbers)
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    plain = tiny_lm(arch, attn_implementation="eager")
    quantise_model(plain, kind, keep_numbers=False)
    wanted = [generate(plain, row, max_new_tokens=16)[0, row.shape[1] :].tolist() for row in rows]
    if keep_numbers:
        network.fused = fused.fuse(network.backbone)
        network.fused_from = network.state()  # or the engine would build what belongs to a CPU
    for plan in (Plan(1), Plan(4), Plan(5, outcomes=2)):
        answers = {}
        for updates in Engine(network, plan).run(PROMPTS, Limits(16), 3):
            answers.update({u.answer.row: u.answer.token_ids for u in updates})
        assert [answers[i] for i in range(len(PROMPTS))] == wanted


@kinds
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_sampled_drafts_are_scored_by_the_quantised_output_embedding(arch, kind):
    """Kept numbers and rounded weights draft alike, token for token."""
    said = []
    for keep_numbers in (True, False):
        network, answers = quantised(arch, kind, keep_numbers), {}
        network.fused_from = network.state()
        for updates in Engine(network, Plan(4, SamplingParams(temperature=0.7))).run(PROMPTS, Limits(12), 5):
            answers.update({u.answer.row: u.answer.token_ids for u in updates})
        said.append(answers)
    assert said[0] == said[1]


@kinds
def test_from_pretrained_quantises(kind, tmp_path):
    folder = tiny_folder(tmp_path)
    plain, ours = (TidarModel.from_pretrained(folder, device="cpu", dtype="float32", weights=w) for w in (None, kind))
    for name, weight in plain.hf_model.named_parameters():
        is_layer = weight.dim() == 2 and "embed" not in name
        wanted = quantise(weight, kind).to(torch.float32) if is_layer else weight
        assert ours.hf_model.get_parameter(name).equal(wanted), name
    assert _fingerprint(ours.network) != _fingerprint(plain.network)
    assert ours.generate("a", mode="ar", max_new_tokens=4, raw=True).new_tokens == 4
    with pytest.raises(TidarError, match="quantised weights is not saved"):
        ours.save_pretrained(tmp_path / "again")


def test_other_kinds_are_refused_before_anything_loads():
    for build in (TidarModel.from_pretrained, lambda name, weights: shapes.build(name, True, "cpu", None, weights)):
        with pytest.raises(TidarError, match=r"^weights is 'int4', but must be one of int8, fp8$"):
            build("random:smollm2-135m", weights="int4")


def test_quantised_weights_do_not_train():
    with pytest.raises(TidarError, match="quantised weights does not train"):
        Conversion(quantised("llama", "int8", keep_numbers=False))
