"""Small conversions for tests."""

import json

from tidar.train.config import ONLY_FOR, TrainConfig


def conversations(path, count):
    """A JSONL file of `count` different conversations."""
    rows = [
        {"prompt": f"say {n}", "answer": f"{n} " * (4 + n % 5) + "and " + "abcdefgh"[n % 8] * 8} for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def options(folder, data, tmp_path, **more):
    """Options of a conversion of `folder` that takes a few seconds."""
    base = {
        "model": folder,
        "output": tmp_path / "out",
        "data": [data],
        "self_generate": False,
        "block_size": 4,
        "rank": 8,
        "sampler_width": 16,
        "steps": 60,
        "batch_size": 4,
        "sequence_length": 64,
        "anchors": 8,
        "log_every": 10,
        "device": "cpu",
    }
    objective = more.get("objective", "lossless")
    own = {name: value for name, value in base.items() if objective in ONLY_FOR.get(name, (objective,))}
    return TrainConfig(**{**own, **more})


def curve(config):
    """The log entries of a conversion."""
    return json.loads((config.output / "training.json").read_text())["curve"]
