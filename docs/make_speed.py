"""Write docs/speed.md from the measurements in results/: `python docs/make_speed.py`."""

from __future__ import annotations

from pages import HERE, RESULTS, conditions, load, render, table

GOALS = {  # draft length, outcomes -> most AR steps a step may cost, by model
    (8, 8): {"random:qwen3-8b": 1.10, "random:qwen2.5-1.5b": 1.15},
    (16, 6): {"random:qwen3-8b": 1.15, "random:qwen2.5-1.5b": 1.20},
    (16, 15): {"random:qwen3-8b": 1.35, "random:qwen2.5-1.5b": 1.40},
}


def slots(name: str, plot: str | None = None) -> str:
    result = load(name)
    drafter = "gated drafter" if result["drafter"] else "no adapter (all-weights conversion)"
    weights = f", {result['weights']} weights" if result.get("weights") else ""
    text = f"### {result['model'].removeprefix('random:')}, {drafter}{weights}\n\n{conditions(result)}\n\n"
    text += (
        f"Weights {result['weights_gb']:.2f} GB; the machine reads {result['read_bandwidth_gb_per_s']:,.0f} GB/s.\n\n"
    )
    if plot:
        text += f"![Latency against tokens in one forward](../results/{plot})\n\n"
    for curve in result["curves"]:
        rows = []
        for step in curve["steps"]:
            leaves = step.get("alternatives", 0)
            shape = (step["draft_length"], step["outcomes"])
            goal = "" if leaves else GOALS.get(shape, {}).get(result["model"], "")
            share = f"{step['share_of_bandwidth']:.0%}"
            rows.append([*shape, leaves, step["slots"], step["ms"], step["ar_steps"], goal, share])
        text += f"Prefix {curve['prefix']:,}:\n\n"
        text += table(["K", "outcomes", "alternatives", "slots", "ms", "AR steps", "goal", "of bandwidth"], rows) + "\n"
    return text


def speed(name: str) -> str:
    result = load(name)
    text, plot = f"{conditions(result)}\n\n", name.replace(".json", ".png")
    if (RESULTS / plot).exists():
        text += f"![Tokens per second](../results/{plot})\n\n"
    if "note" in result:
        text += f"{result['note']}\n\n"
    rows = []
    for r in result["rows"]:
        extra = [r.get(key, "") for key in ("tokens_per_forward", "ms_per_forward", "gb_per_s")]
        same = f"{r['identical_to_ar']}/{r['prompts']}" if "identical_to_ar" in r else ""
        rows.append([r["set"], r["batch"], r["contestant"], f"{r['tokens_per_s']:,.0f}", *extra, same])
    header = ["set", "batch", "contestant", "tokens/s", "tokens per forward", "ms a forward", "GB/s", "same as AR"]
    return text + table(header, rows) + "\n"


def alternatives(name: str) -> str:
    """Tokens per forward by number of alternatives, a line for each set."""
    result = load(name)
    c, rows = result["conditions"], result["rows"]
    counts = sorted({r["alternatives"] for r in rows})
    lines = []
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = {r["alternatives"]: r["tokens_per_forward"] for r in rows if r["set"] == name}
        lines.append([name, *(f"{mine[n]:.2f} ({mine[n] / mine[counts[0]] - 1:+.0%})" for n in counts)])
    same = f"{sum(r['identical_to_ar'] for r in rows)} of {sum(r['prompts'] for r in rows)}"
    text = f"{c['device']}, {c['dtype']}, K = {rows[0]['draft_length']}, all outcomes, greedy, {c['max_new_tokens']} "
    text += f"new tokens, chat template, first {rows[0]['prompts']} prompts, commit {c['commit']}, {c['date']}: "
    text += f"`{c['command']}`. Answers identical to plain decoding: {same}.\n\n"
    return text + table(["alternatives", *map(str, counts)], lines) + "\n"


def weights(*names: str) -> str:
    """The same steps and forwards with weights as they are and quantised, a column for each."""
    results = [load(name) for name in names]
    curves = [result["curves"][0] for result in results]
    kinds = [result["weights"] or result["conditions"]["dtype"] for result in results]

    def line(passes: list[dict[str, float]], firsts: list[dict[str, float]]) -> list[object]:
        return [f"{one['ms']:.2f} ({one['ms'] / first['ms']:.2f})" for one, first in zip(passes, firsts, strict=True)]

    steps, firsts = [c["steps"] for c in curves], [c["steps"][0] for c in curves]
    shapes = ("draft_length", "outcomes", "alternatives", "slots")
    lines = [[same[0][key] for key in shapes] + line(same, firsts) for same in zip(*steps, strict=True)]
    points, ones = [c["forward"] for c in curves], [c["forward"][0] for c in curves]
    counts = [[same[0]["tokens"], *line(same, ones)] for same in zip(*points, strict=True)]
    commands = "; ".join(f"{kind}: `{r['conditions']['command']}`" for kind, r in zip(kinds, results, strict=True))
    plain = {"conditions": {k: v for k, v in results[0]["conditions"].items() if k != "command"}}
    text = f"{results[0]['model'].removeprefix('random:')}, random weights, prefix {curves[0]['prefix']:,}. "
    text += f"{conditions(plain)}. {commands}. Weights take {', '.join(str(r['weights_gb']) for r in results)} GB.\n\n"
    names_of = [f"{kind}, ms" for kind in kinds]
    text += "Whole steps, in brackets over the plain one of the same weights:\n\n"
    text += table(["K", "outcomes", "alternatives", "slots", *names_of], lines)
    text += "\nThe curve, a forward with logits for all of its tokens, in brackets over that of one token:\n\n"
    return text + table(["tokens", *names_of], counts) + "\n"


MAKERS = {"slots": slots, "weights": weights, "alternatives": alternatives, "speed": speed}

if __name__ == "__main__":
    (HERE / "speed.md").write_text(render("speed", MAKERS))
