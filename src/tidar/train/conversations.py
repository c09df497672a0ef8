"""From rows to samples: conversations through the chat template, the answers marked; plain text as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tidar.errors import TidarError, first_line
from tidar.prompts import (
    Message,
    Prompt,
    check_text,
    field_names,
    parse_messages,
    render,
    row_messages,
    row_prompt,
)
from tidar.sources import BadRows, Row
from tidar.train.samples import Sample

ANSWER_FIELDS = ("answer", "response", "output", "completion")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Templates with this tag say themselves which tokens are the assistant's."""
TOGETHER = 512
"""Rows that are tokenised in one call, which spreads over the CPU's cores."""


class Pair(NamedTuple):
    """A prompt and its answer."""

    prompt: Prompt
    answer: str


Source = list[Message] | Pair | str
"""What a training row is: a conversation with answers in it, a prompt with its answer, or plain text."""


class Segment(NamedTuple):
    """A part of a sample that is tokenised on its own, as it would be when decoding.

    learn: it is an answer. opened: the tokenizer puts its beginning-of-text token before it, if it has one.
    """

    text: str
    learn: bool
    opened: bool = False


def row_source(fields: dict[str, Any]) -> Source:
    """What to learn from a row. Raises TidarError naming the field that is wrong or missing."""
    messages = row_messages(fields) or []
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if spoken:
        return messages[: spoken[-1] + 1]
    prompt, answer = row_prompt(fields), _answer(fields)
    if prompt and answer is not None:
        return Pair(prompt, answer)
    if isinstance(fields.get("text"), str):
        return fields["text"]
    raise TidarError(
        "no conversation; it needs 'messages' with an answer of the assistant's, a prompt and one of "
        f"{', '.join(ANSWER_FIELDS)}, or 'text', but this one has {field_names(fields)} (or let the model answer the "
        "prompts: --self-generate)"
    )


def _answer(fields: dict[str, Any]) -> str | None:
    for name in ANSWER_FIELDS:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            last = parse_messages(value, name)[-1]
            if last["role"] == "assistant":
                return last["content"]
    return None


