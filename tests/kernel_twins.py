"""Kernels against their eager twins over random shapes: `kernel_twins.py [ROUNDS]`.

Run with TRITON_INTERPRET=1 on a CPU, without it on a GPU (there in several processes, if ROUNDS is more than 1).
"""

import math
import random
import sys
from multiprocessing import get_context

import torch
from torch import Tensor

from tidar.kernels import attention, gated, linear, norm, paged, rotary, swiglu
from tidar.kernels.norm import LowRank
from tidar.kernels.weights import KINDS, quantise
from tidar.layout import step_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float32,)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype], f"{what}: relative error {error:.2g}"


def low_rank(parts: list[int], rank: int, dtype: torch.dtype) -> LowRank | None:
    if not rank:
        return None
    b = torch.zeros(rank * len(parts), sum(parts), device=DEVICE, dtype=dtype)
    start = 0
    for i, part in enumerate(parts):
        b[rank * i : rank * (i + 1), start : start + part] = random_tensor(rank, part, dtype=dtype)
        start += part
    return LowRank(b, sum(parts))


def one_round(chance: random.Random, dtype: torch.dtype) -> None:
    batch, length = chance.randint(1, 3), chance.randint(1, 8)
    outcomes = sorted(chance.sample(range(1, length + 1), chance.randint(0, length)))
    prefix = torch.tensor([chance.randint(0, 150) for _ in range(batch)], device=DEVICE)
    leaves = tuple(sorted((chance.randrange(length) for _ in range(chance.randint(0, 5))), reverse=True))
    layout = step_layout(length, outcomes, DEVICE, leaves, causal_blocks=chance.random() < 0.3).after(prefix)
    clean = layout.clean
    slots, kv, groups = layout.size, chance.choice((1, 2, 3)), chance.choice((1, 2, 3, 7))
    dim, capacity, split = chance.choice((64, 96, 128, 16)), 320, chance.choice((1, 2, 3, 5, 8))
    heads = rotary.Heads(
        groups * kv,
        kv,
        dim,
        random_tensor((groups + 2) * kv * dim, dtype=dtype) if chance.random() < 0.5 else None,
        *(random_tensor(2, dim, dtype=dtype) if chance.random() < 0.5 else (None, None)),
    )
    keys, values = (random_tensor(batch, kv, capacity, dim, dtype=dtype) for _ in range(2))
    tokens, rank = batch * slots, chance.choice((0, 4, 20))
    what = f"{dtype} B={batch} K={length} outcomes={outcomes} leaves={leaves} H={groups * kv}/{kv} D={dim}"
    what += f" split={split} rank={rank}"

    query = random_tensor(batch, slots, groups * kv, dim, dtype=dtype)
    scale = 1 / math.sqrt(dim)
    wanted = attention.step_attention_eager(query.double(), keys.double(), values.double(), layout, scale)
    close(attention.step_attention(query, keys, values, layout, scale), wanted, dtype, f"attention {what}")

    parts = [groups * kv * dim, kv * dim, kv * dim]
    lora = low_rank(parts, rank, dtype)
    kind = dtype if split == 1 else torch.float32
    partial = random_tensor(split, tokens, sum(parts) + 3 * rank, dtype=kind)
    cos, sin = (random_tensor(batch, slots, dim // 2, dtype=dtype).repeat(1, 1, 2) for _ in range(2))
    stores = [(keys.clone(), values.clone()) for _ in range(2)]
    turned = [
        f(partial, heads, lora, cos, sin, *store, prefix, slots, clean)
        for f, store in zip((rotary.rotate, rotary.rotate_eager), stores, strict=True)
    ]
    close(turned[0], turned[1], dtype, f"rotated queries {what}")
    for got, expected in zip(*stores, strict=True):
        close(got, expected, dtype, f"cache {what}")

    width = chance.choice((48, 576, 130, 1030))
    lora = low_rank([width], rank, dtype)
    partial = random_tensor(split, tokens, width + rank, dtype=kind)
    hidden, weight = random_tensor(tokens, width, dtype=dtype), random_tensor(width, dtype=dtype)
    bias = random_tensor(width, dtype=dtype) if chance.random() < 0.5 else None
    for given in (partial, None):
        arguments = (hidden, given, weight, 1e-5, lora, slots, clean, bias)
        for got, expected in zip(norm.add_norm(*arguments), norm.add_norm_eager(*arguments), strict=True):
            close(got, expected, dtype, f"norm {what}")

    lora = low_rank([width, width], rank, dtype)
    partial = random_tensor(split, tokens, 2 * width + 2 * rank, dtype=kind)
    got = swiglu.swiglu(partial, width, lora, slots, clean, dtype)
    close(got, swiglu.swiglu_eager(partial, width, lora, slots, clean), dtype, f"swiglu {what}")

    inner, out = chance.choice((40, 576, 1030)), chance.choice((33, 200))
    x, weight = random_tensor(tokens, inner, dtype=dtype), random_tensor(out, inner, dtype=dtype)
    columns = chance.choice((64, 128)) if dtype != torch.float32 else 32
    tiling = linear.Tiling(chance.choice((32, 64)), columns, split, 4, 2)
    wanted = linear.linear_eager(x.double(), weight.double())[0]
    close(linear.linear(x, weight, tiling).double().sum(0), wanted, dtype, f"linear {what} {tiling}")
    close(linear.linear(x, weight).double().sum(0), wanted, dtype, f"linear {what}")
    for kind in KINDS:
        numbers = quantise(weight, kind)
        wanted = linear.linear_eager(x.double(), numbers)[0]
        for tiles in (tiling._replace(columns=max(64, columns)), None):
            got = linear.linear(x, numbers, tiles, unrounded=chance.random() < 0.5)
            close(got.double().sum(0), wanted, dtype, f"{kind} linear {what} {tiles}")


def served_round(chance: random.Random, dtype: torch.dtype) -> None:
    """What vLLM's steps run: attention over pages, and the gated LoRA's sum."""
    length, page = chance.randint(2, 8), chance.choice((16, 32))
    outcomes = sorted(chance.sample(range(1, length + 1), chance.randint(1, length)))
    prefixes = [chance.randint(0, 900) for _ in range(chance.randint(1, 4))]
    layout = step_layout(length, outcomes, DEVICE).after(torch.tensor(prefixes, device=DEVICE))
    kv, groups, dim = chance.choice((1, 2, 8)), chance.choice((1, 2, 4, 7)), chance.choice((64, 96, 128))
    count, slots = len(prefixes), layout.size
    lengths = torch.tensor(prefixes, dtype=torch.int32, device=DEVICE) + slots
    most = -(-int(lengths.max()) // page)
    table = torch.randperm(count * most, device=DEVICE).view(count, most).int()
    # As vLLM keeps them: [blocks, H_kv, page, 2 x D], seen with pages before heads.
    keys, values = random_tensor(count * most, kv, page, 2 * dim, dtype=dtype).transpose(1, 2).split(dim, -1)
    query = random_tensor(count * slots, kv * groups, dim, dtype=dtype)
    starts, requests = (torch.arange(n, device=DEVICE, dtype=torch.int32) for n in (count + 1, count))
    enter, exit_ = (bound.expand(count, -1).flatten().int() for bound in (layout.enter, layout.exit))
    facts = (table, lengths, starts * slots, requests, enter, exit_, 1 / math.sqrt(dim))
    out, wanted = query.new_zeros(count * slots, kv * groups * dim), query.double().flatten(1)
    paged.paged_attention_eager(query.double(), keys.double(), values.double(), *facts, wanted)
    paged.paged_attention(query, keys, values, *facts, out, slots)
    close(out, wanted, dtype, f"paged attention {dtype} {prefixes} K={length} {outcomes} H={kv * groups}/{kv} D={dim}")

    tokens, width, rank = chance.randint(1, 80), chance.choice((33, 300, 576)), chance.choice((4, 32, 96))
    product, b = random_tensor(tokens, width + rank, dtype=dtype), random_tensor(width, rank, dtype=dtype)
    gate = (torch.rand(tokens, 1, device=DEVICE) < 0.5).to(dtype)
    expected = gated.add_gated_eager(product.double(), b.double(), gate.double())
    close(gated.add_gated(product, b, gate), expected, dtype, f"gated sum {dtype} {tokens} x {width}, rank {rank}")


def rounds(job: tuple[torch.dtype, int]) -> None:
    dtype, seed = job
    torch.manual_seed(seed)
    one_round(random.Random(seed), dtype)
    served_round(random.Random(seed), dtype)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    jobs = [(dtype, seed) for dtype in DTYPES for seed in range(count)]
    if DEVICE.type == "cuda" and count > 1:  # compiling takes longer than running
        with get_context("spawn").Pool(12) as pool:
            pool.map(rounds, jobs, chunksize=1)
    else:
        for job in jobs:
            rounds(job)
    tiles = [linear.tile_rows(t) for t in (1, 17, 72, 112, 256, 272)]
    assert tiles == [(16, 0), (32, 0), (64, 16), (128, 0), (256, 0), (256, 16)]
    print("twins agree")


if __name__ == "__main__":
    main()
