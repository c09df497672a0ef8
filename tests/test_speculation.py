"""`tidar evaluate speculation`: its counts by hand, its parity, and the formats it reads."""

import json

import pytest
import torch

from tidar import TidarError, TidarModel
from tidar.decode.engine import Answer
from tidar.evaluate.items import Item, read_items
from tidar.evaluate.speculation import Question, gap_in_steps, measure, parity, summary
from tidar.prompts import encode_prompt
from tiny import drafting_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drafting_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return TidarModel.from_pretrained(folder, device="cpu", dtype="float32")


def lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["one", "and more"]},
    {"question_id": 82, "category": "math", "turns": ["two"], "reference": ["2"]},
    {"question_id": 83, "category": "writing", "turns": ["three", "go on", "and on"]},
]


def test_formats_are_read_as_they_are(tmp_path):
    bench = read_items(lines(tmp_path / "bench.jsonl", *ROWS))
    assert [(i.name, i.category, i.prompt, i.more) for i in bench] == [
        ("81", "writing", "one", ("and more",)),
        ("82", "math", "two", ()),
        ("83", "writing", "three", ("go on", "and on")),
    ]
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "a"}, {"messages": messages}, {"question": "b", "answer": "3+4 = 7\n#### 7"}]
    plain = read_items(lines(tmp_path / "plain.jsonl", *rows), "own")
    assert [(i.name, i.category, i.prompt, i.gold) for i in plain] == [
        ("1", "own", "a", None),
        ("2", "own", messages, None),
        ("3", "own", "b", "7"),
    ]
    assert len(read_items(tmp_path / "plain.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 2: no prompt"),
        ({"turns": []}, "line 2: no prompt"),
        ({"turns": ["a", 3]}, "line 2: field 'turns' must be a list of texts"),
        ({"prompt": "a", "category": 3}, "line 2: field 'category' must be a text, not int"),
        ({"messages": "a"}, "line 2: field 'messages' must be a list"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(TidarError, match=message):
        read_items(lines(tmp_path / "bad.jsonl", {"prompt": "fine"}, row))


def answer(gains, token_ids=None):
    tokens = token_ids or list(range(1 + sum(gains)))
    return Answer(0, tokens, forwards=1 + len(gains), acceptance_lengths=list(gains))


def test_statistics_by_hand(model):
    questions = [
        Question("a", "x", answer([1, 3, 4, 1]), answer([1] * 9)),
        Question("a", "y", answer([2, 2]), answer([1] * 4)),
    ]
    row = summary(model, "a", questions, {("a", "tidar"): 3.0, ("a", "ar"): 6.0}, ["a"], greedy=False)
    assert row == {
        "category": "a",
        "prompts": 2,
        "new_tokens": 15,
        "forwards": 8,
        "tokens_per_forward": 1.875,
        "acceptance_length_counts": [0, 2, 2, 1, 1],
        "stood": [0.6667, 0.3333, 0.1667],
        "stood_given_before": [0.6667, 0.5, 0.5],
        "tokens_per_s": 5.0,
        "ar_tokens_per_s": 2.5,
    }


@torch.no_grad()
def test_answers_that_part_are_a_tie_or_different(model):
    """A tie is made: two tokens get the same output embedding."""
    output = model.hf_model.get_output_embeddings()
    prefix = encode_prompt(model.tokenizer, "say")
    before = output.weight.clone()
    try:
        output.weight[7] = output.weight[8]
        assert gap_in_steps(model, prefix, 7, 8) == 0
        assert gap_in_steps(model, prefix, 7, 9) > 100
        ar, tie, other, short = ([1, 2, 8], [1, 2, 7], [1, 2, 9], [1, 2])
        questions = [Question("a", "say", answer([], mine), answer([], ar)) for mine in (ar, tie, other, short)]
        # The prefix of the comparison ends where the answers part.
        assert parity(model, questions) == {"identical_to_ar": 1, "parted_at_tie": 1, "different": 2}
    finally:
        output.weight.copy_(before)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_answers_are_those_of_ar_in_every_turn(model, batch_size):
    items = [
        Item("f, line 1", "1", "writing", "one", ("and more",)),
        Item("f, line 2", "2", "math", "two"),
        Item("f, line 3", "3", "writing", [{"role": "user", "content": "three"}], ("go on", "and on")),
    ]
    result = measure(model, items, 2, batch_size, max_new_tokens=9, draft_length=3)
    assert [(row["category"], row["prompts"]) for row in result["rows"]] == [("writing", 4), ("math", 1), ("all", 5)]
    for row in result["rows"]:
        assert row["identical_to_ar"] == row["prompts"]
        assert row["new_tokens"] == 9 * row["prompts"]
        assert sum(row["acceptance_length_counts"]) == row["forwards"] - row["prompts"]
        assert len(row["acceptance_length_counts"]) <= 4
        assert row["tokens_per_s"] > 0 < row["ar_tokens_per_s"]
    every = result["rows"][-1]
    assert every["forwards"] == sum(row["forwards"] for row in result["rows"][:-1])


def test_later_turns_go_on_from_what_was_said(model):
    """The second turn's prompt holds the first one's answer: asked alone, it gets another."""
    whole = measure(model, [Item("", "1", "a", "one", ("two",))], 2, 1, max_new_tokens=6)["rows"][0]
    said = model.generate("one", mode="ar", max_new_tokens=6).text
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": said}]
    history.append({"role": "user", "content": "two"})
    parts = [measure(model, [Item("", "1", "a", p)], 1, 1, max_new_tokens=6)["rows"][0] for p in ("one", history)]
    assert whole["forwards"] == sum(p["forwards"] for p in parts)
    assert whole["prompts"] == 2


def test_the_command_prints_tables_and_writes_json(run, folder, tmp_path):
    file, out = lines(tmp_path / "bench.jsonl", *ROWS), tmp_path / "deep" / "out.json"
    options = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6]
    code, printed, _ = run("evaluate", "speculation", "--prompts", file, "--out", out, "--turns", 3, *options)
    assert code == 0
    assert "6/6" in printed
    assert "writing" in printed
    result = json.loads(out.read_text())
    conditions = result["conditions"]
    assert {
        "template": "chat",
        "temperature": 0.0,
        "dtype": "float32",
        "trained_block_size": 4,
    }.items() <= conditions.items()
    assert "commit" in conditions
    assert [row["prompts"] for row in result["rows"]] == [5, 1, 6]
    code, printed, _ = run("evaluate", "speculation", "--prompts", file, "--temperature", 1, *options)
    assert code == 0
    assert "not asked" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", 0], "limit is 0"),
        (["--turns", 0], "turns is 0"),
        (["--batch-size", 0], "batch-size is 0"),
        (["--draft-length", 200], "draft length is 200"),
        (["--out", "/proc/none/x.json"], "cannot write /proc/none"),
        (["--drafter", "none"], "no drafter"),
    ],
)
def test_bad_options_are_one_line(run, folder, tmp_path, more, message):
    file = lines(tmp_path / "bench.jsonl", *ROWS)
    code, _, err = run("evaluate", "speculation", "--prompts", file, "--model", folder, "--device", "cpu", *more)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
