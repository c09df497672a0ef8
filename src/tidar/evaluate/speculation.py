"""How far drafts get, by category of prompt: tokens per forward, acceptance lengths, and parity with AR decoding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from tidar.api import TidarModel
from tidar.decode.engine import Answer
from tidar.errors import PromptError, TidarError
from tidar.evaluate.items import Item
from tidar.layout import chain_layout
from tidar.prompts import Prompt, as_messages, encode_prompt

TIE = 4
"""Two logits tie where they differ by at most this many rounding steps (of the larger one, in the model's dtype): each
is the end of a long sum, whose order differs between two plans, so one step would be too strict."""


class Question(NamedTuple):
    """One turn of an item: its prompt, and both modes' answers."""

    category: str
    prompt: Prompt
    answer: Answer
    ar: Answer


def measure(model: TidarModel, items: Sequence[Item], turns: int, batch_size: int, **options: Any) -> dict[str, Any]:
    """Answer the first `turns` turns of every item with drafts and without; rows of statistics by category.

    The answers that later turns go on from are AR's, so that both modes answer the same prompts.

    Args:
        options: of `TidarModel.generate`, for both modes; what concerns drafts is for the first alone.

    Returns:
        {"rows": [one for each category, then "all" if there are several], "turns"}. See `summary` for a row.
    """
    drafts = {key: options.pop(key, None) for key in ("draft_length", "outcomes", "alternatives", "plan")}
    drafts["plan"] = drafts["plan"] or "fixed"
    model.check(mode="ar", **options)
    model.check(**drafts, **options)
    asked: list[tuple[Item, Prompt]] = [(item, item.prompt) for item in items]
    for mode, more in (("ar", {}), ("tidar", drafts)):  # captures, fused weights, the allocator
        _answer(model, asked[:1], batch_size, mode, options | more | {"max_new_tokens": 8})
    questions, seconds = list[Question](), dict[tuple[str, str], float]()
    for turn in range(turns):
        following = list[tuple[Item, Prompt]]()
        for category in dict.fromkeys(item.category for item, _ in asked):
            mine = [(item, prompt) for item, prompt in asked if item.category == category]
            plain, plain_seconds = _answer(model, mine, batch_size, "ar", options)
            drafted, drafted_seconds = _answer(model, mine, batch_size, "tidar", options | drafts)
            for mode, taken in (("ar", plain_seconds), ("tidar", drafted_seconds)):
                seconds[category, mode] = seconds.get((category, mode), 0.0) + taken
            for (item, prompt), answer, ar in zip(mine, drafted, plain, strict=True):
                questions.append(Question(category, prompt, answer, ar))
                if turn < len(item.more):
                    following.append((item, _next_turn(prompt, ar.text, item.more[turn])))
        asked = following
    greedy = not options.get("temperature")
    categories = list(dict.fromkeys(q.category for q in questions))
    groups = {c: [q for q in questions if q.category == c] for c in categories}
    rows = [summary(model, name, found, seconds, [name], greedy) for name, found in groups.items()]
    if len(rows) > 1:
        rows.append(summary(model, "all", questions, seconds, categories, greedy))
    return {"rows": rows, "turns": turns}


def _answer(
    model: TidarModel, asked: Sequence[tuple[Item, Prompt]], batch_size: int, mode: str, options: dict[str, Any]
) -> tuple[list[Answer], float]:
    started = time.perf_counter()
    try:
        answers = model.generate([prompt for _, prompt in asked], batch_size=batch_size, mode=mode, **options)
    except PromptError as error:
        raise TidarError(f"{asked[error.row][0].place}: {error.reason}") from error
    return answers, time.perf_counter() - started


def _next_turn(prompt: Prompt, answer: str, question: str) -> Prompt:
    return [*as_messages(prompt), {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def summary(
    model: TidarModel,
    name: str,
    questions: Sequence[Question],
    seconds: Mapping[tuple[str, str], float],
    categories: Sequence[str],
    greedy: bool,
) -> dict[str, Any]:
    """Statistics of some questions.

    tokens_per_forward: sum of new tokens over sum of forwards, prefills counted. acceptance_length_counts[n]: steps
    after the prefill that gained n tokens (0 never happens). stood[m]: share of those steps in which at least m + 2
    tokens were gained, that is draft m + 2 stood. stood_given_before: the same, of the steps in which the draft before
    stood. tokens_per_s and ar_tokens_per_s: new tokens over wall seconds, prefills counted.
    """
    answers = [q.answer for q in questions]
    gains = Counter(gain for a in answers for gain in a.acceptance_lengths)
    steps, longest = gains.total(), max(gains, default=1)
    reached = [sum(n for gain, n in gains.items() if gain >= m) for m in range(1, longest + 1)]
    tokens, forwards = sum(a.new_tokens for a in answers), sum(a.forwards for a in answers)
    spent = {mode: sum(seconds[c, mode] for c in categories) for mode in ("tidar", "ar")}
    row: dict[str, Any] = {
        "category": name,
        "prompts": len(questions),
        "new_tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": round(tokens / forwards, 3),
        "acceptance_length_counts": [gains[n] for n in range(longest + 1)],
        "stood": [round(n / max(1, steps), 4) for n in reached[1:]],
        "stood_given_before": [round(n / max(1, b), 4) for b, n in pairwise(reached)],
        "tokens_per_s": round(tokens / spent["tidar"], 1),
        "ar_tokens_per_s": round(sum(q.ar.new_tokens for q in questions) / spent["ar"], 1),
    }
    if greedy:
        row |= parity(model, questions)
    return row


def parity(model: TidarModel, questions: Sequence[Question]) -> dict[str, int]:
    """Of greedy answers: how many are AR's token for token, and how many of the others part at a tie.

    Where two answers part, one forward of the plain causal model over what they share says how far apart the logits of
    the two tokens are. More than `TIE` rounding steps is a real difference (`different`), and a bug.
    """
    assert model.tokenizer is not None
    counts = {"identical_to_ar": 0, "parted_at_tie": 0, "different": 0}
    for q in questions:
        mine, ar = q.answer.token_ids, q.ar.token_ids
        at = next((i for i, (a, b) in enumerate(zip(mine, ar, strict=False)) if a != b), None)
        if at is None:
            counts["identical_to_ar" if mine == ar else "different"] += 1
            continue
        prefix = encode_prompt(model.tokenizer, q.prompt) + ar[:at]
        tied = gap_in_steps(model, prefix, mine[at], ar[at]) <= TIE
        counts["parted_at_tie" if tied else "different"] += 1
    return counts


@torch.inference_mode()
def gap_in_steps(model: TidarModel, prefix: list[int], one: int, other: int) -> float:
    """How far apart the causal model's logits of two tokens after `prefix` are, in rounding steps of the larger one."""
    network = model.network
    ids = torch.tensor([prefix], device=network.device)
    hidden = network(ids, chain_layout(len(prefix), ids.new_empty(1, 0), 1))
    logits = network.lm.get_output_embeddings()(hidden[:, -1:])[0, 0].float()
    step = torch.finfo(network.lm.dtype).eps * float(logits[[one, other]].abs().max())
    return float((logits[one] - logits[other]).abs()) / max(step, 1e-30)
