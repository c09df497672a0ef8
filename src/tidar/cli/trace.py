"""`tidar trace`: one answer with everything that its forwards did, as a page in one file or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from tidar.api import Mode
from tidar.cli import options as o
from tidar.cli.files import check_writable, model_name, write_text
from tidar.decode.record import gather
from tidar.demo.describe import describe
from tidar.demo.page import trace_page
from tidar.errors import TidarError


def trace(
    prompt: Annotated[str, typer.Argument(help="Text to answer.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Page to write [default: trace.html].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead, to stdout or to --out.")] = False,
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    mode: Annotated[str, typer.Option(help="'tidar' drafts and verifies, 'ar' is plain decoding.")] = "tidar",
    race: Annotated[bool, typer.Option(help="Decode plainly as well, to compare.")] = True,
    max_new_tokens: o.MaxNewTokens = 128,
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
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
) -> None:
    """Answer a prompt and write what every forward did: a page that needs no server, or JSON."""
    if not prompt.strip():
        raise TidarError("the prompt is empty")
    out = out or (None if as_json else Path("trace.html"))
    check_writable(out)
    shared: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or [],
        "raw": raw,
    }
    drafting: dict[str, Any] = {
        "draft_length": draft_length,
        "outcomes": outcomes,
        "alternatives": alternatives,
        "plan": plan,
        "remeasure": remeasure,
        "trust": trust,
    }
    loaded = o.load(model, drafter, device, dtype, weights)
    document = {
        **describe(loaded, model_name(model)),
        "prompt": prompt,
        "settings": {**shared, **drafting, "mode": mode},
        "runs": [gather(loaded.trace(prompt, mode=cast(Mode, mode), **shared, **drafting))],
    }
    if race and mode != "ar":
        document["runs"].append(gather(loaded.trace(prompt, mode="ar", **shared)))
    text = json.dumps(document, ensure_ascii=False) + "\n" if as_json else trace_page(document)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
        print(_summary(document, out), file=sys.stderr)


def _summary(document: dict[str, Any], out: Path) -> str:
    runs = [
        f"{run['mode']}: {len(run['token_ids'])} tokens in {run['forwards']} forwards and {run['seconds']:.2f} s"
        for run in document["runs"]
    ]
    return f"{'; '.join(runs)}; written to {out}"
