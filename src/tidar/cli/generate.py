"""`tidar generate`: answer one prompt, or every prompt of a file."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from tidar.api import TidarModel
from tidar.cli import options as o
from tidar.decode.engine import Answer, Update
from tidar.errors import PromptError, TidarError, memory_for
from tidar.prompts import Placed, Prompt, read_prompts


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to answer.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with 'prompt', 'messages' or 'turns'.")] = None,
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    mode: o.Mode = "tidar",
    decoder: o.Decoder = None,
    max_new_tokens: o.MaxNewTokens = 256,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = 0,
    stop: o.Stop = None,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = None,
    remeasure: o.Remeasure = False,
    trust: o.Trust = 1.0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, nothing else.")] = False,
) -> None:
    """Answer a prompt (streaming), or every prompt of a JSONL file."""
    if (prompt is None) == (prompts is None):
        raise TidarError("give either a PROMPT or --prompts FILE.jsonl")
    if prompt is not None and not prompt.strip():
        raise TidarError("the prompt is empty")
    jobs = read_prompts(prompts) if prompts is not None else [Placed("PROMPT", prompt or "")]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or [],
        "mode": mode,
        "decoder": decoder,
        "draft_length": draft_length,
        "outcomes": outcomes,
        "alternatives": alternatives,
        "plan": plan,
        "remeasure": remeasure,
        "trust": trust,
        "raw": raw,
    }
    loaded = o.load(model, drafter, device, dtype, weights)
    if prompt is not None and not as_json:
        with _memory_for(1):
            _stream(loaded, prompt, settings)
        return
    written = _InOrder([job.prompt for job in jobs], as_json)
    try:
        with _memory_for(min(batch_size, len(jobs))):
            answers = loaded.generate(written.prompts, batch_size=batch_size, on_update=written.update, **settings)
    except PromptError as error:
        raise TidarError(f"{jobs[error.row].place}: {error.reason}") from error
    if not as_json:
        print(summary(answers), file=sys.stderr)


def _memory_for(rows: int) -> AbstractContextManager[None]:
    if rows == 1:
        return memory_for("one prompt", "shorten it or lower --max-new-tokens")
    return memory_for(f"batch size {rows}", "lower --batch-size or --max-new-tokens")


class _InOrder:
    """Prints each answer as soon as it and all before it are finished: what is on stdout survives a Ctrl-C."""

    def __init__(self, prompts: list[Prompt], as_json: bool) -> None:
        self.prompts, self.as_json = prompts, as_json
        self.waiting: dict[int, Answer] = {}
        self.printed = 0

    def update(self, update: Update) -> None:
        if update.answer.finish_reason is None:
            return
        self.waiting[update.answer.row] = update.answer
        while (answer := self.waiting.pop(self.printed, None)) is not None:
            entry = record(self.prompts[self.printed], answer)
            print(json.dumps(entry, ensure_ascii=False) if self.as_json else answer.text, flush=True)
            self.printed += 1
        if len(self.prompts) > 1 and not sys.stdout.isatty():
            done = self.printed + len(self.waiting)
            end = "\r" if done < len(self.prompts) else "\n"
            print(f"{done}/{len(self.prompts)} prompts", end=end, file=sys.stderr, flush=True)


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
