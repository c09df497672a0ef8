"""From what was measured to what may be said: every figure with its interval, every "better" with a test."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from tidar.errors import TidarError
from tidar.evaluate.compare import VERSION
from tidar.evaluate.statistics import (
    LEVEL,
    Interval,
    holm,
    mean_interval,
    paired_p,
    ratio_interval,
    relative_interval,
    share_error,
    share_interval,
    smallest_p,
    verdict,
)

SMALL = 1_000_000_000
"""Parameters below which a report warns what such a model cannot show."""


@dataclass
class Effect:
    """A method against the baseline: the effect, its p-value after Holm's correction, and what that shows."""

    effect: Interval
    p: float
    shown: str


class Score(NamedTuple):
    """What a model reached in a task, with what kind of error over how many items, and what that was measured with."""

    value: float
    standard_error: float | None
    items: int
    setting: str


@dataclass
class Row:
    """One method.

    Attributes:
        facts: as in the JSON, see `compare`.
        tokens_per_forward, tokens_per_s: sums over prompts, prefills counted.
        accuracy, accuracy_error: share of right answers, where any were graded.
        faster, righter: against the baseline; None for the baseline itself. `faster` is the ratio of tokens per second,
            `righter` the difference of accuracies.
        identical: answers that are the baseline's, token for token.
        gains: how often a forward gained n tokens.
        categories: tokens per forward and per second by category.
        scores: of tasks, by their names, where `tidar evaluate` ran the method's model.
    """

    facts: dict[str, Any]
    tokens_per_forward: Interval
    tokens_per_s: Interval
    new_tokens: int
    accuracy: Interval | None
    accuracy_error: float | None
    faster: Effect | None
    righter: Effect | None
    identical: int
    gains: list[int]
    categories: dict[str, tuple[float, float]]
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.facts["name"])


@dataclass
class Analysis:
    """Everything that a report shows, rows in the order of the methods."""

    conditions: dict[str, Any]
    model: str
    baseline: str
    prompts: int
    graded: int
    rows: list[Row]
    findings: list[str]
    limits: list[str]
    trust: list[list[Row]]
    samples: list[dict[str, Any]]


def analyse(result: dict[str, Any], baseline: str | None = None, scores: dict[str, Any] | None = None) -> Analysis:
    """Statistics of a result of `compare`.

    Args:
        baseline: the method that others are tested against; by default the first "ar", else the first method.
        scores: results of `tidar evaluate` by method.

    Raises:
        TidarError: for another file, a method that is not in it, or scores that are no result of `tidar evaluate`.
    """
    if not isinstance(result, dict) or result.get("version") != VERSION or not result.get("runs"):
        raise TidarError("this is no result of `tidar compare` that this version reads")
    try:
        return _analyse(result, baseline, scores or {})
    except KeyError as error:
        raise TidarError(f"this result of `tidar compare` is incomplete: it lacks {error}") from error


def _analyse(result: dict[str, Any], baseline: str | None, scores: dict[str, Any]) -> Analysis:
    methods = result["methods"]
    names = [m["name"] for m in methods]
    baseline = baseline or next((m["name"] for m in methods if m["kind"] == "ar"), names[0])
    for name in (baseline, *scores):
        if name not in names:
            raise TidarError(f"no method is called {name!r}; there are {', '.join(map(repr, names))}")
    # An interrupted run has answers to the first prompts only.
    finished = min(len(result["runs"][name]) for name in names)
    if not finished:
        raise TidarError("this result of `tidar compare` has no prompt that all methods answered")
    runs = {name: result["runs"][name][:finished] for name in names}
    items = result["items"][:finished]
    base = runs[baseline]
    rows = [_row(facts, runs[facts["name"]], base, items, facts["name"] == baseline) for facts in methods]
    for effects, nothing in (([r.faster for r in rows], 1.0), ([r.righter for r in rows], 0.0)):
        _correct([effect for effect in effects if effect is not None], nothing)
    for row in rows:
        row.scores = _scores(row.name, scores[row.name]) if row.name in scores else {}
    graded = sum(record["correct"] is not None for record in base)
    return Analysis(
        result["conditions"],
        result["model"],
        baseline,
        len(items),
        graded,
        rows,
        _findings(rows, baseline),
        _limits(result, rows, len(items), graded),
        _trust_sweeps(rows),
        _samples(items, runs, names),
    )


