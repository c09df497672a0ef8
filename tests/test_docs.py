"""Every code block of README.md, CONTRIBUTING.md and docs/ does what it says, on tiny models.

Blocks of a page run in order in one folder. Bash itself expands them (loops, variables, comments, redirections). Its
commands are recorded by stand-ins and then checked: every `tidar ...` must be accepted by the command line as written,
and is run with the changes that the tables below name. Python runs, YAML must load as a recipe, JSON must parse. A
block in another language, or with a command that no table knows, fails.
"""

import __future__

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import pytest

from needs import needs_sandbox
from tidar import TidarModel
from tidar.cli import main as cli
from tidar.train.config import ONLY_FOR
from tidar.train.recipe import read_fields
from tiny import drafting_folder

ROOT = Path(__file__).parent.parent
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    if not path.name.endswith(".in.md")
]

TINY = "tiny"
"""A model folder with a drafter inside, in the folder in which blocks run."""
NAMES = {
    **dict.fromkeys(("smollm2-135m", "MODEL", "merged", "HuggingFaceTB/SmolLM2-135M-Instruct"), TINY),
    **dict.fromkeys(("random:qwen2.5-1.5b", "random:qwen3-8b"), TINY),
    "hf:openai/gsm8k:main:train": "prompts.jsonl",
}
"""What stands for models and data that are not here. All other files are made under the names that pages use."""

DECODE = {"--model": TINY, "--device": "cpu", "--max-new-tokens": 8}
TRAIN = {
    **{"--model": TINY, "--device": "cpu", "--log-every": 1},
    **{"--steps": 2000, "--batch-size": 2, "--sequence-length": 96, "--anchors": 4},
    **{"--rank": 4, "--sampler-width": 8, "--answer-tokens": 8, "--answers-per-prompt": 1},
}
SMALL = {
    "generate": DECODE,
    "chat": DECODE,
    "trace": DECODE,
    "generate-data": DECODE | {"--answers-per-prompt": 1, "--batch-size": 4},
    "train": TRAIN,
    "evaluate": DECODE | {"--limit": 1, "--data-dir": "data"},
    "evaluate speculation": DECODE | {"--limit": 2},
    "compare": DECODE | {"--passes": 1},
    "bench slots": {"--model": TINY, "--device": "cpu", "--tokens": 8, "--prefix": 16},
    "bench speed": DECODE | {"--repeats": 1, "--peer-prompts": 1},
    "bench train": {"--model": TINY, "--device": "cpu", "--sequence-length": 32, "--steps": 8, "--accumulate": 1},
}
"""Options that replace those of a block, or join them, so that it ends soon."""
KEPT = ("--model", "--sampler-width")
"""Options that stay as they are where a block has them."""
RECIPES = {"docs/convert.md": "my-recipe.yaml"}
"""The name under which a page asks to save its recipe."""
STEPS = 1000
"""Training takes one step for so many; 2,000 where a block says nothing."""
RECIPE = {"--save-every": 1, "--measure-every": 1, "--measure-count": 1, "--measure-tokens": 8}
NEEDED = {"docs/faq.md": ["my-drafter"]}
"""Folders that a page takes for granted."""

