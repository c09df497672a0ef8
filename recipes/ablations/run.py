"""Train and measure the ablations of runs.yaml, each in a process of its own, as many at a time as there are GPUs
(or `--per-gpu` times as many: starting and measuring leave a GPU idle).

    python recipes/ablations/run.py --answers answers.safetensors --out results/ablations-smollm2-135m.json \
        --folder runs/ablations gsm8k_test=gsm8k_test.jsonl:100 mt_bench=mt_bench.jsonl \
        --choices hellaswag=hellaswag_val.jsonl:500 --choices arc_easy=arc_easy_test.jsonl:500

A run that is in several groups is trained once. Results are written as they come, and what is in the folder already is
neither trained nor measured again, so an interrupted job goes on. Tokens per forward come from the real decoder (see
recipes/smollm2-135m/measure.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="NAME=FILE[:FIRST_N] of prompts")
    parser.add_argument("--choices", action="append", default=[], help="NAME=FILE[:FIRST_N] of multiple choice items")
    parser.add_argument("--runs", type=Path, default=HERE / "runs.yaml")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--answers", type=Path, required=True, help="samples that all runs train on")
    parser.add_argument("--folder", type=Path, required=True, help="where trained models go")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group", action="append", help="only groups whose title holds this text")
    parser.add_argument("--steps", type=int, help="instead of the steps in the file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--per-gpu", type=int, default=1, help="runs that share a GPU")
    args = parser.parse_args()
    plan = yaml.safe_load(args.runs.read_text())
    groups = [g for g in plan["groups"] if not args.group or any(text in g["title"] for text in args.group)]
    jobs: dict[str, dict[str, Any]] = {}
    for group in groups:
        for run in group["runs"]:
            job = jobs.setdefault(key(plan, run, args), {"fields": fields(plan, run, args), "lengths": set()})
            job["lengths"] |= set(group.get("draft-lengths", [8]))
            job["likelihood"] = job.get("likelihood", False) or group.get("likelihood", False)
    devices: Queue[str] = Queue()
    for name in gpus() * args.per_gpu:
        devices.put(name)
    measured: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(devices.qsize()) as pool:
        running = {pool.submit(work, name, job, args, devices): name for name, job in jobs.items()}
        for done in as_completed(running):
            measured[running[done]] = done.result()
            write(args, groups, plan, measured)


def gpus() -> list[str]:
    """Names of the GPUs to use, as CUDA_VISIBLE_DEVICES has them; one name if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(max(1, torch.cuda.device_count()))]


def write(args: argparse.Namespace, groups: list[Any], plan: dict[str, Any], measured: dict[str, Any]) -> None:
    """All rows whose runs are done, in the order of the plan."""
    rows = [
        {"group": group["title"], "name": run["name"], **measured[key(plan, run, args)]}
        for group in groups
        for run in group["runs"]
        if key(plan, run, args) in measured
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"model": args.model, "rows": rows}, indent=1) + "\n")


def fields(plan: dict[str, Any], run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The training config of a run."""
    own = {k: v for k, v in run.items() if k not in ("name", "base")}
    return plan["bases"][run["base"]] | own | ({"steps": args.steps} if args.steps else {})


def key(plan: dict[str, Any], run: dict[str, Any], args: argparse.Namespace) -> str:
    """A folder name that is the same for the same config."""
    text = json.dumps(fields(plan, run, args), sort_keys=True)
    return f"{run['base']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def work(name: str, job: dict[str, Any], args: argparse.Namespace, devices: Queue[str]) -> dict[str, Any]:
    """Train a run and measure it, on a device that is free."""
    device, folder = devices.get(), args.folder / name
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if torch.cuda.is_available() else {})

    def run(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command)], env=environment, check=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "training.json").exists():
            config = job["fields"] | {"model": args.model, "output": str(folder), "answers": str(args.answers)}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            run("-m", "tidar.cli.main", "train", folder / "config.yaml")
        result = {"fields": job["fields"]}
        result["training"] = training_facts(folder)
        lengths = sorted(job["lengths"])
        measured = folder / f"measured-{'-'.join(map(str, lengths))}.json"
        if not measured.exists():
            partial = folder / "measuring.json"
            run(
                *(HERE.parent / "smollm2-135m" / "measure.py", "--model", folder, "--out", partial, *args.sets),
                *("--draft-lengths", *lengths, "--max-new-tokens", args.new_tokens),
            )
            partial.rename(measured)
        result |= json.loads(measured.read_text())
        if job["likelihood"] and args.choices:
            scores = folder / "choices.json"
            run(HERE / "choices.py", "--model", folder, "--out", scores, *args.choices)
            result["choices"] = json.loads(scores.read_text())
        print(f"{name}: done", file=sys.stderr)
        return result
    finally:
        devices.put(device)


def training_facts(folder: Path) -> dict[str, Any]:
    """What a run took."""
    record = json.loads((folder / "training.json").read_text())
    last = next((e for e in reversed(record["curve"]) if "tokens_per_second" in e), {})
    wanted = "tokens_per_second", "mfu", "peak_memory_gib"
    return {"seconds": record["summary"]["seconds"], **{name: last[name] for name in wanted if name in last}}


if __name__ == "__main__":
    main()
