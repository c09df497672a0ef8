import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tidar import TidarModel
from tidar.decode.text import TextStream
from tiny import PROMPTS, network_of, tiny_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("tiny")))


def feed(stream, tokenizer, text, sizes=(1,)):
    """The pieces that come of pushing the tokens a few at a time, and how many tokens were used."""
    ids, pieces, used = tokenizer(text).input_ids, [], 0
    for size in itertools.cycle(sizes):
        used += stream.push(ids[used : used + size])
        pieces.append(stream.take())
        if stream.stopped or used == len(ids):
            break
    stream.finish()
    return [*pieces, stream.take()], used


def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer):
    text = "naïve café 日本語 🙂 done"
    pieces, _ = feed(TextStream(tokenizer), tokenizer, text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 1
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_is_never_shown_and_ends_the_answer_at_its_last_token(tokenizer):
    pieces, used = feed(TextStream(tokenizer, ["END", "E!"]), tokenizer, "one E two ENDless")
    assert "".join(pieces) == "one E two "
    assert used == len("one E two END")


def test_text_that_only_begins_like_a_stop_string_is_shown_in_the_end(tokenizer):
    pieces, _ = feed(TextStream(tokenizer, ["END"]), tokenizer, "the EN")
    assert "".join(pieces) == "the EN"
    assert "E" not in "".join(pieces[:-1]).removeprefix("the ")


def test_an_unfinished_character_is_shown_when_the_answer_ends(tokenizer):
    stream = TextStream(tokenizer)
    stream.push(tokenizer("🙂").input_ids[:1])
    assert stream.take() == ""
    stream.finish()
    assert stream.take() == "\ufffd"


TEXTS = st.lists(st.sampled_from(["a", "EN", "D", "END", "é", "日", "🙂", " ", "n" * 40]), min_size=1, max_size=12)


@given(TEXTS, st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_text_and_its_end_do_not_depend_on_how_many_tokens_come_at_once(tokenizer, words, sizes):
    """A stop string may end inside a push, and an unfinished character may stand behind it."""
    text, stop = "".join(words), ("END", "é日")
    wanted = text[: min([text.index(s) for s in stop if s in text], default=len(text))]
    used = min([len(tokenizer(text[: text.index(s) + len(s)]).input_ids) for s in stop if s in text], default=None)
    for size in (sizes, [1]):
        pieces, taken = feed(TextStream(tokenizer, stop), tokenizer, text, size)
        assert "".join(pieces) == wanted
        assert taken == (len(tokenizer(text).input_ids) if used is None else used)
        assert "".join(feed(TextStream(tokenizer), tokenizer, text, size)[0]) == text


def test_a_long_answer_is_not_decoded_again_and_again(tokenizer):
    decoded = []

    class Counting:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return tokenizer.decode(ids, **options)

    stream = TextStream(Counting())
    for token in tokenizer("abc " * 100).input_ids:
        stream.push([token])
    assert stream.text == "abc " * 100
    assert len(decoded) < 1.1 * 400
    assert max(decoded) < 40


def test_answers_read_the_same_whether_their_text_is_followed_or_not(tokenizer):
    model, prompts, pieces = TidarModel(network_of("llama"), tokenizer), list(map(tokenizer.decode, PROMPTS)), {}

    def follow(update):
        pieces[update.answer.row] = pieces.get(update.answer.row, "") + update.text
        assert update.answer.text.startswith(pieces[update.answer.row])

    options = {"raw": True, "max_new_tokens": 30, "draft_length": 4}
    followed = model.generate(prompts, on_update=follow, **options)
    alone = model.generate(prompts, **options)
    assert [a.text for a in alone] == [a.text for a in followed] == [pieces[row] for row in range(len(prompts))]
    assert all(a.text == tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in alone)
    assert model.generate(prompts[0], stop=[alone[0].text[3:5]], **options).text == alone[0].text[:3]
