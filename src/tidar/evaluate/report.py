"""The report of `tidar compare`: one self-contained HTML page, and the same as Markdown.

The page loads nothing and runs nothing (its own policy forbids both). What models wrote is data: always escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from tidar.evaluate.analysis import Analysis, Effect, Row, Score
from tidar.evaluate.charts import Point, histogram, lines, scatter
from tidar.evaluate.statistics import Interval

GROUPS = ("ar", "tidar", "block-diffusion", "assisted", "prompt-lookup", "transformers")
"""Kinds, by the number of their colour."""
NOT_HERE = "-"
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --soft: #59636e; --line: #d5dae0; --card: #f5f7f9;
  --c0: #5b6570; --c1: #0b62d6; --c2: #b34700; --c3: #17803d; --c4: #8a2be2; --c5: #a0136b; --on: #fff }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e6e9ed; --soft: #9aa5b1; --line: #343c46;
  --card: #1d232a; --c0: #a7b1bc; --c1: #6cb0ff; --c2: #ff9d5c; --c3: #66d08a; --c4: #c79bff; --c5: #ff8fd0;
  --on: #10141a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 68rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem }
p, ul { margin: .4rem 0 } ul { padding-left: 1.2rem } .soft, figcaption { color: var(--soft); font-size: .85rem }
.wide { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top }
th { color: var(--soft); font-weight: 600 }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8.5rem;
  position: sticky; left: 0; background: var(--bg) }
td small { color: var(--soft); display: block; font-size: .78rem }
.text th, .text td { text-align: left } .text td { white-space: normal; overflow-wrap: anywhere }
.better { color: var(--c3); font-weight: 600 } .worse { color: var(--c2); font-weight: 600 }
figure { margin: .6rem 0 } svg { width: 100%; height: auto; max-width: 44rem; display: block }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem }
.many figure { background: var(--card); border-radius: .5rem; padding: .6rem .7rem; margin: 0 }
.many b { font-size: .88rem }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem }
.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem }
.key i { display: inline-block; min-width: 1.35rem; height: 1.35rem; line-height: 1.35rem; border-radius: 1rem;
  text-align: center; font-style: normal; font-size: .72rem; color: var(--on); margin-right: .35rem }
pre { white-space: pre-wrap; background: var(--card); padding: .6rem .7rem; border-radius: .5rem; font-size: .82rem;
  margin: .2rem 0 .7rem; overflow-wrap: anywhere }
details { margin: .5rem 0 } summary { cursor: pointer }
.t { fill: var(--soft); font-size: 11px } .l { fill: var(--fg); font-size: 12px } .n { fill: var(--on); font-size: 11px;
  font-weight: 700; text-anchor: middle } .m { text-anchor: middle } .e { text-anchor: end }
.grid { stroke: var(--line); stroke-width: .7 } .axis { stroke: var(--soft); fill: none }
.bar { stroke: currentColor; stroke-width: 1.6; opacity: .65; fill: none } .band { fill: currentColor; opacity: .15 }
.line { stroke: currentColor; stroke-width: 2; fill: none } circle, rect { fill: currentColor }
""" + "".join(f"svg .g{i} {{ color: var(--c{i}) }} i.g{i} {{ background: var(--c{i}) }}\n" for i in range(len(GROUPS)))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def to_html(analysis: Analysis) -> str:
    """The whole page."""
    title = escape(f"{analysis.model}: {len(analysis.rows)} methods on {analysis.prompts} prompts")
    parts = [
        f"<h1>{title}</h1><p class=soft>{escape(setting(analysis))}</p>",
        "<h2>What is shown</h2>" + _list(analysis.findings),
        "<h2>What this cannot show</h2>" + _list(analysis.limits),
        "<h2>Methods</h2>" + _table(main_table(analysis), _caption(analysis)),
        _quality_html(analysis),
        "<h2>Tokens gained by a forward</h2>" + _histograms(analysis),
        _trust_html(analysis),
        _optional("By category", category_table(analysis), setting(analysis)),
        _optional(
            "Tasks", score_table(analysis), "Scores of `tidar evaluate` ± their standard errors; no tests.", "text"
        ),
        "<h2>What ran</h2>" + _table(facts_table(analysis), _caption(analysis)),
        "<h2>First answers</h2>" + "".join(map(_sample, analysis.samples)),
        f"<h2>Conditions</h2>{_table(conditions_table(analysis), '', 'text')}",
    ]
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head><body>'
    )
    return head + "\n".join(part for part in parts if part) + "</body></html>\n"


