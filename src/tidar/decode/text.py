"""Token ids to text, one token at a time: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class TextStream:
    """Incremental detokeniser of one answer.

    `text` is everything decided so far, cut before a stop string once one appeared; `take()` hands out what is new and
    can no longer become part of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._context = self._read = 0  # ids before _read are in `text`; those from _context on give them their spacing
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; True if it completed a stop string (further tokens are then not to be pushed)."""
        self._ids.append(token)
        new = self._decode(self._context, len(self._ids))
        if new.endswith(_INCOMPLETE):
            return False
        self._append(new[len(self._decode(self._context, self._read)) :])
        self._context, self._read = self._read, len(self._ids)
        return self.stopped

    def finish(self) -> None:
        """No more tokens: an unfinished character is shown as it is, nothing is held back any longer."""
        if not self.stopped and self._read < len(self._ids):
            read = self._decode(self._context, self._read)
            self._append(self._decode(self._context, len(self._ids))[len(read) :])
            self._read = len(self._ids)
        self.stop = ()

    def take(self) -> str:
        """Text that was not handed out before."""
        held = 0 if self.stopped else max((_overlap(self.text, s) for s in self.stop), default=0)
        ready = max(self._taken, len(self.text) - held)
        piece, self._taken = self.text[self._taken : ready], ready
        return piece

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
