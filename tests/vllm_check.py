"""What only GPUs can show of the plug-in: `make vllm-check`, where tidar with its dev extra and vLLM are installed.

The real smollm2-135m, with heads added that do nothing, so that two GPUs can share them. Engines with and without
drafting, on one GPU and (where there are two) on two: each token of every greedy answer must be the float32 base
model's, up to rounding; structured answers beside drafting ones must be what was asked for. Then `tidar serve`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from openai_suite import alive, metric
from tidar.config import TidarConfig
from tidar.model import hub
from tidar.model.drafter import Drafter
from tidar.prompts import encode_prompt

TIE = 0.25
"""Two bfloat16 roundings of a logit between 16 and 32."""
NEW = 96
LONGEST = 300
"""Seconds that an engine may take, its start included."""
TEXTS = (
    "Tom has 5 bags with 7 marbles each. How many marbles does he have?",
    "Write a short story about a lighthouse keeper.",
    "List the planets of the solar system.",
    "Why is the sky blue?",
    "What is wrong with this text? " + "The keeper climbed the stairs and lit the lamp, as he did every evening. " * 20,
    "Count from one to thirty.",
    "Translate to French: the cat sleeps on the table.",
    "A train travels 60 miles an hour for three hours. How far does it go?",
)
CURVE = ((4, 8, 4), (16, 8, 1))
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 10**9}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
CHOICES = ["positive", "negative"]
DATE = r"\d{4}-\d{2}-\d{2}"
MARK = "SAID "


def write_checkpoint(folder: Path) -> None:
    """smollm2-135m with its drafter: 12 heads instead of 9 and 4 of keys instead of 3, the new ones zero."""
    loaded = hub.load("smollm2-135m", device="cpu", dtype="bfloat16")
    source, drafter = loaded.network.lm, loaded.network.drafter
    assert drafter is not None
    assert loaded.tokenizer is not None
    own = drafter.tensors()
    config = AutoConfig.for_model(**{**source.config.to_dict(), "num_attention_heads": 12, "num_key_value_heads": 4})
    config.head_dim, config.architectures = 64, ["LlamaForCausalLM"]
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    copy({name: t for name, t in source.state_dict().items() if "lora_" not in name}, lm.state_dict())
    lm.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    wider = Drafter(lm, drafter.spec)
    copy(own, wider.tensors())
    entry = loaded.network.config
    assert isinstance(entry, TidarConfig)
    wider.save(folder / "drafter", str(folder), entry)


@torch.no_grad()
def copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """Into the first rows and columns of tensors of the same names, which are zero beyond."""
    source = {name.replace(".base.", "."): tensor for name, tensor in source.items()}
    assert source.keys() == target.keys(), sorted(source.keys() ^ target.keys())[:4]
    for name, tensor in source.items():
        target[name].zero_()
        target[name][tuple(slice(size) for size in tensor.shape)] = tensor


def engine_says(folder: str, mode: str, gpus: int) -> None:
    """One engine, in a process of its own: prints what it answers."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from tidar.vllm import Options, engine_options
    from tidar.vllm.plugin import register

    register()
    own: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.4}
    own |= {"seed": 0, "disable_log_stats": True, "tensor_parallel_size": gpus}
    if gpus > 1:
        own["disable_custom_all_reduce"] = True
    if not torch.cuda.is_available():
        own |= {"enforce_eager": True, "block_size": 32, "dtype": "float32"}
    started = time.perf_counter()
    curve = CURVE if mode == "tidar" else None
    options = Options(mode=mode, max_num_seqs=16, curve=curve)  # type: ignore[arg-type]
    llm = LLM(folder, **own, **engine_options(folder, options))
    start = round(time.perf_counter() - started, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [encode_prompt(tokenizer, text) for text in TEXTS]

    def decode(asked: list[tuple[list[int], Any]], name: str) -> tuple[list[list[int]], float]:
        engine, got, outputs = llm.llm_engine, dict[str, list[int]](), 0
        for number, (prompt, params) in enumerate(asked):
            engine.add_request(f"{name}{number}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                outputs += 1
                got[output.request_id] = list(output.outputs[0].token_ids)
        answers = [got[f"{name}{number}"] for number in range(len(asked))]
        return answers, sum(map(len, answers)) / outputs

    def greedy(**more: Any) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=NEW, **more)

    def shaped(**what: Any) -> Any:
        return greedy(structured_outputs=StructuredOutputsParams(**what))

    together, gain = decode([(prompt, greedy()) for prompt in prompts], "together")
    alone = [decode([(prompt, greedy())], f"alone{n}") for n, prompt in enumerate(prompts[:3])]
    off, plain_gain = decode([(prompt, greedy(extra_args={"tidar": False})) for prompt in prompts], "off")
    wishes = [
        ("Name a large city and how many people live there.", shaped(json=CITY)),
        ("Is this positive or negative? I loved every minute of it.", shaped(choice=CHOICES)),
        ("When did people first walk on the moon?", shaped(regex=DATE)),
    ]
    asked = [(prompt, greedy()) for prompt in prompts[:4]]
    mixed, mixed_gain = decode([*asked, *((encode_prompt(tokenizer, t), p) for t, p in wishes)], "mixed")
    said = {
        "start_s": start,
        "together": together,
        "alone": [answers[0] for answers, _ in alone],
        "off": off,
        "mixed": mixed[:4],
        "structured": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in mixed[4:]],
        "tokens_per_step": {"together": gain, "alone": alone[0][1], "off": plain_gain, "mixed": mixed_gain},
    }
    print(MARK + json.dumps(said), flush=True)


