"""Do several GPUs compute one GPU's gradients? `python tests/ranks_check.py`, on a machine with two GPUs (or `--cpu`).

The same rows of packed documents are trained on by one process, by two with DDP (with and without the compiler's
splitting of graphs), and by two with FSDP2. The learning rate is next to nothing, so that every step's gradient is one
at the same weights and rounding cannot grow from step to step; several steps show whether what a step sees is its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed

from tidar.bench import shapes, training
from tidar.train.checkpoint import Cursor
from tidar.train.config import TrainConfig
from tidar.train.convert import prepare_module
from tidar.train.shard import named_once, shard
from tidar.train.trainer import ConversionTrainer, join_processes, trains_in_bf16

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 256}  # fmt: skip
shapes.RANDOM["random:tiny"] = ("llama", TINY)
STEPS, ROWS = 4, 16
WAYS = {"one": 1, "ddp": 2, "ddp with DDPOptimizer": 2, "fsdp": 2}
MOST = {"cpu": 1e-4, "cuda": 2e-2}
"""Relative error of the whole gradient that another order of sums explains, in float32 and in bfloat16."""


class Documents(training.RandomRows):
    """Random rows of several documents of random lengths, a random part of each of them answers."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(index)
        size = self.ids.shape[1]
        starts = np.sort(draw.choice(np.arange(8, size - 8), draw.integers(1, 8), replace=False))
        documents = np.searchsorted(starts, np.arange(size), side="right").astype(np.int32)
        asked = draw.random(documents.max() + 1) * 0.8
        place = np.arange(size) - np.concatenate(([0], starts))[documents]
        length = np.bincount(documents)[documents]
        return {
            "ids": self.ids[index],
            "documents": documents,
            "answers": place > np.maximum(1, asked[documents] * length),
        }


class Gradients(TrainerCallback):
    """Keeps every step's, whole, on the CPU."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.kept = module, list[dict[str, torch.Tensor]]()

    def on_pre_optimizer_step(self, args, state, control, **more):  # type: ignore[no-untyped-def]
        named = {n: p.grad for n, p in self.module.named_parameters() if p.requires_grad and p.grad is not None}
        self.kept.append(
            {n: (g.full_tensor() if isinstance(g, DTensor) else g).float().cpu() for n, g in named.items()}
        )


def train(way: str, objective: str, out: Path, cpu: bool) -> None:
    """One way, in one of its processes."""
    launched = join_processes("cpu" if cpu else None)
    if "with" in way:
        torch._dynamo.config.optimize_ddp = True  # PyTorch's default, which `tidar train` turns off
    torch.set_num_threads(1)
    set_seed(0)
    device = "cpu" if cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    length = 64 if cpu else 1024
    config = TrainConfig(
        model="random:tiny" if cpu else "random:smollm2-135m", objective=objective, output=out.parent / "out",
        steps=STEPS, log_every=1, sequence_length=length, batch_size=ROWS // WAYS[way], anchors=length // 12,
        device=device, learning_rate=1e-12,
    )  # fmt: skip
    network = training.build(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.drafter.parameters() if network.drafter is not None else ():  # else half are zero
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    module, data = prepare_module(config, network), Documents(256, length, network.vocabulary)
    with named_once(network.drafter):
        if way == "fsdp":
            shard(module, trains_in_bf16(config, network.device))
        cursor = Cursor(0, len(data), "", config.seed, {})
        trainer = ConversionTrainer(config, module, data, cursor, done=0, sharded=way == "fsdp")
        gradients = Gradients(module)
        trainer.add_callback(gradients)
        trainer.run(None)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"losses": losses, "gradients": gradients.kept}, out)
    if launched:
        torch.distributed.destroy_process_group()


def compare(one: dict, other: dict) -> list[tuple[float, float, str, float]]:
    """Of each step: errors of the loss and of the whole gradient, the parameter that is furthest off, and its error."""
    lines = []
    for step, (mine, theirs) in enumerate(zip(one["gradients"], other["gradients"], strict=True)):
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        off = {n: float((theirs[n] - g).norm()) for n, g in mine.items()}
        whole = float(sum(g.norm() ** 2 for g in mine.values())) ** 0.5
        worst = max(off, key=lambda n: off[n] / (float(mine[n].norm()) + 1e-3 * whole))
        error = abs(other["losses"][step] / one["losses"][step] - 1)
        share = off[worst] / (float(mine[worst].norm()) + 1e-3 * whole)
        lines.append((error, sum(o**2 for o in off.values()) ** 0.5 / whole, worst, share))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a tiny model, gloo")
    parser.add_argument("--objective", default="lossless")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        train(args.way, args.objective, args.out, args.cpu)
        return
    results, failed = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for way, processes in WAYS.items():
            out = Path(folder) / f"{way}.pt"
            run = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run",
                                                           "--standalone", "--nproc-per-node", "2"]  # fmt: skip
            own = [__file__, "--objective", args.objective, "--way", way, "--out", str(out), *["--cpu"] * args.cpu]
            subprocess.run([*run, *own], check=True)
            results[way] = torch.load(out, weights_only=True)
    for way in [w for w in WAYS if w != "one"]:
        for step, (loss, whole, worst, share) in enumerate(compare(results["one"], results[way])):
            bad = whole > MOST["cpu" if args.cpu else "cuda"]
            failed |= bad
            print(f"{way}, step {step}: loss off by {loss:.2e}, gradient by {whole:.2e}, most {worst} ({share:.2e})"
                  + (" FAILED" if bad else ""))  # fmt: skip
    sys.exit(f"{args.objective}: gradients differ" if failed else 0)


if __name__ == "__main__":
    main()
