"""Prompts and conversations from the user's files: one reader for decoding and for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tidar.errors import TidarError, first_line
from tidar.sources import BadRows, Reading, Row, read_rows

Message = dict[str, str]
Prompt = str | list[Message]

CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that data sets give to the two roles; other names stay as they are."""


class Placed(NamedTuple):
    """A prompt and where it stands: "file, line n"."""

    place: str
    prompt: Prompt


def read_prompts(source: str | Path) -> list[Placed]:
    """Prompts of a source (see sources.py).

    A row holds `prompt` (a text or messages), `messages` (list of role/content) or `conversations` (list of
    from/value; answers at the end of either are left out), `turns` (list of user texts, the first is used), or the
    field names of common sets: `question`, `instruction` (with an optional `input`).

    Raises:
        TidarError: naming file, row and field of the first bad row.
    """
    bad = BadRows()
    prompts = list(row_prompts(read_rows(source, bad), bad))
    if not prompts:
        raise TidarError(f"{source} holds no rows")
    return prompts


def prompts_of(sources: Iterable[str | Path], bad: BadRows, how: Reading) -> Iterator[Placed]:
    """Prompts of several sources; rows without one go to `bad`."""
    for source in sources:
        yield from row_prompts(read_rows(source, bad, how), bad)


def row_prompts(rows: Iterable[Row], bad: BadRows) -> Iterator[Placed]:
    """The prompt of every row that has one; the others go to `bad`."""
    for place, fields in rows:
        try:
            yield Placed(place, needed_prompt(fields))
        except TidarError as error:
            bad.add(TidarError(f"{place}: {error}"))


def needed_prompt(fields: dict[str, Any]) -> Prompt:
    """The prompt in a row that must have one. Raises TidarError saying what is missing."""
    prompt = row_prompt(fields)
    if prompt is None:
        raise TidarError(f"no prompt; a row needs 'prompt', 'messages' or 'turns', this one has {field_names(fields)}")
    if isinstance(prompt, str) and not prompt.strip():
        raise TidarError("the prompt is empty")
    return prompt


def row_prompt(fields: dict[str, Any]) -> Prompt | None:
    """The prompt in a row, None if it has no known field. Raises TidarError naming a field of the wrong form."""
    for name in ("prompt", "question"):
        if isinstance(fields.get(name), str):
            return fields[name]
    if isinstance(fields.get("instruction"), str):
        text, extra = fields["instruction"], fields.get("input")
        return f"{text}\n\n{extra}" if isinstance(extra, str) and extra.strip() else text
    turns = fields.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return turns[0]
    messages = parse_messages(fields["prompt"], "prompt") if "prompt" in fields else row_messages(fields)
    return _unanswered(messages or []) or None


def row_messages(fields: dict[str, Any]) -> list[Message] | None:
    """The conversation in a row, None if it has none. Raises TidarError naming the field that is no message."""
    for name in CONVERSATION_FIELDS:
        if name in fields:
            return parse_messages(fields[name], name)
    return None


def parse_messages(value: object, field: str) -> list[Message]:
    """Messages as role/content from a list of role/content or from/value (ShareGPT) objects; `field` names the list."""
    if not isinstance(value, list):
        wanted = "a text or a list of messages" if field == "prompt" else "a list of messages"
        raise TidarError(f"field '{field}' must be {wanted}, not {type(value).__name__}")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _message(value: object, field: str) -> Message:
    if not isinstance(value, dict):
        raise TidarError(f"field '{field}' must be a message (an object), not {type(value).__name__}")
    names = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for name in names:
        if name not in value:
            raise TidarError(f"field '{field}' has no '{name}', but {field_names(value)}")
    role, content = (_text(value[name], f"{field}.{name}") for name in names)
    return {"role": SPEAKERS.get(role, role) if names[0] == "from" else role, "content": content}


def _text(value: object, field: str) -> str:
    """A text, or a list of text parts as one text."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise TidarError(f"field '{field}' must be a text, not {type(value).__name__}")
    return value


def _unanswered(messages: list[Message]) -> list[Message]:
    """A conversation up to where the model is to speak: answers at its end are not something to answer."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, raw: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, unless `raw`.

    Raises:
        TidarError: for anything but text or messages, for messages without a chat template or with `raw`, and for
            what the template or the tokenizer refuses.
    """
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
        raise TidarError("a prompt must be a text or a list of messages (dictionaries with 'role' and 'content')")
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            reason = "--raw takes plain text" if raw else "this tokenizer has no chat template"
            raise TidarError(f"the prompt is a list of messages, but {reason}")
        return tokenize(tokenizer, prompt)
    return tokenize(tokenizer, render(tokenizer, as_messages(prompt), True), add_special_tokens=False)


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def template_name(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What results say about how prompts are encoded by `encode_prompt`."""
    return "none" if tokenizer is None or tokenizer.chat_template is None else "chat"


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], open_answer: bool) -> str:
    """A conversation as the chat template writes it; with `open_answer`, up to where the model's answer begins."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
    except Exception as error:  # the template is the model author's code, and raises what it likes
        raise TidarError(f"the chat template refuses this conversation: {first_line(error)}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """Token ids of a text. Raises TidarError for a lone surrogate: JSON can spell it, UTF-8 cannot."""
    check_text(text)
    return list(tokenizer(text, **options).input_ids)


def check_text(text: str) -> None:
    """Raise TidarError for a text that no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start + 1}"
        raise TidarError(f"the text holds half a surrogate pair ({half}), which is no character") from error


def field_names(fields: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in fields) or "no fields"