NOT_RUN = {
    "tidar serve": "does not end",
    "tidar demo": "does not end",
    "torchrun": "several GPUs",
    "accelerate": "several GPUs",
    "make": "this suite, or what needs a GPU",
    "pip": "the network",
    "python": "trains at its own size, or asks a server",
}
"""Commands that are only checked, and why: what a machine for tests lacks."""
NOT_RUN_PYTHON = {"import OpenAI": "a running server"}
"""The same for Python, by a text that such a block has."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SHOWN = ("text", "json")
"""Blocks that show something and run nothing."""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    blocks = [Block(page, text[: f.start()].count("\n") + 1, f[2], f[3]) for f in fences]
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks), f"{page}: a fence of another kind"
    return blocks


END = "\1"
STAND_IN = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" $\'\\1\' >> "$RECORD"\n'


def commands_of(block: Block, folder: Path) -> list[list[str]]:
    """What bash would run, expanded; the commands do nothing."""
    names = {name.split()[0] for name in NOT_RUN} | {"tidar"}
    for name in [*(f"bin/{name}" for name in names), ".venv/bin/tidar"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    environment = {"PATH": str(folder / "bin"), "RECORD": str(record)}
    script = f"set -eu\n{block.code}\nwait\n"
    done = subprocess.run(["/bin/bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    commands, words = [], []
    for word in record.read_text().split("\0")[:-1]:
        if word == END:
            commands.append(words)
            words = []
        else:
            words.append(word)
    assert commands, f"{block.place}: no command"
    return commands


def tidar_words(command: list[str]) -> list[str] | None:
    """What follows `tidar`, also where a launcher runs it; None for other commands."""
    if command[0] == "tidar":
        return command[1:]
    return command[command.index("tidar.cli.main") + 1 :] if "tidar.cli.main" in command else None


@pytest.fixture
def accepted(monkeypatch, run):
    """Parses `tidar ...` as the command line does: the functions behind it are left out."""
    called = []

    def idle(command):
        @wraps(command.callback)
        def call(**options):
            called.append(options)

        monkeypatch.setattr(command, "callback", call)

    def each(inside):
        for command in inside.registered_commands:
            idle(command)
        for group in inside.registered_groups:
            if group.typer_instance.registered_callback is not None:
                idle(group.typer_instance.registered_callback)
            each(group.typer_instance)

    each(cli.app)

    def check(words):
        called.clear()
        code, out, err = run(*words)
        return (code, out + err) if code or called else (1, "no such command")

    return check


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted_as_written(page, accepted, tmp_path):
    for block in blocks_of(page):
        assert block.language in ("bash", "python", "yaml", *SHOWN), f"{block.place}: language {block.language!r}"
        for command in commands_of(block, tmp_path) if block.language == "bash" else ():
            words = tidar_words(command)
            if words is not None:
                code, said = accepted(words)
                assert code == 0, f"{block.place}: {' '.join(command)}\n{said}"
            elif command[0] == "make":
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert {word for word in command[1:] if "=" not in word} <= {*targets}, block.place
            elif command[0] == "python" and command[1] != "-m":
                script = (ROOT / command[1]).read_text()
                options = [word for word in command[2:] if word.startswith("--")]
                assert all(f'"{option}"' in script for option in options), f"{block.place}: {' '.join(command)}"
            else:
                assert command[0] in NOT_RUN, f"{block.place}: no table says how to test {command[0]}"


def test_wrong_options_are_noticed(accepted):
    assert accepted(["generate", "x", "--draft-length", "4"])[0] == 0
    assert accepted(["generate", "x", "--draft-lenght", "4"])[0] != 0
    assert accepted(["generate", "x", "--draft-length", "four"])[0] != 0
    assert accepted(["generate-it", "x"])[0] != 0


HISTORICAL = ("docs/speed.md", "docs/ablations.md", "docs/baselines.md")
"""Pages that quote commands as they were when something was measured."""
FOREIGN = {"--help", "--no-deps", "--choices"}
"""Of every command, of pip, of recipes/ablations/run.py."""
FOREIGN |= {"--hf-overrides", "--diffusion-config", "--scheduler-cls", "--additional-config", "--attention-backend"}
FOREIGN |= {"--middleware", "--worker-cls", "--disable-custom-all-reduce"}
"""Of vLLM."""


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORICAL])
def test_options_in_the_text_exist(page):
    """docs/commands.md is made from the command line itself, which test_pages.py holds it to."""
    known = FOREIGN | {*OPTION.findall((ROOT / "docs" / "commands.md").read_text())}
    text = re.sub(r"^( *)```.*?^\1```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    named = {option for code in re.findall(r"`([^`]+)`", text) for option in OPTION.findall(code)}
    assert named <= known, page


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with everything that pages name."""
    folder = tmp_path_factory.mktemp("workshop")
    drafting_folder(folder / TINY, mask_token=True, context=8192)
    shutil.copytree(folder / TINY / "drafter", folder / "my-drafter")
    config = folder / "my-drafter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / TINY), TINY))

    def put(names, *rows):
        for name in names.split():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    put(
        "prompts.jsonl PROMPTS.jsonl held-out.jsonl", *({"prompt": f"say {word}"} for word in ("a", "bc", "def", "g h"))
    )
    put("mt_bench.jsonl", {"question_id": 1, "category": "talk", "turns": ["Hi.", "And?"]})
    put("gsm8k_test.jsonl data/gsm8k_test.jsonl", *[{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}] * 2)
    choice = {"context": "A man", "choices": ["runs.", "is a tree.", "flies.", "no"], "gold": 0}
    put("data/hellaswag_val.jsonl data/arc_challenge_test.jsonl", choice, choice)
    add = {"entry_point": "add", "canonical_solution": "    return a + b\n", "test": "def check(f):\n    pass\n"}
    put("data/humaneval.jsonl", {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", **add})
    tests = {"code": "def add(a, b):\n    return a + b", "test_list": ["assert add(1, 2) == 3"] * 3}
    put("data/mbpp.jsonl", *({"task_id": n, "text": "Add.", "test_setup_code": "", **tests} for n in (2, 3, 4, 11)))
    return folder


def small(words: list[str]) -> list[str]:
    """The command with tiny models and short work."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in SMALL else words[0]
    recipe = any(word.endswith(".yaml") for word in words)
    words = [NAMES.get(word, word) for word in words]
    objective = words[words.index("--objective") + 1] if "--objective" in words else "lossless"
    for flag, value in (SMALL[name] | (RECIPE if recipe else {})).items():
        idle = name == "train" and objective not in ONLY_FOR.get(_field(flag), (objective,))
        if idle or (flag in KEPT and flag in words):
            continue
        while flag in words:
            at = words.index(flag)
            value = int(words[at + 1]) if (name, flag) == ("train", "--steps") else value
            del words[at : at + 2]
        words += [flag, str(max(1, value // STEPS) if (name, flag) == ("train", "--steps") else value)]
    return words


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def run_bash(block, folder, run):
    for command in commands_of(block, folder):
        line = " ".join(command)
        if any(line.startswith(name) for name in NOT_RUN):
            continue
        if "--run-generated-code" in command and needs_sandbox.args[0]:
            continue
        words = small(tidar_words(command)) if "--render" not in command else command[1:]
        code, out, err = run(*words)
        assert code == 0, f"{block.place}: {line}\nrun as: tidar {' '.join(words)}\n{out}\n{err}"


def run_python(block, namespace):
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        assert all(importlib.util.find_spec(module) for module in modules), f"{block.place}: {modules}"
    if not any(mark in block.code for mark in NOT_RUN_PYTHON):
        short = re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", block.code)
        exec(compile(short, block.place, "exec", flags=__future__.annotations.compiler_flag), namespace)


RUNNABLE = [page for page in PAGES if any(block.language not in SHOWN for block in blocks_of(page))]


@pytest.mark.parametrize("page", RUNNABLE)
def test_blocks_run(page, workshop, tmp_path, run, monkeypatch):
    folder = tmp_path / "here"
    left_out = [] if page in NEEDED else ["my-drafter"]
    shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns(*left_out))
    monkeypatch.chdir(folder)
    load = TidarModel.from_pretrained
    monkeypatch.setattr(TidarModel, "from_pretrained", lambda name, **more: load(NAMES.get(name, name), **more))
    namespace = {}
    for block in blocks_of(page):
        if block.language == "bash":
            run_bash(block, folder, run)
        elif block.language == "python":
            run_python(block, namespace)
        elif block.language == "yaml":
            (folder / RECIPES[page]).write_text(block.code)
            assert read_fields(folder / RECIPES[page]), block.place
        elif block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.code.splitlines()), block.place
