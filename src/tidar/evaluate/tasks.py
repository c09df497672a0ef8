"""The paper's tasks: which of the harness' tasks, how many examples, which score counts, how long an answer may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lm_eval import tasks as harness_tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml  # its TaskManager cannot change what a config says before data load

from tidar.errors import TidarError, first_line
from tidar.evaluate import code, grading
from tidar.evaluate.local import Document, Documents, LocalSet, choice_form, read, text_form

HARNESS = Path(harness_tasks.__file__).parent
Config = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a task is run (TiDAR's Section 4.2 and its appendix).

    Attributes:
        configs: whether a chat template is applied -> the harness' configs: one, or one a subject.
        shots: examples before a document.
        score: the one that the paper reports.
        local: what a local file looks like.
        new_tokens: longest answer; None for tasks of likelihood.
        rows_as_examples: whether the examples are rows of a data set, rather than written down in the task.
        grader: what grades answers beside the harness, as (name of the score, function).
        runs_code: whether the grader runs what was generated.
    """

    configs: Callable[[bool], list[Config]]
    shots: int
    score: str
    local: LocalSet
    new_tokens: int | None = None
    rows_as_examples: bool = False
    grader: tuple[str, grading.Grader] | None = None
    runs_code: bool = False


class Job(NamedTuple):
    """A task that is ready to run: the harness' tasks that it consists of, by name, and where documents come from."""

    name: str
    recipe: Recipe
    parts: dict[str, ConfigurableTask]
    source: str


def _yaml(*patterns: str) -> Callable[[bool], list[Config]]:
    """The harness' own configs, by file."""

    def load(chat: bool) -> list[Config]:
        return [load_yaml(path) for pattern in patterns for path in sorted(HARNESS.glob(pattern))]

    return load


