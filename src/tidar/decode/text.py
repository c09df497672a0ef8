"""Token ids to text as they come: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
_WINDOW = 32
"""Ids that are decoded again with every push, at most; a push that exceeds it costs a second look."""


class TextStream:
    """Incremental detokeniser of one answer.

    `text` is everything decided so far, cut before a stop string once one appeared; `take()` hands out what is new and
    can no longer become part of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        # Ids before _read are in `text`; those from _context on, which read _read_text, give new ones their spacing.
        self._context, self._read, self._read_text = 0, 0, ""
        self._taken = 0

    def push(self, tokens: Sequence[int]) -> int:
        """Add tokens, up to the one that completes a stop string (`stopped`); returns how many were added."""
        before = len(self._ids), self._context, self._read, self._read_text, self.text
        self._add(tokens)
        if not self.stop or len(tokens) == 1 or (self._read == len(self._ids) and not self.stopped):
            return len(tokens)
        # Perhaps a stop string, perhaps hidden by an unfinished character behind it: look token by token.
        kept, self._context, self._read, self._read_text, self.text = before
        del self._ids[kept:]
        self.stopped = False
        for count, token in enumerate(tokens, 1):
            self._add([token])
            if self.stopped:
                return count
        return len(tokens)

    def finish(self) -> None:
        """No more tokens: an unfinished character is shown as it is, nothing is held back any longer."""
        if not self.stopped and self._read < len(self._ids):
            self._append(self._decode(self._context, len(self._ids))[len(self._read_text) :])
            self._read = len(self._ids)
        self.stop = ()

    def take(self) -> str:
        """Text that was not handed out before."""
        held = 0 if self.stopped else max((_overlap(self.text, s) for s in self.stop), default=0)
        ready = max(self._taken, len(self.text) - held)
        piece, self._taken = self.text[self._taken : ready], ready
        return piece

    def _add(self, tokens: Sequence[int]) -> None:
        self._ids += tokens
        new = self._decode(self._context, len(self._ids))
        if new.endswith(_INCOMPLETE):
            return
        self._append(new[len(self._read_text) :])
        self._read_text = new
        if len(self._ids) - self._context > _WINDOW:
            self._context, self._read_text = self._read, self._decode(self._read, len(self._ids))
        self._read = len(self._ids)

    def _append(self, piece: str) -> None:
        before = len(self.text)
        self.text += piece
        found = [at for s in self.stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
