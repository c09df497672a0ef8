"""A small draft model for classic speculative decoding: some layers of the base model, distilled from its own answers.

    tidar generate-data --data prompts.jsonl --output answers.safetensors --model smollm2-135m
    python recipes/draft-model/distil.py --answers answers.safetensors --layers 6 --out runs/draft

Every n-th decoder layer is kept, with the base's embeddings, final norm and output embedding, so that the draft model
has its tokenizer and vocabulary. What trains is those layers; the embeddings stay as they are. The loss is the soft
cross-entropy to the base's distribution, on the tokens of answers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tidar import TidarError, TidarModel
from tidar.train.conversion import decoder_layers
from tidar.train.prepare import model_card
from tidar.train.samples import Samples, load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--answers", type=Path, required=True, help="samples of `tidar generate-data` or `tidar train`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers that are kept")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample; the rest is cut off")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    # The base is asked only; what trains needs float32 masters, which autocast multiplies in bfloat16 on a GPU.
    base = TidarModel.from_pretrained(
        args.model, drafter="none", device=args.device, dtype="bfloat16" if cuda else "float32"
    )
    samples = load_samples(args.answers, model_card(base)).samples
    teacher, draft = base.hf_model, shrink(base, args.layers)
    for lm in (teacher, draft):
        lm.set_attn_implementation("sdpa")
    started, curve = time.time(), train(teacher, draft, samples, args)
    draft.save_pretrained(args.out)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(args.out)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "model": args.model,
        "layers": kept_layers(len(decoder_layers(base.network)), args.layers),
        "parameters": sum(p.numel() for p in draft.parameters()),
        "seconds": round(time.time() - started, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}; try: tidar compare --method ar --method assisted:{args.out} ...", file=sys.stderr)


def kept_layers(count: int, keep: int) -> list[int]:
    """`keep` of `count` layers, evenly spread, the first and the last among them."""
    if not 1 <= keep < count:
        raise TidarError(f"layers is {keep}, but must be between 1 and {count - 1} for this model")
    return [round(i * (count - 1) / max(1, keep - 1)) for i in range(keep)]


def shrink(base: TidarModel, keep: int) -> PreTrainedModel:
    """The base model with some of its layers, in float32 on its device; only those layers train."""
    lm, layers = base.hf_model, decoder_layers(base.network)
    kept = kept_layers(len(layers), keep)
    config = type(lm.config).from_dict({**lm.config.to_dict(), "num_hidden_layers": keep, "layer_types": None})
    draft = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    prefix = next(name for name, module in lm.named_modules() if module is layers)
    weights = {}
    for name, tensor in lm.state_dict().items():
        if not name.startswith(f"{prefix}."):
            weights[name] = tensor
    for place, layer in enumerate(kept):
        weights |= {f"{prefix}.{place}.{name}": tensor for name, tensor in layers[layer].state_dict().items()}
    draft.load_state_dict(weights)
    draft.requires_grad_(False)
    draft.get_submodule(prefix).requires_grad_(True)
    draft.generation_config = lm.generation_config
    return draft.to(base.network.device)


def train(
    teacher: PreTrainedModel, draft: PreTrainedModel, samples: Samples, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Distil; returns the curve: loss and share of tokens whose likeliest is the teacher's, each 50 steps."""
    parameters = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.warmup, args.steps))
    rows, device = batches(samples, args), teacher.device
    curve, losses, matches, seen = list[dict[str, float]](), 0.0, 0.0, 0
    draft.train()
    for step in range(1, args.steps + 1):
        ids, counted = (x.to(device) for x in next(rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            # Position i predicts token i + 1; padding is at the end, where nothing that counts can see it.
            with torch.no_grad():
                target = teacher(ids).logits[:, :-1][counted[:, 1:]].float()
            logits = draft(ids).logits[:, :-1][counted[:, 1:]].float()
        loss = F.cross_entropy(logits, target.softmax(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses, seen = losses + float(loss.detach()), seen + 1
        matches += float((logits.argmax(-1) == target.argmax(-1)).float().mean())
        if step % 50 == 0 or step == args.steps:
            curve.append({"step": step, "loss": round(losses / seen, 4), "match": round(matches / seen, 4)})
            print(curve[-1], file=sys.stderr)
            losses, matches, seen = 0.0, 0.0, 0
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise TidarError("training diverged, so nothing is saved: lower --learning-rate")
    return curve


def rate(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def batches(samples: Samples, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: token ids [B, S] padded with 0, and which of them count [B, S]; samples in random order."""
    useful = [i for i in range(len(samples)) if samples[i].answers[1 : args.length].any()]
    if not useful:
        raise TidarError(f"no sample has an answer within {args.length} tokens: make --length larger")
    while True:
        order = torch.randperm(len(useful)).tolist()
        for start in range(0, max(1, len(order) - args.batch_size + 1), args.batch_size):
            chosen = [samples[useful[i]] for i in order[start : start + args.batch_size]]
            width = min(args.length, max(len(sample.ids) for sample in chosen))
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            counted = torch.zeros(len(chosen), width, dtype=torch.bool)
            for row, sample in enumerate(chosen):
                size = min(width, len(sample.ids))
                ids[row, :size] = torch.from_numpy(sample.ids[:size].astype("int64"))
                counted[row, :size] = torch.from_numpy(sample.answers[:size].copy())
            yield ids, counted


def commit() -> str | None:
    found: Any = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    try:
        main()
    except TidarError as error:
        print(f"distil.py: {error}", file=sys.stderr)
        sys.exit(2)
