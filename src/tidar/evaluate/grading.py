"""What the harness' own scores leave out: answers compared as mathematics, and programs that are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from math_verify import parse, verify

from tidar.evaluate import sandbox

Grader = Callable[[Sequence[dict[str, Any]], Sequence[str]], list[bool]]
"""(documents, answers) -> which answers are right."""


def gsm8k_math_verify(documents: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[bool]:
    """math-verify's verdict on GSM8K: the last number or expression of an answer equals what stands behind `####`."""
    gold = [document["answer"].rpartition("####")[2].strip() for document in documents]
    return [bool(verify(parse(right), parse(answer))) for right, answer in zip(gold, answers, strict=True)]


def humaneval_passes(documents: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[bool]:
    """Whether the prompt's function, continued by the answer, passes the problem's `check`."""
    pairs = zip(documents, answers, strict=True)
    return _passes([f"{d['prompt']}{answer}\n\n{d['test']}\n\ncheck({d['entry_point']})\n" for d, answer in pairs])


def mbpp_passes(documents: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[bool]:
    """Whether the answer passes the problem's tests: all of MBPP's assertions, or the program that MBPP+ adds."""
    return _passes([f"{answer}\n\n{_mbpp_test(d)}\n" for d, answer in zip(documents, answers, strict=True)])


def _mbpp_test(document: dict[str, Any]) -> str:
    if document.get("test"):
        return str(document["test"])
    return "\n".join((document.get("test_setup_code") or "", *document["test_list"]))


def _passes(programs: list[str]) -> list[bool]:
    return [verdict.passed for verdict in sandbox.run_all(programs)]