class Encoder:
    """Turns rows into samples.

    Attributes:
        last_only: conversations so far of which just the last of several answers could be marked, as the template
            writes earlier turns differently from how the model said them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.last_only = 0
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(specials | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, filter(None, longest_first))) or r"(?!)")

    def encode(self, rows: Iterable[Row], bad: BadRows) -> Iterator[Sample]:
        """Samples of rows, in their order; rows that are none go to `bad`."""
        rows = iter(rows)
        while batch := list(islice(rows, TOGETHER)):
            parts = []
            for place, fields in batch:
                try:
                    parts.append(self._parts(row_source(fields)))
                except TidarError as error:
                    bad.add(TidarError(f"{place}: {error}"))
            yield from _tokenise(self.tokenizer, parts)

    def _parts(self, source: Source) -> list[Segment] | Sample:
        """Texts to tokenise, or a sample where the template counts the tokens itself."""
        if isinstance(source, str):
            segments = self._text(source)
        elif self.tokenizer.chat_template is None:
            segments = self._untemplated(source)
        else:
            messages = _as_messages(source)
            if not messages[-1]["content"].strip():
                raise TidarError("the last answer is empty")
            if GENERATION.search(self.tokenizer.get_chat_template()):
                return _marked_by_template(self.tokenizer, messages)
            segments = self._every_turn(messages) or self._last_turn(messages)
        for segment in segments:
            check_text(segment.text)
        return [segment for segment in segments if segment.text]

    def _text(self, text: str) -> list[Segment]:
        return [Segment(text, True, opened=True), Segment(self._eos, True)]

    def _untemplated(self, source: list[Message] | Pair) -> list[Segment]:
        if not isinstance(source, Pair) or not isinstance(source.prompt, str):
            raise TidarError("the row is a conversation, but this tokenizer has no chat template")
        return [Segment(source.prompt, False, opened=True), Segment(source.answer, True), Segment(self._eos, True)]

    def _every_turn(self, messages: list[Message]) -> list[Segment] | None:
        """The conversation with every answer marked; None if a later turn changes how an earlier one is written."""
        text, end, segments = "", "", list[Segment]()
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            asked = render(self.tokenizer, messages[:index], True)
            said = render(self.tokenizer, messages[: index + 1], False)
            content = _beginning(said.removeprefix(asked), message["content"])
            if not asked.startswith(text) or not said.startswith(asked) or content is None:
                return None
            end = self._end_of_turn(said[len(asked) + len(content) :])
            segments += [Segment(asked[len(text) :], False), Segment(content + end, True)]
            text = asked + content + end
        return segments if end else [*segments, Segment(self._eos, True)]

    def _last_turn(self, messages: list[Message]) -> list[Segment]:
        """The last answer as decoding would begin and end it."""
        self.last_only += sum(m["role"] == "assistant" for m in messages[1:]) > 1
        asked = render(self.tokenizer, messages[:-1], True)
        answer = messages[-1]["content"]
        said = render(self.tokenizer, messages, False)
        # A template may rewrite the answer; what ends it is then anybody's guess but the tokenizer's own.
        _, found, behind = said.removeprefix(asked).rpartition(answer.strip())
        end = self._end_of_turn(behind) if found else ""
        return [Segment(asked, False), Segment(answer, True), Segment(end or self._eos, True)]

    @property
    def _eos(self) -> str:
        return self.tokenizer.eos_token or ""

    def _end_of_turn(self, tail: str) -> str:
        """What the template writes behind an answer, up to the special token that ends it; empty if there is none."""
        special = self.special.search(tail)
        return tail[: special.end()] if special else ""


def _as_messages(source: list[Message] | Pair) -> list[Message]:
    if not isinstance(source, Pair):
        return source
    prompt = [{"role": "user", "content": source.prompt}] if isinstance(source.prompt, str) else source.prompt
    return [*prompt, {"role": "assistant", "content": source.answer}]


def _beginning(text: str, content: str) -> str | None:
    """The content as `text` begins with it (templates may strip it), None if it does not."""
    return next((c for c in (content, content.strip()) if text.startswith(c)), None)


def _marked_by_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Sample:
    """Tokens and answers by the template's own `generation` tags; what follows the last answer is left out."""
    for message in messages:
        check_text(message["content"])
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # the template is the model author's code, and raises what it likes
        raise TidarError(f"the chat template refuses this conversation: {first_line(error)}") from error
    answers = np.array(encoded["assistant_masks"], bool)
    end = int(np.flatnonzero(answers).max(initial=-1)) + 1
    if not end:
        raise TidarError("the chat template marks no token of this conversation as the assistant's")
    return Sample(np.array(encoded["input_ids"], np.int32)[:end], answers[:end])


def _tokenise(tokenizer: PreTrainedTokenizerBase, parts: list[list[Segment] | Sample]) -> Iterator[Sample]:
    """Samples of the parts, in their order; all texts in two calls."""
    segments = [segment for part in parts if not isinstance(part, Sample) for segment in part]
    tokens: dict[int, list[int]] = {}
    for opened in (False, True):
        places = [place for place, segment in enumerate(segments) if segment.opened == opened]
        if places:
            ids = tokenizer([segments[p].text for p in places], add_special_tokens=opened).input_ids
            tokens.update(zip(places, ids, strict=True))
    done = 0
    for part in parts:
        if isinstance(part, Sample):
            yield part
            continue
        ids = [tokens[done + index] for index in range(len(part))]
        done += len(part)
        learned = [np.full(len(i), s.learn) for i, s in zip(ids, part, strict=True)]
        yield Sample(np.concatenate([np.asarray(i, np.int32) for i in ids]), np.concatenate(learned))
