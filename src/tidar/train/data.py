"""From samples to training batches: documents packed into rows of one length, and random anchors in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tidar.errors import TidarError
from tidar.layout import random_anchors
from tidar.train.samples import Samples

FEWEST_ANSWERS = 2
"""Answer tokens that a document needs: with fewer there is no place for an anchor (see `collate`)."""


class Fit(NamedTuple):
    """What packing did to the samples.

    cut: conversations that lost their end. split: texts that were spread over several rows. no_room: samples left out,
    as fewer than two tokens of an answer stand within a row's length.
    """

    cut: int
    split: int
    no_room: int


@dataclass(frozen=True)
class Packed(Dataset):
    """Rows of `length` tokens, put together from the samples when they are asked for.

    Attributes:
        samples: where the tokens are, perhaps on disk.
        begins, lengths: [P] pieces of the samples' flat arrays, row by row.
        firsts: [R + 1]; row r holds pieces [firsts[r], firsts[r + 1]).
    """

    samples: Samples
    length: int
    begins: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    fit: Fit

    @property
    def content(self) -> tuple[np.ndarray, ...]:
        """Everything that decides the rows."""
        plan = self.begins, self.lengths, self.firsts, np.array(self.length)
        return self.samples.ids, self.samples.answers, *plan

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """ids [S] int32, documents [S] int32 (padding: -1), answers [S] bool."""
        ids = np.zeros(self.length, np.int32)
        documents = np.full(self.length, -1, np.int32)
        answers = np.zeros(self.length, bool)
        to = 0
        for document, piece in enumerate(range(self.firsts[index], self.firsts[index + 1])):
            begin, size = self.begins[piece], self.lengths[piece]
            ids[to : to + size] = self.samples.ids[begin : begin + size]
            answers[to + 1 : to + size] = self.samples.answers[begin + 1 : begin + size]  # nothing foretells the first
            documents[to : to + size] = document
            to += size
        return {"ids": ids, "documents": documents, "answers": answers}


def pack(samples: Samples, length: int) -> Packed:
    """Best-fit packing into rows of `length` tokens: texts are split, conversations that are longer lose their end.

    Raises:
        TidarError: if no sample has an answer within `length` tokens.
    """
    begins, lengths, fit = _pieces(samples, length)
    if not len(begins):
        raise TidarError(f"no training sample has an answer within {length} tokens: give more data or longer sequences")
    rows = best_fit(lengths, length)
    order = np.argsort(rows, kind="stable")
    firsts = np.concatenate(([0], np.cumsum(np.bincount(rows))))
    return Packed(samples, length, begins[order], lengths[order], firsts, fit)


def _pieces(samples: Samples, length: int) -> tuple[np.ndarray, np.ndarray, Fit]:
    """(begins, lengths) of the documents to pack, each at most `length` tokens."""
    starts, sizes = samples.starts, np.diff(samples.ends, prepend=0)
    text = np.asarray(samples.answers[starts], bool)
    count = np.where(text, -(-sizes // length), 1)
    sample = np.repeat(np.arange(len(sizes)), count)
    within = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
    begins = starts[sample] + within * length
    lengths = np.minimum(samples.ends[sample] - begins, length)
    useful = _answer_tokens(samples, begins, lengths) >= FEWEST_ANSWERS
    long = (sizes > length) & (np.bincount(sample, useful, len(sizes)) > 0)
    # The last few tokens of a split text may be too few to learn from: a sample counts as left out if all of it is.
    lost = len(sizes) - len(np.unique(sample[useful]))
    fit = Fit(int((long & ~text).sum()), int((long & text).sum()), lost)
    return begins[useful], lengths[useful], fit


def _answer_tokens(samples: Samples, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[P] answer tokens of each piece, its first token not counted."""
    ends = begins + lengths
    bounds = np.stack((np.minimum(begins + 1, ends - 1), ends), 1).ravel()
    if len(bounds) and bounds[-1] == len(samples.answers):
        bounds = bounds[:-1]  # reduceat sums its last part to the end anyway, and takes no index past it
    counts = np.add.reduceat(samples.answers, bounds, dtype=np.int64)[::2]
    return np.where(lengths > 1, counts, 0)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """[P] row of each piece: longest first, each into the row that it fills best."""
    rows = np.zeros(len(lengths), np.int64)
    with_space: list[list[int]] = [[] for _ in range(room + 1)]
    spaces, used = 0, 0  # bit s of `spaces`: some row has room for exactly s more tokens
    for piece in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[piece])
        if wide := spaces >> need:
            space = need + (wide & -wide).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row, used = room, used, used + 1
        rows[piece] = row
        if left := space - need:
            with_space[left].append(row)
            spaces |= 1 << left
    return rows


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
