"""Decoding speed on real prompts: our TiDAR and AR beside transformers, in one run, by batch size."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tidar.api import TidarModel
from tidar.bench import machine
from tidar.bench.shapes import cache_bytes, weight_bytes
from tidar.decode.runner import captured_at_once
from tidar.errors import TidarError, memory_for
from tidar.prompts import Prompt, encode_prompt


class Run(NamedTuple):
    """One pass over the prompts: wall seconds with prefills, answers as token ids, forwards summed over rows."""

    seconds: float
    answers: list[list[int]]
    forwards: int | None


Runner = Callable[[list[Prompt], int, int], Run]
"""(prompts, batch size, new tokens) -> Run."""


def ours(model: TidarModel, **options: Any) -> Runner:
    """Our engine, in any mode."""

    def run(prompts: list[Prompt], batch: int, new: int) -> Run:
        started = time.perf_counter()
        answers = model.generate(prompts, batch_size=batch, max_new_tokens=new, **options)
        seconds = time.perf_counter() - started
        return Run(seconds, [a.token_ids for a in answers], sum(a.forwards for a in answers))

    return run


@contextmanager
def peer_attention(*models: TidarModel) -> Iterator[None]:
    """Meanwhile models attend as they do for users of transformers."""
    lms = [model.hf_model for model in models]
    before = [lm.config._attn_implementation for lm in lms]
    for lm in lms:
        lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for lm, name in zip(lms, before, strict=True):
            lm.set_attn_implementation(name)


@torch.inference_mode()
def peer_generate(model: TidarModel, rows: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """transformers' generate, greedy unless told otherwise: new tokens of each row, with the end of sequence."""
    width, room, eos = max(map(len, rows)), model.network.max_positions, sorted(model.network.eos_ids)
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.network.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.network.device)
    out = model.hf_model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=new if room is None else min(new, room - width),
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        **{"do_sample": False, **options},
    )
    return [_until(row, eos) for row in out[:, width:].tolist()]


def _until(tokens: list[int], eos: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]


def transformers_generate(model: TidarModel, **options: Any) -> Runner:
    """transformers' generate on the same weights, in left-padded batches."""

    def run(prompts: list[Prompt], batch: int, new: int) -> Run:
        tokenizer, answers = model.tokenizer, list[list[int]]()
        assert tokenizer is not None
        with peer_attention(model):
            started = time.perf_counter()
            for at in range(0, len(prompts), batch):
                rows = [encode_prompt(tokenizer, prompt) for prompt in prompts[at : at + batch]]
                answers += peer_generate(model, rows, new, **options)
            return Run(time.perf_counter() - started, answers, None)

    return run


def contestants(model: TidarModel, peers: bool) -> dict[str, Runner]:
    """What is compared; prompt lookup decodes one row at a time.

    No peers run quantised weights: transformers' layers would multiply them out at every step, which nobody wants.
    """
    trained = model.config.block_size if model.config is not None else 8
    runs = {"ar": ours(model, mode="ar"), "tidar auto": ours(model)}
    if model.network.can_draft:
        runs[f"tidar K={trained}, all outcomes"] = ours(model, plan="fixed")
        runs[f"tidar K={trained}, 3 outcomes"] = ours(model, draft_length=trained, outcomes=3)
        leaves = ours(model, draft_length=trained, alternatives=8)
        runs[f"tidar K={trained}, all outcomes, 8 alternatives"] = leaves
    else:
        del runs["tidar auto"]
    if peers and model.network.weights is None:
        runs["transformers generate"] = transformers_generate(model)
        if model.network.device.type == "cuda":
            runs["transformers static cache + compile"] = transformers_generate(model, cache_implementation="static")
        runs["transformers prompt lookup"] = transformers_generate(model, prompt_lookup_num_tokens=8)
    return runs