def _scores(name: str, result: dict[str, Any]) -> dict[str, Score]:
    """The reported score of every task, by task and score."""
    try:
        c, found = result["conditions"], {}
        for task, summary in result["tasks"].items():
            mean, how = summary["scores"][summary["score"]], c["decoding"] if "forwards" in summary else None
            setting = [f"template {c['template']}", c["dtype"], c["device"], f"commit {c['commit'] or 'unknown'}"]
            if how is not None:
                setting += [f"mode {how['mode']}", f"K {how['draft_length']}", f"temperature {how['temperature']:g}"]
            if bound := summary.get("likelihood"):
                setting.append(f"{bound['kind']}, {bound['samples']} samples")
            label = f"{task}, {summary['score']}"
            value, error = float(mean["value"]), mean["standard_error"]
            found[label] = Score(value, error, int(summary["items"]), ", ".join(map(str, setting)))
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TidarError(f"the scores of {name!r} are no result of `tidar evaluate` that this version reads") from error


def _row(
    facts: dict[str, Any],
    run: list[dict[str, Any]],
    base: list[dict[str, Any]],
    items: list[dict[str, Any]],
    is_base: bool,
) -> Row:
    tokens, forwards, seconds = _columns(run)
    right = [r["correct"] for r in run if r["correct"] is not None]
    counts = Counter(gain for record in run for gain in record["gains"])
    groups: dict[str, tuple[float, float]] = {}
    for category in dict.fromkeys(item["category"] for item in items):
        mine = [r for r, item in zip(run, items, strict=True) if item["category"] == category]
        n, f, s = map(sum, _columns(mine))
        groups[category] = (n / f, n / s)
    return Row(
        facts,
        ratio_interval(tokens, forwards),
        ratio_interval(tokens, seconds),
        int(sum(tokens)),
        share_interval(right) if right else None,
        share_error(right) if right else None,
        None if is_base else _faster(run, base),
        None if is_base else _righter(run, base),
        sum(a["token_ids"] == b["token_ids"] for a, b in zip(run, base, strict=True)),
        [counts[n] for n in range(max(counts, default=0) + 1)],
        groups,
    )


