"""Which requests draft in a step: vLLM's schedulers, with as many places reserved as the step's shape has slots."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tidar.vllm.settings import curve_of, wants_drafts


class TidarScheduler(Scheduler):
    """Speculative tokens are placeholders for a step's drafts and masks; the worker fills them in.

    A request has all of a shape's slots or none of them. It has none, and decodes plainly, while its prompt is being
    computed, if it asked for that, if it needs what only plain decoding does (see `wants_drafts`), or where the slots
    do not fit into the model's context or the step's token budget.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curve = curve_of(self.vllm_config)
        # vLLM would pad requests of one new token to this many placeholders, whether or not they may draft.
        self.num_spec_tokens = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        shape = self.curve.at(min(len(self.running) + len(self.waiting), self.max_num_running_reqs))
        budget = self.max_num_scheduled_tokens
        for request in self.running:
            known = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            room = min(budget, self.max_model_len - request.num_computed_tokens - 1)
            drafts = shape.drafting and known == 1 and shape.slots <= room and wants_drafts(request)
            request.spec_token_ids = [-1] * (shape.slots - 1) if drafts else []
            budget -= shape.slots if drafts else max(known, 0)
        return super().schedule(*args, **kwargs)

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


class AsyncTidarScheduler(TidarScheduler, AsyncScheduler):
    """The next step is scheduled while one is running, as if all of that one's slots were tokens."""
