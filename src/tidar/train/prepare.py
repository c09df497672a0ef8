"""From sources to samples on disk: rows are encoded once, or answered by the base model, and then memory-mapped."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tidar.api import TidarModel
from tidar.errors import TidarError
from tidar.prompts import Placed, encode_prompt, prompts_of
from tidar.sources import HUB, BadRows, Reading, local_files, read_rows
from tidar.train.conversations import Encoder
from tidar.train.data import Packed
from tidar.train.samples import ModelCard, Origin, SampleWriter, Stored, load_samples
from tidar.train.selfgen import Generation, generate_answers, job_key


@dataclass
class Sources:
    """Where rows come from, how they are read, and which of them were bad."""

    names: list[str]
    reading: Reading = field(default_factory=Reading)
    bad: BadRows = field(default_factory=BadRows)


def model_card(model: TidarModel) -> ModelCard:
    """What samples must fit: the last part of the base's name (folders move), and its vocabulary."""
    return ModelCard(Path(model.base).name, model.hf_model.get_input_embeddings().weight.shape[0])


def encode_given(model: TidarModel, sources: Sources, path: Path) -> Stored:
    """Samples of rows that have answers (or are plain text), kept in `path`; read from there if nothing changed.

    Raises:
        TidarError: for sources that cannot be read, bad rows (unless they are skipped), and if no row was good.
    """
    assert model.tokenizer is not None
    card, key = model_card(model), _sources_key(sources, model)
    if (stored := stored_if(path, card, key)) is not None:
        return recalled(stored, sources)
    encoder = Encoder(model.tokenizer)
    with SampleWriter(path, card) as writer:
        for name in sources.names:
            for sample in encoder.encode(read_rows(name, sources.bad, sources.reading), sources.bad):
                writer.add(sample)
        _say(sources.bad.report())
        if encoder.last_only:
            _say(
                f"{encoder.last_only:,} conversations with several answers: only the last is learned, as the chat "
                "template writes earlier turns differently from how the model says them"
            )
        if not writer.ends:
            raise TidarError(f"no row of {', '.join(sources.names)} can be learned from")
        bad = sources.bad
        writer.finish(Origin(key, bad_rows=bad.count, bad_examples=tuple(bad.examples)))
    return load_samples(path, card)


def recalled(stored: Stored, sources: Sources) -> Stored:
    """`stored`, and what was said of the rows when it was made."""
    sources.bad.count, sources.bad.examples = stored.origin.bad_rows, list(stored.origin.bad_examples)
    _say(sources.bad.report())
    return stored


@dataclass(frozen=True)
class Prompts:
    """Prompts and their token ids."""

    placed: list[Placed]
    ids: list[list[int]]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Prompts:
    """Prompts of all sources through the chat template. Raises TidarError for bad rows (unless they are skipped)."""
    prompts = Prompts([], [])
    for placed, ids in _encoded(tokenizer, sources):
        prompts.placed.append(placed)
        prompts.ids.append(ids)
    _say(sources.bad.report())
    if not prompts.ids:
        raise TidarError(f"no row of {', '.join(sources.names)} has a prompt")
    return prompts


def _encoded(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Iterator[tuple[Placed, list[int]]]:
    for placed in prompts_of(sources.names, sources.bad, sources.reading):
        try:
            ids = encode_prompt(tokenizer, placed.prompt)
            if not ids:
                raise TidarError("the prompt has no tokens")
            yield placed, ids
        except TidarError as error:
            sources.bad.add(TidarError(f"{placed.place}: {error}"))


def answer_prompts(
    model: TidarModel, sources: Sources, how: Generation, path: Path, renew: bool = False, keep: bool = False
) -> tuple[Stored, Prompts]:
    """Let the model answer the sources' prompts; the answers are kept in `path`, and a job that was cut off goes on.

    With `renew`, answers to other prompts or by other options are overwritten, and those of this job are taken as they
    are unless it was interrupted. With `keep` as well, nothing is overwritten: other answers are an error.
    """
    assert model.tokenizer is not None
    card, prompts = model_card(model), encode_prompts(model.tokenizer, sources)
    if renew:
        stored = stored_if(path, card, job_key(prompts.ids, how, card))
        if stored is None and path.exists() and keep:
            raise TidarError(
                f"{path} holds answers to other prompts, or by other options, than this run was started with"
            )
        if stored is None:
            path.unlink(missing_ok=True)
        elif not stored.origin.interrupted:
            return stored, prompts
    return generate_answers(model.network, prompts.ids, how, path, card), prompts


def stored_if(path: Path, card: ModelCard, key: str) -> Stored | None:
    """What `path` holds, if it was made from exactly this."""
    try:
        stored = load_samples(path, card) if path.exists() else None
    except TidarError:
        return None
    return stored if stored is not None and stored.origin.key == key else None


def _sources_key(sources: Sources, model: TidarModel) -> str:
    """A hash of all that decides the encoded rows; files count by name, size and time of change."""
    tokenizer = model.tokenizer
    parts: list[Any] = [sources.reading.limit, sources.bad.skip, tuple(model_card(model))]
    parts += [tokenizer.chat_template, tokenizer.eos_token] if tokenizer is not None else []
    for name in sources.names:
        if name.startswith(HUB):
            parts.append(name)
            continue
        for file in local_files(name):
            try:
                status = file.stat()
            except OSError as error:
                raise TidarError(f"cannot read {file}: {error.strerror or error}") from error
            parts.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def packed_facts(packed: Packed) -> dict[str, int]:
    """Counts for the record of a conversion."""
    samples, fit = packed.samples, packed.fit
    return {
        "samples": len(samples),
        "tokens": len(samples.ids),
        "answer_tokens": int(samples.answers.sum()),
        "rows": len(packed),
        **fit._asdict(),
    }


def report_packed(packed: Packed) -> None:
    """Say how much there is, and what did not fit."""
    samples, fit, length = packed.samples, packed.fit, packed.length
    _say(f"{len(samples):,} samples, {len(samples.ids):,} tokens in {len(packed):,} rows of {length:,}")
    if fit.cut:
        _say(f"{fit.cut:,} conversations are longer than a row and lose their end")
    if fit.split:
        _say(f"{fit.split:,} texts are longer than a row and go on in others")
    if fit.no_room:
        _say(f"{fit.no_room:,} samples left out: no two tokens of an answer within {length:,} tokens")


def _say(text: str) -> None:
    if text:
        print(f"data: {text}", file=sys.stderr)
