"""Decoding is lossless: token for token generate's greedy output, and the AR distribution when sampling."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from chi_square import assert_drawn_from
from tidar import TidarModel
from tidar.config import TidarConfig
from tidar.decode.engine import Answer, Engine, Fixed, Limits
from tidar.decode.runner import Pending, Runner
from tidar.decode.step import Plan, Propose, step
from tidar.kernels.draft import ALTERNATIVES
from tidar.layout import chain_layout, prefill_layout
from tidar.model.network import Network
from tidar.model.propose import Proposal
from tidar.model.propose import propose as drafter_propose
from tidar.sampling import SamplingParams
from tiny import (
    ARCHITECTURES,
    CONTEXT,
    PROMPTS,
    VOCABULARY,
    continuations,
    generate,
    network_of,
    plain_of,
    some_prompt,
    tiny_folder,
    tiny_lm,
    tiny_network,
)

NEW = 24

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def decode(
    network: Network,
    prompts: list[list[int]],
    draft_length: int = 4,
    new: int = NEW,
    *,
    eos: int | None = None,
    propose: Propose = drafter_propose,
    batch_size: int | None = None,
    outcomes: int | None = None,
    alternatives: int = 0,
    **params,
) -> list[Answer]:
    engine = Engine(network, Plan(draft_length, SamplingParams(**params), outcomes, alternatives, propose))
    limits = Limits(new, frozenset() if eos is None else frozenset([eos]))
    answers = {u.answer.row: u.answer for updates in engine.run(prompts, limits, batch_size) for u in updates}
    return [answers[row] for row in range(len(prompts))]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def chosen(first: Tensor, after: Tensor, drafts: Tensor, vocabulary: int = VOCABULARY) -> Proposal:
    """Drafts of a proposer that is sure of them, and draws nothing; its alternatives are the tokens that follow."""
    drafts = torch.cat((first[:, None], drafts[:, 1:]), 1)
    drafts[:, 1] = torch.where(after < 0, drafts[:, 1], after)
    others = (drafts[:, 1:, None] + torch.arange(1, ALTERNATIVES + 1)) % vocabulary
    return Proposal(drafts, torch.ones(drafts[:, 1:].shape), others, None)


class Oracle:
    """Proposes what the model will say, each draft spoilt with probability `error` (of all, or of each place [K]).

    It tells its place by the states of the block's masks: they depend on the tokens up to the block's anchor alone, and
    are the same in one big training layout over all prompts with their continuations.
    """

    def __init__(self, network: Network, arch: str, draft_length: int, error: float | Tensor = 0.0) -> None:
        self.error, self.generator = error, torch.Generator().manual_seed(0)
        states, drafts = [], []
        for prompt, continuation in zip(PROMPTS, continuations(arch), strict=True):
            text = torch.tensor(prompt + continuation)
            anchors = torch.arange(len(prompt) - 1, len(text) - draft_length)
            layout = chain_layout(len(text), anchors[None], draft_length)
            blocks = network(text[None], layout)[0, layout.clean :]
            states.append(blocks.view(len(anchors), -1))
            drafts.append(text[anchors[:, None] + torch.arange(1, draft_length + 1)])
        self.states, self.drafts = torch.cat(states), torch.cat(drafts)

    def __call__(self, network, block, logits, first, after, params, noise):
        place = torch.cdist(block.flatten(1), self.states).argmin(1)
        drafts = self.drafts[place]
        spoilt = torch.rand(drafts.shape, generator=self.generator) < self.error
        drafts = torch.where(spoilt, (drafts + 1) % VOCABULARY, drafts)
        return chosen(first, after, drafts)


def guess(network, block, logits, first, after, params, noise):
    """Proposes anything."""
    vocabulary = network.lm.config.vocab_size
    return chosen(first, after, torch.randint(vocabulary, block.shape[:2]), vocabulary)


PROPOSERS: dict[str, Callable[[Network, str, int], Propose]] = {
    "drafter": lambda network, arch, draft_length: drafter_propose,
    "oracle": Oracle,
    "spoilt oracle": lambda network, arch, draft_length: Oracle(network, arch, draft_length, error=1 / 3),
    "guess": lambda network, arch, draft_length: guess,
}


@torch.no_grad()
def proposer(name: str, arch: str, draft_length: int) -> Propose:
    return PROPOSERS[name](network_of(arch), arch, draft_length)


@every_architecture
@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("draft_length", [2, 3, 5, 8])
def test_greedy_output_is_that_of_generate(arch, name, draft_length):
    """In one batch of prompts of different lengths, with draft lengths that the drafter was not made for."""
    assert network_of(arch).config.block_size not in (2, 3, 5, 8)
    answers = decode(network_of(arch), PROMPTS, draft_length, propose=proposer(name, arch, draft_length))
    assert tokens(answers) == [continuation[:NEW] for continuation in continuations(arch)]


@every_architecture
@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize(("draft_length", "outcomes"), [(2, 1), (3, 2), (5, 1), (5, 3), (8, 2)])
def test_pruned_outcomes_do_not_change_the_output(arch, name, draft_length, outcomes):
    propose = proposer(name, arch, draft_length)
    answers = decode(network_of(arch), PROMPTS, draft_length, propose=propose, outcomes=outcomes)
    assert tokens(answers) == [continuation[:NEW] for continuation in continuations(arch)]


@every_architecture
@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize(("draft_length", "outcomes", "alternatives"), [(2, 1, 1), (3, None, 2), (5, 2, 12), (8, 3, 5)])
def test_alternatives_do_not_change_the_output(arch, name, draft_length, outcomes, alternatives):
    propose = proposer(name, arch, draft_length)
    options = {"propose": propose, "outcomes": outcomes, "alternatives": alternatives}
    answers = decode(network_of(arch), PROMPTS, draft_length, **options)
    assert tokens(answers) == [continuation[:NEW] for continuation in continuations(arch)]


def test_a_leaf_that_is_hit_gains_tokens():
    """The second draft is always wrong and its alternative right: half of the steps know their second draft."""
    network, length = network_of("llama"), 5
    oracle = Oracle(network, "llama", length, error=torch.tensor([0.0, 1, 0, 0, 0]))

    def nearly(*arguments):
        proposal = oracle(*arguments)
        return proposal._replace(alternatives=(proposal.drafts[:, 1:, None] - 1) % VOCABULARY)

    without, hit = (decode(network, PROMPTS[:1], length, 21, propose=nearly, alternatives=n)[0] for n in (0, 1))
    assert tokens([hit]) == tokens([without])
    assert set(without.acceptance_lengths) == {1}
    assert hit.acceptance_lengths[:6] == [1, 5, 1, 5, 1, 5]


def test_a_pruned_outcome_is_drafted_from_the_nearest_earlier_one():
    """All drafts stand, but a proposer that doubts itself makes the step pre-draft outcome 1 alone."""
    network, length = network_of("llama"), 5
    oracle = proposer("oracle", "llama", length)

    def doubtful(*arguments):
        proposal = oracle(*arguments)
        return proposal._replace(confidence=torch.zeros_like(proposal.confidence))

    full, pruned = (decode(network, PROMPTS[:1], length, 21, propose=doubtful, outcomes=n)[0] for n in (length, 1))
    assert tokens([pruned]) == tokens([full])
    assert full.acceptance_lengths == [5, 5, 5, 5]
    # All five stand; of the block of outcome 1 only the last mask lies beyond the tokens that are known by then.
    assert pruned.acceptance_lengths[0] == 5
    assert pruned.acceptance_lengths[1] < 5


@pytest.mark.parametrize("kind", ["no sampler head", "paper"])
def test_greedy_output_is_that_of_generate_for_every_kind_of_conversion(kind):
    if kind == "paper":
        network = Network(tiny_lm("llama"), config=TidarConfig(4, "paper", mask_token_id=VOCABULARY - 1))
    else:
        network = tiny_network("llama")
        network.drafter.sampler_head = None
    assert tokens(decode(network, PROMPTS, 3)) == [continuation[:NEW] for continuation in continuations("llama")]


def test_greedy_output_is_that_of_generate_through_a_long_answer():
    answers = decode(network_of("llama"), PROMPTS, 8, 90, propose=proposer("oracle", "llama", 8))
    assert tokens(answers) == [continuation[:90] for continuation in continuations("llama")]


@settings(max_examples=25)
@given(st.data())
def test_greedy_output_does_not_depend_on_how_it_is_batched(data):
    """Any prompts in any order, with places refilled as rows end at different times."""
    rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=7))
    eos = data.draw(st.none() | st.sampled_from(continuations("llama")[0]))
    draft_length = data.draw(st.sampled_from([1, 3, 6]))
    answers = decode(
        network_of("llama"),
        [PROMPTS[row] for row in rows],
        draft_length,
        eos=eos,
        propose=proposer("spoilt oracle", "llama", draft_length),
        batch_size=data.draw(st.integers(1, 8)),
    )
    assert tokens(answers) == [until(continuations("llama")[row][:NEW], eos) for row in rows]


def until(tokens: list[int], eos: int | None) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class Late(Runner):
    """Reads tokens back `lag` steps late and compacts to powers of two, as the engine does on a GPU."""

    def __init__(self, network: Network, lag: int) -> None:
        super().__init__(network)
        self.lag = lag

    def batch_for(self, rows: int) -> int:
        return 1 << (rows - 1).bit_length()

    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        return Pending(step(self.network, self.state.first(rows, plan), plan).packed)


@settings(max_examples=25)
@given(st.data())
def test_greedy_output_does_not_depend_on_when_tokens_are_read_back(data):
    rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=7))
    eos = data.draw(st.none() | st.sampled_from(continuations("llama")[0]))
    length, lag = data.draw(st.sampled_from([1, 3, 6])), data.draw(st.integers(0, 3))
    propose, batch_size = proposer("spoilt oracle", "llama", length), data.draw(st.integers(1, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidar.decode.engine.runner_for", lambda network: Late(network, lag))
        prompts = [PROMPTS[row] for row in rows]
        late = decode(network_of("llama"), prompts, length, eos=eos, propose=propose, batch_size=batch_size)
    assert tokens(late) == [until(continuations("llama")[row][:NEW], eos) for row in rows]
    for answer in late:  # forwards that only the device had begun are not counted
        assert answer.forwards == 1 + len(answer.acceptance_lengths)
        assert answer.new_tokens == 1 + sum(answer.acceptance_lengths)
        assert 0 not in answer.acceptance_lengths


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("draft_length", [1, 3])
def test_rows_that_end_in_their_prefill_do_not_disturb_those_that_take_their_places(lag, draft_length, monkeypatch):
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: Late(network, lag))
    short = 1  # the row whose first token ends the answer
    eos = continuations("llama")[short][0]
    for many in range(1, 5):
        rows = [0, *[short] * many, 2, short, 3, 4]
        prompts = [PROMPTS[row] for row in rows]
        for new in (2, 3):
            answers = decode(network_of("llama"), prompts, draft_length, new, eos=eos, batch_size=2)
            assert tokens(answers) == [until(continuations("llama")[row][:new], eos) for row in rows]
            assert all(0 not in answer.acceptance_lengths for answer in answers)


def test_a_row_that_was_put_into_a_running_batch_can_be_stopped_at_once():
    network, plan = network_of("llama"), Plan(1)
    runner = Runner(network)
    state = runner.prepare(1, 64, plan)
    runner.set_active([False])
    runner.admit(PROMPTS[:1], [0], [0], plan)
    assert state.active.all()
    runner.set_active([False])
    assert not state.active.any()


@pytest.mark.parametrize("batch_size", [2, 3, None])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_sampled_rows_do_not_depend_on_their_batch(draft_length, batch_size):
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
    network, jobs = network_of("llama"), PROMPTS * 2
    alone = decode(network, jobs, draft_length, batch_size=1, **sampled)
    together = decode(network, jobs, draft_length, batch_size=batch_size, **sampled)
    assert tokens(together) == tokens(alone)
    assert tokens(alone)[:5] != tokens(alone)[5:]  # the same prompt in another row is another draw


def test_seed_decides_the_sample():
    runs = [tokens(decode(network_of("llama"), PROMPTS, temperature=0.8, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_finished_long_row_does_not_disturb_the_others():
    """It stays in the batch until half of its places are free, its cache fuller than the rest will ever need."""
    network, long = network_of("llama"), some_prompt(CONTEXT - 8)
    eos = decode(network, [long], new=1)[0].token_ids[0]
    answers = decode(network, [long, *PROMPTS[:2]], 8, eos=eos)
    assert tokens(answers) == [[eos], *(until(continuations("llama")[row][:NEW], eos) for row in (0, 1))]


@pytest.mark.parametrize("new", [1, 2, 7, 13])
def test_limit_inside_a_block_cuts_the_answer(new):
    answers = decode(network_of("llama"), PROMPTS, 5, new, propose=proposer("oracle", "llama", 5))
    assert tokens(answers) == [continuation[:new] for continuation in continuations("llama")]
    assert all(answer.finish_reason == "length" for answer in answers)


def test_stop_string_inside_a_block_ends_the_answer(tmp_path, monkeypatch):
    """The prefill gains token 0, the blocks tokens 1..8 and 9..16; the stop string is tokens 11 and 12."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(tmp_path))
    prompt, continuation = PROMPTS[2], continuations("llama")[2]
    model, propose = TidarModel(network_of("llama"), tokenizer), proposer("oracle", "llama", 8)
    monkeypatch.setattr(model, "plan", lambda mode, params, **options: Plan(8, params, propose=propose))
    text, stop = tokenizer.decode(continuation[:13]), tokenizer.decode(continuation[11:13])
    answer = model.generate(tokenizer.decode(prompt), raw=True, stop=["never there", stop], max_new_tokens=60)
    assert answer.token_ids == continuation[:13]
    assert answer.text == text.removesuffix(stop)
    assert answer.acceptance_lengths == [8, 4]
    assert answer.finish_reason == "stop"


