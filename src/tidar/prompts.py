"""Prompts and conversations from the user's files: one reader for decoding and for training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tidar.errors import TidarError, first_line

Message = dict[str, str]
Prompt = str | list[Message]


class Placed(NamedTuple):
    """A prompt and where it stands: "file, line n"."""

    place: str
    prompt: Prompt


def read_prompts(path: str | Path) -> list[Placed]:
    """Prompts of a JSONL file.

    A row holds `prompt` (a text or messages), `messages` (list of role/content; answers at its end are left out),
    `turns` (list of user texts, the first is used), or the field names of common sets: `question`, `instruction` (with
    an optional `input`).

    Raises:
        TidarError: naming file, row and field of the first bad row.
    """
    prompts = []
    for where, row in read_rows(path):
        prompt = row_prompt(row)
        if prompt is None:
            raise TidarError(
                f"{where}: no prompt; a row needs 'prompt', 'messages' or 'turns', this one has {_keys(row)}"
            )
        if isinstance(prompt, str) and not prompt.strip():
            raise TidarError(f"{where}: the prompt is empty")
        prompts.append(Placed(where, prompt))
    if not prompts:
        raise TidarError(f"{path} holds no rows")
    return prompts


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSONL file with their place ("file, line n"). Raises TidarError for a file or line that is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TidarError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TidarError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TidarError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise TidarError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
        yield where, row


def row_prompt(row: dict[str, Any]) -> Prompt | None:
    """The prompt in a row, None if it has none of the known fields in a usable form."""
    for field in ("prompt", "question"):
        if isinstance(row.get(field), str):
            return row[field]
    if isinstance(row.get("instruction"), str):
        extra = row.get("input")
        return f"{row['instruction']}\n\n{extra}" if isinstance(extra, str) and extra.strip() else row["instruction"]
    turns = row.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return turns[0]
    for field in ("prompt", "messages"):
        messages, _ = split_answer(row.get(field))
        if messages:
            return messages
    return None


def split_answer(messages: object) -> tuple[list[Message], str | None]:
    """A conversation up to where the model is to speak, and what it said last there (None: nothing yet).

    Answers at the end are the model's to give, not something to answer. ([], None) for anything but messages.
    """
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        return [], None
    open_ = [{"role": m["role"], "content": m["content"]} for m in messages]
    answer = None
    while open_ and open_[-1]["role"] == "assistant":
        last = open_.pop()
        answer = last["content"] if answer is None else answer
    return open_, answer


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
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the model author's code, and raises what it likes
        raise TidarError(f"the chat template refuses this conversation: {first_line(error)}") from error
    return tokenize(tokenizer, text, add_special_tokens=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """Token ids of a text. Raises TidarError for a lone surrogate: JSON can spell it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start + 1}"
        raise TidarError(f"the text holds half a surrogate pair ({half}), which is no character") from error
    return list(tokenizer(text, **options).input_ids)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "no fields"
