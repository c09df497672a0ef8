"""Write docs/serve-vllm.md from the measurements in results/: `python docs/make_serving.py`."""

from __future__ import annotations

import statistics

from pages import HERE, conditions, load, render, table


def serving(name: str) -> str:
    """Tokens per second and latencies, with and without drafting, a line for each number of requests."""
    result = load(name)
    rows = {(row["mode"], row["concurrency"]): row for row in result["rows"]}
    lines = []
    for count in result["load"]["concurrency"]:
        plain, ours = rows["ar", count], rows["tidar", count]
        gain = ours["tokens_per_s"] / plain["tokens_per_s"]
        if result.get("in_turns"):
            pairs_of = zip(ours["all_tokens_per_s"], plain["all_tokens_per_s"], strict=True)
            gain = statistics.median(a / b for a, b in pairs_of)
        pairs = [
            f"{plain[key]:{form}} / {ours[key]:{form}}"
            for key, form in (("tokens_per_s", ",.0f"), ("ttft_ms", ".0f"), ("ms_per_token", ".2f"))
        ]
        share = f"{gain / ours['tokens_per_step']:.2f}" if ours["tokens_per_step"] > 1.1 else ""
        lines.append([count, *pairs, ours["tokens_per_step"], f"{gain:.2f}", share])
    header = ["requests", "tokens/s, ar / tidar", "first token, ms", "ms a token", "tokens a step", "gain"]
    c = result["conditions"]
    text = f"{conditions(result)}. vLLM {c['vllm']}, greedy, template {c['template']}; medians of "
    turns = " in turns (the gain: of theirs)" if result.get("in_turns") else ""
    text += f"{result['load']['repeats']} passes{turns} after one to warm up; "
    text += f"curve {result['curve']} (requests, K, outcomes).\n\n"
    return text + table([*header, "of a step's tokens"], lines)


def checked(name: str) -> str:
    """What `make vllm-check` found, a line for each engine."""
    result = load(name)
    c, lines = result["conditions"], []
    for row in result["rows"]:
        steps = row["tokens_per_step"]
        engine = f"{'plain' if row['mode'] == 'ar' else 'drafting'}, {row['gpus']} GPU{'s' if row['gpus'] > 1 else ''}"
        same = f"{row['same_as_plain']} of {row['answers']}"
        lines.append([engine, same, row["largest_gap"], steps["alone"], steps["together"], row["start_s"]])
    text = f"{conditions(result)}. vLLM {c['vllm']}, greedy, template {c['template']}, "
    text += f"{c['max_new_tokens']} new tokens at most.\n\n"
    header = [
        "engine",
        f"answers as {result['compared_with']}",
        "largest gap",
        "tokens a step, the first alone",
        "together",
        "start, s",
    ]
    return text + table(header, lines)


MAKERS = {"serving": serving, "checked": checked}

if __name__ == "__main__":
    (HERE / "serve-vllm.md").write_text(render("serve-vllm", MAKERS))
