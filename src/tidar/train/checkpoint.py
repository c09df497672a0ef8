"""What a run is continued from: trainable weights and optimizer state, by torch.distributed.checkpoint.

The format does not know how many processes wrote it or whether they sharded: one process, DDP and FSDP2 read each
other's. Frozen weights are not in it; they come from the base model again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from tidar.errors import TidarError, first_line

STATE_FOLDER, CURSOR_FILE = "state", "cursor.json"


class Cursor(NamedTuple):
    """Where a run stands in its data, and what it must go on with.

    consumed: rows trained on so far, in the order of stream.py. rows, digest and seed say which order that is. options
    decide the curve (see `TrainConfig.curve_options`).
    """

    consumed: int
    rows: int
    digest: str
    seed: int
    options: dict[str, Any]

    def write(self, folder: Path) -> None:
        (folder / CURSOR_FILE).write_text(json.dumps(self._asdict()) + "\n")

    def at(self, folder: Path) -> Cursor:
        """This data, as far as the run in `folder` came. Raises TidarError if that run had other data or options."""
        stored = Cursor(**json.loads((folder / CURSOR_FILE).read_text()))
        if stored[1:4] != self[1:4]:
            raise TidarError(
                f"resume is {folder}, but that run had other data or another seed ({stored.rows:,} rows, seed "
                f"{stored.seed}; now {self.rows:,} rows, seed {self.seed}), so it cannot be continued exactly"
            )
        for name, value in self.options.items():
            if stored.options.get(name) != value:
                raise TidarError(
                    f"{name.replace('_', '-')} is {value}, but the run in {folder} had {stored.options.get(name)}, so "
                    "it cannot be continued exactly: take its value, or start anew"
                )
        return stored


def digest(*arrays: np.ndarray) -> str:
    """Fingerprint of arrays."""
    hashed = sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).view(np.uint8).data)
    return hashed.hexdigest()[:16]


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write trainable weights and optimizer state; all processes call this."""
    with _quiet():
        dcp.save(_state(model, optimizer), checkpoint_id=folder / STATE_FOLDER)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what `save_state` wrote into `model` and `optimizer`; all processes call this.

    Raises:
        TidarError: if the checkpoint is damaged or of another conversion (other rank, objective, base, ...).
    """
    with _quiet():
        state = _state(model, optimizer)
        try:
            dcp.load(state, checkpoint_id=folder / STATE_FOLDER)
        except CheckpointException as error:
            reason = first_line(next(iter(error.failures.values()))[0])
            raise TidarError(f"resume is {folder}, which does not fit this conversion: {reason}") from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": moments}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # it warns of running in a single process, which is no fault
        warnings.simplefilter("ignore")
        yield
