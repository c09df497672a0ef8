"""`tidar compare`: statistics that call no noise a win, methods that say what they did, reports without surprises."""

import importlib.util
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tidar import TidarError, TidarModel
from tidar.cli.compare import read_set
from tidar.config import TidarConfig
from tidar.evaluate.analysis import analyse
from tidar.evaluate.compare import VERSION, compare
from tidar.evaluate.gsm8k import GRADERS
from tidar.evaluate.items import Item
from tidar.evaluate.methods import KINDS, Method, Models, Reply, Settings, parse_method, prepare, read_methods
from tidar.evaluate.report import to_html, to_markdown
from tidar.evaluate.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_p,
    ratio_interval,
    relative_interval,
    share_interval,
    verdict,
)
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.train.convert import convert
from tiny import tiny_folder
from train_options import options

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> & | `x`\n# no heading"


# Statistics


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), max_size=8))
def test_sign_flips_are_all_tried(differences):
    nonzero = [d for d in differences if d]
    sums = [sum(s * d for s, d in zip(signs, nonzero, strict=True)) for signs in product((1, -1), repeat=len(nonzero))]
    exact = sum(abs(s) >= abs(sum(nonzero)) - 1e-9 for s in sums) / len(sums)
    assert paired_p(differences) == pytest.approx(exact)


def test_many_differences_are_flipped_at_random():
    assert paired_p([1.0] * 40) < 1e-4
    assert paired_p([1.0, -1.0] * 20) == 1.0
    # McNemar's exact test of 15 against 5: 2 * P(Binomial(20, 1/2) >= 15).
    exact = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert paired_p([1.0] * 15 + [-1.0] * 5 + [0.0] * 30) == pytest.approx(exact, abs=0.005)


def test_noise_is_rarely_called_a_difference():
    """200 experiments of nothing at 5%: the test and the interval agree in few of them."""
    rng, called = random.Random(0), 0
    for _ in range(200):
        noise = [rng.gauss(0, 1) for _ in range(20)]
        called += verdict(mean_interval(noise), 0.0, paired_p(noise, draws=500)) != "not shown"
    assert called < 20


def test_a_difference_that_is_there_is_found():
    rng = random.Random(0)
    better = [rng.gauss(1, 1) for _ in range(30)]
    assert verdict(mean_interval(better), 0.0, paired_p(better)) == "better"
    assert verdict(mean_interval([-x for x in better]), 0.0, paired_p(better)) == "worse"
    assert verdict(mean_interval(better), 0.0, 0.2) == "not shown"
    assert verdict(Interval(1.0, -0.1, 2.0), 0.0, 0.001) == "not shown"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_hold_what_they_should():
    got = ratio_interval([2, 4, 6], [1, 2, 3])
    assert got == Interval(2.0, 2.0, 2.0)
    wide = ratio_interval([1, 9, 1, 9], [1, 1, 1, 1])
    assert wide.value == 5
    assert wide.low < 3
    assert wide.high > 7
    same = relative_interval([1, 9, 1, 9], [1, 2, 3, 4], ([1, 9, 1, 9], [1, 2, 3, 4]))
    assert same == Interval(1.0, 1.0, 1.0)  # paired: what both share is no uncertainty
    wrong = share_interval([False] * 10)
    assert (wrong.value, wrong.low) == (0.0, 0.0)
    assert wrong.high == pytest.approx(0.2775, abs=1e-3)


# Grading


@pytest.mark.parametrize(
    ("text", "flexible", "strict", "verified"),
    [
        ("He has 1,000. The answer is 1,000.", True, True, True),
        ("first 5, so $1,000", True, False, True),
        ("#### 1000", True, False, True),
        ("The answer is 1000.00.", False, False, True),
        ("The answer is 100.", False, False, False),
        ("The answer is 1000. No, 7.", False, True, True),
        ("no idea", False, False, False),
        ("", False, False, False),
    ],
)
def test_answers_are_graded_as_the_task_gsm8k_grades_them(text, flexible, strict, verified):
    pytest.importorskip("lm_eval")
    item = Item("", "1", "all", "q", gold="1,000")
    assert [grade(item, text) for grade in GRADERS.values()] == [flexible, strict, verified]
    assert [grade(Item("", "1", "all", "q"), text) for grade in GRADERS.values()] == [None] * 3


