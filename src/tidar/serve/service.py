"""From a request to rows of the batch: what is refused, what is encoded, what is decoded."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from tidar.api import TidarModel
from tidar.decode.engine import Limits
from tidar.errors import TidarError
from tidar.prompts import Prompt, encode_prompt
from tidar.sampling import SamplingParams
from tidar.serve.answers import Choice
from tidar.serve.loop import Deliver, Job, Loop
from tidar.serve.protocol import AnyRequest, ApiError, ChatRequest, unsupported


class Service:
    """A model behind a loop: what the routes need. It is `app.state.service`."""

    def __init__(self, model: TidarModel, name: str, loop: Loop) -> None:
        self.model, self.name, self.loop = model, name, loop
        self.tokenizer, self.created = loop.tokenizer, int(time.time())
        self._encoding = threading.Lock()  # a tokenizer may be shared, but not encode twice at once

    def card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tidar",
            "max_model_len": self.loop.context,
        }

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"the model {name!r} does not exist: this server has {self.name!r}", "model", "model_not_found"
            )

    def jobs(self, request: AnyRequest, deliver_to: Callable[[int], Deliver]) -> tuple[list[Job], list[Choice]]:
        """What to decode for a request; `deliver_to(i)` is given the pieces of answer i. Raises ApiError."""
        self.check_name(request.model)
        request.check()
        prompts = self._prompts(request)
        if len(prompts) * request.n > self.loop.rows + self.loop.most_waiting:
            raise ApiError(
                400, f"{len(prompts)} prompts x {request.n} answers are more than this server takes at once", "n"
            )
        params = request.sampling(secrets.randbits(63) if request.seed is None else request.seed)
        drafting = self._drafting(request, params)
        jobs, choices = [], []
        for number, (name, ids, echo) in enumerate(prompts):
            limits = Limits(self._room(request, ids, name), self.model.network.eos_ids, tuple(request.stop))
            for choice in range(request.n):
                index = number * request.n + choice
                jobs.append(Job(ids, limits, params, deliver_to(index), index, drafting, request.likeliest))
                choices.append(Choice(index, 0 if choice else len(ids), echo))
        return jobs, choices

    def _drafting(self, request: AnyRequest, params: SamplingParams) -> bool:
        """Whether drafts are judged for a request. Raises ApiError where it insists and cannot have them."""
        drafting = self.loop.drafts_for(params, request.seed is not None)
        if request.switch and not self.loop.drafts:
            raise unsupported("tidar", "this server decodes without drafts")
        if request.switch and not drafting:
            raise unsupported(
                "tidar", "a sampled answer with a 'seed' has drafts only where the server's plan is fixed"
            )
        return drafting and request.switch is not False

    def _prompts(self, request: AnyRequest) -> list[tuple[str, list[int], str]]:
        """The parameter that each prompt stands in, its ids, and what is repeated in front of its answers."""
        if isinstance(request, ChatRequest):
            if self.tokenizer.chat_template is None:
                raise ApiError(400, "this model has no chat template: use /v1/completions", "messages")
            return [("messages", self._encode([m.message() for m in request.messages], "messages"), "")]
        found = []
        for prompt in request.prompts():
            ids = self._encode(prompt, "prompt") if isinstance(prompt, str) else self._known(prompt)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            found.append(("prompt", ids, str(text) if request.echo else ""))
        return found

    def _encode(self, prompt: Prompt, param: str) -> list[int]:
        try:
            with self._encoding:
                ids = encode_prompt(self.tokenizer, prompt, raw=isinstance(prompt, str))
        except TidarError as error:
            raise ApiError(400, f"{param}: {error}", param) from error
        if not ids:
            raise ApiError(400, "the prompt is empty: give at least one token", param)
        return ids

    def _known(self, ids: list[int]) -> list[int]:
        if max(ids) >= self.model.network.vocabulary:
            raise ApiError(
                400, f"prompt: token {max(ids)} is not in the vocabulary of {self.model.network.vocabulary}", "prompt"
            )
        return ids

    def _room(self, request: AnyRequest, ids: list[int], param: str) -> int:
        """New tokens that may be made."""
        left = self.loop.context - len(ids)
        if left < 1:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, but the longest prompt and answer together are {self.loop.context}",
                param,
                "context_length_exceeded",
            )
        name, wanted = request.longest()
        if wanted is not None and wanted > left:
            raise ApiError(
                400,
                f"{name} is {wanted}, but behind a prompt of {len(ids)} tokens there is room for {left}",
                name,
                "context_length_exceeded",
            )
        return min(left, request.usual_tokens) if wanted is None else wanted
