"""`tidar evaluate`: settings, local files, grading, what is written; and one clear line for whatever is wrong."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from needs import DATA, needs_data, needs_sandbox
from tidar.cli.main import main
from tidar.errors import TidarError
from tidar.evaluate import grading, sandbox
from tidar.evaluate.run import evaluate
from tidar.evaluate.tasks import RECIPES, build
from tiny import tiny_folder, tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder with a drafter inside and a context of thousands of tokens."""
    from tidar import TidarModel

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_folder(folder)
    base = TidarModel.from_pretrained(str(folder), device="cpu", dtype="float32")
    network = tiny_network("llama", vocabulary=base.network.vocabulary)
    network.drafter.save(folder / "drafter", str(folder), network.config)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    return str(folder)


GSM8K = {"question": "One and one?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_setup_code": "one = 1",
    "test_list": ["assert add(one, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 2"],
}
HELLASWAG = {"context": "A man", "choices": ["runs.", "is a tree.", "flies to it.", "no"], "gold": 0}


def put(folder: Path, name: str, *rows: dict) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    """One file a task, in folders below, as people keep them."""
    data = tmp_path / "data"
    (data / "tasks").mkdir(parents=True)
    put(data / "tasks", "gsm8k_test.jsonl", GSM8K, GSM8K)
    put(data / "tasks", "humaneval.jsonl", HUMANEVAL)
    put(data / "tasks", "mbpp.jsonl", MBPP | {"task_id": 2}, MBPP, MBPP | {"task_id": 601})
    put(data, "hellaswag_val.jsonl", *[HELLASWAG] * 3)
    return data


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["tidar", "evaluate", "--out", str(out), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        code = exit.value.code or 0
        return code, captured.out if code == 0 else captured.err, json.loads(out.read_text()) if code == 0 else None

    return run


def test_a_run_writes_scores_with_errors_costs_and_conditions(run, folder, data, tmp_path):
    options = ("--data-dir", data, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 9)
    samples = tmp_path / "samples.jsonl"
    code, shown, result = run(
        "--model", folder, "--tasks", "gsm8k,hellaswag", "--draft-length", 3, "--samples", samples, *options
    )
    assert code == 0
    assert "hellaswag" in shown
    assert result["model"] == "tiny"
    conditions = result["conditions"]
    assert {"device", "dtype", "commit", "torch", "transformers", "lm-eval", "math-verify"} <= conditions.keys()
    assert conditions["template"] == "none"
    assert conditions["decoding"]["draft_length"] == 3
    assert conditions["decoding"]["temperature"] == 0
    assert str(data.parent) not in json.dumps(result)
    swag, gsm = result["tasks"]["hellaswag"], result["tasks"]["gsm8k"]
    assert swag["scores"].keys() == {"acc_norm", "acc"}
    assert swag["items"] == 3
    assert "tokens_per_forward" not in swag
    assert gsm["scores"].keys() == {"strict_match", "flexible_extract", "math_verify"}
    assert all(mean.keys() == {"value", "standard_error"} for mean in gsm["scores"].values())
    assert (gsm["shots"], gsm["max_new_tokens"], gsm["documents"]) == (8, 9, "gsm8k_test.jsonl")
    assert gsm["new_tokens"] == 18
    assert gsm["tokens_per_forward"] == round(18 / gsm["forwards"], 4) >= 1
    items = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [item["task"] for item in items] == ["gsm8k"] * 2 + ["hellaswag"] * 3
    assert items[0]["prompt"].endswith("Q: One and one?\nA:")
    assert len(items[2]["answers"]) == 4


@pytest.mark.parametrize("chat", [False, True])
def test_code_tasks_run_in_the_sandbox_when_allowed(run, folder, data, monkeypatch, chat):
    monkeypatch.setattr(sandbox, "check", lambda: None)
    ran = []

    def run_all(programs):
        ran.extend(programs)
        return [sandbox.Verdict(True, "") for _ in programs]

    monkeypatch.setattr(sandbox, "run_all", run_all)
    options = ("--data-dir", data, "--device", "cpu", "--max-new-tokens", 4, *(["--chat-template"] if chat else []))
    code, _, result = run("--model", folder, "--tasks", "humaneval,mbpp", "--run-generated-code", *options)
    assert code == 0
    assert [result["tasks"][name]["items"] for name in ("humaneval", "mbpp")] == [1, 1]
    assert [result["tasks"][name]["shots"] for name in ("humaneval", "mbpp")] == [0, 3]
    assert result["tasks"]["mbpp"]["scores"]["pass@1"] == {"value": 1.0, "standard_error": None}
    assert result["tasks"]["mbpp"]["sandbox"]["seconds"] > 0
    assert result["conditions"]["template"] == ("chat" if chat else "none")
    assert ran[0].startswith(HUMANEVAL["prompt"])
    assert ran[0].endswith("check(add)\n")
    assert "one = 1\nassert add(one, 2) == 3\n" in ran[1]


def test_from_python_too_programs_run_only_when_allowed(data):
    with pytest.raises(TidarError, match="mbpp runs the code that the model writes"):
        evaluate(None, [build("mbpp", data)])


def test_a_model_whose_context_is_too_short_is_refused_before_any_work(run, data, tmp_path):
    short = tiny_folder(tmp_path / "short")
    options = ("--mode", "ar", "--data-dir", data, "--device", "cpu")
    code, error, _ = run("--model", short, "--tasks", "hellaswag,gsm8k", *options)
    assert code == 2
    assert "task gsm8k_cot asks for 256 new tokens, but the model's context is 128" in error


def test_a_likelihood_task_needs_no_drafter(run, data, tmp_path):
    plain = tiny_folder(tmp_path / "plain")
    code, _, result = run("--model", plain, "--tasks", "hellaswag", "--data-dir", data, "--limit", 2, "--device", "cpu")
    assert code == 0
    assert result["conditions"]["decoding"] is None
    assert result["tasks"]["hellaswag"]["items"] == 2


def test_block_diffusion_is_scored_by_bounds_and_says_so(run, folder, data, tmp_path):
    model = tiny_folder(tmp_path / "diffusion")
    config = tmp_path / "diffusion" / "config.json"
    entry = {"block_size": 4, "objective": "block-diffusion", "mask_token_id": 3}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096, "tidar": entry}))
    options = ("--data-dir", data, "--device", "cpu", "--likelihood-samples", 3)
    how = ("--mode", "block-diffusion", "--decoder", "fixed-2", "--max-new-tokens", 6)
    how += ("--samples", tmp_path / "samples.jsonl")
    code, said, result = run("--model", model, "--tasks", "hellaswag,gsm8k", *options, *how)
    assert code == 0, said
    assert "hellaswag: log-likelihoods are Monte Carlo lower bounds of 3 samples" in said
    swag, gsm = result["tasks"]["hellaswag"], result["tasks"]["gsm8k"]
    assert (swag["likelihood"]["kind"], swag["likelihood"]["samples"]) == ("Monte Carlo lower bound", 3)
    assert swag["likelihood"]["standard_error"] > 0
    assert "likelihood" not in gsm
    assert gsm["tokens_per_forward"] > 1
    assert result["conditions"]["decoding"]["decoder"] == "fixed-2"
    items = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(item["standard_errors"] or []) for item in items] == [4] * 3 + [0] * 2
    code, error, _ = run("--model", folder, "--tasks", "hellaswag", *options)
    assert code == 2
    assert "likelihood-samples is for block-diffusion models" in error


