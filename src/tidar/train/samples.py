"""Self-generated samples on disk: flat token ids and offsets in one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tidar.errors import TidarError
from tidar.train.data import Sample


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(s.ids) for s in samples], np.int32)
    answers = np.array([s.answer for s in samples], np.int32)
    ids = np.fromiter((t for s in samples for t in s.ids), np.int32, int(lengths.sum()))
    save_file({"ids": ids, "lengths": lengths, "answers": answers}, path)


def load_samples(path: Path) -> list[Sample]:
    """Read what `save_samples` wrote. Raises TidarError for any other file."""
    try:
        stored = load_file(path)
        ids, ends = stored["ids"].tolist(), np.cumsum(stored["lengths"]).tolist()
        answers = stored["answers"].tolist()
    except (SafetensorError, KeyError, OSError) as error:
        raise TidarError(f"{path} does not hold self-generated samples ({error})") from error
    return [Sample(ids[a:b], n) for a, b, n in zip([0, *ends[:-1]], ends, answers, strict=True)]
