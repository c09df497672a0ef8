"""Verification is exact: tokens are distributed as the AR model's processed distribution, whatever was drafted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chi_square import assert_drawn_from
from tidar.errors import TidarError
from tidar.sampling import (
    DraftProbs,
    Leaves,
    MixedParams,
    SamplingParams,
    accept_greedy,
    accept_sampled,
    draw,
    mix_trust,
    row_seeds,
    together,
    uniforms,
    verify,
)
from tiny import tiny_lm

VOCABULARY, DRAFTS, ROWS = 5, 3, 50_000


@given(st.data())
def test_greedy_keeps_drafts_while_they_are_the_argmax(data):
    size, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    token = st.integers(0, 2)
    rows = st.lists(st.lists(token, min_size=size, max_size=size), min_size=batch, max_size=batch)
    drafts, choices = data.draw(rows), data.draw(rows)
    logits = torch.nn.functional.one_hot(torch.tensor(choices), 3).float()
    verdict = accept_greedy(logits.argmax(-1), torch.tensor(drafts))
    for row in range(batch):
        accepted = 1
        while accepted < size and drafts[row][accepted] == choices[row][accepted - 1]:
            accepted += 1
        assert verdict.accepted[row] == accepted
        assert verdict.next_token[row] == choices[row][accepted - 1]


@given(st.data())
def test_a_leaf_tells_the_token_after_the_next_one(data):
    size, batch, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    token = st.integers(0, 2)

    def rows(width: int) -> Tensor:
        return torch.tensor([[data.draw(token) for _ in range(width)] for _ in range(batch)]).view(batch, width)

    drafts, choice, leaf_tokens = rows(size), rows(size + count), rows(count)
    parents = torch.tensor(sorted((data.draw(st.integers(0, size - 1)) for _ in range(count)), reverse=True))
    verdict = accept_greedy(choice, drafts, None, Leaves(leaf_tokens, parents))
    plain = accept_greedy(choice[:, :size], drafts)
    assert verdict.accepted.equal(plain.accepted)
    assert verdict.next_token.equal(plain.next_token)
    for row in range(batch):
        told = [
            int(choice[row, size + leaf])
            for leaf in range(count)
            if parents[leaf] == plain.accepted[row] - 1 and leaf_tokens[row, leaf] == plain.next_token[row]
        ]
        assert int(verdict.after[row]) == (told[0] if told else -1)


class Chain:
    """Distributions of three tokens in a row, each knowing those before it: [V], [V, V] and [V, V, V]."""

    def __init__(self, logits: list[Tensor], params: SamplingParams) -> None:
        self.first, self.second, self.third = (params.probabilities(t[None])[0] for t in logits)

    @property
    def joint(self) -> Tensor:
        return self.first[:, None, None] * self.second[:, :, None] * self.third

    def along(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, 3, V]: the three distributions where the first two tokens are a [B] and b [B]."""
        return torch.stack((self.first.expand(len(a), -1), self.second[a], self.third[a, b]), 1)


def random_logits(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn((VOCABULARY,) * n, generator=generator) for n in (1, 2, 3)]


def draw_drafts(q: Chain, noise: Tensor) -> tuple[Tensor, Tensor]:
    a = draw(q.first.expand(len(noise), -1), noise[:, 0])
    return a, draw(q.second[a], noise[:, 1])


def three_tokens(p: Chain, q: Chain, point_mass: bool = False) -> Tensor:
    """Three tokens a row [ROWS, 3]: drafts of q judged by p; what a rejection leaves open is then drawn from p."""
    noise = uniforms(row_seeds(0, torch.arange(ROWS)), torch.full((ROWS,), 7), DRAFTS + 4)
    a, b = draw_drafts(q, noise[:, DRAFTS:])
    drafts = torch.stack((torch.zeros_like(a), a, b), 1)  # the first is already part of the output, so anything will do
    draft_probs = None if point_mass else everywhere(q.along(a, b)[:, :2])
    accepted, token, _ = accept_sampled(p.along(a, b), drafts, draft_probs, noise[:, :DRAFTS])
    a = torch.where(accepted > 1, a, token)
    b = torch.where(accepted > 2, b, torch.where(accepted > 1, token, draw(p.second[a], noise[:, -2])))
    return torch.stack((a, b, torch.where(accepted > 2, token, draw(p.third[a, b], noise[:, -1]))), 1)


def everywhere(probs: Tensor) -> DraftProbs:
    """Distributions over the whole vocabulary."""
    return DraftProbs(torch.arange(probs.shape[-1]).expand(probs.shape), probs)