def measure(
    model: TidarModel,
    name: str,
    sets: dict[str, list[Prompt]],
    batches: Sequence[int],
    new: int,
    repeats: int,
    peers: bool,
    peer_prompts: int,
    only: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Every contestant on every set and batch size; the median of `repeats` passes after one to warm up.

    Passes of contestants take turns, so that what slows the machine for a while slows all of them.

    first_token_ms is the time to the first token of a batch: a prefill, and what starting a run costs.

    Peers that are not ours run last, at the first batch size only, on the first `peer_prompts` prompts, or as many as
    fill the batch. `only` names the contestants that run. Where plain decoding is one of them, `identical_to_ar` counts
    the answers that are its own. `warm_up_s` is the pass to warm up: it compiles, captures and measures costs, as far
    as no contestant before has. Yields the result as it grows.

    Raises:
        TidarError: for a contestant that does not run at these batch sizes, and where memory ends.
    """
    network = model.network
    jobs = _jobs(model, sets, batches, peers, peer_prompts, only)
    for job in {(job.set, job.batch): job for job in jobs if job.rows < job.batch}.values():
        share = f"{job.rows} of {job.batch} rows"
        print(f"{job.set}: batch {job.batch} has {share}, for there are no more prompts", file=sys.stderr)
    rows, plain = list[dict[str, Any]](), dict[tuple[str, int], list[list[int]]]()
    result = {
        "conditions": machine.conditions(network.device, network.lm.dtype)
        | {"template": "chat", "temperature": 0, "max_new_tokens": new, "repeats": repeats},
        "model": name,
        "weights": network.weights,
        "rows": rows,
    }
    for group in _groups(jobs):
        with memory_for(f"batch {group[0].batch}", "lower --batch; what was measured so far is kept"):
            measured = _measure(model, group, new, repeats)
        for job, (row, answers) in zip(group, measured, strict=True):
            if job.contestant == "ar":
                plain[job.set, job.batch] = answers
            if (wanted := plain.get((job.set, job.batch))) is not None:
                row["identical_to_ar"] = sum(a == b for a, b in zip(answers, wanted, strict=False))
            rows.append(row)
            speed = machine.rounded(row["tokens_per_s"])
            print(f"{job.set}, batch {job.batch}, {job.contestant}: {speed} tokens/s", file=sys.stderr)
            yield result


class Job(NamedTuple):
    """One contestant on one set at one batch size."""

    set: str
    batch: int
    contestant: str
    run: Runner
    prompts: list[Prompt]

    @property
    def rows(self) -> int:
        """Rows that a batch really has."""
        return min(self.batch, len(self.prompts))


def _jobs(
    model: TidarModel,
    sets: dict[str, list[Prompt]],
    batches: Sequence[int],
    peers: bool,
    peer_prompts: int,
    only: Sequence[str] | None,
) -> list[Job]:
    jobs = [
        Job(name, batch, label, run, prompts[: max(peer_prompts, batch)] if _foreign(label) else prompts)
        for name, prompts in sets.items()
        for batch in batches
        for label, run in contestants(model, peers and batch == batches[0]).items()
        if batch == 1 or "lookup" not in label
    ]
    known = dict.fromkeys(job.contestant for job in jobs)
    if idle := [name for name in only or () if name not in known]:
        raise TidarError(
            f"--only {idle[0]!r} is no contestant at batch {', '.join(map(str, batches))}: there are "
            f"{', '.join(map(repr, known))} (transformers runs at the first batch size, and looks up only if that is 1)"
        )
    return sorted((job for job in jobs if not only or job.contestant in only), key=lambda job: _foreign(job.contestant))


def _groups(jobs: list[Job]) -> Iterator[list[Job]]:
    """What is measured in turns: our contestants at one batch size on one set. Peers, which are slow, run alone."""
    for _, group in groupby(jobs, key=lambda job: (job.set, job.batch, _foreign(job.contestant) and job.contestant)):
        yield list(group)


def _measure(
    model: TidarModel, jobs: list[Job], new: int, repeats: int
) -> list[tuple[dict[str, Any], list[list[int]]]]:
    """Figures and answers of jobs, whose passes take turns: what slows the machine for a while slows all of them."""
    network = model.network
    learned = [dict[object, Any]() for _ in jobs]

    def run(number: int, prompts: list[Prompt], new: int) -> Run:
        network.learned = learned[number]  # no contestant may profit from what another learned of the text
        return jobs[number].run(prompts, jobs[number].batch, new)

    warm_ups = list[float]()
    try:
        for number, job in enumerate(jobs):
            # On a GPU all prompts, so that prefills of all sizes are captured.
            all_sizes = network.device.type == "cuda" and not _foreign(job.contestant)
            with captured_at_once(network):
                warm_ups.append(
                    run(number, job.prompts if all_sizes else job.prompts[: max(job.batch, 2)], new).seconds
                )
        passes = [[run(number, job.prompts, new) for number, job in enumerate(jobs)] for _ in range(repeats)]
        firsts = [
            [run(number, job.prompts[: job.batch], 1).seconds for number, job in enumerate(jobs)]
            for _ in range(repeats)
        ]
    finally:
        network.learned = {}
    columns = zip(jobs, warm_ups, zip(*passes, strict=True), zip(*firsts, strict=True), strict=True)
    return [_row(model, job, warm_up, runs, first) for job, warm_up, runs, first in columns]


def _row(
    model: TidarModel, job: Job, warm_up: float, runs: Sequence[Run], firsts: Sequence[float]
) -> tuple[dict[str, Any], list[list[int]]]:
    """A job's figures, and its answers."""
    set_name, batch, contestant, _, prompts = job
    middle = sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
    seconds, tokens = middle.seconds, sum(map(len, middle.answers))
    row: dict[str, Any] = {
        "set": set_name,
        "contestant": contestant,
        "batch": batch,
        "rows": job.rows,
        "prompts": len(prompts),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 3),
        "first_token_ms": round(statistics.median(firsts) * 1e3, 2),
        "warm_up_s": round(warm_up, 3),
        "new_tokens": tokens,
        "passes_s": [round(run.seconds, 3) for run in runs],
    }
    if middle.forwards:
        row |= _per_forward(model, prompts, job.rows, tokens, seconds, middle.forwards)
    return row, middle.answers