@every_architecture
def test_end_of_sequence_inside_a_block_ends_the_answer(arch):
    continuation = continuations(arch)[2]
    place = next(i for i in (12, 11, 10, 13, 14, 9) if continuation.index(continuation[i]) == i)  # inside for K = 8
    eos = continuation[place]
    answer, *_ = decode(network_of(arch), PROMPTS[2:3], 8, eos=eos, propose=proposer("oracle", arch, 8))
    assert answer.finish_reason == "stop"
    assert answer.forwards == 3
    ids = torch.tensor(PROMPTS[2:3])
    wanted = generate(plain_of(arch), ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
    assert answer.token_ids == wanted[0, ids.shape[1] :].tolist() == continuation[: place + 1]


@every_architecture
def test_answer_ends_with_the_context(arch):
    """Masks and drafts stand past it on the way."""
    prompt = some_prompt(CONTEXT - 10)
    answer = decode(network_of(arch), [prompt], 8)[0]
    wanted = generate(plain_of(arch), torch.tensor([prompt]), max_new_tokens=10)[0, len(prompt) :].tolist()
    assert answer.token_ids == wanted
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("draft_length", [2, 5, 8])
def test_right_drafts_gain_a_whole_block_a_forward(draft_length):
    new = 1 + 3 * draft_length
    oracle = proposer("oracle", "qwen3", draft_length)
    for answer in decode(network_of("qwen3"), PROMPTS, draft_length, new, propose=oracle):
        assert answer.acceptance_lengths == [draft_length] * 3
        assert answer.tokens_per_forward == new / 4


@pytest.mark.parametrize("right", [1, 2, 3, 4])
@torch.no_grad()
def test_drafts_stand_up_to_the_first_wrong_one_and_the_next_ones_continue_from_there(right):
    network, wrong = network_of("gemma"), torch.arange(5) == right
    for answer in decode(network, PROMPTS, 5, propose=Oracle(network, "gemma", 5, error=wrong.float())):
        *lengths, last = answer.acceptance_lengths
        assert set(lengths) == {right}
        assert last <= right


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
def test_autoregressive_mode_gains_one_token_a_forward(params):
    for answer in decode(network_of("llama", draft=False), PROMPTS, 1, **params):
        assert answer.forwards == answer.new_tokens == NEW
        assert answer.acceptance_lengths == [1] * (NEW - 1)


@pytest.mark.parametrize("name", PROPOSERS)
def test_acceptance_lengths_add_up_to_the_answer(name):
    for answer in decode(network_of("llama"), PROMPTS, 5, propose=proposer(name, "llama", 5)):
        assert 1 + sum(answer.acceptance_lengths) == answer.new_tokens
        assert 1 + len(answer.acceptance_lengths) == answer.forwards
        assert all(1 <= length <= 5 for length in answer.acceptance_lengths)


@pytest.mark.parametrize("trust", [0.0, 0.5])
@torch.no_grad()
def test_trust_mixes_in_the_first_mask_after_the_context(trust):
    network, context = network_of("llama"), PROMPTS[0]
    wanted = []
    for _ in range(8):
        length = len(context) + len(wanted)
        states = network(torch.tensor([context + wanted]), prefill_layout(torch.tensor([length]), length, 4))
        ar, diffusion = network.head(states[0, length - 1 : length + 1])
        wanted.append(int((trust * ar + (1 - trust) * diffusion).argmax()))
    assert tokens(decode(network, [context], new=8, trust=trust)) == [wanted]


SMALL, ROWS = 11, 3000
PROCESSED = {
    "plain": {"temperature": 1.0},
    "top-k": {"temperature": 0.7, "top_k": 4},
    "top-p and min-p": {"temperature": 1.5, "top_p": 0.8, "min_p": 0.1},
}


@pytest.mark.parametrize("params", PROCESSED.values(), ids=PROCESSED)
@pytest.mark.parametrize("drafter", ["whole", "pruned", "with leaves", "no sampler head", "guess", "guess with leaves"])
def test_sampled_tokens_have_the_distribution_of_the_model(params, drafter):
    """End to end: every pair of neighbours among the first four tokens, over many rows of one prompt."""
    network, prompt = tiny_network("llama", vocabulary=SMALL, spread=0.25), [3, 1, 4]
    if drafter == "no sampler head":
        network.drafter.sampler_head = None
    options = {
        "propose": guess if "guess" in drafter else drafter_propose,
        "outcomes": 1 if drafter == "pruned" else None,
        "alternatives": 4 if "leaves" in drafter else 0,
    }
    drawn = torch.tensor(tokens(decode(network, [prompt] * ROWS, 3, 4, **options, **params)))
    joint = exact_joint(network, prompt, SamplingParams(**params), 4)
    for place in range(3):
        pairs = (drawn[:, place] * SMALL + drawn[:, place + 1]).bincount(minlength=SMALL**2)
        others = [axis for axis in range(4) if axis not in (place, place + 1)]
        assert_drawn_from(pairs, joint.sum(others))


@torch.no_grad()
def exact_joint(network: Network, prompt: list[int], params: SamplingParams, new: int) -> Tensor:
    """[V] * new: probability of every continuation of `new` tokens, from the plain model."""
    joint, texts = torch.ones(()), torch.tensor([prompt])
    for _ in range(new):
        probs = params.probabilities(network.lm(texts).logits[:, -1])
        joint = joint[..., None] * probs.view(*joint.shape, SMALL)
        texts = torch.cat((texts.repeat_interleave(SMALL, 0), torch.arange(SMALL).repeat(len(texts))[:, None]), 1)
    return joint


def test_sampling_is_exact_where_plans_change_and_leaves_are_pruned_too():
    network, prompt = tiny_network("llama", vocabulary=SMALL, spread=0.25), [3, 1, 4]
    params = SamplingParams(1.0)
    shapes = ((3, 1, 4), (6, 2, 9), (1, None, 0), (4, 1, 5), (2, 1, 2), (2, 2, 0), (6, 1, 6))
    plans = [Plan(length, params, outcomes, leaves) for length, outcomes, leaves in shapes]

    class Changing(Fixed):
        turn = 0

        def choose(self, rows, last=False):
            self.turn += 1
            return plans[self.turn % len(plans)]

    answers = {}
    for updates in Engine(network, Changing(plans[1])).run([prompt] * ROWS, Limits(4)):
        answers.update({u.answer.row: u.answer.token_ids for u in updates})
    drawn, joint = torch.tensor([answers[row] for row in range(ROWS)]), exact_joint(network, prompt, params, 4)
    for place in range(3):
        pairs = (drawn[:, place] * SMALL + drawn[:, place + 1]).bincount(minlength=SMALL**2)
        assert_drawn_from(pairs, joint.sum([axis for axis in range(4) if axis not in (place, place + 1)]))


def test_mixed_trust_has_no_leaves():
    assert Plan(4, alternatives=5).leaves
    assert not Plan(4, SamplingParams(trust=0.5), alternatives=5).leaves


def test_a_dear_prefill_waits_until_it_fills_more_places(monkeypatch):
    """Rows end one after the other; no answer changes, and every prompt has its turn."""
    prompts, admitted = [PROMPTS[i % len(PROMPTS)] for i in range(24)], list[int]()
    wanted = [continuations("llama")[i % len(PROMPTS)][:20] for i in range(24)]
    real = Runner.admit

    def admit(self, prompts, *rest):
        admitted.append(len(prompts))
        return real(self, prompts, *rest)

    monkeypatch.setattr(Runner, "admit", admit)
    prefills = []
    for cost in (0.0, 2.0):
        monkeypatch.setattr(Runner, "prefill_forwards", cost)
        admitted.clear()
        assert tokens(decode(network_of("llama"), prompts, 4, 20, batch_size=8)) == wanted
        assert admitted[0] == 8
        assert sum(admitted) == 24
        prefills.append(len(admitted))
    assert prefills[1] < prefills[0]


def test_two_threads_may_decode_with_one_network(monkeypatch):
    """A server and a demo, say; without fused layers, whose drafter is gated in the stock modules."""
    switch = sys.getswitchinterval()
    monkeypatch.setattr(Network, "build_fused", lambda self: None)
    network, plans = tiny_network("llama"), [Plan(4), Plan(6, SamplingParams(1.0, seed=3), outcomes=2)]

    def decode(plan: Plan) -> list[tuple[list[int], int]]:
        answers = {}
        for updates in Engine(network, plan).run(PROMPTS, Limits(40), 2):
            answers.update({update.answer.row: update.answer for update in updates})
        return [(answers[row].token_ids, answers[row].forwards) for row in range(len(PROMPTS))]

    alone = [decode(plan) for plan in plans]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(decode, plans)) == alone
    finally:
        sys.setswitchinterval(switch)


@pytest.mark.parametrize("trust", [1.0, 0.0])
def test_log_probabilities_are_the_ar_models_whatever_judges(trust):
    network, prompt = network_of("llama"), PROMPTS[0]
    plan = Plan(4, SamplingParams(trust=trust), logprobs=1)
    runner = Runner(network)
    runner.prepare(1, 64, plan)
    admitted = runner.admit([prompt], [0], [0], plan)
    ids, told = [*prompt, *admitted.tokens()], admitted.pieces[0].logprobs.chosen[0].tolist()[:1]
    for _ in range(6):
        pending = runner.step(plan, 1, len(ids) - 1)
        tokens = pending.get()[0].tokens
        ids, told = ids + tokens, told + pending.logprobs.chosen[0, : len(tokens)].tolist()
    with torch.no_grad():
        wanted = network.lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(ids))
    assert told == pytest.approx([float(wanted[i - 1, ids[i]]) for i in places], abs=1e-4)
