"""Every kernel compiles for every kind of GPU, and fits into its shared memory. That takes no GPU.

Two kinds by default: one with little shared memory, whose tensor cores multiply registers, and Hopper. CAPABILITIES in
the environment names others, as in `CAPABILITIES="80 100 120"`.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from torch import Tensor

from tidar.kernels import attention, draft, gated, judge, launch, linear, norm, paged, rotary, swiglu
from tidar.kernels.norm import LowRank
from tidar.kernels.weights import quantise
from tidar.layout import Layout, step_layout
from tidar.sampling import Leaves

pytest.importorskip("triton")
from absent_gpu import PROCESSORS, SHARED, absent_gpu

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
CAPABILITIES = [int(name) for name in os.environ.get("CAPABILITIES", "89 90").split()]
STEPS = [(1, ()), (8, (1, 2, 3)), (8, tuple(range(1, 9)))]
"""Plain decoding, a pruned step of 32 slots, and a full one of 72."""
DTYPE = torch.bfloat16


def check(compiled: dict, capability: int) -> None:
    assert compiled
    for name, kernel in compiled.items():
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= SHARED[capability], f"{name} needs {kernel.metadata.shared} bytes"


def layout_of(length: int, outcomes: tuple[int, ...]) -> Layout:
    return step_layout(length, outcomes).after(torch.tensor([1000]))


def low_rank(parts: int, rank: int, width: int, dtype: torch.dtype = DTYPE) -> LowRank:
    return LowRank(torch.empty(parts * rank, parts * width, dtype=dtype), parts * width)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [(32, 8, 128, torch.bfloat16), (9, 3, 64, torch.float16), (8, 2, 256, torch.bfloat16), (8, 8, 96, torch.float32)],
)
def test_attention(capability, heads, kv_heads, dim, dtype):
    common = dim <= 128 and dtype != torch.float32
    with absent_gpu(capability) as compiled:
        for step, capacity in [*zip(STEPS, (1024, 1024, 16384), strict=True)][:: 1 if common else 2]:
            layout = layout_of(*step)
            keys = torch.empty(1, kv_heads, capacity, dim, dtype=dtype)
            query = torch.empty(1, layout.size, heads, dim, dtype=dtype)
            attention.step_attention(query, keys, torch.empty_like(keys), layout, 1 / math.sqrt(dim))
    check(compiled, capability)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_on_hopper_attention_is_cut_as_it_was_measured(dim):
    with absent_gpu(90):
        for rows, capacity in itertools.product((4, 64, 288, 1024), (1024, 4096, 16384)):
            query = torch.empty(1, dim, dtype=DTYPE)
            best = attention._best_plan(rows, 8, capacity, 2, PROCESSORS)
            assert attention.plan_for(rows, 8, capacity, query) == best


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_products(capability, kind):
    if kind == "fp8" and capability < 89:
        pytest.skip("weights are rounded to such numbers there, see model/quantised.py")
    weight = torch.randn(1024, 4096).to(DTYPE)
    numbers = weight if kind is None else quantise(weight, kind)
    with absent_gpu(capability) as compiled:
        for tokens in (1, 72, 128) if kind is None else (1, 32, 64, 96, 128, 272):
            linear.linear(torch.empty(tokens, 4096, dtype=DTYPE), numbers)
        if kind is not None:
            linear.linear(torch.empty(1, 4096, dtype=torch.float16), numbers)
    check(compiled, capability)
    if capability == 90:  # nothing may keep tensor cores waiting for what a step loads
        for kernel in compiled.values():
            loop = kernel.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
            assert "warp_group_dot_wait" in loop
            assert "pendings = 0" not in loop
            assert "tt.load" not in loop


@pytest.mark.parametrize("kind", [None, "int8"])
def test_on_hopper_products_fill_the_gpu_at_once(kind):
    """At the shapes of Qwen3-8B, one row: what is left idle in the end costs more than how tiles are cut."""
    with absent_gpu(90):
        for out, inner in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)):
            tiling = linear.choose(1, out, inner, kind is not None, torch.device("cpu"))
            assert tiling is not None
            tile = linear.tile_bytes(tiling, 1, 2 if kind is None else 1)
            programs = -(-out // tiling.rows) * tiling.split
            at_once = PROCESSORS * launch.programs_for(torch.device("cpu"), tiling.stages, tile)
            assert 0.72 <= programs / at_once <= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rank", [0, 64])
def test_the_rest_of_a_layer(capability, rank):
    """At the shape of Qwen3-8B, with and without a LoRA of rank 64."""
    layout, width, inner = layout_of(*STEPS[1]), 4096, 12288
    slots, clean = layout.size, layout.clean
    scales = torch.empty(2, 128, dtype=DTYPE).unbind()
    heads = rotary.Heads(32, 8, 128, None, *scales, eps=1e-6)
    cos = torch.empty(1, slots, 128, dtype=DTYPE)
    hidden, keys = torch.empty(slots, width, dtype=DTYPE), torch.empty(1, 8, 1024, 128, dtype=DTYPE)

    def partial(columns: int, parts: int) -> Tensor:
        return torch.empty(1, slots, columns + parts * rank, dtype=DTYPE)

    def lora(parts: int, out: int) -> LowRank | None:
        return low_rank(parts, rank, out // parts) if rank else None

    with absent_gpu(capability) as compiled:
        qkv = 48 * 128
        rotary.rotate(partial(qkv, 3), heads, lora(3, qkv), cos, cos, keys, keys, layout.prefix, slots, clean)
        norm.add_norm(hidden, partial(width, 1), hidden[0], 1e-6, lora(1, width), slots, clean)
        norm.add_norm(hidden, None, hidden[0], 1e-6, None, slots, clean)
        swiglu.swiglu(partial(2 * inner, 2), inner, lora(2, 2 * inner), slots, clean, DTYPE)
    check(compiled, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_a_step_decides_and_drafts(capability):
    length, width, hidden, vocabulary = 8, 128, 576, 49152
    walk = draft.Walk(
        *(torch.empty(2 * width, hidden, dtype=DTYPE), torch.empty(vocabulary, 2 * width, dtype=DTYPE)),
        *(torch.empty(vocabulary, width, dtype=DTYPE), torch.empty(2 * width, width, dtype=DTYPE)),
        *(torch.empty(width, width, dtype=DTYPE), torch.empty(vocabulary, hidden, dtype=DTYPE)),
        None,
    )
    block, logits = torch.empty(1, length, hidden, dtype=DTYPE), torch.empty(1, length - 1, vocabulary)
    one = torch.ones(1, dtype=torch.long)
    leaves = Leaves(torch.zeros(1, 8, dtype=torch.long), torch.arange(8))
    anchors = torch.tensor([[0, 2, 5]])
    facts = judge.Judged(torch.zeros(1, length, dtype=torch.long), one, one, anchors, one > 0, 40, length + 8)
    with absent_gpu(capability) as compiled:
        draft.draft(walk, block, logits, one, one, 128)
        draft.draft_plain(logits, one, one)
        judge.choose_outcomes_fused(torch.rand(1, length - 1), one, 3)
        judge.decide_fused(torch.zeros(1, length + 8, dtype=torch.long), leaves, facts, length)
    check(compiled, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (8, 1, 256)])
def test_what_vllm_runs(capability, heads, kv_heads, dim):
    """As vLLM lays its tensors out: queries within a product, keys and values in one tensor."""
    layout, requests = step_layout(8, (1, 2, 3, 4)), 4
    slots = layout.size
    keys, values = torch.empty(9, kv_heads, 16, 2 * dim, dtype=DTYPE).transpose(1, 2).split(dim, -1)
    query = torch.empty(requests * slots, (heads + 2 * kv_heads) * dim, dtype=DTYPE)[:, : heads * dim]
    query = query.unflatten(1, (heads, dim))
    table, lengths = torch.zeros(requests, 65, dtype=torch.int32), torch.full((requests,), 90, dtype=torch.int32)
    starts, rows = (torch.arange(n, dtype=torch.int32) for n in (requests + 1, requests))
    enter, exit_ = (bound.expand(requests, -1).flatten().int() for bound in (layout.enter, layout.exit))
    out, facts = torch.empty(requests * slots, heads * dim, dtype=DTYPE), (table, lengths, starts * slots, rows)
    with absent_gpu(capability) as compiled:
        paged.paged_attention(query, keys, values, *facts, enter, exit_, 0.1, out, slots)
        product, b = torch.empty(40, heads * dim + 96, dtype=DTYPE), torch.empty(heads * dim, 96, dtype=DTYPE)
        gated.add_gated(product, b, torch.ones(40, 1, dtype=DTYPE))
    check(compiled, capability)
