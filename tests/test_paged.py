"""The paged attention kernel, in Triton's interpreter, against its eager twin; and that twin against the dense rule."""

import os
import subprocess
import sys

import pytest
import torch

from tidar.kernels import paged
from tidar.layout import step_layout

pytest.importorskip("triton")
PAGE, DIM, KV_HEADS = 4, 16, 2
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="the test below runs here")
def test_kernel_in_the_interpreter():
    """It has to be chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def some_cache(lengths: list[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and the table of blocks that lie in random order; blocks of nobody hold NaN."""
    needed = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(needed) + 3, generator=generator)
    cache = torch.full((len(order), KV_HEADS, PAGE, 2 * DIM), torch.nan)
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for request, count in enumerate(needed):
        mine, order = order[:count], order[count:]
        table[request, :count] = mine
        cache[mine] = torch.randn(count, KV_HEADS, PAGE, 2 * DIM, generator=generator)
    keys, values = cache.transpose(1, 2).split(DIM, -1)
    return keys, values, table


@pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess above")
@pytest.mark.parametrize("outcomes", [1, 3])
@pytest.mark.parametrize("group", [1, 3])
def test_kernel_is_its_twin(outcomes, group):
    generator = torch.Generator().manual_seed(0)
    length, prefixes = 3, [0, 9, 70, 21]
    layout = step_layout(length, range(1, outcomes + 1)).after(torch.tensor(prefixes))
    counts = [layout.size] * 3 + [2]  # the last decodes plainly and is not ours
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([p + n for p, n in zip(prefixes, counts, strict=True)], dtype=torch.int32)
    keys, values, table = some_cache(lengths.tolist(), generator)
    enter, exit_ = (
        torch.cat((t[:3].flatten(), torch.zeros(2, dtype=torch.long))).int() for t in (layout.enter, layout.exit)
    )
    query = torch.randn(int(starts[-1]), KV_HEADS * group, DIM, generator=generator)
    requests = torch.tensor([2, 0, 1], dtype=torch.int32)
    out, expected = (torch.full((len(query), KV_HEADS * group * DIM), 7.0) for _ in range(2))
    given = (query, keys, values, table, lengths, starts, requests, enter, exit_, 0.3)
    paged.paged_attention_eager(*given, expected)
    paged.paged_attention(*given, out, layout.size)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (out[-2:] == 7).all()


def test_twin_follows_the_layout():
    generator = torch.Generator().manual_seed(1)
    layout = step_layout(3, range(1, 4)).after(torch.tensor([10]))
    total = 10 + layout.size
    keys, values, table = some_cache([total], generator)
    query = torch.randn(layout.size, KV_HEADS, DIM, generator=generator)
    out = torch.empty(layout.size, KV_HEADS, DIM)
    starts, one = torch.tensor([0, layout.size]), torch.zeros(1, dtype=torch.long)
    enter, exit_ = layout.enter[0].int(), layout.exit[0].int()
    paged.paged_attention_eager(query, keys, values, table, torch.tensor([total]), starts, one, enter, exit_, 0.3, out)
    k, v = (pages[table[0].long()].flatten(0, 1)[:total].transpose(0, 1) for pages in (keys, values))
    scores = (query.transpose(0, 1) @ k.transpose(1, 2) * 0.3).masked_fill(~layout.dense_mask(total)[0], -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(0, 1), atol=1e-5, rtol=1e-5)
