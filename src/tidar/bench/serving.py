"""vLLM with and without the plug-in, at several numbers of concurrent requests, in one run.

Each contestant has a process of its own, which steps its engine directly, without HTTP. They share the device's memory
and take turns, pass by pass: a small model's step takes as long as the host's code, and hosts are not equally fast all
the time. Weights are those of a checkpoint folder, or random ones at a real model's shape, for which a fixed share of
drafts is made to stand: which ones is random, what a step costs is not.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tidar.bench import machine
from tidar.bench.shapes import RANDOM
from tidar.errors import TidarError
from tidar.prompts import encode_prompt, read_prompts, template_name

MODES = ("ar", "tidar")
MARK = "RESULT "
LEAST = 8
"""Requests of a measurement."""
MEMORY = 0.85
"""Share of the device's memory that all contestants have together."""
PATIENCE = 60.0
"""Seconds that one may take to end."""


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        model: a checkpoint folder with a drafter, or a key of `shapes.RANDOM`.
        concurrency: requests in flight, one measurement each.
        prompt, new: tokens of a request. Prompts are random tokens, and answers as long as `new`, whatever they say.
        prompts: a set of prompts instead (its name, its file, how many of the first), through the checkpoint's chat
            template; answers end where the model ends them, and have at most `new` tokens.
        rounds: how many requests follow each other in each place; more where that would be fewer than LEAST.
        repeats: measurements of each, in turns, after one to warm up; the one with the median rate counts.
        survival: probability that a draft stands, for random weights; None judges drafts as they are.
        draft_length, outcomes, curve: see `vllm.command.Options`.
        more: further keyword arguments of `vllm.LLM`.
    """

    model: str
    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    prompt: int = 1024
    new: int = 256
    rounds: int = 2
    repeats: int = 3
    survival: float | None = None
    draft_length: int | None = None
    outcomes: int | None = None
    curve: Sequence[Sequence[int]] | None = None
    prompts: tuple[str, str, int | None] | None = None
    more: dict[str, Any] | None = None


def measure(load: Load, modes: Sequence[str] = MODES) -> Iterator[dict[str, Any]]:
    """The result so far, after each measurement. Raises TidarError if a contestant fails."""
    if load.model in RANDOM and load.survival is None:
        raise TidarError("random weights draft nothing useful: say which share of drafts is to stand")
    if load.survival is not None and not 0 <= load.survival <= 1:
        raise TidarError(f"survival is {load.survival}, but must be in [0, 1]")
    if load.prompts is not None and load.model in RANDOM:
        raise TidarError("random weights answer nothing: prompts are for a checkpoint")
    said = load.prompts and f"{load.prompts[0]}{':' if load.prompts[2] else ''}{load.prompts[2] or ''}"
    asked = {
        **asdict(load),
        "prompts": said,
        "prompt": load.prompt if said is None else None,
        "model": load.model if load.model in RANDOM else Path(load.model).name,
    }
    conditions = machine.conditions(torch.device("cpu"), torch.float32) | {"temperature": 0}
    result: dict[str, Any] = {"conditions": conditions, "load": asked, "in_turns": True, "rows": []}
    with tempfile.TemporaryDirectory(prefix="tidar-serving-") as scratch:
        folder = write_random(load.model, Path(scratch)) if load.model in RANDOM else load.model
        with ExitStack() as stack:
            contestants = list[Contestant]()
            for mode in modes:  # one after the other: each measures what memory the others leave
                given = {**asdict(load), "mode": mode, "folder": folder, "memory": MEMORY / len(modes)}
                contestants.append(stack.enter_context(Contestant(mode, _command(given))))
                started = contestants[-1].says()
                conditions |= started.pop("machine")
                result.update(started)
                yield result
            for concurrency in load.concurrency:
                passes = [list[dict[str, Any]]() for _ in contestants]
                for rounds in (1, *[load.rounds] * load.repeats):  # the first warms up
                    for contestant, rows in zip(contestants, passes, strict=True):
                        rows.append(contestant.measures(concurrency, rounds))
                for contestant, (_, *rows) in zip(contestants, passes, strict=True):
                    rates = [row["tokens_per_s"] for row in rows]
                    middle = rows[rates.index(statistics.median_low(rates))]
                    row = {"mode": contestant.mode, "concurrency": concurrency, **middle, "all_tokens_per_s": rates}
                    result["rows"].append(row)
                yield result


def _command(given: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "tidar.bench.serving", json.dumps(given)]


class Contestant:
    """vLLM in a process of its own, measuring when it is asked to."""

    def __init__(self, mode: str, command: Sequence[str]) -> None:
        self.mode = mode
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env={**environment, **os.environ}, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.said = self.process.stdin, self.process.stdout

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *failure: object) -> None:
        with suppress(BrokenPipeError):
            self.asked.close()
        try:
            self.process.wait(0 if any(failure) else PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()

    def measures(self, concurrency: int, rounds: int) -> dict[str, Any]:
        """One pass. Raises TidarError if the process has ended."""
        with suppress(BrokenPipeError):  # what it said is read below
            self.asked.write(json.dumps([concurrency, rounds]) + "\n")
            self.asked.flush()
        return self.says()

    def says(self) -> dict[str, Any]:
        """What it says next. Raises TidarError if it ends instead."""
        for line in self.said:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            print(line, end="", file=sys.stderr)
        code = self.process.wait()
        raise TidarError(
            f"vLLM with mode {self.mode!r} ended with code {code}; what it said stands above (if that is about memory: "
            f"contestants share {MEMORY:.0%} of the device's)"
        )


def write_random(name: str, folder: Path) -> str:
    """A checkpoint folder at the shape of a real model, with a random drafter and no weights file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tidar.config import TidarConfig
    from tidar.model.drafter import Drafter, DrafterSpec
    from tidar.vllm.checkpoint import INDEX

    kind, sizes = RANDOM[name]
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        drafter = Drafter(lm, DrafterSpec())
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    size = sum(parameter.nbytes for parameter in lm.parameters())  # what the curve depends on
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": {}}))
    drafter = drafter.to_empty(device="cpu")
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    drafter.save(folder / "drafter", str(folder), TidarConfig(block_size=8))
    return str(folder)


