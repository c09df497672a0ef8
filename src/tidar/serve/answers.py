"""Answers in OpenAI's shapes: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tidar.decode.engine import Answer
from tidar.serve.loop import Piece, TokenLogprobs
from tidar.serve.protocol import AnyRequest, ChatRequest

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass
class Choice:
    """One answer while it comes.

    Attributes:
        index: its number among the request's answers.
        prompt: tokens of its prompt, 0 if an earlier answer has counted them.
        prefix: text in front of the answer (`echo`).
        text: the answer's text so far.
    """

    index: int
    prompt: int
    prefix: str = ""
    text: str = ""
    answer: Answer | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprob_offset: int = 0

    def add(self, piece: Piece) -> None:
        self.answer = piece.answer
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs


class Shape:
    """Writes one request's answers."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, wants_logprobs: bool) -> None:
        self.model, self.tokenizer, self.wants_logprobs = model, tokenizer, wants_logprobs
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        return self._frame(self.kind) | {"choices": [self._whole(c) for c in choices], "usage": usage(choices)}

    def start(self, choice: Choice) -> list[dict[str, Any]]:
        """Chunks before an answer's first piece."""
        return [self._chunk(choice.index, choice.prefix, None, None)] if choice.prefix else []

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """A piece that `choice` has just been given, None if it shows nothing."""
        reason = piece.finish_reason
        if not piece.text and reason is None and not piece.logprobs:
            return None
        logprobs = self._logprobs(choice, piece.token_ids, piece.logprobs) if self.wants_logprobs else None
        return self._chunk(choice.index, piece.text, logprobs, reason)

    def last(self, choices: list[Choice]) -> dict[str, Any]:
        """The chunk that has no answer, only what all of them took."""
        return self._frame(self.chunk_kind) | {"choices": [], "usage": usage(choices)}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        assert choice.answer is not None
        return {
            "index": choice.index,
            "text": choice.prefix + choice.text,
            "logprobs": self._all_logprobs(choice),
            "finish_reason": choice.answer.finish_reason,
        }

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._frame(self.chunk_kind) | {"choices": [choice]}

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return self._logprobs(choice, choice.token_ids, choice.logprobs) if self.wants_logprobs else None

    def _logprobs(self, choice: Choice, token_ids: list[int], said: list[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self._token(token) for token in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(choice.logprob_offset)
            choice.logprob_offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.chosen) for one in said],
            "top_logprobs": [self._by_text(one) for one in said],
            "text_offset": offsets,
        }

    def _by_text(self, said: TokenLogprobs) -> dict[str, float]:
        """The likeliest of tokens with the same text, such as halves of characters, is the one that is told."""
        return {self._token(token): _finite(logprob) for token, logprob in reversed(said.likeliest)}

    def _token(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatShape(Shape):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def start(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._delta(choice.index, {"role": "assistant", "content": ""}, None, None)]

    def _whole(self, choice: Choice) -> dict[str, Any]:
        assert choice.answer is not None
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._all_logprobs(choice),
            "finish_reason": choice.answer.finish_reason,
        }

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return self._delta(index, {"content": text} if text else {}, logprobs, reason)

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._frame(self.chunk_kind) | {"choices": [choice]}

    def _logprobs(self, choice: Choice, token_ids: list[int], said: list[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(token, one.chosen) | {"top_logprobs": [self._entry(i, v) for i, v in one.likeliest]}
                for token, one in zip(token_ids, said, strict=True)
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # A token may be half a character, which has no text; its bytes are not known here.
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


def shape_of(request: AnyRequest, model: str, tokenizer: PreTrainedTokenizerBase) -> Shape:
    shape = ChatShape if isinstance(request, ChatRequest) else Shape
    return shape(model, tokenizer, request.likeliest is not None)


def usage(choices: list[Choice]) -> dict[str, Any]:
    """OpenAI's counts, and ours: forwards, summed over the answers, and tokens per forward."""
    answers = [choice.answer for choice in choices if choice.answer is not None]
    prompt = sum(choice.prompt for choice in choices)
    new, forwards = sum(a.new_tokens for a in answers), sum(a.forwards for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "forwards": forwards,
        "tokens_per_forward": round(new / max(forwards, 1), 4),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