def count(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each tuple of tokens [B, n] occurs, [vocabulary ** n]."""
    weights = vocabulary ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * weights).sum(1).bincount(minlength=vocabulary ** tokens.shape[1])


PROCESSED = {
    "plain": SamplingParams(1.0),
    "cool": SamplingParams(0.5),
    "top-k": SamplingParams(1.3, top_k=2),
    "top-p": SamplingParams(1.0, top_p=0.7),
    "all": SamplingParams(2.0, top_k=4, top_p=0.9, min_p=0.2),
}


@pytest.mark.parametrize("drafter", ["point mass", "good", "bad", "disjoint"])
@pytest.mark.parametrize("params", PROCESSED.values(), ids=PROCESSED)
def test_sampled_output_is_distributed_as_the_model(params, drafter):
    logits, noise = random_logits(0), random_logits(1)
    p = Chain(logits, params)
    if drafter == "bad":
        q = Chain(noise, SamplingParams(1.0))
    elif drafter == "disjoint":  # all mass where p has none or, without truncation, least
        least = [torch.where(t == t.amin(-1, keepdim=True), 0.0, -math.inf) for t in (p.first, p.second, p.third)]
        q = Chain(least, SamplingParams(1.0))
    else:
        q = Chain([a + 0.3 * b for a, b in zip(logits, noise, strict=True)], params)
    tokens = three_tokens(p, q, point_mass=drafter == "point mass")
    assert_drawn_from(count(tokens, VOCABULARY), p.joint)


def test_chi_square_notices_a_verifier_that_believes_its_drafter():
    p, q = Chain(random_logits(0), SamplingParams(1.0)), Chain(random_logits(1), SamplingParams(1.0))
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(count(three_tokens(q, q), VOCABULARY), p.joint)


def test_perfect_drafts_always_stand():
    p = Chain(random_logits(0), SamplingParams(1.0))
    noise = uniforms(row_seeds(0, torch.arange(ROWS)), torch.zeros(ROWS, dtype=torch.long), DRAFTS + 2)
    a, b = draw_drafts(p, noise[:, DRAFTS:])
    probs = p.along(a, b)
    verdict = accept_sampled(probs, torch.stack((a, a, b), 1), everywhere(probs[:, :2]), noise[:, :DRAFTS])
    assert (verdict.accepted == DRAFTS).all()


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.25, 1.0, 3e4]), min_size=1, max_size=8).filter(any),
    st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_draw_never_picks_what_has_no_weight(weights, uniform):
    assert weights[draw(torch.tensor(weights), torch.tensor(uniform, dtype=torch.float64))] > 0


def test_draw_matches_the_weights():
    weights = torch.tensor([2.0, 0.0, 0.5, 7.0, 0.0, 1e-3])
    chosen = draw(weights.expand(ROWS, -1), uniforms(torch.zeros(ROWS, dtype=torch.long), torch.arange(ROWS), 1)[:, 0])
    assert_drawn_from(chosen.bincount(minlength=6), weights)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 20))
def test_uniforms_depend_on_seed_row_position_and_index_alone(seed, row, position, others):
    rows, positions = torch.arange(others) + row, torch.arange(others) * 3 + position
    batch = uniforms(row_seeds(seed, rows), positions, 4)
    assert batch.dtype == torch.float64
    assert ((batch >= 0) & (batch < 1)).all()
    alone = uniforms(row_seeds(seed, rows[-1:]), positions[-1:], 3)
    assert batch[-1:, :3].equal(alone)


@pytest.mark.parametrize("vary", ["seed", "row", "position", "index"])
def test_uniforms_are_uniform_and_independent_along(vary):
    n = ROWS
    steps, zeros = torch.arange(n), torch.zeros(n, dtype=torch.long)
    numbers = {
        "seed": lambda: torch.cat([uniforms(row_seeds(s, zeros[:1]), zeros[:1], 1)[0] for s in range(5000)]),
        "row": lambda: uniforms(row_seeds(0, steps), zeros, 1)[:, 0],
        "position": lambda: uniforms(row_seeds(0, zeros), steps, 1)[:, 0],
        "index": lambda: uniforms(row_seeds(0, zeros[:1]), zeros[:1], n)[0],
    }[vary]()
    assert len(numbers.unique()) == len(numbers)
    bins = (numbers * 20).long()
    assert_drawn_from(bins.bincount(minlength=20), torch.ones(20))
    assert_drawn_from(count(torch.stack((bins[:-1], bins[1:]), 1), 20), torch.ones(400))


@settings(max_examples=25)
@given(
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([None, 1, 7, 1000]),
    st.sampled_from([None, 0.1, 0.8, 1.0]),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_probabilities_are_those_of_generate(temperature, top_k, top_p, min_p):
    output = tiny_lm("llama").generate(
        torch.arange(8).view(2, 4),
        attention_mask=torch.ones(2, 4),
        do_sample=True,
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=top_p,
        min_p=min_p,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    params = SamplingParams(temperature, top_k, top_p, min_p)
    torch.testing.assert_close(params.probabilities(output.logits[0]), output.scores[0].softmax(-1))


def test_probabilities_do_not_depend_on_leading_dimensions():
    logits = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(0.8, top_k=5, top_p=0.9)
    probs = params.probabilities(logits)
    assert probs.shape == logits.shape
    assert probs[1, 2, 3].equal(params.probabilities(logits[1, 2, 3:])[0])


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-38, 1e-45])
def test_a_temperature_near_zero_picks_the_likeliest_token(temperature):
    logits = torch.tensor([[[9.0, 40.0, -3.0]]])
    noise = torch.full((1, 1), 0.999, dtype=torch.float64)
    verdict = verify(SamplingParams(temperature), logits, torch.zeros(1, 1, dtype=torch.long), None, noise)
    assert verdict.next_token.tolist() == [1]


def test_trust_goes_from_the_drafter_to_the_model():
    ar, diffusion = torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[2.0, 0.0]]])
    assert mix_trust(ar, diffusion, 1.0).equal(ar)
    assert mix_trust(ar, diffusion, 0.0).equal(diffusion)
    assert mix_trust(ar, diffusion, 0.25).tolist() == [[[1.5, 1.0]]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf)],
        *[("top_k", value) for value in (0, -1)],
        *[("top_p", value) for value in (0, 1.1, math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("seed", value) for value in (-1, 2**63)],
        *[("trust", value) for value in (-0.1, 1.1, math.nan)],
    ],
)
def test_impossible_parameter_is_named_in_one_line(name, value):
    with pytest.raises(TidarError, match=rf"^{name} is {value}\b.*$") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_rows_together_are_sampled_as_each_alone():
    kinds = [
        SamplingParams(),
        SamplingParams(0.7, top_k=5),
        SamplingParams(1.3, top_p=0.6),
        SamplingParams(0.7, top_k=5),
    ]
    logits = torch.randn(4, 3, 50)
    mixed = together(kinds)
    assert isinstance(mixed, MixedParams)
    assert not mixed.greedy
    probs = mixed.probabilities(logits)
    for row, params in enumerate(kinds):
        assert torch.equal(probs[row], params.probabilities(logits[row]))
    assert torch.equal(probs[0], torch.nn.functional.one_hot(logits[0].argmax(-1), 50).float())
    assert torch.equal(probs, mixed.unseeded.probabilities(logits))


def test_rows_that_agree_need_no_mixture():
    assert together([SamplingParams(seed=1), SamplingParams(top_k=3, seed=2)]) == SamplingParams()
    assert together([SamplingParams(0.5, seed=1)] * 2) == SamplingParams(0.5, seed=1)
    seeds = together([SamplingParams(0.5, seed=1), SamplingParams(0.5, seed=2)]).seed
    assert torch.equal(
        row_seeds(seeds, torch.tensor([3, 4])),
        torch.cat([row_seeds(seed, torch.tensor([row])) for seed, row in ((1, 3), (2, 4))]),
    )


def test_greedy_rows_among_sampled_ones_stay_greedy():
    """Whatever their drafts were drawn from, and whatever noise there is."""
    logits, drafts = torch.randn(200, 4, 10), torch.randint(10, (200, 4))
    drafts[:100, 1:] = logits[:100, :-1].argmax(-1)
    weights = torch.rand(200, 3, 10).softmax(-1)
    weights[::3] = torch.nn.functional.one_hot(drafts[::3, 1:], 10).float()
    mixed = together([SamplingParams()] * 199 + [SamplingParams(1.0)])
    verdict = verify(mixed, logits, drafts, everywhere(weights), torch.rand(200, 5, dtype=torch.float64))
    for got, wanted in zip(verdict, accept_greedy(logits.argmax(-1), drafts), strict=True):
        assert torch.equal(got[:199], wanted[:199])
