"""Write docs/baselines.md and its plot from the measurements in results/: `python docs/make_baselines.py`."""

from __future__ import annotations

import re
from typing import Any

from pages import HERE, RESULTS, conditions, load, render, table

from tidar.evaluate.analysis import Row, analyse

COMPARISON, SCORES, TRAINING = (
    f"{name}-h200" for name in ("compare-smollm2-135m", "evaluate-baselines", "training-baselines")
)
NAMES = {  # trained model -> what a reader calls it
    "base": "base model, plain decoding",
    "ar": "AR, fine-tuned",
    "lossless": "TiDAR, lossless, K=8",
    "shipped": "TiDAR, lossless, shipped drafter (trained longer), K=8",
    "paper-4": "TiDAR, all weights, K=4",
    "paper-8": "TiDAR, all weights, K=8",
    "paper-16": "TiDAR, all weights, K=16",
    "paper-random-masks": "TiDAR, all weights, random masks, K=8",
    "causal-blocks": "causal mask tokens, gated LoRA (MTP-like), K=8",
    "block-diffusion": "block diffusion, K=8",
    "draft": "draft model, 6 of 30 layers",
}
DECODERS = ("max-confidence", "left-to-right", "fixed-2", *(f"confidence>0.{n}" for n in (9, 8, 7, 6)))
GENERATIVE = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP"}
CHOICES = {
    "mmlu": "MMLU",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande": "Winogrande",
}


def percent(score: dict[str, float]) -> str:
    return f"{score['value']:.1%} ± {score['standard_error']:.1%}"


def training() -> str:
    """The budget, and what each model took."""
    result = load(f"{TRAINING}.json")
    data, lines = result["conditions"]["answers"], []
    text = f"{conditions(result)}; {result['conditions']['host']}. {result['rows_seen']:,} rows of 1,024 tokens of "
    text += f"{data['samples']:,} answers that the base model gave itself ({data['tokens']:,} tokens).\n\n"
    for name, run in result["runs"].items():
        speed = f"{run['tokens_per_second']:,.0f}" if "tokens_per_second" in run else ""
        options = re.sub(
            r"tidar train |python |--(model|answers|output|out|log-every) \S+ ?", "", run["command"]
        ).strip()
        lines.append([NAMES[name], f"`{options}`", f"{run['seconds']:.0f}", speed])
    return text + table(["model", "options", "seconds", "clean tokens/s"], lines)


def generative() -> str:
    """Scores and tokens per forward of generated answers (the paper's Table 1)."""
    results, lines = load(f"{SCORES}.json"), []
    for name in (
        "base",
        "ar",
        "lossless",
        "shipped",
        "paper-4",
        "paper-8",
        "paper-16",
        "paper-random-masks",
        "causal-blocks",
    ):
        tasks, line = results[name]["tasks"], list[object]([NAMES[name]])
        for task in GENERATIVE:
            mine = tasks.get(task)
            line.append("" if mine is None else percent(mine["scores"][mine["score"]]))
            if task == "gsm8k":
                line.append(percent(mine["scores"]["math_verify"]))
            line.append("" if mine is None else f"{mine['tokens_per_forward']:.2f}")
        lines.append(line)
    header = ["", "GSM8K", "GSM8K, math-verify", "T/NFE", "HumanEval", "T/NFE", "MBPP", "T/NFE"]
    items = ", ".join(f"{title} {results['base']['tasks'][task]['items']:,}" for task, title in GENERATIVE.items())
    return f"{conditions(results['paper-8'])}; items: {items}.\n\n{table(header, lines)}"


def likelihood() -> str:
    """Scores of likelihood tasks (the paper's Tables 2 and 3)."""
    results, lines = load(f"{SCORES}.json"), []
    for name in ("base", "ar", "lossless", "paper-4", "paper-8", "paper-16", "paper-random-masks", "block-diffusion"):
        tasks = results[f"{name}-likelihood"]["tasks"] | results.get(f"{name}-mmlu", {"tasks": {}})["tasks"]
        cells = [percent(tasks[t]["scores"][tasks[t]["score"]]) if t in tasks else "" for t in CHOICES]
        lines.append([NAMES[name], *cells])
    counts = results["base-likelihood"]["tasks"] | results["base-mmlu"]["tasks"]
    bound = results["block-diffusion-likelihood"]["tasks"]["hellaswag"]
    items = ", ".join(f"{title} {counts[t]['items']:,}" for t, title in CHOICES.items())
    text = f"{conditions(results['base-likelihood'])}. Items: {items}; "
    text += f"of block diffusion the first {bound['items']}, bounds of 128 random maskings each.\n\n"
    return text + table(["", *CHOICES.values()], lines)


def decoders() -> str:
    """Block diffusion by decoder (the paper's Table 4), beside TiDAR on the same items' whole set."""
    results, lines = load(f"{SCORES}.json"), []
    for name in DECODERS:
        tasks = results["bd-" + name.replace(">", "-")]["tasks"]
        one, two = tasks["gsm8k"], tasks["humaneval"]
        lines.append(
            [
                f"`{name}`",
                percent(one["scores"]["math_verify"]),
                f"{one['tokens_per_forward']:.2f}",
                percent(two["scores"]["pass@1"]),
                f"{two['tokens_per_forward']:.2f}",
            ]
        )
    items = one["items"]
    return f"First {items} items of GSM8K, all of HumanEval.\n\n" + table(
        ["decoder", "GSM8K, math-verify", "T/NFE", "HumanEval", "T/NFE"], lines
    )


