"""Self-generated samples on disk: flat token ids and offsets in one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tidar.errors import TidarError, first_line
from tidar.train.data import Sample


class ModelCard(NamedTuple):
    """Whose answers they are: the model's name and the size of its vocabulary."""

    base: str
    vocabulary: int


def save_samples(path: Path, samples: Sequence[Sample], model: ModelCard) -> None:
    """Write samples of `model` to `path`. Raises TidarError, and writes nothing, if there are none."""
    if not samples:
        raise TidarError(
            "self-generation finished no answer: give it shorter prompts, longer sequences or more --generation-minutes"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(s.ids) for s in samples], np.int32)
    answers = np.array([s.answer for s in samples], np.int32)
    ids = np.fromiter((t for s in samples for t in s.ids), np.int32, int(lengths.sum()))
    metadata = {"base": model.base, "vocabulary": str(model.vocabulary)}
    save_file({"ids": ids, "lengths": lengths, "answers": answers}, path, metadata=metadata)


def load_samples(path: Path, model: ModelCard) -> list[Sample]:
    """Read what `save_samples` wrote. Raises TidarError for any other file, or one whose answers are not `model`'s."""
    try:
        with safe_open(path, "np") as stored:
            metadata = stored.metadata() or {}
            ids, lengths, answers = (stored.get_tensor(name) for name in ("ids", "lengths", "answers"))
    except (SafetensorError, OSError) as error:
        raise TidarError(f"{path} does not hold self-generated samples ({first_line(error)})") from error
    whose = metadata.get("base", model.base), metadata.get("vocabulary", str(model.vocabulary))
    if whose != (model.base, str(model.vocabulary)):
        raise TidarError(
            f"{path} holds answers of {whose[0]} (vocabulary {whose[1]}), not of {model.base} (vocabulary "
            f"{model.vocabulary}): delete it, or name another file with --answers"
        )
    ends = np.cumsum(lengths)
    if not len(ids) or ends[-1] != len(ids) or ids.min() < 0 or ids.max() >= model.vocabulary:
        raise TidarError(f"{path} holds no samples with token ids of {model.base} (vocabulary {model.vocabulary})")
    starts = ends - lengths
    return [Sample(ids[a:b].tolist(), int(n)) for a, b, n in zip(starts, ends, answers, strict=True)]
