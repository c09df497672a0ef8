"""From conversations to training batches: token ids, answers marked, documents packed without being cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tidar.errors import TidarError
from tidar.layout import random_anchors
from tidar.prompts import Prompt, encode_prompt, read_rows, row_prompt, split_answer, tokenize

ANSWER_FIELDS = ("answer", "response", "output", "completion")


class Sample(NamedTuple):
    """Token ids of one conversation; the answer to learn is ids[answer:]."""

    ids: list[int]
    answer: int


def read_samples(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Conversations of a JSONL file: `messages` ending with the assistant's, or a prompt with an answer.

    Answers are called `answer`, `response`, `output` or `completion`. Raises TidarError naming the first bad row.
    """
    samples = []
    for where, row in read_rows(path):
        prompt: Prompt | None
        prompt, answer = split_answer(row.get("messages"))
        if answer is None:
            prompt, answer = row_prompt(row), _answer(row)
        if not prompt or answer is None:
            raise TidarError(
                f"{where}: no conversation; it needs 'messages' ending with the assistant's, or a prompt and one of "
                f"{', '.join(ANSWER_FIELDS)} (or let the model answer the prompts: --self-generate)"
            )
        try:
            samples.append(encode_sample(tokenizer, prompt, answer))
        except TidarError as error:
            raise TidarError(f"{where}: {error}") from error
    return samples


def _answer(row: dict[str, Any]) -> str | None:
    for value in map(row.get, ANSWER_FIELDS):
        answer = value if isinstance(value, str) else split_answer(value)[1]
        if answer is not None:
            return answer
    return None


def encode_sample(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> Sample:
    ids = encode_prompt(tokenizer, prompt)
    tail = tokenize(tokenizer, answer, add_special_tokens=False)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return Sample([*ids, *tail, *end], len(ids))


@dataclass(frozen=True)
class Packed(Dataset):
    """Rows of S tokens. ids [R, S] int32, documents [R, S] int16 (padding: -1), answers [R, S] bool."""

    ids: np.ndarray
    documents: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"ids": self.ids[index], "documents": self.documents[index], "answers": self.answers[index]}


def pack(samples: Iterable[Sample], length: int) -> Packed:
    """Best-fit packing into rows of `length` tokens; longer samples are cut at the end, hopeless ones raise.

    Raises:
        TidarError: if no sample has an answer within `length` tokens.
    """
    fitting = [Sample(s.ids[:length], s.answer) for s in samples if s.answer < min(length, len(s.ids)) - 1]
    if not fitting:
        raise TidarError(f"no training sample has an answer within {length} tokens: give more data or longer sequences")
    rows: list[list[Sample]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]
    for sample in sorted(fitting, key=lambda s: -len(s.ids)):
        need = len(sample.ids)
        space = next((s for s in range(need, length) if by_space[s]), None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, length
        else:
            row = by_space[space].pop()
        rows[row].append(sample)
        by_space[space - need].append(row)
    ids = np.zeros((len(rows), length), np.int32)
    documents = np.full((len(rows), length), -1, np.int16)
    answers = np.zeros((len(rows), length), bool)
    for r, row_samples in enumerate(rows):
        start = 0
        for d, sample in enumerate(row_samples):
            end = start + len(sample.ids)
            ids[r, start:end], documents[r, start:end] = sample.ids, d
            answers[r, start + sample.answer : end] = True
            start = end
    return Packed(ids, documents, answers)


def collate(rows: Sequence[dict[str, np.ndarray]], blocks: int) -> dict[str, Tensor]:
    """A batch with fresh random anchors: input_ids, documents, answers [B, S] and anchors [B, blocks].

    An anchor sits where the verifier will know the next token and the drafter has at least one more to guess: just
    before an answer token that has a successor.
    """
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    answers, documents = batch["answers"], batch["documents"].long()
    allowed = torch.zeros_like(answers)
    allowed[:, :-2] = answers[:, 1:-1] & answers[:, 2:] & (documents[:, :-2] == documents[:, 2:])
    return {
        "input_ids": batch["ids"].long(),
        "documents": documents,
        "answers": answers,
        "anchors": random_anchors(allowed, blocks),
    }
