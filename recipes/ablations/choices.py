"""Likelihood accuracy of a checkpoint's plain causal model on multiple choice items: the choice likeliest a token.

    python recipes/ablations/choices.py --model DIR --out FILE NAME=FILE.jsonl[:FIRST_N] ...

Items are JSONL rows with context, choices and gold. This shows what training all weights does to the AR half; for
comparison with published scores use an evaluation harness.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from tidar import TidarModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    model = TidarModel.from_pretrained(args.model)
    scores = {}
    for text in args.sets:
        name, _, rest = text.partition("=")
        file, _, limit = rest.partition(":")
        lines = Path(file).read_text().splitlines()[: int(limit) if limit else None]
        right = accuracy(model, [json.loads(line) for line in lines], args.batch_size)
        error = math.sqrt(right * (1 - right) / len(lines))
        scores[name] = {"accuracy": round(right, 4), "standard_error": round(error, 4), "items": len(lines)}
    args.out.write_text(json.dumps(scores, indent=1) + "\n")


@torch.inference_mode()
def accuracy(model: TidarModel, items: list[dict], batch_size: int) -> float:
    """Share of items whose gold choice is the likeliest a token."""
    tokenizer, lm = model.tokenizer, model.hf_model
    assert tokenizer is not None
    pairs = [(item["context"], " " + choice) for item in items for choice in item["choices"]]
    means = list[float]()
    for at in range(0, len(pairs), batch_size):
        batch = pairs[at : at + batch_size]
        contexts = [tokenizer.encode(context, add_special_tokens=False) for context, _ in batch]
        choices = [tokenizer.encode(choice, add_special_tokens=False) for _, choice in batch]
        width = max(len(a) + len(b) for a, b in zip(contexts, choices, strict=True))
        ids = torch.tensor([a + b + [0] * (width - len(a) - len(b)) for a, b in zip(contexts, choices, strict=True)])
        logits = lm(ids.to(lm.device)).logits.float().log_softmax(-1)[:, :-1]
        chosen = logits.gather(-1, ids.to(lm.device)[:, 1:, None])[..., 0]
        for row, (a, b) in zip(chosen, zip(contexts, choices, strict=True), strict=True):
            means.append(float(row[len(a) - 1 : len(a) + len(b) - 1].mean()))
    scores, right = iter(means), 0
    for item in items:
        own = [next(scores) for _ in item["choices"]]
        right += own.index(max(own)) == item["gold"]
    return right / len(items)


if __name__ == "__main__":
    main()
