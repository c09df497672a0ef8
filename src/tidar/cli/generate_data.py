"""`tidar generate-data`: let a model answer prompts, many at a time, into a file that `tidar train --answers` reads."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from tidar.cli import options as o
from tidar.errors import TidarError
from tidar.sources import BadRows, Reading
from tidar.train.prepare import Prompts, Sources, answer_prompts
from tidar.train.samples import Stored
from tidar.train.selfgen import TEMPERATURES, Generation, readable


def generate_data(
    data: Annotated[
        list[str], typer.Option(help="Prompts: a file, folder, glob or hf:NAME[:CONFIG][:SPLIT] (repeatable).")
    ],
    output: Annotated[Path, typer.Option(help="File for the answers (safetensors); continued if it is there.")],
    model: o.Model = "smollm2-135m",
    jsonl: Annotated[Path | None, typer.Option(help="Write the answers as readable rows too.")] = None,
    answers_per_prompt: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Prompts go round these (repeatable) [default: 0, 0.5, 0.8, 1].")
    ] = None,
    max_new_tokens: o.MaxNewTokens = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are left out, and counted.")] = 768,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together; 0 for as many as memory allows.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Stop after about this long.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed; an answer does not depend on its batch.")] = 0,
    skip_bad_rows: Annotated[bool, typer.Option(help="Count and report bad rows instead of stopping.")] = False,
    row_limit: Annotated[int | None, typer.Option(help="Most rows to take of each source.")] = None,
    stream: Annotated[bool, typer.Option(help="Take rows of hf: data sets as they arrive.")] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Let a model answer prompts by plain decoding. Ctrl-C keeps the answers; the same command then continues."""
    temperatures = tuple(temperature or TEMPERATURES)
    for name, value, least in (
        ("answers-per-prompt", answers_per_prompt, 1),
        ("max-new-tokens", max_new_tokens, 1),
        ("max-prompt-tokens", max_prompt_tokens, 1),
        ("row-limit", 1 if row_limit is None else row_limit, 1),
        ("batch-size", batch_size, 0),
        ("seed", seed, 0),
        *(("temperature", t, 0) for t in temperatures),
    ):
        if not least <= value < math.inf:
            raise TidarError(f"{name} is {value}, but must be at least {least}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise TidarError(f"minutes is {minutes}, but must be a finite number above 0")
    for path in (output, jsonl):
        if path is not None and path.is_dir():
            raise TidarError(f"{path} is a folder, but must be a file")
    loaded = o.load(model, "none", device, dtype, None)
    if loaded.tokenizer is None:
        raise TidarError(f"{model} has no tokenizer, so prompts cannot be encoded")
    context = loaded.network.max_positions or math.inf
    how = Generation(
        temperatures=temperatures,
        answers=answers_per_prompt,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=int(min(max_prompt_tokens, context - 1)),
        batch_size=batch_size or None,
        seed=seed,
        seconds=None if minutes is None else 60 * minutes,
    )
    sources = Sources(data, Reading(row_limit, stream), BadRows(skip_bad_rows))
    stored, prompts = answer_prompts(loaded, sources, how, output)
    if jsonl is not None:
        _write_rows(jsonl, stored, prompts, how, loaded.tokenizer)
    tokens = int(stored.samples.answers.sum())
    print(f"{output}: {len(stored.samples):,} answers, {tokens:,} tokens of answers", file=sys.stderr)


def _write_rows(
    path: Path, stored: Stored, prompts: Prompts, how: Generation, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows that `tidar train --no-self-generate` reads: the prompt as it was given, and the answer's text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in readable(stored, len(prompts.ids), how):
            answer = tokenizer.decode(row.token_ids, skip_special_tokens=True)
            entry = {"prompt": prompts.placed[row.prompt].prompt, "answer": answer, "temperature": row.temperature}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
