"""Write docs/ablations.md, its plots and docs/convert.md from the measurements in results/.

python docs/make_training.py
"""

from __future__ import annotations

import io
import math
from itertools import groupby
from statistics import median
from typing import Any

from pages import HERE, RESULTS, conditions, load, render, table
from PIL import Image

Row = dict[str, Any]
SETS = {"gsm8k_test": "GSM8K", "mt_bench": "MT-Bench"}
SLOWEST = {"paper": 2.1, "lossless": 1.5}  # goals: the time of plain AR training that a clean token may take
MFU = {"random:qwen2.5-1.5b": 0.40}  # goal: of plain AR training
ABLATIONS, DISTRIBUTED = "ablations-smollm2-135m", "distributed-h200"


def groups(result: Row) -> dict[str, list[Row]]:
    return {title: list(rows) for title, rows in groupby(result["rows"], key=lambda r: r["group"])}


def error(row: Row) -> float:
    """Standard error of tokens per forward, were all forwards independent; prefills have none."""
    counts = row["acceptance_length_counts"]
    steps = sum(counts)
    mean = sum(n * c for n, c in enumerate(counts, 1)) / steps
    variance = sum((n - mean) ** 2 * c for n, c in enumerate(counts, 1)) / (steps - 1)
    return math.sqrt(variance * steps) / row["forwards"]


def apart(row: Row, first: Row) -> float:
    """How many standard errors of the difference a row is from another."""
    return (row["tokens_per_forward"] - first["tokens_per_forward"]) / math.hypot(error(row), error(first))


def group(*words: str) -> str:
    """The table of the group whose title begins with these words."""
    rows = next(rows for title, rows in groups(load(f"{ABLATIONS}.json")).items() if title.startswith(" ".join(words)))
    measured = [{(m["set"], m["draft_length"]): m for m in row["rows"]} for row in rows]
    columns = [key for key in measured[0] if all(key in m for m in measured)]
    lengths = {length for _, length in columns}
    judged = [name for name in rows[0].get("choices", {}) if all(name in row.get("choices", {}) for row in rows)]
    header = [SETS[name] + (f", K={length}" if len(lengths) > 1 else "") for name, length in columns]
    if len(lengths) == 1:
        header.append("same as AR")
    lines = []
    for row, mine in zip(rows, measured, strict=True):
        line: list[object] = [row["name"] + (f" ({row['commit']})" if "commit" in row else "")]
        for key in columns:
            distance = "" if row is rows[0] else f" ({apart(mine[key], measured[0][key]):+.1f})"
            line.append(f"{mine[key]['tokens_per_forward']:.2f} ± {error(mine[key]):.2f}{distance}")
        if len(lengths) == 1:
            line.append(", ".join(f"{mine[key]['identical_to_ar']}/{mine[key]['prompts']}" for key in columns))
        scores = [row["choices"][name] for name in judged]
        lines.append([*line, *(f"{s['accuracy']:.1%} ± {s['standard_error']:.1%}" for s in scores)])
    return table(["", *header, *judged], lines)


def ablations() -> str:
    """What holds for all groups."""
    result = load(f"{ABLATIONS}.json")
    c, rows = result["conditions"], [m for row in result["rows"] for m in row["rows"]]
    fields = result["rows"][0]["fields"]
    largest = [f"{max(error(m) for m in rows if m['set'] == name):.2f} on {title}" for name, title in SETS.items()]
    text = f"{conditions(result)}\n\n"
    text += f"{c['answers']}. {fields['steps']} steps of {fields['batch-size']} rows of "
    text += f"{fields['sequence-length']:,} tokens. Decoded greedily, chat template, "
    text += f"{c['max_new_tokens']} new tokens, batch {c['batch_size']}. Runs: {c['runs']}; {c['heads']}.\n\n"
    return text + f"One standard error is at most {' and '.join(largest)}."


def throughput(name: str) -> str:
    """What training costs, objective beside objective."""
    result = load(name)
    o, model = result["options"], result["model"].removeprefix("random:")
    text = f"### {model}, random weights\n\n{conditions(result)}\n\n"
    text += f"Rows of {o['sequence_length']:,} tokens, batch {o['batch_size']} x {o['accumulate']}, K = "
    text += f"{o['block_size']}, {o['anchors'] or 'all'} blocks a row"
    text += f"{', gradient checkpointing' if o['gradient_checkpointing'] else ''}. Medians of a run of {o['steps']} "
    text += "steps, the first quarter left out.\n\n"
    lines = []
    for r in result["rows"]:
        goal = ""
        if r["objective"] in SLOWEST:
            goal = f"time at most {SLOWEST[r['objective']]}: " + _met(r["time_per_token"] <= SLOWEST[r["objective"]])
        elif result["model"] in MFU:
            goal = f"MFU at least {MFU[result['model']]:.0%}: " + _met(r["mfu"] >= MFU[result["model"]])
        cells = f"{r['tokens_per_second']:,.0f}", f"{r['time_per_token']:.2f}", f"{r['mfu']:.0%}"
        lines.append([r["objective"], *cells, f"{r['peak_memory_gib']:.1f}", goal])
    return text + table(["objective", "tokens/s", "time a clean token", "MFU", "peak GiB", "goal"], lines)