# Methods


def test_methods_are_read():
    assert parse_method("tidar") == Method("tidar", "tidar")
    assert parse_method("tidar:K=8,trust=0.5") == Method(
        "tidar K=8,trust=0.5", "tidar", None, {"K": "8", "trust": "0.5"}
    )
    assert parse_method("tidar:some/dir:K=4") == Method("tidar dir K=4", "tidar", "some/dir", {"K": "4"})
    assert parse_method("ar:some/dir", "tuned") == Method("tuned", "ar", "some/dir")
    assert parse_method("block-diffusion:dir") == Method(
        "block-diffusion dir max-confidence", "block-diffusion", "dir", {"decoder": "max-confidence"}
    )
    assert parse_method("block-diffusion:dir:confidence>0.9").options == {"decoder": "confidence>0.9"}
    assert parse_method("assisted:draft:K=3") == Method("assisted draft K=3", "assisted", "draft", {"K": "3"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "'magic' is no method; there are tidar, ar"),
        ("assisted", r"names no folder: write assisted:DRAFTMODEL\[:K=..\]"),
        ("block-diffusion", r"names no folder: write block-diffusion:MODEL\[:DECODER\]"),
        ("block-diffusion:dir:best", "decoder is 'best'"),
        ("tidar:a:b", r"is not tidar\[:MODEL\]\[:K=..,outcomes=..,alternatives=..,trust=..,plan=..\]"),
        ("tidar:a:J=3", "'J=3' is no option of 'tidar'"),
        ("tidar:K=x", "K is 'x', but must be a whole number"),
        ("tidar:trust=high", "trust is 'high', but must be a number"),
        ("ar:K=3", "its options: none"),
        ("ar:", r"is not ar\[:MODEL\]"),
    ],
)
def test_methods_that_cannot_be_meant_are_named(text, message):
    with pytest.raises(TidarError, match=message) as error:
        parse_method(text)
    assert "\n" not in str(error.value)


def test_a_methods_file(tmp_path):
    file = tmp_path / "methods.yaml"
    file.write_text(yaml.safe_dump({"methods": ["ar", {"name": "fast", "method": "tidar:K=4"}]}))
    assert read_methods(file) == [Method("ar", "ar"), Method("fast", "tidar", None, {"K": "4"})]
    for content, message in (
        ("methods: []", "holds no list of methods"),
        ("- {name: x}", "method 1: must be a text"),
        ("- ar\n- magic", "method 2: method 'magic'"),
        ("- {method: ar, color: red}", "method 1: must be a text"),
        ("a: [", "cannot read"),
    ):
        file.write_text(content)
        with pytest.raises(TidarError, match=message):
            read_methods(file)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a model with a drafter, a smaller draft model, one trained as block diffusion, one of the paper's."""
    path = tmp_path_factory.mktemp("models")
    lossless = TidarModel.from_pretrained(tiny_folder(path / "base", mask_token=True), device="cpu")
    drafter = Drafter(lossless.hf_model, DrafterSpec(rank=4, sampler_width=8))
    drafter.save(path / "base" / "drafter", str(path / "base"), TidarConfig(block_size=4))
    tiny_folder(path / "draft", mask_token=True)
    tiny_folder(path / "other")
    for objective in ("block-diffusion", "paper"):
        model = TidarModel.from_pretrained(str(path / "draft"), device="cpu")
        model.network.config = TidarConfig(4, objective, 258)
        model.save_pretrained(path / objective)
    return path


METHODS = (
    "ar",
    "tidar:K=4",
    "tidar:K=4,trust=0.5",
    "tidar:{m}/paper:K=3,trust=0",
    "transformers",
    "prompt-lookup:K=3",
    "assisted:{m}/draft:K=3",
    "block-diffusion:{m}/block-diffusion:fixed-2",
    "block-diffusion:{m}/block-diffusion:confidence>0.9",
)
ITEMS = [
    Item("f, line 1", "1", "math", "how many?", gold="7"),
    Item("f, line 2", "2", "talk", [{"role": "user", "content": "say"}]),
]


