"""`tidar bench`: what a forward costs on this machine, and how fast decoding is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tidar.bench import machine, serving, shapes, slots, speed, training
from tidar.cli import files
from tidar.cli import options as o
from tidar.errors import TidarError
from tidar.prompts import Prompt, read_prompts
from tidar.train.config import TrainConfig
from tidar.vllm.hooks import check_version
from tidar.vllm.shapes import Curve

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="Where to write: OUT.json and OUT.png.")]
OutJson = Annotated[Path, typer.Option(help="Where to write: OUT.json.")]
TOKENS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 72, 96, 112, 128, 160, 192, 256, 272, 320, 512]


@app.command("slots")
def bench_slots(
    model: Annotated[str, typer.Option(help=f"A model, or one of {', '.join(shapes.RANDOM)}.")] = "smollm2-135m",
    out: Out = Path("slots"),
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in a forward (repeatable).")] = None,
    prefix: Annotated[list[int] | None, typer.Option(help="Cached tokens (repeatable) [default: 256 1024].")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    drafter: Annotated[bool, typer.Option(help="Time steps with the gated drafter.")] = True,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Draw the free-token-slots curve: latency against tokens in one forward."""
    prefixes, counts = prefix or [256, 1024], sorted(set(tokens or TOKENS))
    if min(*prefixes, *counts, batch) < 1:
        raise TidarError("tokens, prefix and batch must be at least 1")
    files.check_writable(files.named(out, ".json"), files.named(out, ".png"))
    o.be_quiet()
    network = shapes.build(model, drafter, device, dtype, weights)
    limit = network.max_positions
    if limit is not None and max(prefixes) + max(counts) > limit:
        raise TidarError(f"{max(prefixes)} + {max(counts)} tokens exceed the model's context of {limit}")
    if not network.can_draft:
        print(
            f"{model} has no drafter, so of the steps only the plain one is timed; --no-drafter times them all, as of "
            "a conversion that trains all weights",
            file=sys.stderr,
        )
    result = _kept(slots.measure(network, model, counts, prefixes, batch), out)
    slots.plot(result, files.named(out, ".png"))
    console = Console()
    for curve in result["curves"]:
        table = _table(
            f"prefix {curve['prefix']:,}",
            *("K", "outcomes", "leaves", "slots", "ms", "AR\nsteps", "GB/s", "of band-\nwidth", "warm-up\ns"),
        )
        for step in curve["steps"]:
            numbers = (str(step[key]) for key in ("draft_length", "outcomes", "alternatives", "slots"))
            reading = (machine.rounded(step["gb_per_s"]), f"{step['share_of_bandwidth']:.0%}")
            table.add_row(
                *numbers, f"{step['ms']:.3f}", f"{step['ar_steps']:.2f}", *reading, f"{step['warm_up_s']:.1f}"
            )
        console.print(table)