def _letters(context: str, choices: list[str], gold: int) -> dict[str, Any]:
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    return {"question": context, "choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}


def _sentence(context: str, choices: list[str], gold: int) -> dict[str, Any]:
    if "_" not in context:
        raise TidarError("field 'context' has no '_' where the choices go")
    return {"sentence": context, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}


def _arc(name: str) -> LocalSet:
    return LocalSet((name,), (choice_form(_letters),))


_HELLASWAG = choice_form(lambda context, choices, gold: {"query": context, "choices": choices, "label": gold})
_PIQA = choice_form(lambda goal, both, gold: {"goal": goal, "sol1": both[0], "sol2": both[1], "label": gold}, 2)
_WINOGRANDE = choice_form(_sentence, 2)
_MMLU = choice_form(
    lambda question, choices, gold: {"question": question, "choices": choices, "answer": gold}, 4, "subject"
)
_HUMANEVAL = text_form("prompt", "entry_point", "canonical_solution", "test")
_MBPP = text_form("text", lists=("test_list",))
_PASS = ("pass@1", grading.humaneval_passes), ("pass@1", grading.mbpp_passes)

RECIPES = {
    "humaneval": Recipe(
        lambda chat: [code.humaneval("humaneval", "openai/openai_humaneval", chat)],
        *(0, "pass@1", LocalSet(("humaneval",), (_HUMANEVAL,)), 512),
        grader=_PASS[0],
        runs_code=True,
    ),
    "humaneval_plus": Recipe(
        lambda chat: [code.humaneval("humaneval_plus", "evalplus/humanevalplus", chat)],
        *(0, "pass@1", LocalSet(("humaneval_plus", "humanevalplus"), (_HUMANEVAL,)), 512),
        grader=_PASS[0],
        runs_code=True,
    ),
    "mbpp": Recipe(
        lambda chat: [code.mbpp("mbpp", "google-research-datasets/mbpp", "full", chat)],
        *(3, "pass@1", LocalSet(("mbpp",), (_MBPP,), lambda row: 11 <= row.get("task_id", 11) <= 510), 512),
        grader=_PASS[1],
        runs_code=True,
    ),
    "mbpp_plus": Recipe(
        lambda chat: [code.mbpp("mbpp_plus", "evalplus/mbppplus", None, chat)],
        *(3, "pass@1"),
        LocalSet(("mbpp_plus", "mbppplus"), (text_form("prompt", "test", lists=("test_list",)),)),
        512,
        grader=_PASS[1],
        runs_code=True,
    ),
    "gsm8k": Recipe(
        _yaml("gsm8k/gsm8k-cot.yaml"),
        *(8, "strict_match", LocalSet(("gsm8k",), (text_form("question", "answer"),)), 256),
        grader=("math_verify", grading.gsm8k_math_verify),
    ),
    "minerva_math": Recipe(
        _yaml("minerva_math/minerva_math_*.yaml"),
        *(4, "exact_match", LocalSet(("minerva_math", "hendrycks_math"), (text_form("problem", "solution"),)), 512),
    ),
    "mmlu": Recipe(_yaml("mmlu/default/mmlu_*.yaml"), 5, "acc", LocalSet(("mmlu",), (_MMLU,)), rows_as_examples=True),
    "arc_easy": Recipe(_yaml("arc/arc_easy.yaml"), 0, "acc", _arc("arc_easy")),
    "arc_challenge": Recipe(_yaml("arc/arc_challenge.yaml"), 0, "acc_norm", _arc("arc_challenge")),
    "hellaswag": Recipe(_yaml("hellaswag/hellaswag.yaml"), 0, "acc_norm", LocalSet(("hellaswag",), (_HELLASWAG,))),
    "piqa": Recipe(_yaml("piqa/piqa.yaml"), 0, "acc_norm", LocalSet(("piqa",), (_PIQA,))),
    "winogrande": Recipe(
        _yaml("winogrande/default.yaml"),
        *(5, "acc", LocalSet(("winogrande", "winogrande_xl"), (_WINOGRANDE,))),
        rows_as_examples=True,
    ),
}


def recipe(name: str) -> Recipe:
    """Raises TidarError for a name that is no task of ours."""
    if name not in RECIPES:
        raise TidarError(f"there is no task {name!r}: take some of {', '.join(RECIPES)}")
    return RECIPES[name]


def build(name: str, data_dir: Path | None = None, chat: bool = False, new_tokens: int | None = None) -> Job:
    """A task with its documents, from local files or from the Hugging Face hub.

    Args:
        data_dir: a folder with the task's file (see local.py); None for the hub.
        chat: whether a chat template will be applied: code tasks then ask in other words.
        new_tokens: longest answer, instead of the paper's.

    Raises:
        TidarError: for an unknown task, for a file, row or field that is missing, and for a set that does not load.
    """
    known = recipe(name)
    if data_dir is None:
        return build_from(name, None, chat, new_tokens)
    wanted = known.shots if known.rows_as_examples else 0
    by_subject = wanted and len(known.configs(chat)) > 1
    local = read(name, known.local, data_dir, wanted, "subject" if by_subject else None)
    return build_from(name, local, chat, new_tokens)


def build_from(name: str, local: Documents | None, chat: bool = False, new_tokens: int | None = None) -> Job:
    """`build` from documents that were read, None for the hub's."""
    known = recipe(name)
    configs = known.configs(chat)
    if not configs:
        raise TidarError(f"the installed lm-eval has no task {name}: pip install 'tidar[eval]'")
    if local is not None:
        configs = _parts(name, configs, local)
    source = "Hugging Face hub" if local is None else local.source
    parts = {}
    for config in configs:
        task = _task(name, known, config, local, new_tokens)
        parts[task.task_name] = task
    return Job(name, known, parts, source)


def _parts(name: str, configs: list[Config], local: Documents) -> list[Config]:
    """The configs of the subjects that local documents have; one for all documents, if they name no subject."""
    if len(configs) == 1:
        return configs
    if "subject" not in local.scored[0]:
        return [configs[0] | {"task": name}]
    subjects = {document["subject"] for document in local.scored}
    unknown = subjects - {config["dataset_name"] for config in configs}
    if unknown:
        raise TidarError(f"{local.source}: {sorted(unknown)[0]!r} is no subject of {name}")
    return [config for config in configs if config["dataset_name"] in subjects]


def _task(
    name: str, known: Recipe, config: Config, local: Documents | None, new_tokens: int | None
) -> ConfigurableTask:
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    config["num_fewshot"] = known.shots
    if known.new_tokens is not None:
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": new_tokens or known.new_tokens}
    if local is not None:
        config |= _local(config, local, known)
    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # the data set's library, the network and the task's template raise what they like
        if local is not None:
            raise TidarError(f"task {name}: {local.source} does not fit it ({first_line(error)})") from error
        raise TidarError(
            f"task {name}: its data set {config['dataset_path']} does not load from the Hugging Face hub "
            f"({first_line(error)}); local files go with --data-dir"
        ) from error


def _local(config: Config, local: Documents, known: Recipe) -> Config:
    """What a config says otherwise, if its documents are these."""

    def mine(documents: list[Document]) -> datasets.Dataset:
        own = [d for d in documents if d.get("subject", config.get("dataset_name")) == config.get("dataset_name")]
        return datasets.Dataset.from_list(own)

    splits = {"test": mine(local.scored)} | ({"examples": mine(local.examples)} if local.examples else {})
    changed: Config = {
        "custom_dataset": lambda **_: datasets.DatasetDict(splits),
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    if known.rows_as_examples:
        changed["fewshot_split"] = "examples"
    if local.processed:
        changed["process_docs"] = None
    return changed
