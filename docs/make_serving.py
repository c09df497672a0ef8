"""Write docs/serve-vllm.md from the measurements in results/: `python docs/make_serving.py`."""

from __future__ import annotations

from pages import HERE, conditions, load, render, table


def serving(name: str) -> str:
    """Tokens per second and latencies, with and without drafting, a line for each number of requests."""
    result = load(name)
    rows = {(row["mode"], row["concurrency"]): row for row in result["rows"]}
    lines = []
    for count in result["load"]["concurrency"]:
        plain, ours = rows["ar", count], rows["tidar", count]
        gain = ours["tokens_per_s"] / plain["tokens_per_s"]
        pairs = [
            f"{plain[key]:{form}} / {ours[key]:{form}}"
            for key, form in (("tokens_per_s", ",.0f"), ("ttft_ms", ".0f"), ("ms_per_token", ".2f"))
        ]
        share = f"{gain / ours['tokens_per_step']:.2f}" if ours["tokens_per_step"] > 1.1 else ""
        lines.append([count, *pairs, ours["tokens_per_step"], f"{gain:.2f}", share])
    header = ["requests", "tokens/s, ar / tidar", "first token, ms", "ms a token", "tokens a step", "gain"]
    c = result["conditions"]
    text = f"{conditions(result)}. vLLM {c['vllm']}, greedy, template {c['template']}; medians of "
    text += (
        f"{result['load']['repeats']} passes after one to warm up; curve {result['curve']} (requests, K, outcomes).\n\n"
    )
    return text + table([*header, "of a step's tokens"], lines)


def parity(name: str) -> str:
    p = load(name)["parity"]
    same, answers, gap = (p[key] for key in ("same_as_plain", "answers", "largest_gap"))
    text = (
        f"{same} of {answers} are identical; where the others part, the float32 base model's logits of the two tokens "
    )
    return f"{text}differ by at most {gap}."


MAKERS = {"serving": serving, "parity": parity}

if __name__ == "__main__":
    (HERE / "serve-vllm.md").write_text(render("serve-vllm", MAKERS))
