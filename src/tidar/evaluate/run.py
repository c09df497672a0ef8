"""Runs tasks on a model, grades answers, and says what was measured with what."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

from lm_eval import evaluate as run_harness
from lm_eval.tasks import TaskManager

from tidar.api import TidarModel
from tidar.bench import machine
from tidar.decode.engine import Engine
from tidar.errors import TidarError
from tidar.evaluate import sandbox
from tidar.evaluate.harness import Decoding, Spent, TidarLM
from tidar.evaluate.tasks import Job, recipe
from tidar.sampling import DEFAULT_DECODER

FEWSHOT_SEED = 1234
"""The harness' own: which examples stand before a document, where they are drawn from a data set."""


class ScoredItem(NamedTuple):
    """One document of a task: what was asked and answered, and how that scored.

    answers: the generated text, or one log-likelihood a choice.
    standard_errors: of log-likelihoods that are estimates, one a choice; None where they are exact.
    """

    task: str
    part: str
    item: int
    prompt: str
    answers: list[Any]
    scores: dict[str, float]
    standard_errors: list[float] | None = None


def evaluate(
    model: TidarModel,
    jobs: Sequence[Job],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    chat: bool = False,
    run_generated_code: bool = False,
    likelihood_samples: int | None = None,
) -> tuple[dict[str, Any], list[ScoredItem]]:
    """Scores of a model, and what they are means of.

    Args:
        jobs: tasks (see `tasks.build`, which must know about `chat` too).
        limit: first documents of every task, of every subject where it has some; None for all.
        chat: apply the chat template, examples as turns.
        run_generated_code: allow code tasks to run what the model wrote, in the sandbox.
        likelihood_samples: draws of a bound, for block-diffusion models; None for the paper's 128.

    Returns:
        A result fit for JSON, as docs/evaluate.md describes it; and every scored document.

    Raises:
        TidarError: for a model or options that cannot be honoured, and for code tasks that are not allowed to run
            programs or cannot confine them; all before any work.
    """
    check_code([job.name for job in jobs], run_generated_code)
    decoding = decoding or Decoding()
    lm = TidarLM(model, decoding, batch_size, likelihood_samples)
    if chat and lm.tokenizer.chat_template is None:
        raise TidarError("this model's tokenizer has no chat template: leave --chat-template out")
    tasks = [task for job in jobs for task in job.parts.values()]
    how = None
    for task in tasks:
        task.set_fewshot_seed(FEWSHOT_SEED)
        if task.OUTPUT_TYPE == "generate_until":
            lm.room(task.config.generation_kwargs["max_gen_toks"], task.task_name)
            how = asdict(decoding)
            if isinstance(lm.engine, Engine):
                how["draft_length"] = lm.engine.planner.longest.draft_length
            else:
                how |= {"decoder": decoding.decoder or DEFAULT_DECODER, "draft_length": lm.engine.block_size}
    found = run_harness(
        lm,
        TaskManager(include_defaults=False).load(tasks),
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    items = [item for job in jobs for item in _items(job, found["samples"], lm)]
    result = {
        "conditions": machine.conditions(model.network.device, model.network.lm.dtype)
        | {"weights": model.network.weights, "template": "chat" if chat else "none"}
        | {"decoding": how, "batch_size": batch_size, "limit": limit}
        | {name: version(name) for name in ("lm-eval", "math-verify")},
        "tasks": {job.name: _summary(job, [item for item in items if item.task == job.name], lm) for job in jobs},
    }
    return result, items


def check_code(tasks: Sequence[str], allowed: bool) -> None:
    """Raise TidarError for a code task that is not allowed to run programs, or where they cannot be confined."""
    running = [name for name in tasks if recipe(name).runs_code]
    if running and not allowed:
        raise TidarError(f"task {running[0]} runs the code that the model writes: allow it with --run-generated-code")
    if running:
        sandbox.check()


def _items(job: Job, samples: dict[str, list[dict[str, Any]]], lm: TidarLM) -> Iterator[ScoredItem]:
    for part in job.parts:
        graded: dict[int, dict[str, float]] = {}
        for sample in samples[part]:
            scores = {
                _score(name, sample["filter"]): float(sample[name]) for name in sample["metrics"] if name != "bypass"
            }
            graded.setdefault(sample["doc_id"], {}).update(scores)
        first = {sample["doc_id"]: sample for sample in reversed(samples[part])}
        documents = [first[item] for item in sorted(first)]
        if job.recipe.grader is not None:
            score, grade = job.recipe.grader
            right = grade([d["doc"] for d in documents], [d["resps"][0][0] for d in documents])
            for document, passed in zip(documents, right, strict=True):
                graded[document["doc_id"]][score] = float(passed)
        for d in documents:
            answers = [r[0] if isinstance(r[0], str) else float(r[0][0]) for r in d["resps"]]
            errors = None
            if lm.bounds and job.recipe.new_tokens is None:
                errors = [lm.estimates[arguments].standard_error for arguments in d["arguments"]]
            yield ScoredItem(job.name, part, d["doc_id"], d["arguments"][0][0], answers, graded[d["doc_id"]], errors)


def _score(metric: str, extraction: str) -> str:
    """What a score is called: by how the answer was found, where the harness knows several ways."""
    return metric if extraction == "none" else extraction.replace("-", "_")


def _summary(job: Job, items: Sequence[ScoredItem], lm: TidarLM) -> dict[str, Any]:
    names = dict.fromkeys((job.recipe.score, *(name for item in items for name in item.scores)))
    task = next(iter(job.parts.values()))
    summary: dict[str, Any] = {
        "score": job.recipe.score,
        "scores": {name: _mean([item.scores[name] for item in items]) for name in names},
        "items": len(items),
        "shots": job.recipe.shots,
        "documents": job.source,
        "harness_task": sorted(job.parts) if len(job.parts) > 1 else next(iter(job.parts)),
        "harness_version": task.VERSION,
    }
    errors = [error for item in items for error in item.standard_errors or ()]
    if errors:
        summary["likelihood"] = {
            "kind": "Monte Carlo lower bound",
            "samples": lm.samples,
            "seed": lm.seed,
            "standard_error": round(statistics.fmean(errors), 6),
        }
    if job.recipe.new_tokens is not None:
        spent = sum((lm.spent[part] for part in job.parts), Spent())
        summary |= {
            "max_new_tokens": task.config.generation_kwargs["max_gen_toks"],
            "tokens_per_forward": round(spent.new_tokens / spent.forwards, 4),
            "new_tokens": spent.new_tokens,
            "forwards": spent.forwards,
            "acceptance_length_counts": dict(sorted(spent.acceptance_lengths.items())),
            "answers_cut_by_limit": spent.unended,
            "truncated_prompts": spent.truncated,
        }
    if job.recipe.runs_code:
        summary["sandbox"] = sandbox.Bounds()._asdict()
    return summary


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error, as the harness has them: from the sample's deviation; None for one item."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": round(statistics.fmean(values), 6), "standard_error": None if error is None else round(error, 6)}
