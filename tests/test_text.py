import pytest
from transformers import AutoTokenizer

from tidar.decode.text import TextStream
from tiny import tiny_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("tiny")))


def feed(stream, tokenizer, text):
    pieces, used = [], 0
    for token in tokenizer(text).input_ids:
        used += 1
        stopped = stream.push(token)
        pieces.append(stream.take())
        if stopped:
            break
    stream.finish()
    return [*pieces, stream.take()], used


def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer):
    text = "naïve café 日本語 🙂 done"
    pieces, _ = feed(TextStream(tokenizer), tokenizer, text)
    assert "".join(pieces) == text
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
    stream.push(tokenizer("🙂").input_ids[0])
    assert stream.take() == ""
    stream.finish()
    assert stream.take() == "\ufffd"
