"""The plug-in's part of a worker: prepares every step for the model, and hands the sampler what it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tidar.errors import TidarError
from tidar.vllm.checkpoint import Checkpoint
from tidar.vllm.drafter import DraftHead, install, read_tensors
from tidar.vllm.replay import Replay
from tidar.vllm.sampler import TidarSampler
from tidar.vllm.settings import curve_of
from tidar.vllm.step import Buffers, Drafts, Step, StepMaker, Visibility, find_rows

CHANGES = (
    "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "presence_penalty", "frequency_penalty",
    "watermarking",
)  # fmt: skip
"""What changes logits before the largest one is taken."""


class TidarModelState(DefaultModelState):
    """Made once the model is loaded; the runner calls `prepare_attn`, `prepare_inputs`, then the sampler, every step.

    Attributes:
        step: the drafting part of the running step, None if nothing drafts.
        untouched: [requests] whether a request's next token is simply the one with the largest logit.
        drafted: [requests] whether a request may have drafts to judge, as far as the host knows.
        inputs, verdicts: run what comes before the model, and after it, as CUDA graphs; the latter not on several GPUs,
            which talk to each other there.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        check_supported(vllm_config)
        super().__init__(vllm_config, model, encoder_cache, device)
        self.checkpoint = Checkpoint.read(vllm_config.model_config.model)
        self.curve = curve_of(vllm_config)
        self.buffers = Buffers(self.max_num_tokens, self.max_num_reqs, self.dtype, device)
        self.drafts = Drafts.empty(self.max_num_reqs, self.curve.most_drafts, device)
        self.untouched, self.drafted = np.zeros((2, self.max_num_reqs), dtype=bool)
        alone = vllm_config.parallel_config.tensor_parallel_size == 1
        recorded = device.type == "cuda" and not self.model_config.enforce_eager
        self.inputs = Replay(recorded)
        self.verdicts = self.inputs if alone else Replay(False)
        self.step: Step | None = None
        stored = self.checkpoint.drafter
        tensors = read_tensors(stored) if stored is not None else {}
        if stored is not None:
            install(model, stored, tensors, self.buffers.gate)
        self.head = DraftHead(model, self.checkpoint, tensors, self.dtype)
        tidar, last = self.checkpoint.tidar, self.max_model_len - 1
        causal = tidar.block_attention == "causal"
        mask = self.checkpoint.mask_token or 0
        self.maker = StepMaker(self.buffers, self.drafts, mask, last, causal, self.inputs)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return TidarSampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        if self.drafted[req_index]:  # by the request that was there before
            self.drafts.count[req_index] = 1
            self.drafted[req_index] = False
        self.untouched[req_index] = takes_the_best(new_req_data.sampling_params)

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: CUDAGraphMode, *args: Any, for_capture: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        metadata = super().prepare_attn(input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs)
        full = cudagraph_mode == CUDAGraphMode.FULL
        visibility = self._capture(input_batch) if for_capture else self._prepare(input_batch, full)
        for layer in metadata.values():
            layer.tidar = visibility
        return metadata

    def _prepare(self, batch: Any, full_graph: bool) -> Visibility:
        shape, rows = find_rows(batch, self.curve)
        if len(rows) < batch.num_reqs:
            self.buffers.fill_plain(batch, full_graph)
        self.step, self.model.running = None, "drafting" if len(rows) else "plain"
        if not len(rows):
            return self.buffers.visibility(None, 0, 0)
        self.step = step = self.maker.make(batch, shape, rows)
        requests = None if step.index is None else step.index.int()
        return self.buffers.visibility(requests, batch.num_reqs_after_padding, shape.slots)

    def _capture(self, batch: Any) -> Visibility:
        """Full graphs are captured of steps in which all requests draft with one shape, or none does."""
        shape = self.curve.of_slots(batch.num_tokens // batch.num_reqs)
        drafting = shape.drafting and batch.num_tokens == shape.slots * batch.num_reqs
        self.model.running = "drafting" if drafting else "plain"
        return self.buffers.visibility(None, batch.num_reqs if drafting else 0, shape.slots if drafting else 0)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if self.step is not None:
            self.model.wanted = "both" if input_batch.has_structured_output_reqs else "states"
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.model.running = "both"
        return super().prepare_dummy_inputs(num_reqs, num_tokens)


def takes_the_best(params: Any) -> bool:
    """Whether sampling parameters leave nothing to do but to take the token with the largest logit."""
    given = params is not None and params.temperature == 0
    return bool(given and params.repetition_penalty == 1 and not any(getattr(params, name, None) for name in CHANGES))


def check_supported(config: VllmConfig) -> None:
    """Raise TidarError for what the plug-in cannot do, before anything is served."""
    parallel = config.parallel_config
    refused = {
        "LoRA adapters (--enable-lora)": config.lora_config is not None,
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "data parallelism inside one server": parallel.data_parallel_size > 1,
        "a quantised KV cache": config.cache_config.cache_dtype.startswith("fp8"),
        "rotary positions of several axes (M-RoPE)": config.model_config.uses_mrope,
        "prompt embeddings": config.model_config.enable_prompt_embeds,
        "returning sampling masks": getattr(config.model_config, "return_sampling_mask", False),
        "replaying traces": getattr(config.model_config, "enable_trace_replay", False),
    }
    for name, wanted in refused.items():
        if wanted:
            raise TidarError(f"{name} does not go with drafting: leave it away, or serve with --mode ar")
