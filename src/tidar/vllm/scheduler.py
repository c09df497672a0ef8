"""Which requests draft in a step: vLLM's schedulers, with as many places reserved as the step's shape has slots."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tidar.vllm.settings import curve_of, wants_drafts
from tidar.vllm.shapes import PLAIN, Shape

LONG_PROMPTS = 2048
"""Steps with so many tokens of prompts do not draft: a drafting step runs the adapter over all of its tokens, which by
estimate costs more there than the drafts of one step are worth."""
SPARE = 3
"""A step drafts if the KV cache has room for so many times the slots of all running requests: once for the step, and
twice for what the others may need until those that drafted have grown into their blocks, as two steps may be in flight.
"""
QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")
"""Where requests wait, in one version or another."""


class TidarScheduler(Scheduler):
    """Speculative tokens are placeholders for a step's drafts and masks; the worker fills them in.

    A request has all of a shape's slots or none of them. It has none, and decodes plainly, while its prompt is being
    computed, if it asked for that, if it needs what only plain decoding does (see `wants_drafts`), where the slots
    do not fit into the model's context or the step's token budget, beside long prompts, and where the KV cache is
    nearly full: a request that drafted keeps the blocks of rejected slots, and others would be preempted for them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curve = curve_of(self.vllm_config)
        # vLLM would pad requests of one new token to this many placeholders, whether or not they may draft.
        self.num_spec_tokens = 0
        self.admits = True  # whether waiting requests may join the next step: none did last time, if not

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        shape = self.curve.at(min(sum(self.get_request_counts()), self.max_num_running_reqs))
        if shape.drafting:
            prompts = self._prompt_tokens()
            if prompts >= LONG_PROMPTS or not self._has_room(shape, prompts):
                shape = PLAIN
        self._place(shape)
        output = super().schedule(*args, **kwargs)
        self.admits = bool(output.scheduled_new_reqs) or not any(self._queues())
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
            # One token may be left of a prompt, too, whose last chunk it is.
            decodes = known == 1 and not request.is_prefill_chunk
            drafts = decodes and shape.slots <= room and wants_drafts(request)
            if drafts:
                request.spec_token_ids = [-1] * (shape.slots - 1)
            budget -= shape.slots if drafts else max(known, 0)

    def _prompt_tokens(self) -> int:
        """How many tokens of prompts the next step may hold, cached ones included."""
        seats = self.max_num_running_reqs - len(self.running) if self.admits else 0
        begun = (known for known in map(_to_compute, self.running) if known > 1)
        waiting = chain.from_iterable(self._queues())
        return sum(begun) + sum(request.num_tokens for request in islice(waiting, seats))

    def _queues(self) -> list[Any]:
        return [getattr(self, name, ()) for name in QUEUES]

    def _has_room(self, shape: Shape, prompts: int) -> bool:
        """Whether the KV cache has room for a drafting step, and for what follows it if no other drafts."""
        needed = SPARE * len(self.running) * self._blocks(shape.slots) + self._blocks(prompts)
        return needed <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _blocks(self, tokens: int) -> int:
        """Blocks that so many more tokens of a request may take: layers of each kind have their own."""
        sizes = (group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups)
        return sum(-(-tokens // size) for size in sizes)

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
