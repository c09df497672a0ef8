"""Block diffusion decodes what training made: against hand-worked cases and a reference without a cache."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chi_square import assert_drawn_from
from test_runner import AskNothing, Replayed
from tidar import TidarError, TidarModel
from tidar.config import TidarConfig
from tidar.decode import block_diffusion as module
from tidar.decode.block_diffusion import BlockDiffusion, GraphDenoiser
from tidar.decode.cache import RowCache
from tidar.decode.denoise import denoise, denoise_prefill
from tidar.decode.engine import Answer, Engine, Limits
from tidar.decode.step import Plan
from tidar.layout import block_causal_layout, denoise_layout, denoise_prefill_layout
from tidar.model.network import MASKED, Network
from tidar.sampling import Reveal, SamplingParams, choose_reveals, undecided
from tidar.train.convert import convert
from tiny import CONTEXT, PROMPTS, VOCABULARY, some_prompt, tiny_lm
from train_options import options

K, MASK = 4, VOCABULARY - 1
DECODERS = ("max-confidence", "left-to-right", "fixed-2", "confidence>0.9", "confidence>0.3")

every_decoder = pytest.mark.parametrize("name", DECODERS)


@cache
def diffusion_network(arch: str = "llama", block_size: int = K) -> Network:
    config = TidarConfig(block_size, "block-diffusion", MASK)
    return Network(tiny_lm(arch), config=config).eval()


def decode(
    network: Network,
    prompts: list[list[int]],
    name: str = "max-confidence",
    new: int = 13,
    eos: int | None = None,
    batch_size: int | None = None,
    **params,
) -> list[Answer]:
    engine = BlockDiffusion(network, Reveal.parse(name), SamplingParams(**params))
    limits = Limits(new, frozenset() if eos is None else frozenset([eos]))
    answers = {u.answer.row: u.answer for updates in engine.run(prompts, limits, batch_size) for u in updates}
    return [answers[row] for row in range(len(prompts))]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@torch.no_grad()
def block_logits(network: Network, text: list[int], block: list[int]) -> Tensor:
    """[K, V] of a block behind the whole tiles in `text`, by the layout of training and nothing cached."""
    size = len(block)
    ids = torch.tensor([text], dtype=torch.long)
    layout = block_causal_layout(len(text), torch.tensor([[len(text) - 1]]), size)
    return network.head(network(ids, layout, block_ids=torch.tensor([block]))[0, len(text) :])


def reference(
    network: Network, prompt: list[int], name: str, new: int, eos: int | None = None
) -> tuple[list[int], int]:
    """Greedy answer and forwards of one prompt, one forward over everything at a time, in plain Python."""
    size, reveal, forwards = network.config.block_size, Reveal.parse(name), 0
    whole = len(prompt) // size * size
    text, block = prompt[:whole], prompt[whole:]
    block = block + [MASKED] * (size - len(block))
    while True:
        logits = block_logits(network, text, block)
        logits[:, MASK] = -torch.inf
        forwards += 1
        best = logits.softmax(-1).max(-1)
        open_places = still_masked(text, block, len(prompt), new, eos)
        order = open_places if reveal.left_to_right else sorted(open_places, key=lambda i: -best.values[i])
        chosen = set(order[: reveal.count])
        if reveal.threshold is not None:
            chosen |= {i for i in open_places if best.values[i] > reveal.threshold}
        for i in chosen:
            block[i] = int(best.indices[i])
        if still_masked(text, block, len(prompt), new, eos):
            continue
        text += block
        answer = text[len(prompt) :][:new]
        if eos in answer:
            return answer[: answer.index(eos) + 1], forwards
        if len(answer) == new and MASKED not in answer:
            return answer, forwards
        block = [MASKED] * size


def still_masked(text: list[int], block: list[int], start: int, new: int, eos: int | None) -> list[int]:
    found = []
    for i, token in enumerate(block):
        place = len(text) + i
        if place >= start and token == eos:
            break
        if token == MASKED and place < start + new:
            found.append(i)
    return found


# Which masks become tokens


def test_decoders_by_hand():
    confidence = torch.tensor([[0.2, 0.95, 0.7, 0.85], [0.1, 0.2, 0.3, 0.99]])
    candidates = torch.tensor([[True, True, True, True], [True, True, True, False]])

    def chosen(name: str) -> list[list[int]]:
        rows = choose_reveals(confidence, candidates, Reveal.parse(name))
        return [row.nonzero()[:, 0].tolist() for row in rows]

    assert chosen("max-confidence") == [[1], [2]]
    assert chosen("left-to-right") == [[0], [0]]
    assert chosen("fixed-2") == [[1, 3], [1, 2]]
    assert chosen("fixed-9") == [[0, 1, 2, 3], [0, 1, 2]]
    assert chosen("confidence>0.9") == [[1], [2]]
    assert chosen("confidence>0.8") == [[1, 3], [2]]
    assert chosen("confidence>0.6") == [[1, 2, 3], [2]]


@pytest.mark.parametrize(
    "name", ["", "greedy", "fixed-0", "fixed-x", "confidence>1", "confidence>-1", "confidence>nan"]
)
def test_an_unknown_decoder_is_named(name):
    with pytest.raises(TidarError, match="decoder is"):
        Reveal.parse(name)


def test_what_is_behind_the_end_stays_masked():
    m = MASKED
    block = torch.tensor([[m, 7, m, m], [7, m, m, m], [m, m, m, m], [5, m, 7, m]])
    places = torch.arange(8, 12).expand(4, 4)
    start, limit = torch.tensor([8, 9, 8, 9]), torch.tensor([99, 99, 10, 99])
    wanted = [[True, False, False, False], [False, True, True, True], [True, True, False, False]]
    wanted.append([False, True, False, False])  # the 5 belongs to the prompt
    assert undecided(block, places, start, limit, torch.tensor([7])).tolist() == wanted


# Layouts


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.data())
def test_decoding_sees_what_training_saw(size, tiles, draw):
    """The prefill, and a forward with and without a finished tile, against the layout of a training row."""
    rows, width = len(tiles), max(1, *tiles) * size
    lengths = torch.tensor(tiles) * size
    prefill = denoise_prefill_layout(lengths, width, size)
    finished = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    steps = {False: denoise_layout(size, None, rows).after(lengths)}
    steps[True] = denoise_layout(size, finished, rows).after(lengths)
    for row, length in enumerate(lengths.tolist()):
        text = length + size
        anchors = torch.tensor([[length - 1, text - 1]])
        trained = block_causal_layout(text, anchors, size)
        mask, place = trained.dense_mask()[0, 0], trained.position[0]
        tile, before, after = slice(length, text), text + torch.arange(size), text + size + torch.arange(size)
        seen = torch.cat((torch.arange(length), before))
        own = torch.cat((torch.arange(length), width + torch.arange(size)))
        assert prefill.dense_mask()[row, 0][width:][:, own].equal(mask[before][:, seen])
        assert prefill.dense_mask()[row, 0][:length, :width].equal(
            mask[:length, :width] if length == width else _padded(mask[:length, :length], width)
        )
        assert prefill.position[row, width:].equal(place[before])
        for with_tile, layout in steps.items():
            clean = size if with_tile else 0
            got = layout.dense_mask(length + layout.size)[row, 0][clean:]
            if with_tile and finished[row]:
                keys = torch.cat((torch.arange(text), after))
                assert got.equal(mask[after][:, keys])
                assert layout.dense_mask(length + layout.size)[row, 0][:size].equal(mask[tile][:, keys])
                assert layout.position[row, size:].equal(place[after])
            else:
                assert not got[:, length : length + clean].any()
                assert got[:, [*range(length), *range(length + clean, length + layout.size)]].equal(
                    mask[before][:, seen]
                )
                assert layout.position[row, clean:].equal(place[before])


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))


# Decoding


@every_decoder
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt_neox"])
def test_greedy_decoding_is_that_of_a_reference_without_a_cache(arch, name):
    """In one batch of prompts of different lengths, the fused backbone where there is one."""
    network = diffusion_network(arch)
    wanted = [reference(network, prompt, name, 13) for prompt in PROMPTS]
    answers = decode(network, PROMPTS, name)
    assert tokens(answers) == [answer for answer, _ in wanted]
    assert [a.forwards for a in answers] == [forwards for _, forwards in wanted]
    assert {a.finish_reason for a in answers} == {"length"}


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(1, 11), st.integers(1, 14), st.sampled_from(DECODERS), st.integers(0, 9))
def test_any_block_size_prompt_and_limit(size, length, new, name, seed):
    network, prompt = diffusion_network(block_size=size), some_prompt(length, seed)
    answer, forwards = reference(network, prompt, name, new)
    (got,) = decode(network, [prompt], name, new)
    assert (got.token_ids, got.forwards) == (answer, forwards)
    assert len(answer) == new


@every_decoder
def test_an_end_of_sequence_ends_a_row(name):
    """Whatever token it is, and wherever the block has it; one in the prompt ends nothing."""
    network = diffusion_network()
    free = tokens(decode(network, PROMPTS, name))
    for eos in {answer[5] for answer in free}:
        prompts = [[*prompt, eos] for prompt in PROMPTS]
        wanted = [reference(network, prompt, name, 13, eos) for prompt in prompts]
        answers = decode(network, prompts, name, eos=eos)
        assert tokens(answers) == [answer for answer, _ in wanted]
        assert [a.forwards for a in answers] == [forwards for _, forwards in wanted]
        assert [a.finish_reason for a in answers] == ["stop" if eos in a.token_ids else "length" for a in answers]


@every_decoder
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_equals_its_rows(name, temperature):
    network = diffusion_network()
    alone = [decode(network, [PROMPTS[0]] * (row + 1), name, temperature=temperature, seed=3)[row] for row in range(3)]
    together = decode(network, [PROMPTS[0]] * 3, name, temperature=temperature, seed=3)
    two = decode(network, [PROMPTS[0]] * 3, name, temperature=temperature, seed=3, batch_size=2)
    assert tokens(together) == tokens(alone) == tokens(two)
    assert (len(set(map(tuple, tokens(together)))) == 1) == (temperature == 0)


def test_forwards_and_gains_are_counted():
    network = diffusion_network()
    for name, per_forward in (("max-confidence", 1), ("left-to-right", 1), ("fixed-2", 2), ("fixed-4", 4)):
        (answer,) = decode(network, [some_prompt(8)], name, 16)
        assert answer.forwards == 16 // per_forward
        assert answer.acceptance_lengths == [per_forward] * answer.forwards


def test_left_to_right_streams_every_token_and_text_follows():
    network = diffusion_network()
    engine = BlockDiffusion(network, Reveal.parse("left-to-right"))
    gained = [u.token_ids for updates in engine.run([some_prompt(5)], Limits(9)) for u in updates]
    assert [len(g) for g in gained] == [1] * 9
    assert [t for g in gained for t in g] == decode(network, [some_prompt(5)], "left-to-right", 9)[0].token_ids


def test_the_context_ends_the_answer():
    network = diffusion_network()
    (answer,) = decode(network, [some_prompt(CONTEXT - 3)], "fixed-2", new=50)
    assert (answer.new_tokens, answer.finish_reason) == (3, "length")


@torch.no_grad()
def test_the_first_token_is_drawn_from_the_model():
    network = diffusion_network()
    prompt, rows = some_prompt(8), 4000
    logits = block_logits(network, prompt, [MASKED] * K)[0]
    logits[MASK] = -torch.inf
    params = SamplingParams(temperature=1.5, top_k=5)
    answers = decode(network, [prompt] * rows, "left-to-right", 1, temperature=1.5, top_k=5)
    counts = torch.bincount(torch.tensor(tokens(answers))[:, 0], minlength=VOCABULARY)
    assert_drawn_from(counts, params.probabilities(logits))


@torch.no_grad()
def test_the_cache_holds_clean_tiles():
    """Keys and values after a few blocks are those of the finished text in training's layout."""
    network = diffusion_network()
    reveal, params, prompt = Reveal.parse("fixed-2"), SamplingParams(), some_prompt(6)
    state, result = denoise_prefill(network, [prompt], [0], [40], frozenset(), reveal, params)
    text = prompt[:4]
    for _ in range(9):
        if result[0, -1]:
            text += result[0, :K].tolist()
        result = denoise(network, state, reveal, params)
    length = int(state.cache.lengths)
    assert length >= 16
    fresh = RowCache(1, 64, network.device)
    layout = block_causal_layout(length, torch.empty(1, 0, dtype=torch.long), K)
    fresh.reserve(length)
    network(torch.tensor([text[:length]]), layout, fresh)
    for mine, wanted in zip((*state.cache.keys, *state.cache.values), (*fresh.keys, *fresh.values), strict=True):
        torch.testing.assert_close(mine[:, :, :length], wanted[:, :, :length], atol=1e-4, rtol=1e-4)


