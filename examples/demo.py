"""The demo: one prompt on the CPU, tokens that one forward committed share a colour, then the comparison with AR.

python examples/demo.py ["your prompt"]
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from tidar import Answer, TidarModel

COLOURS = ("cyan", "yellow", "green", "magenta")
PROMPT = "A farmer has 12 boxes with 8 apples each. He sells 30 apples. How many apples are left? Think step by step."


def main() -> None:
    logging.disable_progress_bar()
    console, prompt = Console(), " ".join(sys.argv[1:]) or PROMPT
    with console.status("loading smollm2-135m (the first time it unpacks weights and times this machine, about 40 s)"):
        model = TidarModel.from_pretrained("smollm2-135m", dtype="float32")  # exact: no ties by rounding
        model.generate("Hello", max_new_tokens=2)  # measures what a forward costs here
    console.print(f"[bold]{prompt}[/bold]\n", highlight=False)
    results = {"tidar": race(console, model, prompt, "tidar"), "ar": race(None, model, prompt, "ar")}
    table = Table("mode", "tokens", "forwards", "tokens per forward", "tokens/s")
    for mode, answer in results.items():
        rate = f"{answer.new_tokens / answer.seconds:.1f}"
        per_forward = f"{answer.tokens_per_forward:.2f}"
        table.add_row(mode, str(answer.new_tokens), str(answer.forwards), per_forward, rate)
    console.print("\n\n[dim]tokens of one colour were drafted and accepted together, in one forward[/dim]\n")
    console.print(table)
    same = results["tidar"].token_ids == results["ar"].token_ids
    console.print("outputs are [bold green]identical[/]" if same else "outputs [bold red]differ[/]")


def race(console: Console | None, model: TidarModel, prompt: str, mode: str) -> Answer:
    answer = Answer(0)
    started = time.perf_counter()
    for forward, update in enumerate(model.stream(prompt, mode=mode, max_new_tokens=160)):
        answer = update.answer
        if console is not None:
            console.print(Text(update.text, style=COLOURS[forward % len(COLOURS)]), end="")
    answer.seconds = time.perf_counter() - started
    return answer


if __name__ == "__main__":
    main()
