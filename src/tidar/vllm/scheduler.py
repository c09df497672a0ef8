"""Which requests draft in a step: vLLM's schedulers, with as many places reserved as the step's shape has slots."""

from __future__ import annotations

from itertools import islice
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tidar.vllm.settings import curve_of, wants_drafts
from tidar.vllm.shapes import PLAIN, Shape

LONG_PROMPTS = 2048
"""Steps with so many tokens of prompts do not draft: a drafting step runs the adapter over all of its tokens, which by
estimate costs more there than the drafts of one step are worth."""


class TidarScheduler(Scheduler):
    """Speculative tokens are placeholders for a step's drafts and masks; the worker fills them in.

    A request has all of a shape's slots or none of them. It has none, and decodes plainly, while its prompt is being
    computed, if it asked for that, if it needs what only plain decoding does (see `wants_drafts`), where the slots
    do not fit into the model's context or the step's token budget, and beside long prompts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curve = curve_of(self.vllm_config)
        # vLLM would pad requests of one new token to this many placeholders, whether or not they may draft.
        self.num_spec_tokens = 0
        self.admits = True  # whether waiting requests may join the next step: none did last time, if not

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        shape = self.curve.at(min(len(self.running) + len(self.waiting), self.max_num_running_reqs))
        if shape.drafting and self._prompt_tokens() >= LONG_PROMPTS:
            shape = PLAIN
        self._place(shape)
        output = super().schedule(*args, **kwargs)
        self.admits = bool(output.scheduled_new_reqs) or not self.waiting
        return output

    def _place(self, shape: Shape) -> None:
        """Give placeholders to the requests that draft in the next step."""
        budget = self.max_num_scheduled_tokens
        for request in self.running:
            request.spec_token_ids = []
            if not shape.drafting:
                continue
            known = _to_compute(request)
            room = min(budget, self.max_model_len - request.num_computed_tokens - 1)
            drafts = known == 1 and shape.slots <= room and wants_drafts(request)
            if drafts:
                request.spec_token_ids = [-1] * (shape.slots - 1)
            budget -= shape.slots if drafts else max(known, 0)

    def _prompt_tokens(self) -> int:
        """How many tokens of prompts the next step may hold, cached ones included."""
        seats = self.max_num_running_reqs - len(self.running) if self.admits else 0
        begun = (known for known in map(_to_compute, self.running) if known > 1)
        return sum(begun) + sum(request.num_tokens for request in islice(self.waiting, seats))

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> SpecDecodingStats | None:
        """vLLM's own figures, of drafts alone: masks are no drafts."""
        if not self.log_stats:
            return None
        drafts = self.curve.of_slots(num_draft_tokens + 1).draft_length - 1
        stats = spec_decoding_stats or SpecDecodingStats.new(self.curve.most_drafts - 1)
        stats.observe_draft(num_draft_tokens=drafts, num_accepted_tokens=num_accepted_tokens)
        return stats


def _to_compute(request: Any) -> int:
    """Tokens of a running request that no forward has seen: one, unless its prompt is still being computed."""
    return request.num_tokens + request.num_output_placeholders - request.num_computed_tokens


class AsyncTidarScheduler(TidarScheduler, AsyncScheduler):
    """The next step is scheduled while one is running, as if all of that one's slots were tokens."""