def _met(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def generation(name: str) -> str:
    result = load(name)
    rows, goal = result["rows"], result["goal_tokens_per_second"]
    each = " and ".join(f"{r['tokens_per_second']:,}" for r in rows)
    text = f"{conditions(result)}\n\n{each} tokens/s ({result['conditions']['runs']}): "
    text += f"{rows[0]['answers']:,} answers, {rows[0]['tokens']:,} tokens. The goal was {goal:,}: "
    return text + _met(min(r["tokens_per_second"] for r in rows) >= goal) + "."


def own(run: Row) -> list[Row]:
    """The log lines that a run wrote itself, not those of the run that it resumed."""
    return [e for e in run["curve"] if e["step"] > run.get("resumed", {}).get("step", 0)]


def speeds(run: Row) -> list[float]:
    """Tokens per second of log lines, without the first, in which layers compile."""
    return [e["tokens_per_second"] for e in own(run)[1:]]


def distributed() -> str:
    result = load(f"{DISTRIBUTED}.json")
    runs = {run["name"]: run for run in result["runs"]}
    one = runs["one"]
    at = {e["step"]: e["loss"] for e in one["curve"]}
    lines = []
    for run in runs.values():
        if run["model"] != one["model"]:
            continue
        speed = speeds(run)
        share = median(speed) / run["processes"] / median(speeds(one))
        off = max(abs(e["loss"] - at[e["step"]]) for e in own(run))
        commit = f" (commit {run['commit']})" if "commit" in run else ""
        spread = f"{median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})"
        peak, last = (own(run)[-1][key] for key in ("peak_memory_gib", "loss"))
        cells = f"{run['processes']} x {run['batch_size']}", spread, "" if run is one else f"{share:.0%}"
        lines.append([run["title"] + commit, *cells, f"{peak:.1f}", f"{last:.4f}", "" if run is one else f"{off:.4f}"])
    c = result["conditions"]
    header = ["", "rows a step", "tokens/s", "scaling efficiency", "peak GiB, each", "last loss", "off one GPU's loss"]
    again = next(run for run in runs.values() if "resumed" in run and run["processes"] == one["processes"])
    share = median(speeds(again)) / median(speeds(one))
    return (
        f"{conditions(result)}; {c['host']}. On one GPU: `{one['command']}`.\n\n{table(header, lines)}\n"
        "Tokens/s are medians over the log lines without the first after a start (in brackets: their range). The last "
        f"column is the largest difference at a log line; losses lie between {min(at.values()):.2f} and "
        f"{max(at.values()):.2f}. The resumed run does the same work as the first row, at {share:.0%} of its tokens/s: "
        "smaller differences of speed mean nothing here."
    )


def large() -> str:
    """The run of 8B, in words."""
    run = next(run for run in load(f"{DISTRIBUTED}.json")["runs"] if run["name"] == "8b")
    last = own(run)[1:]
    text = f"A model of {run['model']}, {run['processes']} GPUs x {run['batch_size']} row of "
    text += (
        f"{run['sequence_length']:,} tokens, {run['anchors']} blocks a row: **{median(speeds(run)):,.0f} tokens/s**, "
    )
    text += f"MFU {median(e['mfu'] for e in last):.0%}, peak {last[-1]['peak_memory_gib']:.1f} GiB a GPU, medians of "
    return text + f"{len(last)} log lines after the first ({run['curve'][-1]['step']} steps): `{run['command']}`."


def ranks(name: str) -> str:
    """How far several processes are from one, at the same weights: the worst of the steps."""
    result = load(name)
    lines = []
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["way"] == way]
        worst = max(mine, key=lambda row: row["furthest_error"])
        cells = (f"{max(row[key] for row in mine):.1e}" for key in ("loss_error", "gradient_error"))
        furthest = worst["furthest"].removeprefix("network.")
        lines.append([way, *cells, f"{worst['furthest_error']:.1e} (`{furthest}`)"])
    header = ["two GPUs against one", "loss", "whole gradient", "parameter that is furthest off"]
    steps = len({row["step"] for row in result["rows"]})
    return f"{conditions(result)}. {result['model']}; relative errors, worst of {steps} steps.\n\n" + table(
        header, lines
    )


