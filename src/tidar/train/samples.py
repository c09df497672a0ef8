"""Samples, one after another in flat arrays: in memory while they are made, memory-mapped from one file afterwards."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from tidar.errors import TidarError, first_line

DTYPES: dict[str, np.dtype] = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(bool)}


class Sample(NamedTuple):
    """A document. ids [n] int32; answers [n] bool, the tokens to learn.

    A sample that begins with an answer has no prompt: it is plain text, learned from the first token to the last.
    """

    ids: np.ndarray
    answers: np.ndarray

    @classmethod
    def after(cls, ids: Sequence[int], prompt: int) -> Sample:
        """Everything after the first `prompt` tokens is to be learned."""
        return cls(np.asarray(ids, np.int32), np.arange(len(ids)) >= prompt)


@dataclass(frozen=True)
class Samples:
    """N samples. ids [T] int32, answers [T] bool, ends [N] int64; sample i is [ends[i - 1], ends[i])."""

    ids: np.ndarray
    answers: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        kept = [sample for sample in samples if len(sample.ids)]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(s.ids for s in kept)]),
            np.concatenate([np.zeros(0, bool), *(s.answers for s in kept)]),
            np.cumsum([len(s.ids) for s in kept], dtype=np.int64),
        )

    @property
    def starts(self) -> np.ndarray:
        """[N]"""
        return np.concatenate((np.zeros(1, np.int64), self.ends))[: len(self.ends)]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Sample:
        span = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return Sample(self.ids[span], self.answers[span])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class ModelCard(NamedTuple):
    """Whose tokens they are: the model's name and the size of its vocabulary."""

    base: str
    vocabulary: int


class Origin(NamedTuple):
    """Where the samples of a file come from.

    key: a hash of everything that decides them. complete: nothing is missing. interrupted: what is missing was still
    wanted (it was not left out for lack of time). bad_rows: rows that were skipped, the first of them described.
    """

    key: str = ""
    complete: bool = True
    interrupted: bool = False
    bad_rows: int = 0
    bad_examples: tuple[str, ...] = ()


class SampleWriter:
    """Writes samples to a file as they come; in memory are only their ends. The file appears when all is written."""

    def __init__(self, path: Path, model: ModelCard) -> None:
        self.path, self.model = path, model
        self.made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.names = [path.with_name(f"{path.name}.{part}") for part in ("ids", "answers", "whole")]
        self.ids, self.answers = (name.open("wb") for name in self.names[:2])
        self.ends, self.jobs = array("q"), array("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self.ids, self.answers):
            file.close()
        for name in self.names:
            name.unlink(missing_ok=True)
        if not self.path.exists():
            for folder in self.made:
                folder.rmdir()

    def add(self, sample: Sample, job: int | None = None) -> None:
        """Append a sample. `job` is its number in a job that may be continued; default: its place in the file."""
        if len(sample.ids):
            self.jobs.append(len(self.ends) if job is None else job)
            self.ends.append((self.ends[-1] if self.ends else 0) + len(sample.ids))
            self.ids.write(np.ascontiguousarray(sample.ids, np.int32).data)
            self.answers.write(np.ascontiguousarray(sample.answers, bool).data)

    def finish(self, origin: Origin) -> None:
        """Put the parts together. Raises TidarError, and leaves no file, if there are no samples."""
        if not self.ends:
            raise TidarError(f"no samples, so {self.path} is not written")
        self.ids.close()
        self.answers.close()
        tokens, count = self.ends[-1], len(self.ends)
        # Longest items first, so that every array starts at a multiple of its item's size.
        shapes = {"ends": ("I64", count), "jobs": ("I64", count), "ids": ("I32", tokens), "answers": ("BOOL", tokens)}
        with self.names[2].open("wb") as whole:
            whole.write(_header(shapes, _metadata(self.model, origin)))
            for numbers in (self.ends, self.jobs):
                whole.write(numbers.tobytes())
            for name in self.names[:2]:
                with name.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 22)
        os.replace(self.names[2], self.path)


def _metadata(model: ModelCard, origin: Origin) -> dict[str, str]:
    flags = {name: "yes" if getattr(origin, name) else "no" for name in ("complete", "interrupted")}
    bad = {"bad_rows": str(origin.bad_rows), "bad_examples": json.dumps(origin.bad_examples)}
    return {"base": model.base, "vocabulary": str(model.vocabulary), "key": origin.key, **flags, **bad}


def _header(shapes: dict[str, tuple[str, int]], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file that holds these one-dimensional arrays, in this order."""
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name, (kind, count) in shapes.items():
        end = begin + count * DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": [count], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_samples(
    path: Path, samples: Iterable[Sample], model: ModelCard, origin: Origin | None = None, jobs: Iterable[int] = ()
) -> None:
    """Write samples of `model` to `path`. Raises TidarError, and writes nothing, if there are none."""
    numbers = iter(jobs)
    with SampleWriter(path, model) as writer:
        for sample in samples:
            writer.add(sample, next(numbers, None))
        writer.finish(origin or Origin())


class Stored(NamedTuple):
    """A file's samples (memory-mapped), where they come from, and their numbers [N] in the job that made them."""

    samples: Samples
    origin: Origin
    jobs: np.ndarray


def load_samples(path: Path, model: ModelCard) -> Stored:
    """Map what `SampleWriter` wrote. Raises TidarError for any other file, or one whose tokens are not `model`'s."""
    try:
        with safe_open(path, "np") as checked:  # refuses headers that do not fit the file
            metadata = checked.metadata() or {}
        arrays = _map(path)
        ids, answers, ends, jobs = (arrays[name] for name in ("ids", "answers", "ends", "jobs"))
    except (SafetensorError, OSError, KeyError) as error:
        raise TidarError(f"{path} does not hold samples that this version reads ({first_line(error)})") from error
    whose = metadata.get("base", model.base), metadata.get("vocabulary", str(model.vocabulary))
    if whose != (model.base, str(model.vocabulary)):
        raise TidarError(
            f"{path} holds answers of {whose[0]} (vocabulary {whose[1]}), not of {model.base} (vocabulary "
            f"{model.vocabulary}): delete it, or name another file with --answers"
        )
    fitting = len(answers) == len(ids) and len(jobs) == len(ends) > 0 and ends[-1] == len(ids)
    if not fitting or (np.diff(ends, prepend=0) <= 0).any() or ids.min() < 0 or ids.max() >= model.vocabulary:
        raise TidarError(f"{path} holds no samples with token ids of {model.base} (vocabulary {model.vocabulary})")
    complete, interrupted = (metadata.get(name) == "yes" for name in ("complete", "interrupted"))
    examples = tuple(json.loads(metadata.get("bad_examples", "[]")))
    origin = Origin(metadata.get("key", ""), complete, interrupted, int(metadata.get("bad_rows", 0)), examples)
    return Stored(Samples(ids, answers, ends), origin, jobs)


def _map(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, without reading them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    arrays = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            (count,), begin = tensor["shape"], tensor["data_offsets"][0]
            kind = DTYPES[tensor["dtype"]]
            arrays[name] = np.memmap(path, kind, "r", 8 + size + begin, (count,)) if count else np.zeros(0, kind)
    return arrays
