"""Two processes (gloo, CPU), plain and sharded, against one: the same loss curve, and each other's checkpoints."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from tidar import TidarModel
from tidar.train.convert import convert
from tiny import tiny_folder
from train_options import conversations, curve, options

STEPS = 6
OBJECTIVES = ("lossless", "paper")


def free_port():
    """Not one that the system hands out meanwhile, nor what a seed chooses in every process."""
    while True:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 30_000)))
            return found.getsockname()[1]


def run_two(configs, folder):
    """Run conversions one after the other in two processes."""
    file = folder / "configs.json"
    file.write_text(json.dumps([asdict(config) for config in configs], default=str))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    here = str(Path(__file__).parent)
    place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    logs = [folder / f"rank{r}.log" for r in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, f"{here}/ranks.py", str(file)],
            env={**os.environ, **place, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for r, log in enumerate(logs)
    ]
    try:
        while (codes := [process.poll() for process in processes]) != [0, 0]:
            # One that failed leaves the other waiting; see ranks.py for two that wait.
            assert not any(codes), "\n".join(log.read_text() for log in logs)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make_runs(root):
    """The same conversions by one process, by two, and by two that shard; each with a checkpoint half way."""
    folder = tiny_folder(root / "model", mask_token=True, tied=True)
    data = conversations(root / "rows.jsonl", 40)
    configs, two = {}, []
    for objective in OBJECTIVES:
        base = {
            "objective": objective,
            "steps": STEPS,
            "log_every": 1,
            "save_every": 3,
            "keep_checkpoints": 9,
            "measure_prompts": data,
            "measure_count": 5,
            "measure_tokens": 12,
            "measure_every": 2,
            "learning_rate": 2e-3,
            "gradient_checkpointing": objective == "lossless",
        }

        def config(name, objective=objective, base=base, **more):
            return options(folder, data, root, **{**base, "output": root / f"{objective}-{name}", **more})

        one = config("one", batch_size=2, accumulate=2)
        convert(one)
        plain, sharded = config("two", batch_size=2), config("sharded", batch_size=1, accumulate=2, fsdp=True)
        resumed = config("sharded-again", batch_size=2, fsdp=True, resume=str(one.checkpoints / "checkpoint-3"))
        two += [plain, sharded, resumed]
        configs[objective] = {"one": one, "two": plain, "sharded": sharded, "sharded after one": resumed}
    run_two(two, root)
    for objective, each in configs.items():
        for before in ("two", "sharded"):
            checkpoint = str(each[before].checkpoints / "checkpoint-3")
            output = root / f"{objective}-one-after-{before}"
            again = options(folder, data, root, **{**kept(each["one"]), "output": output, "resume": checkpoint})
            convert(again)
            each[f"one after {before}"] = again
    return configs


def kept(config):
    names = (
        "objective",
        "learning_rate",
        "steps",
        "log_every",
        "batch_size",
        "accumulate",
        "measure_prompts",
        "measure_count",
    )
    return {name: getattr(config, name) for name in (*names, "measure_tokens", "measure_every")}


def losses(config):
    return {row["step"]: [row["loss"], row["grad_norm"]] for row in curve(config) if "loss" in row}


def check_the_loss_curve(name, objective, runs):
    wanted, got = losses(runs[objective]["one"]), losses(runs[objective][name])
    assert len(got) == STEPS
    for step, values in wanted.items():
        assert got[step] == pytest.approx(values, rel=2e-4), step
    assert wanted[STEPS] != pytest.approx(wanted[STEPS - 1], rel=2e-4)


def check_the_exported_weights(name, objective, runs):
    def weights(config):
        (file,) = config.output.glob("*model.safetensors")
        return load_file(file)

    wanted, got = weights(runs[objective]["one"]), weights(runs[objective][name])
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key].float(), tensor.float(), rtol=2e-2, atol=2e-4)
    model = TidarModel.from_pretrained(str(runs[objective][name].output), device="cpu", dtype="float32")
    assert model.generate("say 3", max_new_tokens=8).new_tokens


def check_the_counts(name, objective, runs):
    """Match rates are sums over ranks, and prompts are shared out to be measured."""
    for wanted, got in zip(curve(runs[objective]["one"]), curve(runs[objective][name]), strict=True):
        for key in ("match", "cross_entropy", "ar_cross_entropy", "tokens_per_forward_k4", "acceptance_k4"):
            if key in wanted:
                assert got[key] == pytest.approx(wanted[key], abs=2e-3), key
    assert sum("tokens_per_forward_k4" in row for row in curve(runs[objective]["one"])) == 3


def check_the_pieces(objective, runs):
    def pieces(name):
        state = runs[objective][name].checkpoints / "checkpoint-3" / "state"
        stored = FileSystemReader(state).read_metadata().state_dict_metadata
        return {len(meta.chunks) for key, meta in stored.items() if key.endswith("weight")}

    assert pieces("sharded") == {2}
    assert pieces("two") == {1}


def test_processes_train_alike_plain_and_sharded_and_continue_each_other(tmp_path):
    """One test, as the runs take a minute and are made once."""
    runs = make_runs(tmp_path)
    for objective in OBJECTIVES:
        for name in ("two", "sharded", "sharded after one", "one after two", "one after sharded"):
            check_the_loss_curve(name, objective, runs)
        for name in ("two", "sharded", "one after sharded"):
            check_the_exported_weights(name, objective, runs)
        for name in ("two", "sharded"):
            check_the_counts(name, objective, runs)
        check_the_pieces(objective, runs)
