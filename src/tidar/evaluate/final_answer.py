"""Grading by the final number: GSM8K's exact match."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from tidar.evaluate.items import FINAL_ANSWER, Item

Grade = Callable[[Item, str], bool | None]
"""(question, answer's text) -> whether it is right; None where the grader has no opinion."""
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def grade_final_number(item: Item, text: str) -> bool | None:
    """Whether the answer's final number is the known one; None for a question without one.

    The final number is what follows "####" where the answer has that, else its last number ("flexible extract" of
    lm-evaluation-harness).
    """
    gold = number(item.gold) if item.gold is not None else None
    return None if gold is None else last_number(text) == gold


def last_number(text: str) -> Decimal | None:
    marked = FINAL_ANSWER.findall(text)
    found = NUMBER.findall(marked[-1] if marked else text)
    return number(found[0] if marked and found else found[-1]) if found else None


def number(text: str) -> Decimal | None:
    """A number as people write it: "$1,234.50" is 1234.5. None for anything else."""
    try:
        value = Decimal(text.replace("$", "").replace(",", "").strip().rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