def test_the_settings_are_the_papers():
    settings = {name: (r.shots, r.new_tokens, r.score) for name, r in RECIPES.items()}
    assert settings == {
        "humaneval": (0, 512, "pass@1"),
        "humaneval_plus": (0, 512, "pass@1"),
        "mbpp": (3, 512, "pass@1"),
        "mbpp_plus": (3, 512, "pass@1"),
        "gsm8k": (8, 256, "strict_match"),
        "minerva_math": (4, 512, "exact_match"),
        "mmlu": (5, None, "acc"),
        "arc_easy": (0, None, "acc"),
        "arc_challenge": (0, None, "acc_norm"),
        "hellaswag": (0, None, "acc_norm"),
        "piqa": (0, None, "acc_norm"),
        "winogrande": (5, None, "acc"),
    }
    assert [name for name, r in RECIPES.items() if r.runs_code] == ["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"]


def test_minerva_math_takes_one_local_file(tmp_path):
    put(tmp_path, "minerva_math.jsonl", {"problem": "1+1?", "solution": "It is $\\boxed{2}$."})
    job = build("minerva_math", tmp_path)
    ((name, task),) = job.parts.items()
    assert name == "minerva_math"
    assert task.config.generation_kwargs["max_gen_toks"] == 512
    assert task.process_results(
        task.task_docs[0], ["Final Answer: The final answer is $2$. I hope it is correct."]
    ) == {
        "exact_match": 1,
        "math_verify": 1,
    }