@pytest.fixture(scope="module")
def result(models):
    settings = Settings(str(models / "base"), max_new_tokens=12, device="cpu", dtype="float32")
    methods = [parse_method(text.format(m=models)) for text in METHODS]

    def known(item, text):
        return None if item.gold is None else text == item.gold

    *_, last = compare(methods, ITEMS, settings, passes=2, grade=known)
    return last


def test_every_method_answers_and_says_what_it_took(result):
    assert len(result["runs"]) == len(METHODS)
    for name, run in result["runs"].items():
        for record in run:
            assert record["new_tokens"] == len(record["token_ids"]) == 12
            assert record["forwards"] == len(record["gains"])
            assert len(record["seconds"]) == 2
            assert min(record["seconds"]) > 0
            assert sum(record["gains"]) >= 12, name
        assert [record["correct"] for record in run] == [False, None]
    runs = result["runs"]
    for name in ("tidar K=4", "transformers", "prompt-lookup K=3", "assisted draft K=3"):
        assert [r["token_ids"] for r in runs[name]] == [r["token_ids"] for r in runs["ar"]], name
    assert all(r["forwards"] == 12 for r in runs["ar"] + runs["transformers"])
    # The draft model has the same weights, so everything that it says stands: 3 drafts and a bonus a forward.
    assert all(r["forwards"] == 3 for r in runs["assisted draft K=3"])
    # The prompts end one and three tokens before a block does: 1 + 2 + 2 + 2 forwards, and 2 + 2 + 2 + 1.
    assert [r["forwards"] for r in runs["block-diffusion block-diffusion fixed-2"]] == [7, 7]
    facts = {m["name"]: m for m in result["methods"]}
    assert facts["assisted draft K=3"]["draft_model"].endswith("draft")
    assert facts["tidar paper K=3,trust=0"]["objective"] == "paper"
    assert [facts[n]["K"] for n in ("ar", "tidar K=4", "transformers", "prompt-lookup K=3")] == [None, 4, None, 3]
    assert facts["tidar K=4,trust=0.5"]["trust"] == 0.5
    assert {"template": "chat", "temperature": 0.0, "dtype": "float32", "batch": 1}.items() <= result[
        "conditions"
    ].items()


def test_prompts_that_a_method_cannot_take_are_named_before_anything_runs(models):
    settings = Settings(str(models / "base"), device="cpu")
    for text, items, message in (
        ("ar:{m}/block-diffusion", ITEMS, "block-diffusion model"),
        ("block-diffusion:{m}/base", ITEMS, "this is none"),
        ("tidar:{m}/other", ITEMS, "no drafter"),
        ("assisted:{m}/other", ITEMS, "draft model's vocabulary has 258 tokens, the model's has 259"),
        ("assisted:{m}/base", ITEMS, "the draft model is the model itself"),
        ("tidar:trust=2", ITEMS, "trust is 2.0, but must be in"),
        ("ar", [Item("f, line 9", "9", "all", "x" * 200)], "f, line 9: the prompt has 202 tokens"),
    ):
        with pytest.raises(TidarError, match=message):
            next(compare([parse_method(text.format(m=models))], items, settings))
    with pytest.raises(TidarError, match="two methods are called 'ar'"):
        next(compare([parse_method("ar"), parse_method("ar")], ITEMS, settings))


def test_sampling_methods_draw(models):
    settings = Settings(str(models / "base"), 12, temperature=1.0, seed=1, device="cpu", dtype="float32")
    for text in ("ar", "transformers", "assisted:{m}/draft"):
        contestant = prepare(parse_method(text.format(m=models)), Models(settings))
        other = prepare(parse_method(text.format(m=models)), Models(settings))
        assert contestant("hi", 1).token_ids == other("hi", 1).token_ids != other("hi", 2).token_ids


# Reports


