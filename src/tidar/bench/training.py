"""How fast training is, objective beside objective, on synthetic rows: what to expect before data is at hand."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidar.bench import machine, shapes
from tidar.model.network import Network
from tidar.train.checkpoint import Cursor
from tidar.train.config import ONLY_FOR, TrainConfig
from tidar.train.convert import needs_mask_token, prepare_model, prepare_module, set_up, training_dtype
from tidar.train.trainer import ConversionTrainer

LOGS = 4
"""Log lines a run has; the first, in which layers compile, does not count."""


class RandomRows:
    """`count` rows of random tokens, each one document and all of it to be learned."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        ids = np.random.default_rng(0).integers(0, vocabulary, (count, length))
        self.ids = ids.astype(np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = self.ids[index]
        return {"ids": ids, "documents": np.zeros_like(ids), "answers": np.arange(len(ids)) > 0}


def measure(base: TrainConfig, objectives: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Train with each objective for `base.steps` steps; yields the result as it grows.

    Figures are those that `tidar train` logs, medians over its log lines without the first: clean tokens a second, MFU
    (see `train.throughput.model_flops`), and the most memory allocated.
    """
    result, rows = dict[str, Any](), list[dict[str, Any]]()
    for objective in objectives:
        config = replace(options_for(base, objective), log_every=max(1, base.steps // LOGS))
        network = build(config)
        if not result:
            conditions = machine.conditions(network.device, computed_in(network.device))
            result = {"conditions": conditions, "model": config.model, "options": _options(config), "rows": rows}
        row = _train(config, network)
        first = (rows or [row])[0]
        row["time_per_token"] = round(first["tokens_per_second"] / row["tokens_per_second"], 3)
        rows.append(row)
        del network
        gc.collect()
        torch.cuda.empty_cache()
        yield result


def options_for(base: TrainConfig, objective: str) -> TrainConfig:
    """`base` for an objective, without what that makes no use of."""
    own: dict[str, Any] = {
        f.name: f.default for f in fields(base) if objective not in ONLY_FOR.get(f.name, (objective,))
    }
    return replace(base, objective=objective, **own)


def build(config: TrainConfig) -> Network:
    """A network that is set up for the objective; random weights for the names of `shapes.RANDOM`.

    Rows are random, so any token will do as the mask.
    """
    if config.model in shapes.RANDOM:
        network = shapes.build(config.model, False, config.device, training_dtype(config))
    else:
        network = prepare_model(config).network
    set_up(config, network, 0 if needs_mask_token(config) else None)
    return network


def _train(config: TrainConfig, network: Network) -> dict[str, Any]:
    module = prepare_module(config, network)
    data = RandomRows(64, config.sequence_length, network.vocabulary)
    cursor = Cursor(0, len(data), "", config.seed, {})
    with tempfile.TemporaryDirectory() as folder:
        trainer = ConversionTrainer(replace(config, output=Path(folder)), module, data, cursor, done=0, sharded=False)
        trainer.run(None)
    logs = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry][1:]
    figures = {
        name: statistics.median(e[name] for e in logs) for name in ("tokens_per_second", "mfu") if name in logs[0]
    }
    return {
        "objective": config.objective,
        **figures,
        "peak_memory_gib": logs[-1]["peak_memory_gib"],
        "model_mflop_per_token": round(trainer.flops / config.sequence_length / 1e6, 3),
    }


def computed_in(device: torch.device) -> torch.dtype:
    """What products are made in, whatever the weights are kept in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _options(config: TrainConfig) -> dict[str, Any]:
    names = ("sequence_length", "batch_size", "accumulate", "block_size", "anchors", "steps", "gradient_checkpointing")
    return {name: getattr(config, name) for name in names}
