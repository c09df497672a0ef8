"""`tidar chat`: several turns, streaming; Ctrl-C stops the answer, not the session."""

from __future__ import annotations

import sys
from typing import Any

from tidar.cli import options as o
from tidar.errors import TidarError, memory_for
from tidar.prompts import Message


def chat(
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    mode: o.Mode = "tidar",
    decoder: o.Decoder = None,
    max_new_tokens: o.MaxNewTokens = 512,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = 0,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = None,
    remeasure: o.Remeasure = False,
    trust: o.Trust = 1.0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Chat with a model. An empty line is ignored; Ctrl-D or /exit ends the session, /new starts a new one."""
    loaded = o.load(model, drafter, device, dtype, weights)
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise TidarError(f"{model} has no chat template, so it cannot chat; use `tidar generate --raw`")
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "draft_length": draft_length,
        "outcomes": outcomes,
        "alternatives": alternatives,
        "plan": plan,
        "remeasure": remeasure,
        "trust": trust,
        "mode": mode,
        "decoder": decoder,
    }
    loaded.check(**settings)
    print("Ctrl-C stops an answer, Ctrl-D or /exit leaves, /new forgets the conversation.", file=sys.stderr)
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:  # throws away what was typed, as in a shell
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = []
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        answer, text = None, ""
        try:
            with memory_for("this conversation", "shorten it or lower --max-new-tokens"):
                for update in loaded.stream(messages, **settings):
                    answer, text = update.answer, text + update.text
                    print(update.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except TidarError as error:
            messages.pop()
            print(f"tidar: {error} (/new starts a new conversation)", file=sys.stderr)
            continue
        print()
        messages.append({"role": "assistant", "content": text})
        if answer is not None and answer.forwards:
            print(f"[{answer.tokens_per_forward:.2f} tokens per forward]", file=sys.stderr)
