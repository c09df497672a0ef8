"""`tidar generate`: answer one prompt, or every prompt of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidar.api import TidarModel
from tidar.cli import options as o
from tidar.decode.engine import Answer, Update
from tidar.errors import TidarError
from tidar.prompts import Prompt, read_prompts


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to answer.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with 'prompt', 'messages' or 'turns'.")] = None,
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    mode: o.Mode = "tidar",
    max_new_tokens: o.MaxNewTokens = 256,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = 0,
    stop: o.Stop = None,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    plan: o.PlanName = "auto",
    remeasure: o.Remeasure = False,
    trust: o.Trust = 1.0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, nothing else.")] = False,
) -> None:
    """Answer a prompt (streaming), or every prompt of a JSONL file."""
    if (prompt is None) == (prompts is None):
        raise TidarError("give either a PROMPT or --prompts FILE.jsonl")
    if prompt is not None and not prompt.strip():
        raise TidarError("the prompt is empty")
    jobs: list[Prompt] = [prompt] if prompt is not None else read_prompts(prompts)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or [],
        "mode": mode,
        "draft_length": draft_length,
        "outcomes": outcomes,
        "plan": plan,
        "remeasure": remeasure,
        "trust": trust,
        "raw": raw,
    }
    loaded = o.load(model, drafter, device, dtype)
    if prompt is not None and not as_json:
        _stream(loaded, prompt, settings)
        return
    done = 0

    def progress(update: Update) -> None:
        nonlocal done
        done += update.answer.finish_reason is not None
        if len(jobs) > 1 and update.answer.finish_reason is not None:
            print(f"\r{done}/{len(jobs)} prompts", end="", file=sys.stderr, flush=True)

    answers = loaded.generate(jobs, batch_size=batch_size, on_update=progress, **settings)
    if len(jobs) > 1:
        print(file=sys.stderr)
    for job, answer in zip(jobs, answers, strict=True):
        print(json.dumps(record(job, answer), ensure_ascii=False) if as_json else answer.text)
    if not as_json:
        print(summary(answers), file=sys.stderr)


def _stream(model: TidarModel, prompt: str, settings: dict[str, Any]) -> None:
    answer = None
    for update in model.stream(prompt, **settings):
        answer = update.answer
        print(update.text, end="", flush=True)
    print()
    if answer is not None:
        print(summary([answer]), file=sys.stderr)


def record(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """One line of `--json`."""
    return {
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "new_tokens": answer.new_tokens,
        "forwards": answer.forwards,
        "tokens_per_forward": round(answer.tokens_per_forward, 4),
        "acceptance_lengths": answer.acceptance_lengths,
        "seconds": round(answer.seconds, 4),
        "finish_reason": answer.finish_reason,
    }


def summary(answers: list[Answer]) -> str:
    """Totals in one line."""
    tokens, forwards = sum(a.new_tokens for a in answers), sum(a.forwards for a in answers)
    text = f"{tokens} tokens, {forwards} forwards, {tokens / forwards:.2f} tokens per forward"
    if len(answers) == 1:
        text += f", {tokens / max(answers[0].seconds, 1e-9):.1f} tokens/s"
    return text
