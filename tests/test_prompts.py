"""Prompts come as texts or conversations, from the API and from files; what cannot be one is said in one sentence."""

import json

import pytest

from tidar import TidarError, TidarModel
from tidar.errors import PromptError
from tidar.prompts import encode_prompt, read_prompts
from tidar.sources import BadRows, read_rows
from tidar.train.conversations import Encoder
from tiny import tiny_folder

ASKED, ANSWERED = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TidarModel.from_pretrained(tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu")


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "messages": [ASKED]}, "a"),
        ({"prompt": [ASKED]}, [ASKED]),
        ({"messages": [ASKED]}, [ASKED]),
        ({"messages": [ASKED, ANSWERED]}, [ASKED]),
        ({"messages": [ASKED, ANSWERED, ANSWERED]}, [ASKED]),
        ({"conversations": [{"from": "human", "value": "why?"}]}, [ASKED]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]}, [ASKED]),
        ({"messages": [ASKED, ANSWERED, ASKED]}, [ASKED, ANSWERED, ASKED]),
        ({"turns": ["a", "b"]}, "a"),
        ({"instruction": "do", "input": "this"}, "do\n\nthis"),
    ],
)
def test_a_row_asks_what_the_model_is_to_answer(row, prompt, tmp_path):
    placed = read_prompts(write(tmp_path / "p.jsonl", row))
    assert placed == [(f"{tmp_path / 'p.jsonl'}, line 1", prompt)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]},
        {"prompt": "something else", "messages": [ASKED, ANSWERED]},
        {"prompt": "why?", "answer": "because"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ],
)
def test_every_form_of_a_training_row_is_the_same_sample(row, model, tmp_path):
    rows = read_rows(write(tmp_path / "p.jsonl", row), BadRows())
    (sample,) = Encoder(model.tokenizer).encode(rows, BadRows())
    assert sample.ids[~sample.answers].tolist() == encode_prompt(model.tokenizer, "why?")
    assert model.tokenizer.decode(sample.ids[sample.answers]) == "because<end>"


def test_a_list_of_messages_is_one_conversation(model):
    alone = model.generate([ASKED], mode="ar", max_new_tokens=5)
    assert alone.token_ids == model.generate("why?", mode="ar", max_new_tokens=5).token_ids
    assert [a.token_ids for a in model.generate([[ASKED], "why?"], mode="ar", max_new_tokens=5)] == [
        alone.token_ids
    ] * 2
    assert model.generate([], mode="ar") == []


@pytest.mark.parametrize("prompt", [7, None, ["a"], [ASKED, "a"], {"role": "user"}])
def test_anything_else_is_refused_with_its_row(prompt, model):
    with pytest.raises(PromptError, match=r"^prompt 2: a prompt must be") as error:
        model.generate(["a", prompt], mode="ar")
    assert error.value.row == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['name'] + 'x' }}", "name"),
        ("{% for m in messages %}{{ m", "expected"),
    ],
)
def test_a_chat_template_that_raises_is_one_sentence(template, reason, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    with pytest.raises(TidarError, match="the chat template refuses") as error:
        encode_prompt(model.tokenizer, "a")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_options_are_checked_without_a_prompt(model):
    model.check(mode="ar", temperature=0.5)
    with pytest.raises(TidarError, match="temperature is -1"):
        model.check(mode="ar", temperature=-1)
