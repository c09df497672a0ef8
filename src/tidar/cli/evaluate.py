"""`tidar evaluate`: scores on the paper's tasks, with tokens per forward beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tidar.cli import files
from tidar.cli import options as o
from tidar.errors import TidarError
from tidar.evaluate import require_packages

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    tasks: Annotated[str | None, typer.Option(help="Names with commas between them, such as gsm8k,hellaswag.")] = None,
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    out: Annotated[Path, typer.Option(help="Where to write the result.")] = Path("evaluation.json"),
    samples: Annotated[
        Path | None, typer.Option(help="Where to write every prompt, answer and score, one JSON object a line.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' files, instead of the Hugging Face hub.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many items of a task, or of its subjects.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward.")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Apply the model's chat template, examples as turns.")
    ] = False,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Code tasks run what the model wrote, in a sandbox.")
    ] = False,
    likelihood_samples: Annotated[
        int | None,
        typer.Option(
            help="Random maskings that a block-diffusion model's likelihood is estimated from [default: 128]."
        ),
    ] = None,
    mode: o.Mode = "tidar",
    decoder: o.Decoder = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer [default: the paper's, by task].")] = None,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = None,
    trust: o.Trust = 1.0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Score a model on tasks of the TiDAR paper, by lm-evaluation-harness; docs/evaluate.md says how.

    `speculation` measures how far drafts get instead.
    """
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                option, command = name.replace("_", "-"), context.invoked_subcommand
                raise TidarError(f"--{option} stands before {command!r}: its options go behind its name")
        return
    require_packages("evaluation")
    o.check_counts(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    # Seconds to import, and not installed everywhere.
    import datasets

    from tidar.evaluate import run
    from tidar.evaluate.harness import Decoding
    from tidar.evaluate.likelihood import check_samples
    from tidar.evaluate.tasks import RECIPES, build

    datasets.disable_progress_bars()
    names = list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
    if not names:
        raise TidarError(f"--tasks is needed: some of {','.join(RECIPES)}")
    run.check_code(names, run_generated_code)
    files.check_writable(out, samples)
    if likelihood_samples is not None:
        check_samples(likelihood_samples)
    decoding = Decoding(mode, plan, draft_length, outcomes, alternatives, temperature, trust, seed, decoder)  # type: ignore[arg-type]
    jobs = [build(name, data_dir, chat_template, max_new_tokens) for name in names]
    loaded = o.load(model, drafter, device, dtype, weights)
    result, items = run.evaluate(
        loaded,
        jobs,
        decoding,
        batch_size=batch_size,
        limit=limit,
        chat=chat_template,
        run_generated_code=run_generated_code,
        likelihood_samples=likelihood_samples,
    )
    result = {"model": files.model_name(model), **result}
    files.write_json(out, result)
    if samples is not None:
        lines = (json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items)
        files.write_text(samples, "".join(lines))
    _show(result["tasks"])


def _show(tasks: dict[str, dict[str, Any]]) -> None:
    table = Table("task", "score", "", "± error", "items", "shots", "tokens/forward")
    for name, summary in tasks.items():
        for score, mean in summary["scores"].items():
            reported = score == summary["score"]
            error = "" if mean["standard_error"] is None else f"{mean['standard_error']:.4f}"
            counts = (str(summary["items"]), str(summary["shots"]), str(summary.get("tokens_per_forward", "")))
            table.add_row(
                name if reported else "", score, f"{mean['value']:.4f}", error, *(counts if reported else ("", "", ""))
            )
    Console().print(table)
    for name, summary in tasks.items():
        if bound := summary.get("likelihood"):
            error = f"{bound['standard_error']:.2f} nats on average"
            print(f"{name}: log-likelihoods are Monte Carlo lower bounds of {bound['samples']} samples, ± {error}")