def to_markdown(analysis: Analysis) -> str:
    """Everything but charts and answers, which the HTML has."""
    parts = [
        _plain(f"# {analysis.model}: {len(analysis.rows)} methods on {analysis.prompts} prompts"),
        _plain(setting(analysis)),
        "## What is shown\n\n" + "\n".join(f"- {_plain(text)}" for text in analysis.findings),
        "## What this cannot show\n\n" + "\n".join(f"- {_plain(text)}" for text in analysis.limits),
    ]
    sections = [
        ("Methods", main_table(analysis)),
        ("Tokens gained by a forward", gains_table(analysis)),
        ("Trust", trust_table(analysis)),
        ("By category", category_table(analysis)),
        ("Tasks", score_table(analysis)),
        ("What ran", facts_table(analysis)),
        ("Conditions", conditions_table(analysis)),
    ]
    parts += [f"## {title}\n\n{_markdown_table(table)}" for title, table in sections if len(table) > 1]
    return "\n\n".join(parts) + "\n"


# What is said


def setting(analysis: Analysis) -> str:
    """The conditions that belong to every figure, in one line."""
    c = analysis.conditions
    found = {str(row.facts["K"]) for row in analysis.rows if row.facts["K"] is not None}
    lengths = ", ".join(sorted(found, key=lambda text: (len(text), text)))
    dtypes = ", ".join(dict.fromkeys(row.facts["dtype"] for row in analysis.rows))
    threads = f" ({c['threads']} threads)" if c.get("threads") else ""
    return (
        f"Template {c['template']}, {dtypes}, {c['device']}{threads}, K {lengths or 'none'}, temperature "
        f"{c['temperature']:g}, batch {c['batch']}, at most {c['max_new_tokens']} new tokens, "
        f"{analysis.prompts} prompts, commit {c['commit'] or 'unknown'}, {c['date']}."
    )


Cell = str | tuple[str, str]
"""A text, or a text and what stands small below it; "better" and "worse" as the second word of a pair are coloured."""
Table = list[list[Cell]]


def main_table(analysis: Analysis) -> Table:
    header: list[Cell] = ["method", "tokens/forward", "tokens/s", f"speed against {analysis.baseline}", "right answers"]
    header += ["difference", "same answer"]
    rows: Table = [header]
    for row in analysis.rows:
        accuracy: Cell = NOT_HERE
        if row.accuracy is not None and row.accuracy_error is not None:
            a = row.accuracy
            accuracy = (f"{a.value:.1%} ± {row.accuracy_error:.1%}", f"{a.low:.1%} to {a.high:.1%}")
        rows.append(
            [
                (row.name, _drafting(row)),
                _interval(row.tokens_per_forward, lambda v: f"{v:.2f}"),
                _interval(row.tokens_per_s, lambda v: f"{v:,.1f}"),
                _effect(row.faster, lambda v: f"{v:.2f}x"),
                accuracy,
                _effect(row.righter, lambda v: f"{v:+.1%}"),
                f"{row.identical}/{analysis.prompts}",
            ]
        )
    return rows


def _drafting(row: Row) -> str:
    """K and trust, where the method has them."""
    trust = f"trust {row.facts['trust']:g}" if row.facts["trust"] is not None else ""
    return ", ".join(filter(None, (f"K {row.facts['K']}" if row.facts["K"] is not None else "", trust)))


def category_table(analysis: Analysis) -> Table:
    categories = list(analysis.rows[0].categories)
    if len(categories) < 2:
        return []
    rows: Table = [["method", *categories]]
    for row in analysis.rows:
        cells: list[Cell] = [(f"{f:.2f} a forward", f"{s:,.1f}/s") for f, s in (row.categories[c] for c in categories)]
        rows.append([row.name, *cells])
    return rows


