"""Tokens per forward of a drafter, by the real decoder: greedy, template applied, prefill counted.

    python recipes/smollm2-135m/measure.py --model smollm2-135m --out results/smollm2-135m.json \
        gsm8k_test=gsm8k_test.jsonl:100 mt_bench=mt_bench.jsonl

Each set is NAME=FILE[:FIRST_N]. Tokens per forward is the sum of new tokens over the sum of forwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from tidar import TidarModel
from tidar.prompts import Prompt, read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="NAME=FILE[:FIRST_N]")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--outcomes", type=int, help="outcome blocks a step; default all")
    parser.add_argument("--alternatives", type=int, nargs="+", default=[0])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype")
    args = parser.parse_args()
    model = TidarModel.from_pretrained(args.model, dtype=args.dtype)
    rows = []
    for name, prompts in map(read_set, args.sets):
        for temperature in args.temperatures:
            options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "temperature": temperature}
            reference = model.generate(prompts, mode="ar", **options)
            for length, leaves in itertools.product(args.draft_lengths, args.alternatives):
                plan = {"draft_length": length, "outcomes": args.outcomes, "alternatives": leaves}
                answers = model.generate(prompts, **plan, **options)
                tokens, forwards = sum(a.new_tokens for a in answers), sum(a.forwards for a in answers)
                same = sum(a.token_ids == b.token_ids for a, b in zip(answers, reference, strict=True))
                histogram = [0] * (length + 1)
                for a in answers:
                    for gained in a.acceptance_lengths:
                        histogram[gained] += 1
                row = {
                    "set": name,
                    "prompts": len(prompts),
                    **plan,
                    "temperature": temperature,
                    "tokens_per_forward": round(tokens / forwards, 3),
                    "new_tokens": tokens,
                    "forwards": forwards,
                    "acceptance_length_counts": histogram[1:],
                }
                if temperature == 0:
                    row["identical_to_ar"] = same
                rows.append(row)
                print(row, file=sys.stderr)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"conditions": conditions(model, args), "rows": rows}, indent=1) + "\n")


def read_set(text: str) -> tuple[str, list[Prompt]]:
    name, _, rest = text.partition("=")
    file, _, limit = rest.partition(":")
    return name, [placed.prompt for placed in read_prompts(file)[: int(limit) if limit else None]]


def conditions(model: TidarModel, args: argparse.Namespace) -> dict[str, object]:
    device = model.network.device
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "command": " ".join(["python", *(Path(a).name if os.sep in a and "=" not in a else a for a in sys.argv)]),
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "template": "chat" if model.tokenizer is not None and model.tokenizer.chat_template else "none",
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "commit": os.environ.get("COMMIT") or commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