def compared(name: str = COMPARISON, baseline: str | None = None) -> list[Row]:
    return analyse(load(f"{name}.json"), baseline).rows


def against(row: Row) -> str:
    """Tokens per second over the baseline's, with its interval and what that shows."""
    if row.faster is None:
        return ""
    ratio = row.faster.effect
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), {row.faster.shown}"


def speed(name: str, baseline: str) -> str:
    """Tokens per forward and per second, each method against one of them."""
    result, lines = load(f"{name}.json"), []
    for row in compared(name, baseline):
        lines.append([row.name, f"{row.tokens_per_forward.value:.2f}", f"{row.tokens_per_s.value:,.0f}", against(row)])
    return f"{conditions(result)}\n\n" + table(
        ["method", "tokens per forward", "tokens/s", f"against {baseline}"], lines
    )


def trusted(rows: list[Row]) -> list[tuple[float, Row]]:
    """The trust sweep's rows, by trust."""
    return sorted((float(match[1]), row) for row in rows if (match := re.search(r"trust ([\d.]+)$", row.name)))


def plot() -> None:
    """Quality against speed, tokens a forward gains, and the trust sweep."""
    from matplotlib import pyplot

    rows, scores = {row.name: row for row in compared()}, load(f"{SCORES}.json")
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=(1.35, 1, 1)
    )
    _quality(left, rows, scores)
    _gains(middle, rows)
    _trust(right, trusted(list(rows.values())))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(RESULTS / "baselines-h200.png", dpi=140)
    pyplot.close(figure)


def _quality(axes: Any, rows: dict[str, Row], scores: dict[str, Any]) -> None:
    """GSM8K against time over plain decoding's (the paper's Fig. 4 and 5)."""
    points = {
        "ar": "base",
        "ar fine-tuned": "ar",
        "tidar lossless K=8": "lossless",
        "tidar shipped K=8": "shipped",
        "tidar paper K=4": "paper-4",
        "tidar paper trust 1": "paper-8",
        "tidar paper K=16": "paper-16",
        "mtp-like": "causal-blocks",
        "block diffusion max-confidence": "bd-max-confidence",
        "block diffusion >0.6": "bd-confidence-0.6",
    }
    shifts = {
        "ar": (4, 26),
        "ar fine-tuned": (-2, -36),
        "tidar paper K=16": (-62, 8),
        "block diffusion >0.6": (5, 70),
        "block diffusion max-confidence": (5, 70),
        "mtp-like": (5, 5),
        "tidar lossless K=8": (4, -16),
        "tidar shipped K=8": (5, 12),
    }
    for name, model in points.items():
        score = scores[model]["tasks"]["gsm8k"]["scores"]["math_verify"]
        x = rows[name].tokens_per_s.value / rows["ar"].tokens_per_s.value
        colour = "#0b62d6" if name.startswith("tidar") else "#17803d" if "diffusion" in name else "#5b6570"
        axes.errorbar(x, 100 * score["value"], 100 * score["standard_error"], fmt="o", ms=4, color=colour, lw=0.8)
        label = name.replace(" trust 1", " K=8").replace("block diffusion", "BD").replace("max-confidence", "1 a step")
        axes.annotate(
            label, (x, 100 * score["value"]), textcoords="offset points", xytext=shifts.get(name, (5, 4)), fontsize=7
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.18)
    axes.set_xlabel("tokens/s over plain decoding's", fontsize=9)
    axes.set_ylabel("GSM8K, math-verify, %", fontsize=9)
    axes.set_title("quality and speed: a floor, not a ranking", fontsize=9)


def _gains(axes: Any, rows: dict[str, Row]) -> None:
    """Share of forwards that gained n tokens (the paper's NFE distribution)."""
    shown = {
        "tidar shipped K=8": "#0b62d6",
        "tidar lossless K=8": "#6cb0ff",
        "tidar paper trust 1": "#b34700",
        "mtp-like": "#8a2be2",
        "block diffusion >0.6": "#17803d",
    }
    for name, colour in shown.items():
        gains = rows[name].gains
        share = [100 * n / sum(gains) for n in gains]
        axes.plot(
            range(len(share))[1:], share[1:], "o-", ms=3, lw=1.2, color=colour, label=name.replace(" trust 1", " K=8")
        )
    axes.set_xlabel("tokens gained by a forward", fontsize=9)
    axes.set_ylabel("share of forwards, %", fontsize=9)
    axes.legend(fontsize=7.5, frameon=False)
    axes.set_title("how far drafts get", fontsize=9)


def _trust(axes: Any, sweep: list[tuple[float, Row]]) -> None:
    """Tokens per forward by trust (the paper's Fig. 6)."""
    for trust, row in sweep:
        low, high = (
            abs(end - row.tokens_per_forward.value) for end in (row.tokens_per_forward.low, row.tokens_per_forward.high)
        )
        axes.errorbar(trust, row.tokens_per_forward.value, [[low], [high]], fmt="o", ms=4, lw=0.9, color="#b34700")
    axes.set_ylim(bottom=1)
    axes.set_xlabel("trust: 0 diffusion logits, 1 AR logits", fontsize=9)
    axes.set_ylabel("tokens per forward, 95% interval", fontsize=9)
    axes.set_title("TiDAR, all weights, K=8", fontsize=9)


MAKERS = {
    "training": training,
    "generative": generative,
    "likelihood": likelihood,
    "decoders": decoders,
    "speed": speed,
}

if __name__ == "__main__":
    plot()
    (HERE / "baselines.md").write_text(render("baselines", MAKERS))
