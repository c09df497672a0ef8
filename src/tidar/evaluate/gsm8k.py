"""GSM8K's graders for one answer at a time: those of `tidar evaluate --tasks gsm8k`, under the names of its scores.

The harness' task judges, or math-verify; both come with the extra `eval`, and are loaded when they are first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from tidar.evaluate.items import Item

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

Grade = Callable[[Item, str], bool | None]
"""(question, answer's text) -> whether it is right; None where the grader has no opinion."""


def strict_match(item: Item, text: str) -> bool | None:
    """Whether "The answer is N." has the known answer; None for a question without one."""
    return _extracted(item, text, "strict-match")


def flexible_extract(item: Item, text: str) -> bool | None:
    """Whether the last number is the known answer, digit for digit; None for a question without one."""
    return _extracted(item, text, "flexible-extract")


def math_verify(item: Item, text: str) -> bool | None:
    """Whether the last number or expression equals the known answer; None for a question without one."""
    if item.gold is None:
        return None
    from tidar.evaluate.grading import gsm8k_math_verify

    return gsm8k_math_verify([{"answer": f"#### {item.gold}"}], [text])[0]


GRADERS: dict[str, Grade] = {
    "flexible-extract": flexible_extract,
    "strict-match": strict_match,
    "math-verify": math_verify,
}


def _extracted(item: Item, text: str, name: str) -> bool | None:
    """By the harness' filter of that name and its exact match."""
    if item.gold is None:
        return None
    from lm_eval.api.instance import Instance

    task, document = _task(), {"question": "", "answer": f"#### {item.gold}"}
    asked = Instance("generate_until", document, ("", {}), 0, resps=[text])
    next(extraction for extraction in task._filters if extraction.name == name).apply([asked])
    return bool(task.process_results(document, [asked.filtered_resps[name]])["exact_match"])


@cache
def _task() -> ConfigurableTask:
    """The harness' task, over a document that is never asked."""
    from tidar.evaluate.local import Documents
    from tidar.evaluate.tasks import build_from

    document = {"question": "1 + 1?", "answer": "#### 2"}
    (task,) = build_from("gsm8k", Documents([document], [], "nowhere", False)).parts.values()
    return task