def score_table(analysis: Analysis) -> Table:
    tasks = list(dict.fromkeys(task for row in analysis.rows for task in row.scores))
    if not tasks:
        return []
    rows: Table = [["method", *tasks, "measured with"]]
    for row in analysis.rows:
        settings = dict.fromkeys(score.setting for score in row.scores.values())
        rows.append([row.name, *(_score(row.scores.get(task)) for task in tasks), "; ".join(settings) or NOT_HERE])
    return rows


def _score(score: Score | None) -> Cell:
    if score is None:
        return NOT_HERE
    error = f" ± {score.standard_error:.1%}" if score.standard_error is not None else ""
    return (f"{score.value:.1%}{error}", f"{score.items} items")


def gains_table(analysis: Analysis) -> Table:
    most = max(len(row.gains) for row in analysis.rows)
    rows: Table = [["method", *(str(n) for n in range(most))]]
    for row in analysis.rows:
        total = sum(row.gains)
        shares = [f"{n / total:.0%}" if n else "" for n in row.gains]
        rows.append([row.name, *shares, *[""] * (most - len(shares))])
    return rows


def trust_table(analysis: Analysis) -> Table:
    rows: Table = [["method", "trust", "tokens/forward", "tokens/s", "right"]]
    for sweep in analysis.trust:
        for row in sweep:
            right = NOT_HERE if row.accuracy is None else f"{row.accuracy.value:.1%}"
            speeds = f"{row.tokens_per_forward.value:.2f}", f"{row.tokens_per_s.value:,.1f}"
            rows.append([row.name, f"{row.facts['trust']:g}", *speeds, right])
    return rows


def facts_table(analysis: Analysis) -> Table:
    rows: Table = [["method", "model", "trained as", "parameters", "dtype", "engine", "draft model"]]
    for row in analysis.rows:
        f = row.facts
        trained = f["objective"] or "plain causal LM"
        trained += ", causal blocks" if f["block_attention"] == "causal" else ""
        draft = NOT_HERE if f["draft_model"] is None else f"{f['draft_model']} ({f['draft_parameters']:,})"
        rows.append([row.name, f["model"], trained, f"{f['parameters']:,}", f["dtype"], f["engine"], draft])
    return rows


def conditions_table(analysis: Analysis) -> Table:
    rows: Table = [["what", "value"]]
    for name, value in analysis.conditions.items():
        rows.append([name, str(value)])
    return rows


def _interval(interval: Interval, form: Callable[[float], str]) -> Cell:
    return (form(interval.value), f"{form(interval.low)} to {form(interval.high)}")


def _effect(effect: Effect | None, form: Callable[[float], str]) -> Cell:
    if effect is None:
        return NOT_HERE
    e = effect.effect
    p = "p < 0.001" if effect.p < 0.001 else f"p = {effect.p:.3f}"
    return (f"{form(e.value)} {effect.shown}", f"{form(e.low)} to {form(e.high)}, {p}")


# HTML


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else "<p>Nothing.</p>"


def _table(table: Table, caption: str, kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in table[0])
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table[1:])
    text = f"<div class=wide><table class={kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return text + (f"<p class=soft>{escape(caption)}</p>" if caption else "")


def _cell(cell: Cell) -> str:
    text, small = cell if isinstance(cell, tuple) else (cell, "")
    shown = next((word for word in ("better", "worse") if text.endswith(f" {word}")), "")
    inner = f"<span class={shown}>{escape(text)}</span>" if shown else escape(text)
    return f"<td>{inner}{f'<small>{escape(small)}</small>' if small else ''}</td>"


def _caption(analysis: Analysis) -> str:
    return (
        f"{setting(analysis)} Intervals: 95%, over prompts; ±: standard error. Better and worse: than "
        f"{analysis.baseline}, by a paired sign-flip test with Holm's correction and an interval that agree."
    )


def _optional(title: str, table: Table, caption: str, kind: str = "numbers") -> str:
    return f"<h2>{title}</h2>{_table(table, caption, kind)}" if table else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _group(row: Row) -> int:
    return GROUPS.index(row.facts["kind"])