@app.command("speed")
def bench_speed(
    prompts: Annotated[list[str], typer.Option(help="NAME=FILE.jsonl[:FIRST_N] (repeatable).")],
    model: o.Model = "smollm2-135m",
    drafter: o.DrafterFolder = None,
    out: Out = Path("speed"),
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes (repeatable) [default: 1 4 16 64].")] = None,
    max_new_tokens: o.MaxNewTokens = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes; the median counts.")] = 3,
    peers: Annotated[
        bool,
        typer.Option(
            help="Also time transformers' generate, at the first --batch only, and its prompt lookup, if that is 1 "
            "(neither with --weights)."
        ),
    ] = True,
    peer_prompts: Annotated[int, typer.Option(help="Prompts that peers answer, at least a batch; they are slow.")] = 8,
    only: Annotated[
        list[str] | None, typer.Option(help="A contestant by its name in the table (repeatable) [default: all].")
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Measure decoding, TiDAR against AR and peers, in one run."""
    batches = list(dict.fromkeys(batch or [1, 4, 16, 64]))
    if min(*batches, repeats, peer_prompts) < 1:
        raise TidarError("batch, repeats and peer-prompts must be at least 1")
    files.check_writable(files.named(out, ".json"), files.named(out, ".png"))
    sets = read_sets(prompts)
    loaded = o.load(model, drafter, device, dtype, weights)
    measured = speed.measure(loaded, model, sets, batches, max_new_tokens, repeats, peers, peer_prompts, only)
    result = _kept(measured, out)
    speed.plot(result, files.named(out, ".png"))
    for name, size in dict.fromkeys((row["set"], row["batch"]) for row in result["rows"]):
        mine = [row for row in result["rows"] if (row["set"], row["batch"]) == (name, size)]
        few = "" if mine[0]["rows"] == size else f" ({mine[0]['rows']} of {size} rows)"
        table = _table(
            f"{name}, batch {size}{few}",
            *("", "tokens/s", "first\nms", "ms a\nforward", "tokens a\nforward", "GB/s", "warm-up\ns"),
        )
        for row in mine:
            forward = ("",) * 3
            if "ms_per_forward" in row:
                reading = machine.rounded(row["gb_per_s"])
                forward = (f"{row['ms_per_forward']:.2f}", f"{row['tokens_per_forward']:.2f}", reading)
            times = (machine.rounded(row["tokens_per_s"]), f"{row['first_token_ms']:.0f}", *forward)
            table.add_row(row["contestant"], *times, f"{row['warm_up_s']:.1f}")
        Console().print(table)


@app.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help=f"A model, or one of {', '.join(shapes.RANDOM)}.")] = "smollm2-135m",
    objective: Annotated[
        list[str] | None, typer.Option(help="Objectives of `tidar train` (repeatable) [default: ar paper lossless].")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps; the first quarter, which compiles, is left out.")] = 16,
    block_size: Annotated[int, typer.Option(help="K, tokens in a mask block.")] = 8,
    anchors: Annotated[int, typer.Option(help="Mask blocks a row; 0 for sequence length / block size.")] = 0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Run each layer twice to save memory.")] = False,
    out: OutJson = Path("train"),
    device: o.Device = None,
) -> None:
    """Measure training on random rows: tokens/s, MFU and memory, objective beside objective."""
    config = TrainConfig(
        model=model,
        output=out,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        sequence_length=sequence_length,
        block_size=block_size,
        anchors=anchors,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
    )
    objectives = objective or ["ar", "paper", "lossless"]
    for name in objectives:
        training.options_for(config, name).check_options()
    if steps < 2 * training.LOGS:
        raise TidarError(f"steps is {steps}, but must be at least {2 * training.LOGS}")
    files.check_writable(files.named(out, ".json"))
    result = _kept(training.measure(config, objectives), out)
    table = Table(
        "objective", "tokens/s", "time a token", "MFU", "peak GiB", title=f"{model}, {sequence_length:,} tokens"
    )
    for row in result["rows"]:
        mfu = f"{row['mfu']:.0%}" if "mfu" in row else ""
        times = f"{row['tokens_per_second']:,.0f}", f"{row['time_per_token']:.2f}"
        table.add_row(row["objective"], *times, mfu, f"{row['peak_memory_gib']:.1f}")
    Console().print(table)


@app.command("serve")
def bench_serve(
    model: Annotated[str, typer.Option(help=f"A checkpoint folder, or one of {', '.join(shapes.RANDOM)}.")],
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests in flight (repeatable) [default: 1 4 16 64].")
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a random prompt [default: 1024].")] = None,
    prompts: Annotated[str | None, typer.Option(help="NAME=FILE.jsonl[:FIRST_N] instead of random prompts.")] = None,
    max_new_tokens: o.MaxNewTokens = 256,
    rounds: Annotated[int, typer.Option(help="Requests that follow each other in each place.")] = 2,
    repeats: Annotated[int, typer.Option(help="Measurements of each, after one to warm up; the median counts.")] = 3,
    survival: Annotated[
        float | None, typer.Option(help="Probability that a draft stands, with random weights (needed there).")
    ] = None,
    draft_length: Annotated[int | None, typer.Option(help="K, for any number of requests [default: a curve].")] = None,
    outcomes: Annotated[int | None, typer.Option(help="Outcome blocks of a step, likewise [default: a curve].")] = None,
    curve: o.CurveSteps = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "--tensor-parallel-size", help="GPUs.")] = 1,
    out: OutJson = Path("serve"),
) -> None:
    """Measure vLLM with and without the plug-in, in one run."""
    o.check_counts(prompt=prompt, max_new_tokens=max_new_tokens, rounds=rounds, tensor_parallel=tensor_parallel)
    o.check_counts(draft_length=draft_length, outcomes=outcomes, repeats=repeats)
    requests = tuple(sorted(set(concurrency or [1, 4, 16, 64])))
    o.check_counts(concurrency=min(requests))
    check_version()
    files.check_writable(files.named(out, ".json"))
    more = {"tensor_parallel_size": tensor_parallel} if tensor_parallel > 1 else None
    if prompt is not None and prompts is not None:
        raise TidarError("prompt is the length of random prompts, and prompts a file of real ones: give one of them")
    chosen = None
    if prompts is not None:
        name, file, first = files.prompt_set(prompts)
        read_prompts(file)  # says what is wrong with it before an engine starts
        chosen = (name, str(file), first)
    load = serving.Load(
        model,
        requests,
        prompt or 1024,
        max_new_tokens,
        rounds,
        repeats,
        survival,
        draft_length,
        outcomes,
        Curve.read(curve).entries if curve else None,
        prompts=chosen,
        more=more,
    )
    result = _kept(serving.measure(load), out)
    table = Table("requests", "", "tokens/s", "first ms", "ms/token", "tokens/step", title=model)
    for row in sorted(result["rows"], key=lambda row: row["concurrency"]):
        each = "" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}"
        times = (f"{row['tokens_per_s']:,.0f}", f"{row['ttft_ms']:.0f}", each)
        numbers = (*times, f"{row['tokens_per_step']:.2f}")
        table.add_row(str(row["concurrency"]), row["mode"], *numbers)
    Console().print(table)


def read_set(text: str) -> tuple[str, list[Prompt]]:
    """NAME=FILE[:FIRST_N] as a name and its prompts."""
    name, file, limit = files.prompt_set(text)
    return name, [placed.prompt for placed in read_prompts(file)][:limit]


def read_sets(texts: list[str]) -> dict[str, list[Prompt]]:
    """Sets by name. Raises TidarError for a name that comes twice."""
    sets = dict[str, list[Prompt]]()
    for name, prompts in map(read_set, texts):
        if name in sets:
            raise TidarError(f"two sets of --prompts are named {name!r}: give each a name of its own")
        sets[name] = prompts
    return sets


def _table(title: str, first: str, *numbers: str) -> Table:
    """A table of numbers, the first column perhaps of names."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, justify="right" if first else "left")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _kept(results: Iterator[dict[str, Any]], out: Path) -> dict[str, Any]:
    path = files.named(out, ".json")
    result = files.kept(results, path)
    print(f"wrote {path}", file=sys.stderr)
    return result