# What captured graphs are asked to do


class ReplayedDenoiser(GraphDenoiser):
    """A new one for each engine, as on the CPU there is none to keep."""

    def step(self, finished: bool, longest: int) -> Tensor:
        return super().step(finished, longest).clone()  # on a GPU it is read before the next replay


@pytest.fixture
def captured(monkeypatch) -> list[ReplayedDenoiser]:
    """Engines run graphs that call what they would have captured; one denoiser for all, as a network keeps it."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made: list[ReplayedDenoiser] = []

    def denoiser(network, reveal, params):
        if not made:
            made.append(ReplayedDenoiser(network, Replayed(network)))
        made[0].reveal, made[0].params = reveal, params
        return made[0]

    monkeypatch.setattr(module, "denoiser_for", denoiser)
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_forwards_decode_the_same(captured, temperature, monkeypatch):
    network, eos = diffusion_network(), 6
    asked = [(name, size) for name in DECODERS for size in (5, 2, 3)]
    got = [decode(network, PROMPTS, n, 21, eos, size, temperature=temperature, seed=1) for n, size in asked]
    monkeypatch.undo()
    wanted = [decode(network, PROMPTS, n, 21, eos, size, temperature=temperature, seed=1) for n, size in asked]
    assert [tokens(g) for g in got] == [tokens(w) for w in wanted]
    assert [[a.forwards for a in g] for g in got] == [[a.forwards for a in w] for w in wanted]
    lengths = {len(answer) for answer in tokens(wanted[0])}
    assert len(lengths) > 1  # rows end at different times, so some stay in the batch without moving
    made = captured[0].recorder.made
    # Batches of five, two and one, and of three: with a tile to finish and without, for every decoder.
    assert len(made) <= 2 * 4 * len(DECODERS)


def test_other_ends_and_longer_answers_make_a_new_state(captured):
    network = diffusion_network()
    for new, eos in ((5, None), (5, 40), (60, 40), (5, 40)):
        answers = decode(network, PROMPTS[:2], new=new, eos=eos)
        assert tokens(answers) == [reference(network, p, "max-confidence", new, eos)[0] for p in PROMPTS[:2]]
    assert captured[0].held is not None


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_forward_asks_the_device_nothing(finished, temperature, fused):
    network = diffusion_network()
    reveal, params = Reveal.parse("confidence>0.3"), SamplingParams(temperature=temperature)
    state, _ = denoise_prefill(network, PROMPTS, range(5), [20] * 5, frozenset([3]), reveal, params)
    network.fused, before = (network.fused if fused else None), network.fused
    try:
        with AskNothing():
            denoise(network, state, reveal, params, finished)
    finally:
        network.fused = before


# What users reach


def test_a_trained_folder_decodes_through_the_api(folder, data, tmp_path):
    convert(options(folder, data, tmp_path, objective="block-diffusion", learning_rate=2e-3, steps=40))
    model = TidarModel.from_pretrained(str(tmp_path / "out"), device="cpu", dtype="float32")
    answers = {}
    for name in (None, *DECODERS):
        options_ = {"mode": "block-diffusion", "decoder": name, "max_new_tokens": 12}
        answers[name] = model.generate(["say b", "say 1"], **options_)
        assert all(a.new_tokens == 12 or a.finish_reason == "stop" for a in answers[name])
        assert all(a.text for a in answers[name])
    assert tokens(answers[None]) == tokens(answers["max-confidence"])
    assert sum(a.forwards for a in answers["fixed-2"]) < sum(a.forwards for a in answers["left-to-right"])
    text = "".join(update.text for update in model.stream("say b", mode="block-diffusion", max_new_tokens=12))
    assert text == answers[None][0].text
    stop = text[3:5]
    assert (
        model.generate("say b", mode="block-diffusion", max_new_tokens=12, stop=[stop]).text == text[: text.find(stop)]
    )
    for bad, message in (
        ({"decoder": "best"}, "decoder is 'best'"),
        ({"draft_length": 4}, "draft length, outcomes, alternatives, plan"),
        ({"plan": "fixed"}, "draft length, outcomes, alternatives, plan"),
        ({"outcomes": 0}, "draft length, outcomes, alternatives, plan"),
        ({"trust": 0.5}, "trust below 1"),
    ):
        with pytest.raises(TidarError, match=message):
            model.generate("say b", **{"mode": "block-diffusion", **bad})


def test_other_models_are_refused():
    network = Network(tiny_lm("llama"), config=TidarConfig(K, "paper", MASK))
    with pytest.raises(TidarError, match="this is none"):
        BlockDiffusion(network, Reveal())
    with pytest.raises(TidarError, match="mode 'block-diffusion'"):
        Engine(diffusion_network(), Plan(1))
    with pytest.raises(TidarError, match="option of 'block-diffusion'"):
        TidarModel(network, object()).check(decoder="fixed-2")