def _foreign(label: str) -> bool:
    return label.startswith("transformers")


def _per_forward(
    model: TidarModel, prompts: list[Prompt], rows: int, tokens: int, seconds: float, forwards: int
) -> dict[str, float]:
    """What one forward of the batch gains, takes and reads, prefills counted."""
    network = model.network
    assert model.tokenizer is not None
    length = (sum(len(encode_prompt(model.tokenizer, p)) for p in prompts) + tokens / 2) / len(prompts)
    step = seconds * rows / forwards
    return {
        "tokens_per_forward": round(tokens / forwards, 3),
        "ms_per_forward": round(step * 1e3, 3),
        "gb_per_s": round((weight_bytes(network) + rows * cache_bytes(network, int(length))) / step / 1e9, 1),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second: bars at the first batch size, lines over batch sizes."""
    from matplotlib import pyplot

    rows = result["rows"]
    sets, sizes = list(dict.fromkeys(r["set"] for r in rows)), {r["rows"] for r in rows}
    panels = 2 if len(sizes) > 1 else 1
    size = (3.2 + 3.6 * len(sets), 0.6 + 3.2 * panels)
    figure, axes = pyplot.subplots(panels, len(sets), figsize=size, layout="constrained", squeeze=False)
    # In every panel one place for each: a run that was cut off has not all of them in the last one.
    names = list(dict.fromkeys(r["contestant"] for r in rows if r["batch"] == rows[0]["batch"]))
    for column, name in enumerate(sets):
        mine = [r for r in rows if r["set"] == name]
        shown = [r for r in mine if r["batch"] == rows[0]["batch"]]
        _bars(axes[0][column], f"{name}, batch {rows[0]['batch']}", shown, names, column == 0)
        if panels > 1:
            _lines(axes[1][column], mine)
    if panels > 1:
        figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    device = result["conditions"]["device"]
    figure.suptitle(f"{result['model']}, {device}, {machine.precision(result)}, greedy", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, title: str, rows: list[dict[str, Any]], names: list[str], named: bool) -> None:
    colours = ["C0" if r["contestant"].startswith("tidar") else "0.65" for r in rows]
    bars = axes.barh([names.index(r["contestant"]) for r in rows], [r["tokens_per_s"] for r in rows], color=colours)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.bar_label(bars, [f" {machine.rounded(r['tokens_per_s'])}" for r in rows], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens/s")


def _lines(axes: Any, rows: list[dict[str, Any]]) -> None:
    for label in dict.fromkeys(r["contestant"] for r in rows):
        mine = {r["rows"]: r["tokens_per_s"] for r in rows if r["contestant"] == label}
        if not _foreign(label):
            axes.plot(*zip(*sorted(mine.items()), strict=True), "o-", ms=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({r["rows"] for r in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    bottom, top = axes.get_ylim()
    ticks = [n * 10**power for power in range(-1, 7) for n in (1, 2, 5) if bottom <= n * 10**power <= top]
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_xlabel("rows in a batch")
    axes.set_ylabel("tokens/s")
    axes.grid(alpha=0.3)
