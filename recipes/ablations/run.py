"""Train and measure the ablations of runs.yaml, each in a process of its own, as many at a time as there are GPUs.

    python recipes/ablations/run.py --answers answers.safetensors --out results/ablations-smollm2-135m.json \
        --folder runs/ablations gsm8k_test=gsm8k_test.jsonl:100 mt_bench=mt_bench.jsonl \
        --choices hellaswag=hellaswag_val.jsonl:500 --choices arc_easy=arc_easy_test.jsonl:500

A run that is in several groups is trained once. What is in the folder already is not trained again, so an interrupted
job goes on. Tokens per forward come from the real decoder (see recipes/smollm2-135m/measure.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    for index in range(max(1, torch.cuda.device_count())):
        devices.put(str(index))
    with ThreadPoolExecutor(devices.qsize()) as pool:
        measured = dict(zip(jobs, pool.map(lambda name: work(name, jobs[name], args, devices), jobs), strict=True))
    rows = [
        {"group": group["title"], "name": run["name"], **measured[key(plan, run, args)]}
        for group in groups
        for run in group["runs"]
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
        measured = folder / "measured.json"
        run(
            *(HERE.parent / "smollm2-135m" / "measure.py", "--model", folder, "--out", measured, *args.sets),
            *("--draft-lengths", *sorted(job["lengths"]), "--max-new-tokens", args.new_tokens),
        )
        result |= json.loads(measured.read_text())
        if job["likelihood"] and args.choices:
            scores = folder / "choices.json"
            run(HERE / "choices.py", "--model", folder, "--out", scores, *args.choices)
            result["choices"] = json.loads(scores.read_text())
        print(f"{name}: done", file=sys.stderr)
        return result
    finally:
        devices.put(device)


if __name__ == "__main__":
    main()