def evaluated(task: str) -> dict:
    """A result of `tidar evaluate`, as much of it as a report shows."""
    scores = {"acc": {"value": 0.25, "standard_error": 0.01}}
    conditions = {"template": "none", "dtype": "float32", "device": "a processor", "commit": None, "decoding": None}
    return {"conditions": conditions, "tasks": {task: {"score": "acc", "scores": scores, "items": 100}}}


def made(prompts=24, speeds=(1.0, 2.0, 1.02), right=(0.5, 0.5, 0.5), names=("ar", "fast <b>", "like ar")):
    """A result as `compare` writes it, made up: prompts vary tenfold in speed, methods by `speeds` and little else."""
    rng = random.Random(1)
    lengths, luck = [rng.randint(20, 99) for _ in range(prompts)], [rng.random() for _ in range(prompts)]
    paces = [rng.uniform(10, 100) for _ in range(prompts)]
    facts = {"model": "m", "draft_model": None, "draft_parameters": None, "objective": "lossless", "engine": "tidar"}
    facts |= {"block_attention": "bidirectional", "parameters": 134_515_008, "dtype": "float32", "options": {}}
    kinds = [("ar", None, None), ("tidar", 8, 1.0), ("tidar", 8, 0.5)]
    return {
        "version": VERSION,
        "conditions": {
            "template": "chat",
            "device": "a CPU",
            "dtype": "float32",
            "threads": 2,
            "temperature": 0,
            "max_new_tokens": 99,
            "batch": 1,
            "passes": 1,
            "commit": "abc1234",
            "date": "2026-01-01",
        },
        "model": HOSTILE,
        "methods": [
            {**facts, "name": name, "kind": kind, "K": k, "trust": trust}
            for name, (kind, k, trust) in zip(names, kinds, strict=True)
        ],
        "items": [
            {"place": "f", "name": str(i), "category": "ab"[i % 2], "prompt": HOSTILE, "gold": "7"}
            for i in range(prompts)
        ],
        "runs": {
            name: [
                {
                    "text": HOSTILE,
                    "token_ids": [1, 2],
                    "new_tokens": n,
                    "forwards": n // (1 + index),
                    "gains": [1 + index] * (n // (1 + index)),
                    "seconds": [n / pace / speed * rng.uniform(0.9, 1.1)],
                    "correct": lucky < share,
                }
                for n, pace, lucky in zip(lengths, paces, luck, strict=True)
            ]
            for index, (name, speed, share) in enumerate(zip(names, speeds, right, strict=True))
        },
    }


def test_only_what_is_shown_is_called_better():
    rows = {row.name: row for row in analyse(made(speeds=(1.0, 2.0, 0.5))).rows}
    assert rows["ar"].faster is None
    assert [rows[n].faster.shown for n in ("fast <b>", "like ar")] == ["better", "worse"]
    assert rows["fast <b>"].faster.effect.value == pytest.approx(2, rel=0.1)
    assert rows["fast <b>"].righter.shown == "not shown"
    analysis = analyse(made())
    assert {r.name: r.faster.shown for r in analysis.rows[1:]} == {"fast <b>": "better", "like ar": "not shown"}
    assert "no difference in speed shown" in analysis.findings[1]
    assert analysis.findings[2:] == ["No difference in quality from ar is shown for any method."]
    better = analyse(made(right=(0.2, 0.9, 0.2)))
    assert better.rows[1].righter.shown == "better"
    assert "more right answers" in better.findings[0]
    assert "no difference in quality shown" in better.findings[1]
    assert len(better.findings) == 2
    assert better.rows[1].righter.effect.value == pytest.approx(0.7, abs=0.15)


def test_few_prompts_never_show_anything():
    analysis = analyse(made(prompts=5, speeds=(1.0, 50.0, 0.01)))
    assert {row.faster.shown for row in analysis.rows[1:]} == {"not shown"}
    enough = analyse(made(prompts=7, speeds=(1.0, 50.0, 0.01)))
    assert [row.faster.shown for row in enough.rows[1:]] == ["better", "worse"]
    assert not any("no difference can be shown" in text for text in enough.limits)
    assert any("With 5 prompts and 2 methods beside the baseline no difference" in text for text in analysis.limits)


def test_figures_by_hand():
    analysis = analyse(made(prompts=8))
    run = made(prompts=8)["runs"]["fast <b>"]
    row = analysis.rows[1]
    assert row.tokens_per_forward.value == pytest.approx(
        sum(r["new_tokens"] for r in run) / sum(r["forwards"] for r in run)
    )
    assert row.tokens_per_s.value == pytest.approx(
        sum(r["new_tokens"] for r in run) / sum(r["seconds"][0] for r in run)
    )
    assert row.gains == [0, 0, sum(r["forwards"] for r in run)]
    assert list(row.categories) == ["a", "b"]
    assert row.identical == 8
    assert [[r.facts["trust"] for r in sweep] for sweep in analysis.trust] == [[0.5, 1.0]]


def test_a_small_model_is_said_to_be_small():
    limits = " ".join(analyse(made()).limits)
    assert "135M parameters" in limits
    assert "cannot show the quality" in limits
    assert "timed once" in limits


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.text, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_shows_what_models_wrote_as_text():
    text = to_html(analyse(made(), scores={"ar": evaluated("<i>arc</i>")}))
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "b1", "i>"} & set(page.tags)
    assert page.links == []
    assert page.handlers == []
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    whole = " ".join(page.text)
    assert HOSTILE in whole
    assert "<i>arc</i>" in whole
    assert "25.0% ± 1.0%" in whole
    assert page.tags.count("svg") == 2 + 3 + 2  # quality against speed, histograms, trust
    assert page.tags.count("details") == 3
    for tag in ("div", "figure", "table", "svg", "g", "ul", "p", "details", "td", "tr"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert "nan" not in text.lower().replace("finance", "")


def test_every_figure_carries_its_conditions():
    page = to_html(analyse(made()))
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    charts = [c for c in captions if not c.startswith("mean")]
    assert len(charts) == 4
    line = re.search(r"Share of forwards.*?</p>", page).group()
    for caption in (*charts, line):
        for part in ("Template chat", "float32", "a CPU", "K 8", "temperature 0", "commit abc1234"):
            assert part in caption


def test_markdown_has_the_tables_and_no_html():
    text = to_markdown(analyse(made()))
    assert "<script>" not in text
    assert "<b>" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "| fast &lt;b> · K 8, trust 1 |" in text
    assert "commit abc1234" in text


def test_nothing_graded_means_nothing_about_quality():
    result = made()
    for run in result["runs"].values():
        for record in run:
            record["correct"] = None
    analysis = analyse(result)
    assert any("nothing here is about quality" in text for text in analysis.limits)
    assert all(row.accuracy is None and row.righter is None for row in analysis.rows)
    page = to_html(analysis)
    assert "Quality and speed" not in page
    assert "quality shown" not in page


@pytest.mark.parametrize("missing", ["conditions", "items", "gains", "seconds", "parameters"])
def test_a_result_that_lacks_something_is_one_line(missing):
    result = made()
    for entry in (result, result["methods"][0], result["runs"]["ar"][0]):
        entry.pop(missing, None)
    with pytest.raises(TidarError, match=f"is incomplete: it lacks '{missing}'") as error:
        analyse(result)
    assert "\n" not in str(error.value)


def test_every_prompt_draws_its_own_numbers(models):
    """Two prompts that read the same get different answers, and the same ones again in a second run."""
    settings = Settings(str(models / "base"), 12, temperature=1.0, device="cpu", dtype="float32")
    twice = [Item("f, line 1", "1", "all", "hi"), Item("f, line 2", "2", "all", "hi")]
    runs = []
    for _ in range(2):
        *_, result = compare([parse_method("ar"), parse_method("transformers")], twice, settings)
        runs.append({name: [r["token_ids"] for r in run] for name, run in result["runs"].items()})
    assert runs[0] == runs[1]
    assert all(one != other for one, other in runs[0].values())


def test_a_report_of_an_interrupted_run_has_what_was_finished():
    result = made()
    del result["runs"]["like ar"][7:]
    analysis = analyse(result)
    assert analysis.prompts == 7
    assert analysis.rows[0].new_tokens == sum(r["new_tokens"] for r in result["runs"]["ar"][:7])
    assert any("interrupted: 7 of 24" in text for text in analysis.limits)
    result["runs"]["ar"] = []
    with pytest.raises(TidarError, match="no prompt that all methods answered"):
        analyse(result)


def test_methods_take_turns(models, monkeypatch):
    """Every prompt goes to all methods before the next, beginning with another each time."""
    asked = []

    def prepared(method, models_):
        prepare(method, models_)

        def contestant(prompt, seed):
            asked.append((method.name, prompt))
            return Reply([1], "7", 1, [1], 0.5 if prompt == "a" else 0.25)

        return contestant

    monkeypatch.setattr("tidar.evaluate.compare.prepare", prepared)
    items = [Item("", str(i), "all", prompt, gold="7") for i, prompt in enumerate("ab")]
    methods = [parse_method("ar"), parse_method("transformers"), parse_method("prompt-lookup")]
    settings = Settings(str(models / "base"), device="cpu")
    *_, result = compare(methods, items, settings, passes=2, grade=lambda item, text: item.prompt == "a")
    turns = [("ar", "transformers", "prompt-lookup"), ("transformers", "prompt-lookup", "ar")]
    turns += [turns[1], ("prompt-lookup", "ar", "transformers")]
    warm = [(name, "a") for name in turns[0]]
    assert asked == warm + [(n, p) for p, names in zip("abab", turns, strict=True) for n in names]
    for run in result["runs"].values():
        assert [r["seconds"] for r in run] == [[0.5, 0.5], [0.25, 0.25]]
        assert [r["correct"] for r in run] == [True, False]


# The command


def test_the_command_measures_writes_and_renders_again(run, models, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"prompt": "say", "category": "talk"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "scores.json").write_text(json.dumps(evaluated("arc_easy")))
    out = tmp_path / "deep" / "v1.2"
    common = [
        "--model",
        models / "base",
        "--device",
        "cpu",
        "--max-new-tokens",
        6,
        "--scores",
        f"ar={tmp_path}/scores.json",
    ]
    asked = ["--prompts", f"mine={tmp_path}/rows.jsonl:2", "--method", "ar", "--method", "tidar:K=4"]
    code, printed, err = run("compare", *asked, *common, "--out", out)
    assert code == 0
    assert "no difference" in printed
    assert "v1.2.html" in err
    stored = json.loads((tmp_path / "deep" / "v1.2.json").read_text())
    assert [item["category"] for item in stored["items"]] == ["mine", "talk"]
    assert stored["conditions"]["grader"] == "flexible_extract"
    assert "--prompts mine=rows.jsonl:2 --method ar --method tidar:K=4" in stored["conditions"]["command"]
    assert str(tmp_path) not in stored["conditions"]["command"]
    assert [record["correct"] for record in stored["runs"]["ar"]] == [False, None]
    code, _, _ = run(
        "compare", "--render", f"{out}.json", "--scores", f"ar={tmp_path}/scores.json", "--out", tmp_path / "again"
    )
    assert code == 0
    assert "| 25.0% ± 1.0% · 100 items | template none, float32, a processor" in out.with_name("v1.2.md").read_text()
    for ending in (".md", ".html"):
        assert (tmp_path / f"again{ending}").read_text() == (tmp_path / "deep" / f"v1.2{ending}").read_text()
    code, printed, _ = run("compare", "--render", f"{out}.json", "--baseline", "tidar K=4", "--out", tmp_path / "again")
    assert code == 0
    assert printed.startswith("ar: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts"),
        (["--prompts", "a={tmp}/rows.jsonl"], "no methods"),
        (["--prompts", "{tmp}/rows.jsonl", "--method", "ar"], "is not NAME=FILE"),
        (["--prompts", "a={tmp}/none.jsonl", "--method", "ar"], "none.jsonl"),
        (["--prompts", "a={tmp}/rows.jsonl", "--method", "ar", "--grader", "best"], "grader is 'best'"),
        (["--prompts", "a={tmp}/rows.jsonl", "--method", "ar", "--passes", "0"], "passes is 0"),
        (["--prompts", "a={tmp}/rows.jsonl", "--method", "ar", "--baseline", "x"], "no method is called 'x'"),
        (["--prompts", "a={tmp}/rows.jsonl", "--methods", "{tmp}/none.yaml"], "cannot read"),
        (["--render", "{tmp}/none.json"], "cannot read"),
        (["--render", "{tmp}/rows.jsonl"], "no result of `tidar compare`"),
        (["--render", "{tmp}/rows.jsonl", "--method", "ar"], "leave --method out"),
        (
            ["--render", "{tmp}/rows.jsonl", "--seed", "0", "--max-new-tokens", "9"],
            "leave --seed, --max-new-tokens out",
        ),
        (["--render", "{tmp}/rows.jsonl", "--scores", "{tmp}/rows.jsonl"], "is not METHOD=RESULT.json"),
        (["--render", "{tmp}/rows.jsonl", "--scores", "ar={tmp}/rows.jsonl"], "is no result of `tidar evaluate`"),
        (["--render", "{tmp}/rows.jsonl", "--scores", "ar={tmp}/none.json"], "cannot read"),
        (
            ["--prompts", "a={tmp}/rows.jsonl", "--method", "ar", "--scores", "x={tmp}/s.json"],
            "no method is called 'x'",
        ),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "s.json").write_text('{"tasks": {}, "conditions": {}}')
    code, _, err = run("compare", *(a.format(tmp=tmp_path) for a in arguments), "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_scores_of_another_form_are_refused():
    broken = evaluated("arc_easy")
    del broken["tasks"]["arc_easy"]["scores"]
    with pytest.raises(TidarError, match="the scores of 'ar' are no result of `tidar evaluate`"):
        analyse(made(), scores={"ar": broken})


def test_answers_are_graded_with_the_extra_and_left_ungraded_without(run, models, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else real(name))
    out = tmp_path / "out"
    asked = ["compare", "--prompts", f"a={tmp_path}/rows.jsonl", "--method", "ar", "--out", out, "--max-new-tokens", 2]
    asked += ["--model", models / "base", "--device", "cpu"]
    code, _, err = run(*asked)
    assert code == 2
    assert (
        "(--grader none leaves them ungraded) needs packages that are not installed: pip install 'tidar[eval]'" in err
    )
    assert run(*asked, "--grader", "none")[0] == 0
    stored = json.loads(out.with_suffix(".json").read_text())
    assert stored["conditions"]["grader"] is None
    assert stored["runs"]["ar"][0]["correct"] is None


def test_a_set_may_be_cut():
    with pytest.raises(TidarError, match="is not NAME=FILE"):
        read_set("a=file.jsonl:0")
    with pytest.raises(TidarError, match=r"file\.jsonl"):
        read_set("a=file.jsonl:3")


def test_a_trained_block_diffusion_folder_is_compared(folder, data, tmp_path):
    """From `tidar train` to a report, without anything in between."""
    convert(options(folder, data, tmp_path, objective="block-diffusion", steps=5))
    settings = Settings(folder, max_new_tokens=8, device="cpu", dtype="float32")
    methods = [parse_method("ar"), parse_method(f"block-diffusion:{tmp_path}/out:left-to-right")]
    *_, result = compare(methods, ITEMS, settings)
    assert "block-diffusion out left-to-right" in to_html(analyse(result))


def test_the_recipes_name_every_baseline():
    recipes = Path(__file__).parent.parent / "recipes" / "compare"
    methods = [m for name in ("smollm2-135m", "peers") for m in read_methods(recipes / f"{name}.yaml")]
    assert {m.kind for m in methods} == set(KINDS)
    decoders = {m.options["decoder"] for m in methods if m.kind == "block-diffusion"}
    assert decoders == {"max-confidence", "left-to-right", "fixed-2", *(f"confidence>0.{n}" for n in (9, 8, 7, 6))}
