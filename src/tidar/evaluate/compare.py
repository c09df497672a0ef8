"""Run several methods on the same prompts in one process: the measurements of `tidar compare`, as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tidar.api import TidarModel
from tidar.bench import machine
from tidar.errors import TidarError
from tidar.evaluate.gsm8k import Grade
from tidar.evaluate.items import Item
from tidar.evaluate.methods import (
    ASSISTED_K,
    LOOKUP_K,
    Method,
    Models,
    Reply,
    Settings,
    model_of,
    prepare,
)
from tidar.prompts import as_messages, encode_prompt, template_name

VERSION = 1
"""Of the JSON file."""


def compare(
    methods: Sequence[Method],
    items: Sequence[Item],
    settings: Settings,
    passes: int = 1,
    grade: Grade | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer every item by every method, one prompt at a time; yields the result as it grows.

    All models stay in memory. Every prompt is answered by all methods before the next one, each time beginning with
    another, so that what disturbs the machine meanwhile is no difference between methods. Answers are those of the
    first pass; later ones add times.

    Args:
        grade: judges answers, see gsm8k.py; None to leave them ungraded.

    Returns:
        {"version", "conditions", "model", "methods": [facts of each], "items": [...], "runs": {method: [a record for
        each item: text, new_tokens, forwards, gains, seconds (one a pass), correct (None: not graded)]}}.

    Raises:
        TidarError: for methods of one name, a method that its model cannot do, or a prompt that does not fit; before
            anything is measured.
    """
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TidarError(f"two methods are called {twice!r}: give them names of their own (a methods file has 'name')")
    models = Models(settings)
    contestants = {method.name: prepare(method, models) for method in methods}
    _check_prompts(items, models)
    result: dict[str, Any] = {
        "version": VERSION,
        "conditions": _conditions(models, settings, passes) | {"grader": getattr(grade, "__name__", None)},
        "model": settings.model,
        "methods": [_facts(method, models, items) for method in methods],
        "items": [_question(item) for item in items],
        "runs": {name: [] for name in names},
    }
    for name in names:  # captures, fused weights, the allocator
        contestants[name](items[0].prompt, settings.seed)
    for done in range(passes):
        for place, item in enumerate(items):
            first = (done + place) % len(names)
            for name in names[first:] + names[:first]:
                reply = contestants[name](item.prompt, settings.seed * len(items) + place)
                _keep(result["runs"][name], place, item, reply, grade)
            print(f"pass {done + 1}/{passes}: {place + 1}/{len(items)} prompts", end="\r", file=sys.stderr, flush=True)
            yield result
        print(file=sys.stderr)


def _keep(run: list[dict[str, Any]], place: int, item: Item, reply: Reply, grade: Grade | None) -> None:
    """Note an answer, or in later passes its time."""
    if place < len(run):
        run[place]["seconds"].append(round(reply.seconds, 6))
        return
    run.append(
        {
            "text": reply.text,
            "token_ids": reply.token_ids,
            "new_tokens": len(reply.token_ids),
            "forwards": reply.forwards,
            "gains": reply.gains,
            "seconds": [round(reply.seconds, 6)],
            "correct": None if grade is None else grade(item, reply.text),
        }
    )


def _check_prompts(items: Sequence[Item], models: Models) -> None:
    for model in models.loaded.values():
        tokenizer, context = model.tokenizer, model.network.max_positions
        assert tokenizer is not None
        for item in items:
            try:
                length = len(encode_prompt(tokenizer, item.prompt))
            except TidarError as error:
                raise TidarError(f"{item.place}: {error}") from error
            if context is not None and length >= context:
                raise TidarError(
                    f"{item.place}: the prompt has {length} tokens, but a model's context is {context}: shorten it"
                )


def _conditions(models: Models, settings: Settings, passes: int) -> dict[str, Any]:
    model = next(iter(models.loaded.values()))
    return machine.conditions(model.network.device, model.network.lm.dtype) | {
        "template": template_name(model.tokenizer),
        "temperature": settings.temperature,
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens,
        "batch": 1,
        "passes": passes,
    }


def _facts(method: Method, models: Models, items: Sequence[Item]) -> dict[str, Any]:
    """What the report says about a method."""
    model = model_of(method, models)
    config, lm = model.config, model.hf_model
    draft = models.get(method.folder) if method.kind == "assisted" else None
    ours = method.kind in ("tidar", "ar", "block-diffusion")
    return {
        "name": method.name,
        "kind": method.kind,
        "model": method.folder if method.folder is not None and draft is None else models.settings.model,
        "draft_model": None if draft is None else method.folder,
        "draft_parameters": None if draft is None else _parameters(draft),
        "options": method.options,
        "engine": "tidar" if ours else "transformers",
        "K": _draft_length(method, model),
        "trust": float(method.options.get("trust", 1)) if method.kind == "tidar" else None,
        "objective": None if config is None else config.objective,
        "block_attention": None if config is None else config.block_attention,
        "parameters": _parameters(model),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def _parameters(model: TidarModel) -> int:
    """Of the base model; those of a drafter are not counted."""
    return sum(p.numel() for name, p in model.hf_model.named_parameters() if ".lora_" not in name)


def _draft_length(method: Method, model: TidarModel) -> int | str | None:
    """K as the report names it: a number, "auto", or None where nothing is drafted."""
    trained = model.config.block_size if model.config is not None else 8
    if method.kind == "tidar":
        if "K" in method.options:
            return int(method.options["K"])
        fixed = method.options.get("plan") == "fixed" or method.options.keys() & {"outcomes", "alternatives"}
        return trained if fixed or float(method.options.get("trust", 1)) < 1 else "auto"
    if method.kind == "block-diffusion":
        return trained
    default = {"assisted": ASSISTED_K, "prompt-lookup": LOOKUP_K}.get(method.kind)
    return None if default is None else int(method.options.get("K", default))


def _question(item: Item) -> dict[str, Any]:
    return {
        "place": item.place.rsplit("/", 1)[-1],
        "name": item.name,
        "category": item.category,
        "prompt": "\n\n".join(message["content"] for message in as_messages(item.prompt)),
        "gold": item.gold,
    }