def plot_ablations() -> None:
    """Tokens per forward, a bar for each option, K = 8."""
    from matplotlib import pyplot, ticker

    result = load(f"{ABLATIONS}.json")
    figure, panels = pyplot.subplots(1, len(SETS), figsize=(8.4, 8.2), sharey=True, layout="constrained")
    for axes, (name, title) in zip(panels, SETS.items(), strict=True):
        places, labels, place = [], [], 0.0
        for heading, rows in groups(result).items():
            if axes is panels[0]:
                axes.text(-0.02, place, heading.split(",")[0], transform=axes.get_yaxis_transform(), ha="right",
                          va="center", fontsize=8, weight="bold")  # fmt: skip
            place += 1
            for row in rows:
                mine = next(m for m in row["rows"] if (m["set"], m["draft_length"]) == (name, 8))
                is_base = row["fields"] == result["rows"][0]["fields"] and "commit" not in row
                value, colour = mine["tokens_per_forward"], "#4f86c6" if is_base else "#a9bacb"
                axes.barh(place, value - 1, left=1, height=0.72, color=colour)
                axes.errorbar(value, place, xerr=error(mine), color="#1f2933", linewidth=0.9)
                axes.text(value + error(mine) + 0.02, place, f"{value:.2f}", va="center", fontsize=7.5)
                places.append(place)
                labels.append(row["name"])
                place += 1
            place += 0.4
        axes.set_yticks(places, labels, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.xaxis.set_major_locator(ticker.MultipleLocator(0.5))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens per forward", fontsize=9)
        axes.margins(x=0.12)
        axes.set_xlim(left=1)
        axes.set_ylim(place - 0.6, -0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    c = result["conditions"]
    figure.suptitle(
        f"{result['model']}, {c['steps']} steps, K = 8, {c['dtype']}; dark: base run; lines: 1 std. error",
        fontsize=9,
    )
    save(figure, ABLATIONS)


def plot_distributed() -> None:
    """The same run on one GPU and on two: curves, and how far they are apart."""
    from matplotlib import pyplot

    result = load(f"{DISTRIBUTED}.json")
    one = next(run for run in result["runs"] if run["name"] == "one")
    at = {e["step"]: e["loss"] for e in one["curve"]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for run, style in zip(result["runs"], ("o-", "s--", "^-.", "D:"), strict=False):
        if run["model"] != one["model"]:
            continue
        steps = [e["step"] for e in own(run)]
        look = {"label": run["title"], "markersize": 4, "linewidth": 1.2}
        left.plot(steps, [e["cross_entropy"] for e in own(run)], style, **look)
        right.plot(steps, [e["loss"] - at[e["step"]] for e in own(run)], style, **look)
    left.set_ylabel("cross-entropy of the masks, nats")
    right.set_ylabel("loss minus that of one GPU")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{one['model']}, lossless, 16 rows of 1,024 tokens a step, {one['curve'][-1]['step']} steps", fontsize=9
    )
    save(figure, DISTRIBUTED)


def save(figure: Any, name: str) -> None:
    """As a PNG of few colours, which takes a third of the room."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    figure.clear()
    Image.open(picture).convert("RGB").quantize(48).save(RESULTS / f"{name}.png", optimize=True)


def costs() -> str:
    """What a conversion takes, by model and objective."""
    rows = []
    for name in ("train-smollm2-135m-h200", "train-qwen2.5-1.5b-h200"):
        result = load(f"{name}.json")
        device = result["conditions"]["device"].removeprefix("NVIDIA ")
        model = result["model"].removeprefix("random:")
        for row in result["rows"]:
            if row["objective"] in SLOWEST:
                rows.append(
                    _cost(model, row["objective"], f"1 {device}", row["tokens_per_second"], row["peak_memory_gib"])
                )
    result = load(f"{DISTRIBUTED}.json")
    run = next(run for run in result["runs"] if run["name"] == "8b")
    peak = max(entry["peak_memory_gib"] for entry in run["curve"])
    rows.append(_cost("qwen3-8b", "lossless", f"{run['processes']} H200, `--fsdp`", median(speeds(run)), peak))
    header = ["shape", "objective", "GPUs", "clean tokens/s", "peak GiB a GPU", "100M clean tokens, by that"]
    return table(header, rows)


def _cost(model: str, objective: str, gpus: str, speed: float, peak: float) -> list[object]:
    minutes = 1e8 / speed / 60
    time = f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    return [model, objective, gpus, f"{speed:,.0f}", f"{peak:.1f}", time]


MAKERS = {f.__name__: f for f in (costs, ablations, group, throughput, generation, distributed, large, ranks)}

if __name__ == "__main__":
    for page in ("ablations", "convert"):
        (HERE / f"{page}.md").write_text(render(page, MAKERS))
    plot_ablations()
    plot_distributed()