@contextmanager
def engine(folder: str, mode: str, gpus: list[int]) -> Iterator[subprocess.Popen[str]]:
    """A process with an engine; it and all that it started have ended afterwards."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    own = {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_LOGGING_LEVEL": "INFO" if len(gpus) > 1 else "WARNING",
        "CUDA_VISIBLE_DEVICES": ",".join(visible[number] for number in gpus),
    }
    command = [sys.executable, __file__, folder, mode, str(len(gpus))]
    with subprocess.Popen(
        command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What an engine said."""
    try:
        text, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired as late:
        print((late.output or b"").decode(errors="replace")[-3000:])
        raise SystemExit(f"an engine did not end within {LONGEST} s") from None
    said = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    if process.returncode or not said:
        print(text[-3000:])
        raise SystemExit(f"an engine ended with code {process.returncode}")
    return json.loads(said[0])


class Reference:
    """The base model in float32."""

    def __init__(self, folder: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = [encode_prompt(tokenizer, text) for text in TEXTS]

    @torch.inference_mode()
    def gap(self, answers: list[list[int]]) -> float:
        """How far below the largest logit a chosen token's lies, at most."""
        gaps = [0.0]
        for prompt, answer in zip(self.prompts, answers, strict=False):
            ids = torch.tensor([prompt + answer], device=self.device)
            logits = self.lm(ids).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps.append(float((logits.amax(1) - chosen).max()))
        return max(gaps)


def check(mode: str, gpus: int, said: dict[str, Any], plain: dict[str, Any], reference: Reference) -> dict[str, Any]:
    """A line for people, and the figures."""
    kinds = ("together", "alone", "off", "mixed")
    pairs = [(a, b) for kind in kinds for a, b in zip(said[kind], plain["together"], strict=False)]
    same, gap = sum(a == b for a, b in pairs), max(reference.gap(said[kind]) for kind in kinds)
    steps = {kind: round(value, 2) for kind, value in said["tokens_per_step"].items()}
    city, choice, date = said["structured"]
    print(
        f"{mode}, GPUs: {gpus}: {same} of {len(pairs)} answers are those of plain vLLM on as many GPUs, no token is "
        f"more than {gap:.3f} below the largest logit; tokens per step {steps}; structured {said['structured']}; "
        f"start {said['start_s']} s",
        flush=True,
    )
    assert gap <= TIE, "a token is not the base model's"
    for kind, value in steps.items():
        drafts = mode == "tidar" and kind != "off"
        assert value > 1.2 if drafts else value == 1, f"{kind}: {value} tokens a step"
    found = json.loads(city)
    assert found.keys() == {"city", "people"}, city
    assert choice in CHOICES, choice
    assert re.fullmatch(DATE, date), date
    figures = {"same_as_plain": same, "answers": len(pairs), "largest_gap": round(gap, 3), "tokens_per_step": steps}
    return {"mode": mode, "gpus": gpus, **figures, "structured": said["structured"], "start_s": said["start_s"]}


def check_server(folder: str) -> dict[str, Any]:
    """`tidar serve FOLDER`, asked by streams and for a schema at once; then the cases for any server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root, log = f"http://127.0.0.1:{port}", Path(folder) / "server.log"
    command = [sys.executable, "-m", "tidar.cli.main", "serve", folder, "--port", str(port), "--name", "smollm2"]
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--max-model-len", "1024"], stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
    try:
        while not alive(root):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.perf_counter() - started < LONGEST, log.read_text()[-3000:]
            time.sleep(1)
        figures: dict[str, Any] = {"answers_after_s": round(time.perf_counter() - started)}
        print(f"server: answers after {figures['answers_after_s']} s", flush=True)
        shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        jobs = [(text, {}) for text in TEXTS] + [("Name a large city.", {"response_format": shape})] * 3
        texts = [""] * len(jobs)

        def work(number: int) -> None:
            text, more = jobs[number]
            texts[number] = chat(root, text, more)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(texts), "a request failed"
        for text in texts[len(TEXTS) :]:
            assert json.loads(text).keys() == {"city", "people"}, text
        time.sleep(3)  # counters are read a second or two after the last step
        steps, tokens = (metric(root, name) for name in ("tidar_steps_total", "tidar_tokens_total"))
        print(f"server: {steps:.0f} drafting steps, {tokens / steps:.2f} tokens each", flush=True)
        assert tokens / steps > 1.2
        suite = Path(__file__).with_name("openai_suite.py")
        where = {**os.environ, "TIDAR_SERVER": f"{root}/v1"}
        # In bfloat16 answers may change with what they are computed beside; `make test-vllm` compares them in float32.
        steady = "not fifty_requests and not several_prompts and not switched_off"
        tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{suite}::TestVLLMServer", "-k", steady]
        ended = subprocess.run(tests, env=where, cwd=suite.parent, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-1000:]
        figures |= {"drafting_steps": round(steps), "tokens_per_step": round(tokens / steps, 2)}
        return figures | {"suite": ended.stdout.splitlines()[-1]}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            os.killpg(process.pid, signal.SIGKILL)


def chat(root: str, text: str, more: dict[str, Any]) -> str:
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": text}], "max_tokens": NEW, "temperature": 0}
    data = json.dumps({**asked, **more}).encode()
    request = urllib.request.Request(
        f"{root}/v1/chat/completions", data, headers={"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main() -> None:
    started, gpus = time.time(), torch.cuda.device_count() if torch.cuda.is_available() else 1
    report: dict[str, Any] = {"compared_with": "plain on as many GPUs", "rows": []}
    with tempfile.TemporaryDirectory(prefix="tidar-vllm-check-") as scratch:
        folder = str(Path(scratch) / "smollm2-135m")
        write_checkpoint(Path(folder))
        runs = [("ar", [0]), ("tidar", [gpus - 1]), *((mode, [0, 1]) for mode in ("ar", "tidar") if gpus > 1)]
        with ExitStack() as stack:
            together = [stack.enter_context(engine(folder, *run)) for run in runs[:2]] if gpus > 1 else []
            said = [result(process) for process in together]
        for run in runs[len(said) :]:
            with engine(folder, *run) as process:
                said.append(result(process))
        reference = Reference(folder)
        plain = {len(places): one for (mode, places), one in zip(runs, said, strict=True) if mode == "ar"}
        for (mode, places), one in zip(runs, said, strict=True):
            report["rows"].append(check(mode, len(places), one, plain[len(places)], reference))
        del reference
        torch.cuda.empty_cache()
        report["server"] = check_server(folder)
    print(json.dumps(report))
    print(f"vllm check passed in {time.time() - started:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        engine_says(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