def test_mbpp_plus_runs_the_tests_that_it_adds(monkeypatch, tmp_path):
    row = {"task_id": 2, "prompt": "Add.", "test_list": ["assert add(1, 1) == 2"] * 3, "test": "assert add(2, 2) == 4"}
    put(tmp_path, "mbpp_plus.jsonl", row)
    (task,) = build("mbpp_plus", tmp_path).parts.values()
    assert "your task: Add. Your code" in task.doc_to_text(task.task_docs[0])
    monkeypatch.setattr(sandbox, "run_all", lambda programs: [sandbox.Verdict("== 4" in p, "") for p in programs])
    assert grading.mbpp_passes([row], ["def add(a, b): return a + b"]) == [True]


def test_examples_are_never_scored(tmp_path):
    rows = [{"context": f"{i} _ x", "choices": ["a", "b"], "gold": i % 2} for i in range(8)]
    put(tmp_path, "winogrande.jsonl", *rows)
    job = build("winogrande", tmp_path)
    (task,) = job.parts.values()
    assert [d["sentence"] for d in task.task_docs] == ["5 _ x", "6 _ x", "7 _ x"]
    assert [d["sentence"] for d in task.fewshot_docs()] == [f"{i} _ x" for i in range(5)]
    assert "first 5 rows are examples and not scored" in job.source
    put(tmp_path, "winogrande_train.jsonl", *rows[:5])
    job = build("winogrande", tmp_path)
    (task,) = job.parts.values()
    assert len(task.task_docs) == 8
    assert job.source == "winogrande.jsonl, examples from winogrande_train.jsonl"


def test_a_subjects_examples_are_its_own(tmp_path):
    rows = [
        {"context": f"{subject} {i}?", "choices": list("wxyz"), "gold": 1, "subject": subject}
        for i in range(7)
        for subject in ("virology", "anatomy")
    ]
    put(tmp_path, "mmlu_test.jsonl", *rows)
    parts = build("mmlu", tmp_path).parts
    assert list(parts) == ["mmlu_anatomy", "mmlu_virology"]
    task = parts["mmlu_virology"]
    assert [d["question"] for d in task.task_docs] == ["virology 5?", "virology 6?"]
    context = task.fewshot_context(task.task_docs[0], 5)
    assert context.startswith("The following are multiple choice questions (with answers) about virology.")
    assert [f"virology {i}?" in context for i in range(7)] == [True] * 6 + [False]
    assert "anatomy" not in context


@needs_data
@needs_sandbox
def test_solutions_of_the_sets_authors_pass_and_others_do_not():
    for name, field, grade in (
        ("humaneval", "canonical_solution", grading.humaneval_passes),
        ("mbpp", "code", grading.mbpp_passes),
    ):
        documents = [json.loads(line) for line in (DATA / "tasks" / f"{name}.jsonl").read_text().splitlines()[10:30]]
        assert all(grade(documents, [document[field] for document in documents]))
        assert not any(grade(documents, ["    return None\n" for _ in documents]))


@needs_data
def test_gold_answers_of_gsm8k_are_right_and_other_questions_answers_are_not():
    lines = (DATA / "tasks" / "gsm8k_test.jsonl").read_text().splitlines()[:50]
    documents = [json.loads(line) for line in lines]
    gold = [document["answer"].rpartition("####") for document in documents]
    said = [f" {reasoning.strip()} The answer is {number.strip()}." for reasoning, _, number in gold]
    assert all(grading.gsm8k_math_verify(documents, said))
    assert sum(grading.gsm8k_math_verify(documents, said[1:] + said[:1])) < 5


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 1 + 1 = 2. The answer is 2.", True),
        (" So it is $2.00", True),
        (" The answer is 4/2.", True),
        (" The answer is 3.", False),
        (" I do not know.", False),
        ("", False),
    ],
)
def test_gsm8k_answers_are_graded_as_mathematics(answer, right):
    assert grading.gsm8k_math_verify([GSM8K], [answer]) == [right]


