"""`tidar evaluate speculation`: how far drafts get, by category of prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

from tidar.bench import machine
from tidar.cli import files
from tidar.cli import options as o
from tidar.evaluate.items import read_items
from tidar.evaluate.speculation import TIE, measure
from tidar.prompts import template_name


def speculation(
    prompts: Annotated[Path, Option(help="JSONL: MT-Bench, Spec-Bench, GSM8K, or rows with 'prompt' or 'messages'.")],
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    out: Annotated[Path | None, Option(help="Write everything that was measured to this JSON file.")] = None,
    limit: Annotated[int | None, Option(help="Take the first prompts only.")] = None,
    turns: Annotated[
        int, Option(help="Turns of a conversation that are asked; later ones go on from AR's answer.")
    ] = 1,
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = 0,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = None,
    batch_size: Annotated[int, Option(help="Prompts decoded together; tokens/s depend on it.")] = 1,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Measure tokens per forward, acceptance lengths, tokens/s and parity with plain decoding, by category."""
    o.check_counts(limit=limit, turns=turns, batch_size=batch_size)
    items = read_items(prompts, limit=limit)
    files.check_writable(out)
    loaded = o.load(model, drafter, device, dtype, weights)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    drafts = {"draft_length": draft_length, "outcomes": outcomes, "alternatives": alternatives, "plan": plan}
    measured = measure(loaded, items, turns, batch_size, max_new_tokens=max_new_tokens, **sampling, **drafts)
    trained = loaded.config.block_size if loaded.config is not None else None
    result: dict[str, Any] = {
        "conditions": machine.conditions(loaded.network.device, loaded.network.lm.dtype)
        | {"template": template_name(loaded.tokenizer), "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        | sampling
        | drafts
        | {"trained_block_size": trained, "tie_in_rounding_steps": TIE, "prompts": prompts.name},
        "model": files.model_name(model),
        "weights": weights,
        **measured,
    }
    if out is not None:
        files.write_json(out, result)
        print(f"wrote {out}", file=sys.stderr)
    show(result)


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console, conditions = Console(), result["conditions"]
    length = conditions["draft_length"] or f"{conditions['trained_block_size']} (as trained)"
    where = f"{conditions['device']}, {machine.precision(result)}, batch {conditions['batch_size']}"
    how = f"temperature {conditions['temperature']:g}, K = {length}, template {conditions['template']}"
    title = f"{result['model']}: {where}, {how}"
    table = Table("", "prompts", "tokens/forward", "tokens/s", "AR tokens/s", "identical to AR", title=title)
    for row in result["rows"]:
        same = "not asked at temperature > 0"
        if "identical_to_ar" in row:
            same = f"{row['identical_to_ar']}/{row['prompts']}"
            same += f", {row['parted_at_tie']} parted at a tie" if row["parted_at_tie"] else ""
            same += f", {row['different']} DIFFERENT" if row["different"] else ""
        speeds = (f"{row[key]:,.1f}" for key in ("tokens_per_s", "ar_tokens_per_s"))
        table.add_row(row["category"], str(row["prompts"]), f"{row['tokens_per_forward']:.2f}", *speeds, same)
    console.print(table)
    longest = max(len(row["acceptance_length_counts"]) for row in result["rows"])
    gains = Table("", *(f"{n}" for n in range(1, longest)), title="share of steps that gained so many tokens")
    stood = Table("", *(f"{n}" for n in range(2, longest)), title="share of steps in which that draft stood")
    for row in result["rows"]:
        counts = row["acceptance_length_counts"]
        gains.add_row(row["category"], *(f"{n / max(1, sum(counts)):.2f}" for n in counts[1:]))
        stood.add_row(row["category"], *(f"{share:.2f}" for share in row["stood"]))
    console.print(gains)
    if longest > 2:
        console.print(stood)
