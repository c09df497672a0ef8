"""What methods are asked: prompts with their category, further turns, and the known answer where there is one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.errors import TidarError
from tidar.prompts import Prompt, needed_prompt
from tidar.sources import BadRows, Row, read_rows

NO_CATEGORY = "all"
FINAL_ANSWER = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        place: "file, line n".
        name: the row's own id, else its number in the file.
        category: as the row says; the set's name, or "all", where it does not.
        prompt: what is asked first.
        more: what is asked after the first answer, turn by turn.
        gold: the known final answer (the text after "####" in GSM8K's `answer`), None where there is none.
    """

    place: str
    name: str
    category: str
    prompt: Prompt
    more: tuple[str, ...] = ()
    gold: str | None = None


def read_items(source: str | Path, category: str = NO_CATEGORY, limit: int | None = None) -> list[Item]:
    """The first `limit` questions of a file.

    Rows are those of MT-Bench and Spec-Bench (question_id, category, turns), of GSM8K (question, answer), or anything
    that `tidar generate --prompts` reads.

    Raises:
        TidarError: naming file, row and field of the first bad row.
    """
    items = []
    for number, row in enumerate(read_rows(source, BadRows()), 1):
        if limit is not None and number > limit:
            break
        items.append(_item(row, number, category))
    if not items:
        raise TidarError(f"{source} holds no rows")
    return items


def _item(row: Row, number: int, category: str) -> Item:
    place, fields = row
    try:
        prompt = needed_prompt(fields)
    except TidarError as error:
        raise TidarError(f"{place}: {error}") from error
    own = fields.get("category")
    if own is not None and not isinstance(own, str):
        raise TidarError(f"{place}: field 'category' must be a text, not {type(own).__name__}")
    return Item(
        place=place,
        name=str(fields.get("question_id", number)),
        category=own or category,
        prompt=prompt,
        more=_more_turns(fields, place),
        gold=_gold(fields),
    )


def _more_turns(fields: dict[str, Any], place: str) -> tuple[str, ...]:
    turns = fields.get("turns")
    if not isinstance(turns, list):
        return ()
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise TidarError(f"{place}: field 'turns' must be a list of texts, none of them empty")
    return tuple(turns[1:])


def _gold(fields: dict[str, Any]) -> str | None:
    answer = fields.get("answer")
    found = FINAL_ANSWER.findall(answer) if isinstance(answer, str) else []
    return found[-1] if found else None