def test_large_numbers_are_graded_as_mathematics():
    assert grading.gsm8k_math_verify([{"answer": "#### 1,250"}], ["The answer is $1250."]) == [True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--tasks is needed"),
        (["--tasks", "gsm8k,chess"], "there is no task 'chess': take some of humaneval"),
        (["--tasks", "hellaswag,humaneval"], "humaneval runs the code that the model writes: allow it with --run-gen"),
        (["--tasks", "hellaswag", "--limit", 0], "limit is 0"),
        (["speculation", "--prompts", "p.jsonl"], "--out stands before 'speculation': its options go behind its name"),
        (["--tasks", "gsm8k", "--mode", "block-diffusion", "--decoder", "best"], "decoder is 'best'"),
        (["--tasks", "hellaswag", "--batch-size", 0], "batch-size is 0"),
        (["--tasks", "hellaswag", "--likelihood-samples", 1], "samples is 1, but a standard error needs at least 2"),
        (["--tasks", "gsm8k", "--max-new-tokens", 0], "max-new-tokens is 0"),
        (["--tasks", "gsm8k", "--mode", "quick"], "mode is 'quick'"),
        (["--tasks", "gsm8k", "--plan", "none"], "plan is 'none'"),
        (["--tasks", "gsm8k", "--temperature", -1], "temperature"),
        (["--tasks", "arc_easy"], "has no file for task arc_easy: it takes one of arc_easy.jsonl"),
        (["--tasks", "hellaswag", "--data-dir", "/nowhere"], "--data-dir /nowhere is no folder"),
        (["--tasks", "hellaswag", "--out", "/dev/null/a.json"], "cannot write /dev/null/a.json"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(run, data, monkeypatch, options, says):
    monkeypatch.setattr("tidar.cli.options.load", lambda *_: pytest.fail("loaded"))
    code, error, _ = run("--data-dir", data, *options)
    assert code == 2
    assert says in error
    assert error.startswith("tidar: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("hellaswag.jsonl", {"context": "a", "gold": 0}, "line 1: no field 'choices', but 'context', 'gold'"),
        (
            "hellaswag.jsonl",
            HELLASWAG | {"gold": 4},
            "line 1: field 'gold' is 4, but must be the index of a choice: 0 to 3",
        ),
        ("hellaswag.jsonl", HELLASWAG | {"choices": "runs"}, "field 'choices' must be a list of texts"),
        ("hellaswag.jsonl", HELLASWAG | {"context": 3}, "field 'context' must be a text, not int"),
        ("piqa.jsonl", HELLASWAG, "field 'choices' has 4 entries, but must have 2"),
        ("gsm8k.jsonl", {"question": "?"}, "no field 'answer', but 'question'"),
        ("mbpp.jsonl", MBPP | {"test_list": []}, "field 'test_list' must be a list of texts"),
        ("mbpp.jsonl", MBPP | {"task_id": 700}, "no row of the test split of task mbpp"),
        ("winogrande.jsonl", {"context": "no gap", "choices": ["a", "b"], "gold": 0}, "has no '_'"),
        (
            "winogrande.jsonl",
            {"context": "_", "choices": ["a", "b"], "gold": 0},
            "has 1 rows, but task winogrande shows 5",
        ),
        ("mmlu.jsonl", HELLASWAG | {"subject": "cooking"}, "has 1 rows with subject 'cooking', but task mmlu shows 5"),
        ("humaneval.jsonl", {}, "no field 'prompt', but no fields"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, says):
    put(tmp_path, name, row)
    with pytest.raises(TidarError) as error:
        build(name.removesuffix(".jsonl"), tmp_path)
    assert says in str(error.value)
    assert name in str(error.value)


def test_an_empty_file_two_files_and_an_unknown_subject_are_named(tmp_path):
    put(tmp_path, "piqa.jsonl")
    with pytest.raises(TidarError, match=r"piqa\.jsonl holds no rows"):
        build("piqa", tmp_path)
    (tmp_path / "more").mkdir()
    put(tmp_path / "more", "piqa.jsonl")
    with pytest.raises(TidarError, match="have the same name"):
        build("piqa", tmp_path)
    put(tmp_path, "mmlu.jsonl", *[HELLASWAG | {"subject": "cooking"}] * 6)
    with pytest.raises(TidarError, match="'cooking' is no subject of mmlu"):
        build("mmlu", tmp_path)


def test_without_network_the_hubs_sets_are_one_line():
    with pytest.raises(TidarError, match=r"does not load from the Hugging Face hub \(.*local files go with --data-dir"):
        build("hellaswag")


def test_a_missing_package_is_one_line(run, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    code, error, _ = run("--tasks", "gsm8k")
    assert code == 2
    assert error == "tidar: evaluation needs packages that are not installed: pip install 'tidar[eval]'\n"


def test_chat_needs_a_template(run, data, tmp_path):
    plain = tiny_folder(tmp_path / "plain", chat=False)
    code, error, _ = run(
        "--model", plain, "--tasks", "hellaswag", "--data-dir", data, "--chat-template", "--device", "cpu"
    )
    assert code == 2
    assert "no chat template" in error
