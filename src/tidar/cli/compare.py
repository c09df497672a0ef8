"""`tidar compare`: several methods on the same prompts, and a report of what that shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from tidar.cli import files
from tidar.cli import options as o
from tidar.config import require_choice
from tidar.errors import TidarError, first_line
from tidar.evaluate import require_packages
from tidar.evaluate.analysis import analyse
from tidar.evaluate.compare import compare as run_all
from tidar.evaluate.gsm8k import GRADERS
from tidar.evaluate.items import Item, read_items
from tidar.evaluate.methods import Method, Settings, parse_method, read_methods
from tidar.evaluate.report import to_html, to_markdown

ENDINGS = (".json", ".md", ".html")
RENDERING = ("render", "out", "baseline", "scores")
"""Options that a report is made by; the others are of the run."""


def compare(
    context: Context,
    prompts: Annotated[list[str] | None, Option(help="NAME=FILE.jsonl[:FIRST_N] (repeatable).")] = None,
    method: Annotated[
        list[str] | None,
        Option(
            help="KIND[:FOLDER][:OPTIONS] (repeatable): tidar:K=8,trust=0.5, ar, ar:FOLDER, "
            "block-diffusion:FOLDER:confidence>0.9, assisted:DRAFTMODEL, prompt-lookup, transformers."
        ),
    ] = None,
    methods: Annotated[Path | None, Option(help="YAML file with a list of them.")] = None,
    model: o.Model = "smollm2-135m",
    out: Annotated[Path, Option(help="Where to write: OUT.json, OUT.md, OUT.html.")] = Path("compare"),
    render: Annotated[Path | None, Option(help="Run nothing: make the report of this JSON file again.")] = None,
    baseline: Annotated[
        str | None, Option(help="Method that others are tested against [default: the first ar].")
    ] = None,
    scores: Annotated[
        list[str] | None, Option(help="METHOD=RESULT.json (repeatable): scores of `tidar evaluate` for the report.")
    ] = None,
    passes: Annotated[int, Option(help="Times every method answers everything; medians count.")] = 1,
    grader: Annotated[
        str, Option(help=f"What judges GSM8K answers: {', '.join(GRADERS)}, or none. Needs tidar[eval].")
    ] = "flexible-extract",
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Compare methods on the same prompts, one prompt at a time, and write a report."""
    graded = dict(map(read_scores, scores or []))
    if render is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if idle := [f"--{name.replace('_', '-')}" for name in given if name not in RENDERING]:
            raise TidarError(f"--render makes a report of what was measured: leave {', '.join(idle)} out")
        write_report(_read_json(render), out, baseline, graded)
        return
    named = [parse_method(text) for text in method or []] + (read_methods(methods) if methods is not None else [])
    _check(prompts, named, passes, baseline, graded)
    require_choice("grader", grader, (*GRADERS, "none"))
    items = [item for text in prompts or [] for item in read_set(text)]
    grade = None if all(item.gold is None for item in items) else GRADERS.get(grader)
    if grade is not None:
        require_packages("grading GSM8K answers (--grader none leaves them ungraded)")
    files.check_writable(*(files.named(out, ending) for ending in ENDINGS))
    o.be_quiet()
    settings = Settings(model, max_new_tokens, temperature, seed, device, dtype)
    measured = run_all(named, items, settings, passes, grade)
    result = files.kept(measured, files.named(out, ".json"), indent=None)
    write_report(result, out, baseline, graded)


def _check(
    prompts: list[str] | None,
    methods: list[Method],
    passes: int,
    baseline: str | None,
    scores: dict[str, Any],
) -> None:
    """What would only show after measuring."""
    if not prompts:
        raise TidarError("no prompts: give --prompts NAME=FILE.jsonl[:FIRST_N]")
    if not methods:
        raise TidarError("no methods: give --method (for example --method ar --method tidar) or --methods FILE.yaml")
    o.check_counts(passes=passes)
    names = [m.name for m in methods]
    for name in ([baseline] if baseline is not None else []) + list(scores):
        if name not in names:
            raise TidarError(f"no method is called {name!r}; there are {', '.join(map(repr, names))}")


def read_set(text: str) -> list[Item]:
    """NAME=FILE[:FIRST_N]; rows without a category are of category NAME."""
    name, file, limit = files.prompt_set(text)
    return read_items(file, name, limit)


def read_scores(text: str) -> tuple[str, Any]:
    """METHOD=RESULT.json as the method's name and the result of `tidar evaluate`."""
    name, _, file = text.rpartition("=")  # names of methods may hold one too
    if not name or not file:
        raise TidarError(f"--scores {text!r} is not METHOD=RESULT.json")
    result = _read_json(Path(file))
    if not isinstance(result, dict) or not {"tasks", "conditions"} <= result.keys():
        raise TidarError(f"{file} is no result of `tidar evaluate`")
    return name, result


def write_report(
    result: dict[str, Any], out: Path, baseline: str | None = None, scores: dict[str, Any] | None = None
) -> None:
    """Write OUT.html and OUT.md, and print where and what is shown."""
    analysis = analyse(result, baseline, scores)
    for ending, text in ((".md", to_markdown(analysis)), (".html", to_html(analysis))):
        files.write_text(files.named(out, ending), text)
    print("\n".join(analysis.findings))
    print(f"wrote {files.named(out, '.html')} and {files.named(out, '.md')}", file=sys.stderr)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TidarError(f"cannot read {path} as JSON: {first_line(error)}") from error