def _key(analysis: Analysis) -> str:
    entries = (f"<li><i class=g{_group(r)}>{i}</i>{escape(r.name)}</li>" for i, r in enumerate(analysis.rows, 1))
    return f"<ul class=key>{''.join(entries)}</ul>"


def _quality_html(analysis: Analysis) -> str:
    """Quality against speed (the paper's Figs. 4 and 5), where answers were graded."""
    rows = [(number, row, row.accuracy) for number, row in enumerate(analysis.rows, 1) if row.accuracy is not None]
    if not rows:
        return ""
    charts = []
    for label, of in (
        ("tokens per second", lambda row: row.tokens_per_s),
        ("tokens per forward", lambda row: row.tokens_per_forward),
    ):
        points = [Point(n, row.name, of(row), accuracy, _group(row)) for n, row, accuracy in rows]
        charts.append(
            _figure(scatter(points, label, "right answers", True), f"Crosses: 95% intervals. {setting(analysis)}")
        )
    graded = f"{analysis.graded} graded prompts."
    return f"<h2>Quality and speed</h2><p>{graded}</p>{_key(analysis)}<div class=two>{''.join(charts)}</div>"


def _histograms(analysis: Analysis) -> str:
    figures, most = [], max(len(row.gains) for row in analysis.rows)
    for row in analysis.rows:
        counts = row.gains + [0] * (most - len(row.gains))  # the same scale for all
        chart = histogram(counts, _group(row), f"Tokens gained by a forward of {row.name}")
        mean = f"mean {row.tokens_per_forward.value:.2f}, {sum(row.gains):,} forwards"
        figures.append(f"<figure><b>{escape(row.name)}</b>{chart}<figcaption>{mean}</figcaption></figure>")
    note = "Share of forwards that gained so many tokens, prefills included. " + setting(analysis)
    return f"<div class=many>{''.join(figures)}</div><p class=soft>{escape(note)}</p>"


def _trust_html(analysis: Analysis) -> str:
    """Speed and quality by trust (the paper's Fig. 6)."""
    parts = []
    for sweep in analysis.trust:
        xs = [row.facts["trust"] for row in sweep]
        label = "trust (1: judged by AR logits alone)"
        paces = [row.tokens_per_forward for row in sweep]
        charts = [lines(xs, paces, label, "tokens per forward", False, _group(sweep[0]))]
        accuracies = [row.accuracy for row in sweep if row.accuracy is not None]
        if len(accuracies) == len(sweep):
            charts.append(lines(xs, accuracies, label, "right answers", True, _group(sweep[0])))
        caption = f"{sweep[0].facts['model']}, K = {sweep[0].facts['K']}. Bands: 95% intervals. {setting(analysis)}"
        parts.append(f"<div class=two>{''.join(_figure(chart, caption) for chart in charts)}</div>")
    return "<h2>Trust</h2>" + "".join(parts) if parts else ""


def _sample(sample: dict[str, Any]) -> str:
    marks = {True: " (right)", False: " (wrong)", None: ""}
    answers = "".join(
        f"<h3>{escape(name)}{marks[correct]}</h3><pre>{escape(text)}</pre>" for name, text, correct in sample["answers"]
    )
    gold = f"<p class=soft>Known answer: {escape(str(sample['gold']))}</p>" if sample["gold"] is not None else ""
    question = " ".join(sample["prompt"].split())
    short = question[:100] + ("…" if len(question) > 100 else "")
    return f"<details><summary>{escape(short)}</summary><pre>{escape(sample['prompt'])}</pre>{gold}{answers}</details>"


# Markdown


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[Cell]) -> str:
        texts = [" · ".join(filter(None, cell)) if isinstance(cell, tuple) else cell for cell in cells]
        return "| " + " | ".join(_plain(text).replace("|", "\\|") for text in texts) + " |"

    rule = "|" + "---|" * len(table[0])
    return "\n".join([line(table[0]), rule, *map(line, table[1:])])


def _plain(text: str) -> str:
    """A text on one line that Markdown does not take for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
