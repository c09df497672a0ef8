import json
import time
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from tidar import TidarModel
from tidar.decode.record import gather
from tidar.decode.step import Plan, prefill
from tidar.decode.trace import draw
from tidar.layout import prefill_layout, step_layout
from tidar.model.propose import propose
from tiny import drafting_folder

PROMPT = "three bags"
OPTIONS = [
    {"draft_length": 4},
    {"draft_length": 6, "outcomes": 2, "alternatives": 5},
    {"draft_length": 4, "temperature": 0.9, "top_k": 20, "seed": 3},
    {"draft_length": 4, "temperature": 0.9, "alternatives": 4},
    {"draft_length": 4, "trust": 0.5},
    {"mode": "ar"},
    {},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drafting_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain_model(folder):
    return TidarModel.from_pretrained(folder, device="cpu", dtype="float32")


class Knowing:
    """The drafter, but two greedy drafts of three are what the model will say: a random one is never right."""

    def __init__(self, answer):
        self.answer, self.place = answer, 0

    def __call__(self, network, block, logits, first, after, params, noise):
        proposal = propose(network, block, logits, first, after, params, noise)
        if len(first) > 1 or not params.greedy or first.item() not in self.answer[self.place :]:
            return proposal
        self.place = self.answer.index(first.item(), self.place)
        for i, token in enumerate(self.answer[self.place + 1 : self.place + block.shape[1]], 1):
            if (self.place + i) % 3:
                proposal.drafts[0, i] = token
        return proposal


@pytest.fixture
def model(plain_model, monkeypatch):
    """A model some of whose drafts stand."""
    answer = plain_model.generate(PROMPT, mode="ar", max_new_tokens=40).token_ids

    def plan(*arguments, **options):
        return Plan(*arguments, **options, propose=Knowing(answer))

    monkeypatch.setattr("tidar.api.Plan", plan)
    return plain_model


def traced(model, **options):
    return gather(model.trace(PROMPT, max_new_tokens=24, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trace_has_the_engines_own_numbers(model, options):
    if not options:  # auto: what is learned and measured differs from run to run, tokens do not
        assert traced(model)["token_ids"] == model.generate(PROMPT, max_new_tokens=24).token_ids
        return
    answer, run = model.generate(PROMPT, max_new_tokens=24, **options), traced(model, **options)
    assert (run["token_ids"], run["forwards"], run["acceptance_lengths"], run["text"], run["finish_reason"]) == (
        answer.token_ids,
        answer.forwards,
        answer.acceptance_lengths,
        answer.text,
        answer.finish_reason,
    )
    steps = run["steps"]
    assert len(steps) == answer.forwards
    assert [len(step["tokens"]) for step in steps[1:]] == answer.acceptance_lengths
    assert [token["id"] for step in steps for token in step["tokens"]] == answer.token_ids
    assert "".join(token["piece"] for step in steps for token in step["tokens"]) == answer.text
    assert run["tokens_per_forward"] == answer.tokens_per_forward


@pytest.mark.parametrize("options", [o for o in OPTIONS if o and "mode" not in o], ids=str)
def test_steps_fit_together(model, options):
    steps = traced(model, **options)["steps"]
    seen = {draft["verdict"] for step in steps for draft in step["drafts"]}
    assert {"known", "fell"} <= seen
    assert "stood" in seen or "temperature" in options or "trust" in options
    for before, step in pairwise(steps):
        chosen = [outcome for outcome in before["outcomes"] if outcome["chosen"]]
        drafts = [draft["id"] for draft in step["drafts"] if draft["verdict"] != "none"]
        assert drafts[0] == before["next"]["id"]
        if chosen:
            assert [guess["id"] for guess in chosen[0]["tokens"]] == drafts
            assert chosen[0]["accepted"] <= before["accepted"]
        assert step["prefix"] == before["prefix"] + (before["accepted"] or len(PROMPT) + 2)
        gained = [draft["id"] for draft in step["drafts"][1 : step["accepted"]]] + [step["next"]["id"]]
        assert [token["id"] for token in step["tokens"]] == gained[: len(step["tokens"])]
        verdicts = [draft["verdict"] for draft in step["drafts"]]
        fell = step["next"]["source"] == "correction"
        assert verdicts.count("fell") == fell
        assert all(v in ("known", "stood") for v in verdicts[: step["accepted"]])
        assert 0 < step["at"] - before["at"] == pytest.approx(step["seconds"])
        assert sum(leaf["hit"] for leaf in step["leaves"]) <= 1
        assert all(outcome["tokens"] for outcome in step["outcomes"])


def test_probabilities_are_those_of_the_plain_model(model, folder):
    run = traced(model, draft_length=4, alternatives=4)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = [token["id"] for token in run["prompt"]]
    logits = plain(torch.tensor([ids + run["token_ids"]])).logits[0, len(ids) - 1 : -1]
    wanted = logits.softmax(-1).gather(1, torch.tensor(run["token_ids"])[:, None])[:, 0]
    told = [token["ar"] for step in run["steps"] for token in step["tokens"]]
    assert told == pytest.approx(wanted.tolist(), abs=1e-4)


def test_sampled_drafts_stand_as_likely_as_the_verifier_says(model):
    steps = traced(model, draft_length=4, temperature=0.9)["steps"]
    odds = [d["odds"] for step in steps for d in step["drafts"][1:] if d["verdict"] != "none"]
    assert all(0 <= p <= 1 for p in odds)
    assert min(odds) < max(odds)


def test_a_block_that_was_thrown_away_holds_what_it_would_have_drafted(model):
    run, plan = traced(model, draft_length=4), Plan(4)
    text = [token["id"] for token in run["prompt"]]
    checked = 0
    for step in run["steps"]:
        text_before = text + [draft["id"] for draft in step["drafts"][:1]]
        for outcome in (o for o in step["outcomes"] if not o["chosen"]):
            prefix = text_before + [draft["id"] for draft in step["drafts"][1 : outcome["accepted"]]]
            state = prefill(model.network, [prefix], [0], plan)
            assert [guess["id"] for guess in outcome["tokens"]] == state.drafts[0].tolist()
            sure = [guess["confidence"] for guess in outcome["tokens"][1:]]
            assert sure == pytest.approx(state.confidence[0].tolist(), abs=1e-4)
            checked += 1
        text = text_before + [draft["id"] for draft in step["drafts"][1 : step["accepted"]]]
    assert checked > 10


@pytest.mark.parametrize("prefix", [0, 5])
def test_a_picture_is_the_layouts_own_mask(prefix):
    layout = step_layout(3, [1, 3], leaves=(1, 0)).after(torch.tensor([prefix]))
    picture = draw(layout, 0, 2)
    mask = layout.dense_mask(prefix + layout.size)[0, 0]
    seen = torch.zeros_like(mask[:, prefix:])
    for row, ranges in enumerate(picture.sees):
        for first, end in ranges:
            seen[row, first:end] = True
    assert torch.equal(seen, mask[:, prefix:])
    assert all(picture.sees_prefix)
    assert picture.depth == layout.depth[0].tolist()
    assert picture.kinds == ["draft"] * 3 + ["leaf"] * 2 + ["mask"] * 6
    assert picture.blocks == [-1] * 5 + [0] * 3 + [1] * 3


def test_padding_of_a_prompt_is_drawn_as_what_it_is():
    picture = draw(prefill_layout(torch.tensor([2]), 4, 3), 2, 0)
    assert picture.kinds == ["prompt"] * 2 + ["padding"] * 2 + ["mask"] * 3
    assert picture.sees[4] == [(0, 2), (4, 7)]


def test_tracing_takes_no_time_of_the_run(model):
    events = model.trace(PROMPT, max_new_tokens=8, draft_length=4)
    step = None
    for event in events:
        if event.event == "step":
            step = event
            time.sleep(0.2)
    assert step.at < 0.2 * step.index


def test_stop_strings_cut_the_pieces_too(model):
    whole = model.generate(PROMPT, max_new_tokens=24, draft_length=4).text
    stop = whole[6:8]
    run = gather(model.trace(PROMPT, max_new_tokens=24, draft_length=4, stop=[stop]))
    assert "".join(t["piece"] for step in run["steps"] for t in step["tokens"]) == run["text"] == whole.split(stop)[0]


def test_json_and_page(run, folder, tmp_path):
    evil = "</script><script>document.title='broken'</script><!--"
    common = ("trace", evil, "--model", folder, "--dtype", "float32", "--max-new-tokens", 6, "--draft-length", 3)
    code, out, _ = run(*common, "--json")
    document = json.loads(out)
    assert code == 0
    assert [r["mode"] for r in document["runs"]] == ["tidar", "ar"]
    assert document["runs"][0]["token_ids"] == document["runs"][1]["token_ids"]
    assert document["settings"]["draft_length"] == 3
    assert document["prompt"] == evil
    code, out, err = run(*common, "-o", tmp_path / "t.html", "--no-race")
    page = (tmp_path / "t.html").read_text()
    assert (code, out) == (0, "")
    assert "tokens in" in err
    assert page.count("</script>") == 2 == page.count("<script")
    data = page.split('id="trace">')[1].split("</script>")[0]
    assert json.loads(data)["prompt"] == evil
    assert "src=" not in page
    assert 'href="data:,"' in page
    assert page.count("href=") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mode", "block-diffusion"], "no drafts to trace"),
        (["--mode", "fast"], "mode is 'fast'"),
        (["-o", "/proc/no/trace.html"], "cannot write"),
        (["-o", "."], "it is a folder"),
        (["--draft-length", "0"], "draft length is 0"),
    ],
)
def test_bad_input_is_one_line(run, folder, more, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("trace", "hi", "--model", folder, "--device", "cpu", *more)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_an_empty_prompt_is_refused(run):
    assert run("trace", "  ") == (2, "", "tidar: the prompt is empty\n")
