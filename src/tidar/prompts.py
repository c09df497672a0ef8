"""Prompts and conversations from the user's files: one reader for decoding and for training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tidar.errors import TidarError

Message = dict[str, str]
Prompt = str | list[Message]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSONL file.

    A row holds `prompt` (text), `messages` (list of role/content), `turns` (list of user texts, the first is used), or
    the field names of common sets: `question`, `instruction` (with an optional `input`).

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
        prompts.append(prompt)
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
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    return None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, raw: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, unless `raw`.

    Raises:
        TidarError: for messages without a chat template, or messages with `raw`.
    """
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            reason = "--raw takes plain text" if raw else "this tokenizer has no chat template"
            raise TidarError(f"a row holds 'messages', but {reason}")
        return list(tokenizer(prompt).input_ids)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "no fields"