def _run(given: dict[str, Any]) -> None:
    """A contestant's process: says when it is ready, then measures what it is asked for, line by line."""
    from tidar.vllm.plugin import register

    register()
    import vllm
    from vllm import LLM

    from tidar.vllm import Options, engine_options

    most = max(given["concurrency"])
    chosen = {key: given[key] for key in ("draft_length", "outcomes", "curve")} if given["mode"] == "tidar" else {}
    options = engine_options(given["folder"], Options(mode=given["mode"], max_num_seqs=most, **chosen))
    texts, template = _encoded(given) if given["prompts"] else (None, "none")
    own = {
        "max_model_len": (max(map(len, texts)) if texts else given["prompt"]) + given["new"] + 64,
        "max_num_batched_tokens": 8192,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "gpu_memory_utilization": given["memory"],
        "seed": 0,
        **({"load_format": "dummy"} if given["model"] in RANDOM else {}),
    }
    curve = (options.get("additional_config") or {}).get("tidar", {}).get("curve", [])
    if not torch.cuda.is_available():
        own["enforce_eager"] = True
    started = time.perf_counter()
    llm = LLM(given["folder"], **{**own, **options, **(given["more"] or {})})
    if given["survival"] is not None and given["mode"] == "tidar":
        # By its full name: workers on other GPUs do not run this module as their main one.
        from tidar.bench.serving import fix_acceptance

        llm.collective_rpc(fix_acceptance, args=(given["survival"],))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    where = {"device": device, "threads": None, "dtype": dtype, "vllm": vllm.__version__, "template": template}
    _say({"machine": where, f"{given['mode']}_start_s": round(time.perf_counter() - started, 1), "curve": curve})
    for line in sys.stdin:
        concurrency, rounds = json.loads(line)
        _say(one(llm, given["prompt"], texts, given["new"], concurrency, rounds))


def _encoded(given: dict[str, Any]) -> tuple[list[list[int]], str]:
    """Token ids of the prompts, and what template they went through."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given["folder"])
    _, file, first = given["prompts"]
    texts = [encode_prompt(tokenizer, placed.prompt) for placed in read_prompts(file)[:first]]
    return texts, template_name(tokenizer)


def one(
    llm: Any, length: int, texts: list[list[int]] | None, new: int, concurrency: int, rounds: int
) -> dict[str, Any]:
    """Keep `concurrency` requests in flight until each place has had its rounds.

    `texts` are the prompts, in turn; None draws random ones of `length` tokens.
    """
    from vllm import SamplingParams

    engine, draw = llm.llm_engine, random.Random(concurrency)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=texts is None, detokenize=False)
    sent, first, gains = dict[str, float](), dict[str, float](), 0
    ended, tokens = dict[str, float](), dict[str, int]()
    count = max(concurrency * rounds, LEAST)
    waiting = [f"{concurrency}-{time.monotonic_ns()}-{number}" for number in range(count)]

    def random_tokens() -> list[int]:
        return [draw.randrange(10, vocabulary - 10) for _ in range(length)]

    def send() -> None:
        name = waiting.pop()
        sent[name] = time.perf_counter()
        prompt = texts[len(waiting) % len(texts)] if texts else random_tokens()
        engine.add_request(name, {"prompt_token_ids": prompt}, params)

    started = time.perf_counter()
    for _ in range(concurrency):
        send()
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter()
        gains += len(outputs)
        for output in outputs:
            first.setdefault(output.request_id, now)
            if output.finished:
                ended[output.request_id] = now
                tokens[output.request_id] = len(output.outputs[0].token_ids)
                if waiting:
                    send()
    seconds = time.perf_counter() - started
    total = sum(tokens.values())
    each = [(ended[name] - first[name]) / (n - 1) * 1e3 for name, n in tokens.items() if n > 1]
    return {
        "tokens_per_s": round(total / seconds, 1),
        "ttft_ms": round(statistics.median(first[name] - sent[name] for name in first) * 1e3, 1),
        "ms_per_token": round(statistics.median(each), 3) if each else None,
        "tokens_per_step": round(total / gains, 3),
        "tokens": total,
    }


def fix_acceptance(worker: Any, survival: float) -> None:
    """In a worker of vLLM: from now on every draft stands with this probability, whatever the logits say.

    All ranks draw the same numbers: they begin with the same seed, and draw in the same steps.
    """
    from tidar.kernels import judge
    from tidar.sampling import Leaves
    from tidar.vllm import sampler

    def decide(choice: torch.Tensor, leaves: Leaves | None, facts: judge.Judged, block_size: int) -> judge.Decision:
        stands = torch.rand(choice[:, 1:].shape, device=choice.device) < survival
        wrong = (facts.drafts[:, 1:] + 1) % 1000
        fixed = torch.where(stands, facts.drafts[:, 1:], wrong)
        return judge.decide(torch.cat((fixed, choice[:, -1:]), 1), leaves, facts, block_size)

    torch.manual_seed(0)
    vars(sampler)["decide"] = decide


def _say(line: dict[str, Any]) -> None:
    print(MARK + json.dumps(line), flush=True)


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
