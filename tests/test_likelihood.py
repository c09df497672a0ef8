"""Monte Carlo likelihood against all masks of a small case, and against what training minimises."""

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from test_block_diffusion import MASK, K, block_logits, diffusion_network
from tidar import TidarError
from tidar.config import TidarConfig
from tidar.evaluate.likelihood import Likelihood, log_likelihood
from tidar.model.network import MASKED, Network
from tiny import CONTEXT, some_prompt, tiny_lm, tiny_network


def every_mask(count: int) -> list[tuple[float, tuple[int, ...]]]:
    """(probability, masked places) of all masks of `count` tokens: how many is uniform, and so is which."""
    return [
        (1 / count / math.comb(count, n), chosen)
        for n in range(1, count + 1)
        for chosen in combinations(range(count), n)
    ]


def block_bounds(context: list[int], continuation: list[int]) -> list[list[tuple[float, float]]]:
    """For each block, (probability, bound of -log p) of each of its masks, by forwards one at a time."""
    network, text, found = diffusion_network(), context + continuation, []
    for start in range(len(context) // K * K, len(text), K):
        tokens = text[start : start + K]
        counted = [i for i in range(len(tokens)) if start + i >= len(context)]
        bounds = []
        for probability, chosen in every_mask(len(counted)):
            masked = [counted[i] for i in chosen]
            block = [MASKED if i in masked else token for i, token in enumerate(tokens)]
            losses: Tensor = -block_logits(network, text[:start], block + [MASKED] * (K - len(block))).log_softmax(-1)
            bound = sum(float(losses[i, tokens[i]]) for i in masked) * len(counted) / len(masked)
            bounds.append((probability, bound))
        found.append(bounds)
    return found


@pytest.mark.parametrize(("context", "continuation"), [(5, 2), (4, 4), (0, 3), (2, 9), (9, 3)])
def test_it_converges_to_the_mean_over_all_masks(context, continuation):
    text = some_prompt(context + continuation)
    blocks = block_bounds(text[:context], text[context:])
    exact = -sum(p * bound for bounds in blocks for p, bound in bounds)
    variance = sum(
        sum(p * bound**2 for p, bound in bounds) - sum(p * bound for p, bound in bounds) ** 2 for bounds in blocks
    )
    samples = 4000
    got = log_likelihood(diffusion_network(), text[:context], text[context:], samples)
    assert got.samples == samples
    assert abs(got.log_likelihood - exact) < 4 * math.sqrt(variance / samples) + 1e-3
    assert got.standard_error == pytest.approx(math.sqrt(variance / samples), rel=0.15, abs=1e-4)


def test_every_draw_is_one_of_the_enumerated_ones():
    """Of one block with two tokens to guess, the value of each of its three masks."""
    text = some_prompt(7)
    values = [bound for _, bound in block_bounds(text[:5], text[5:])[0]]
    few = [log_likelihood(diffusion_network(), text[:5], text[5:], 2, seed) for seed in range(20)]
    sums = [(a + b) / 2 for a, b in product(values, values)]
    for got in few:
        assert min(abs(-got.log_likelihood - s) for s in sums) < 1e-3
    assert len({round(got.log_likelihood, 3) for got in few}) > 2


def test_a_seed_repeats_it_and_the_default_is_128_draws():
    text = some_prompt(12)
    assert log_likelihood(diffusion_network(), text[:5], text[5:]) == log_likelihood(
        diffusion_network(), text[:5], text[5:]
    )
    other = log_likelihood(diffusion_network(), text[:5], text[5:], seed=1)
    assert isinstance(other, Likelihood)
    assert other.samples == 128
    assert other != log_likelihood(diffusion_network(), text[:5], text[5:])


def test_one_token_needs_no_average():
    """Its bound is the model's own log-probability."""
    text = some_prompt(5)
    got = log_likelihood(diffusion_network(), text[:4], text[4:])
    exact = block_logits(diffusion_network(), text[:4], [MASKED] * K)[0].log_softmax(-1)[text[4]]
    assert got.log_likelihood == pytest.approx(float(exact), abs=1e-4)
    assert got.standard_error == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_meant_is_refused():
    network = diffusion_network()
    for arguments, message in (
        ((network, [1], []), "continuation is empty"),
        ((network, [1], [2], 1), "samples is 1"),
        ((network, some_prompt(CONTEXT), [2]), "context is 128"),
        ((tiny_network("llama"), [1], [2]), "for block-diffusion models"),
        ((Network(tiny_lm("llama"), config=TidarConfig(K, "paper", MASK)), [1], [2]), "for block-diffusion models"),
    ):
        with pytest.raises(TidarError, match=message):
            log_likelihood(*arguments)
    assert torch.isfinite(torch.tensor(log_likelihood(network, some_prompt(CONTEXT - 1), [2]).log_likelihood))
