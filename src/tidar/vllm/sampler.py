"""Verifies and drafts: takes the place of vLLM's sampler, and leaves to it the requests that decode plainly.

Logits of judged drafts go through vLLM's own processing (temperature, truncation, penalties, biases, bad words), which
knows how to treat several positions of a request; `tidar.sampling` decides which drafts stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from tidar.kernels.judge import Decision, Judged, decide, decide_eager
from tidar.sampling import accept_sampled, certain, uniforms
from tidar.vllm.hooks import call_with_known
from tidar.vllm.metrics import Metrics
from tidar.vllm.shapes import Shape
from tidar.vllm.step import Step, Told, sent

if TYPE_CHECKING:
    from tidar.vllm.state import TidarModelState

ONE_PASS = 288
"""Up to so many tokens all logits of a step are computed at once: reading the output embedding is what it costs."""
MOST_JUDGED = 256
"""Drafts that are judged at once: more of them, as in vLLM's warm-up, would need gigabytes for their probabilities."""
WARM_UP = ("_warmup_", "_v2_mixed_warmup")
"""How the ids of requests begin that vLLM makes up before it serves."""


class TidarSampler:
    def __init__(self, base: Any, state: TidarModelState) -> None:
        self.base, self.state = base, state
        self.metrics = Metrics(state.curve, state.drafts.count.device, get_tensor_model_parallel_rank() == 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def __call__(self, logits: Tensor, batch: Any) -> SamplerOutput:
        """`logits` are those of all places that vLLM asked for, or hidden states in a step that drafts."""
        step, model = self.state.step, self.state.model
        states, self.state.step, model.step_states = model.step_states, None, None
        if step is None:
            self._forget(batch, _all(batch))
            return self.base(logits, batch) if not batch.num_draft_tokens else self._plain(logits, batch, _all(batch))
        whole = None if states is logits else logits
        alone = step.index is None and whole is None and step.tokens.numel() <= MOST_JUDGED
        if alone and self.state.untouched[batch.idx_mapping_np[step.rows]].all():
            told = self._take_the_best(states, step)
        else:
            parts = step.parts(max(MOST_JUDGED // step.shape.draft_length, 1))
            each = [self._judge_processed(states, whole, part, batch) for part in parts]
            tokens, counts = zip(*each, strict=True)
            told = Told(torch.cat(tokens), torch.cat(counts, 1)) if len(each) > 1 else each[0]
        if not batch.req_ids[0].startswith(WARM_UP):
            self.metrics.record(told.counts)
        self.state.drafted[batch.idx_mapping_np[step.rows]] = True
        if step.index is None:
            return _output(told)
        plain = np.setdiff1d(_all(batch), step.rows)
        self._forget(batch, plain)
        chosen = sent(batch.cu_num_logits_np[plain], states.device)
        rest = model.compute_logits(states[chosen]) if whole is None else whole[chosen]
        return _merge(_output(told), step, self._plain(rest, batch, plain), plain, batch.num_reqs)

    def _forget(self, batch: Any, rows: np.ndarray) -> None:
        """Requests of a batch that decoded plainly have no drafts to judge next; most of them had none before."""
        slots = batch.idx_mapping_np[rows]
        had = slots[self.state.drafted[slots]]
        if len(had):
            drafts = self.state.drafts
            drafts.count.index_fill_(0, sent(had, drafts.count.device), 1)
            self.state.drafted[had] = False

    def _take_the_best(self, states: Tensor, step: Step) -> Told:
        """Where all requests draft and the largest logits decide."""
        rows, shape = len(step.slots), step.shape
        made = step.slots, step.tokens, step.anchors  # lie where the graph before the model has left them

        def judge(states: Tensor) -> Told:
            return self._judge(best, shape, states, None, *made)

        def best(logits: Tensor, facts: Judged) -> Decision:
            return decide(logits.argmax(-1).view(rows, -1), None, facts, shape.draft_length)

        key, given = ("verdict", shape, rows), states.view(rows, shape.slots, -1)
        results = self.state.verdicts(key, judge, given, tokens=rows * shape.slots, fixed=made)
        return Told(*(result.clone() for result in results))

    def _judge_processed(self, states: Tensor, logits: Tensor | None, step: Step, batch: Any) -> Told:
        """The same for any requests, by logits as vLLM's sampler would draw from them."""
        first = sent(batch.cu_num_logits_np[step.rows], states.device)
        where = first[:, None] + torch.arange(step.shape.slots, device=states.device)

        def choose(logits: Tensor, facts: Judged) -> Decision:
            return self._decide(logits, facts, step, batch)

        known = None if logits is None else logits[where]
        return self._judge(choose, step.shape, states[where], known, step.slots, step.tokens, step.anchors)

    def _judge(
        self,
        choose: Callable[[Tensor, Judged], Decision],
        shape: Shape,
        states: Tensor,
        logits: Tensor | None,
        slots: Tensor,
        tokens: Tensor,
        anchors: Tensor,
    ) -> Told:
        """Verify a step's drafts, and make and keep the next ones.

        Args:
            choose: what stands, by the logits [R * K, V] of what is judged.
            states: [R, N, H] final hidden states of the requests that draft.
            logits: [R, N, V], where they are known.
            shape, slots, tokens, anchors: see `Step`.
        """
        rows, length = tokens.shape
        compute, drafts = self.state.model.compute_logits, self.state.drafts
        if logits is None and rows * shape.slots <= ONE_PASS:
            logits = compute(states.flatten(0, 1)).view(rows, shape.slots, -1)
        judged = compute(states[:, :length].flatten(0, 1)) if logits is None else logits[:, :length].flatten(0, 1)
        one = torch.ones_like(slots)
        counts = drafts.count[slots].clamp(max=length)
        decision = choose(judged, Judged(tokens, counts, one, anchors, one > 0, shape.slots, length))
        block = states.flatten(0, 1)[decision.masks]
        if logits is None:
            block_logits = compute(block[:, 1:].flatten(0, 1)).view(rows, length - 1, -1)
        else:
            block_logits = logits.flatten(0, 1)[decision.masks[:, 1:]]
        drafted = self.state.head.drafts(block, block_logits, decision.next_token)
        drafts.tokens[slots, :length] = drafted.drafts
        drafts.count[slots] = decision.drafted
        drafts.confidence[slots, : length - 1] = drafted.confidence
        return Told.of(decision, shape, anchors)

    def _decide(self, logits: Tensor, facts: Judged, step: Step, batch: Any) -> Decision:
        """Which drafts stand, by logits [R * K, V]."""
        rows, length = step.tokens.shape
        hosted = batch.idx_mapping_np[step.rows]
        greedy = self.base.sampling_states.temperature.np[hosted] == 0
        logits = self._processed(logits, step, batch, hosted, bool(greedy.all()))
        if greedy.all():
            return decide(logits.argmax(-1).view(rows, length), None, facts, length)
        probs = logits.float().softmax(-1)
        if greedy.any():
            sure = sent(np.repeat(greedy, length), probs.device) > 0
            probs = torch.where(sure[:, None], certain(logits), probs)
        seeds = self.base.sampling_states.seeds.gpu[step.slots].to(logits.device)
        noise = uniforms(seeds, step.prefix, length)
        verdict = accept_sampled(probs.view(rows, length, -1), facts.drafts, None, noise, facts.drafted)
        return decide_eager(verdict, facts, length)

    def _processed(self, logits: Tensor, step: Step, batch: Any, hosted: np.ndarray, greedy: bool) -> Tensor:
        """Logits as vLLM's sampler would draw from them: K places of each request, one after another."""
        rows, length = step.tokens.shape
        places = (step.starts[:, None] + torch.arange(length, device=logits.device)).flatten()
        mapping = batch.idx_mapping if step.index is None else batch.idx_mapping[step.index]
        return call_with_known(
            self.base.apply_sampling_params,
            logits=logits,
            expanded_idx_mapping=mapping.repeat_interleave(length),
            idx_mapping=mapping,
            idx_mapping_np=hosted,
            pos=batch.positions[places],
            input_ids=batch.input_ids[places],
            expanded_local_pos=torch.arange(length, dtype=torch.int32, device=logits.device).repeat(rows),
            seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy()[step.rows],
            skip_top_k_top_p=greedy,
        )

    def _plain(self, logits: Tensor, batch: Any, rows: np.ndarray) -> SamplerOutput:
        """vLLM's sampler on some requests, by the logits of their first place each.

        A request that had room for some placeholders but not all decodes plainly; its placeholders count as rejected.
        """
        device, count = logits.device, len(rows)
        index, first = sent(rows, device), sent(batch.cu_num_logits_np[rows], device)
        if len(logits) != count:
            logits = logits[first]
        part = replace(
            batch,
            req_ids=[batch.req_ids[row] for row in rows],
            num_reqs=count,
            num_reqs_after_padding=count,
            idx_mapping=batch.idx_mapping[index],
            idx_mapping_np=batch.idx_mapping_np[rows],
            expanded_idx_mapping=batch.idx_mapping[index],
            expanded_local_pos=torch.zeros(count, dtype=torch.int32, device=device),
            num_draft_tokens=0,
            num_draft_tokens_per_req=None,
            seq_lens=batch.seq_lens[index],
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows)],
            logits_indices=batch.logits_indices[first],
            cu_num_logits=torch.arange(count + 1, dtype=torch.int32, device=device),
            cu_num_logits_np=np.arange(count + 1, dtype=np.int32),
        )
        output = self.base(logits, part)
        unused = sent(np.diff(batch.cu_num_logits_np)[rows] - 1, device)
        output.num_rejected = output.num_rejected + unused.to(output.num_rejected.dtype)
        return output


def _all(batch: Any) -> np.ndarray:
    return np.arange(batch.num_reqs)


def _output(told: Told) -> SamplerOutput:
    return SamplerOutput(
        sampled_token_ids=told.tokens,
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=told.counts[0],
        num_rejected=told.counts[1],
    )


def _merge(drafting: SamplerOutput, step: Step, plain: SamplerOutput, rows: np.ndarray, count: int) -> SamplerOutput:
    """One output for a batch of `count` requests of which `rows` were decoded plainly."""
    index = sent(rows, drafting.num_sampled.device)
    tokens = drafting.sampled_token_ids.new_zeros(count, drafting.sampled_token_ids.shape[1])
    tokens[step.index], tokens[index, :1] = drafting.sampled_token_ids, plain.sampled_token_ids.to(tokens.dtype)
    sampled, rejected = drafting.num_sampled.new_zeros(2, count)
    sampled[step.index], sampled[index] = drafting.num_sampled, plain.num_sampled.to(sampled.dtype)
    rejected[step.index], rejected[index] = drafting.num_rejected, plain.num_rejected.to(rejected.dtype)
    logprobs = None
    if plain.logprobs_tensors is not None:
        wide = (_scatter(tensor, index, count) for tensor in plain.logprobs_tensors[:3])
        logprobs = LogprobsTensors(*wide)
    return SamplerOutput(
        sampled_token_ids=tokens,
        logprobs_tensors=logprobs,
        num_nans=None,
        num_sampled=sampled,
        num_rejected=rejected,
    )


def _scatter(tensor: Tensor, index: Tensor, count: int) -> Tensor:
    wide = tensor.new_zeros(count, *tensor.shape[1:])
    wide[index] = tensor
    return wide