def _columns(run: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Tokens, forwards and seconds of every answer."""
    return [r["new_tokens"] for r in run], [r["forwards"] for r in run], [median(r["seconds"]) for r in run]


def _faster(run: list[dict[str, Any]], base: list[dict[str, Any]]) -> Effect:
    """Ratio of tokens per second; tested by the logarithm of each prompt's ratio."""
    tokens, _, seconds = _columns(run)
    base_tokens, _, base_seconds = _columns(base)
    ratios = [
        math.log(n / s) - math.log(n0 / s0)
        for n, s, n0, s0 in zip(tokens, seconds, base_tokens, base_seconds, strict=True)
    ]
    return Effect(relative_interval(tokens, seconds, (base_tokens, base_seconds)), paired_p(ratios), "")


def _righter(run: list[dict[str, Any]], base: list[dict[str, Any]]) -> Effect | None:
    """Difference of accuracies on the items that both were graded on; None without any."""
    both = [
        float(a["correct"]) - float(b["correct"])
        for a, b in zip(run, base, strict=True)
        if a["correct"] is not None and b["correct"] is not None
    ]
    return Effect(mean_interval(both), paired_p(both), "") if both else None


def _correct(effects: list[Effect], nothing: float) -> None:
    """Correct the p-values of one question, asked about several methods, and say what they show."""
    for effect, p in zip(effects, holm([e.p for e in effects]), strict=True):
        effect.p, effect.shown = p, verdict(effect.effect, nothing, p)


def _findings(rows: list[Row], baseline: str) -> list[str]:
    """One sentence for each method: what is shown, and what is not; one for all where no quality differs."""
    found = []
    graded = [row.righter for row in rows if row.righter is not None]
    alike = len(graded) > 1 and all(effect.shown == "not shown" for effect in graded)
    for row in rows:
        if row.faster is None:
            continue
        e = row.faster.effect
        pace = f"{e.value:.2f}x the tokens per second of {baseline} (95% interval {e.low:.2f} to {e.high:.2f})"
        words = {"better": "faster", "worse": "slower", "not shown": "no difference in speed shown"}
        text = f"{row.name}: {words[row.faster.shown]}, {pace}"
        if row.righter is not None and not alike:
            d = row.righter.effect
            words = {
                "better": "more right answers",
                "worse": "fewer right answers",
                "not shown": "no difference in quality shown",
            }
            text += f"; {words[row.righter.shown]}, {d.value:+.1%} ({d.low:+.1%} to {d.high:+.1%})"
        found.append(text + ".")
    if alike:
        found.append(f"No difference in quality from {baseline} is shown for any method.")
    return found


def _limits(result: dict[str, Any], rows: list[Row], prompts: int, graded: int) -> list[str]:
    """What this comparison cannot show, said before anybody asks."""
    smallest = min(row.facts["parameters"] for row in rows)
    texts = []
    if smallest < SMALL:
        millions = f"{smallest / 1e6:,.0f}M" if smallest >= 1e6 else f"{smallest:,}"
        texts.append(
            f"A model of {millions} parameters can show how many tokens a forward gives, what a step costs here, and "
            "whether a lossless method changes the answers. It cannot show the quality that a method keeps at useful "
            "sizes: its scores are near the floor, so a method that hurts a good model may look harmless here. Nor do "
            "its speed-ups carry over: at 1.5B or 8B parameters a forward is bound by reading weights, here much of it "
            "is overhead."
        )
    if prompts < len(result["items"]):
        texts.append(f"The run was interrupted: {prompts} of {len(result['items'])} prompts were answered.")
    tests = len(rows) - 1
    if tests * smallest_p(prompts) >= 1 - LEVEL:
        texts.append(
            f"With {prompts} prompts and {tests} method{'s' * (tests > 1)} beside the baseline no difference can be "
            "shown, however large."
        )
    if not graded:
        texts.append("No prompt has a known answer that was graded, so nothing here is about quality.")
    engines = {row.facts["engine"] for row in rows}
    if len(engines) > 1:
        texts.append(
            "Two engines: tidar runs fused layers, transformers its stock ones. Tokens per forward compare methods; "
            "tokens per second between engines compare implementations as well. The method 'transformers' is plain "
            "decoding by the second engine."
        )
    on_gpu = not result["conditions"].get("threads")
    if on_gpu and any(row.facts["kind"] == "block-diffusion" for row in rows):
        texts.append(
            "On a GPU all forwards of our engine are captured CUDA graphs, but for block diffusion's prefills: its "
            "tokens per second are a little lower than they could be, its tokens per forward are not affected."
        )
    if any(row.facts["kind"] == "assisted" for row in rows):
        texts.append("Forwards of a draft model are not counted as forwards; the time that they take is.")
    if result["conditions"]["passes"] == 1:
        texts.append("Each prompt was timed once, by all methods in turn; more passes make times less noisy.")
    texts.append(
        "Intervals and tests are over prompts. They say nothing about another seed of training, another machine or "
        "another kind of text."
    )
    return texts


def _trust_sweeps(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in trust alone, ascending; a sweep has at least two."""
    groups: dict[tuple[Any, ...], dict[float, Row]] = {}
    for row in rows:
        if row.facts["kind"] == "tidar" and row.facts["K"] != "auto":
            others = tuple(sorted((k, v) for k, v in row.facts["options"].items() if k not in ("trust", "K", "plan")))
            key = (row.facts["model"], row.facts["K"], others)
            groups.setdefault(key, {})[row.facts["trust"]] = row
    return [[group[trust] for trust in sorted(group)] for group in groups.values() if len(group) > 1]


def _samples(
    items: list[dict[str, Any]], runs: dict[str, Any], names: list[str], count: int = 3
) -> list[dict[str, Any]]:
    """The first questions, with every method's answer."""
    return [
        {**item, "answers": [(name, runs[name][i]["text"], runs[name][i]["correct"]) for name in names]}
        for i, item in enumerate(items[:count])
    ]
