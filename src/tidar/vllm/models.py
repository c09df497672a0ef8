"""The model classes: vLLM's own, and what the plug-in adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM

if TYPE_CHECKING:
    from tidar.vllm.state import TidarModelState

    _Base = LlamaForCausalLM
else:
    _Base = object


class Tidar(_Base):
    """Mixin: brings its own model state, which hands the final hidden states of drafting steps to the sampler."""

    step_states: Tensor | None = None
    """Final hidden states of a drafting step at all places that `compute_logits` was asked for."""
    wanted: Literal["logits", "states", "both"] = "logits"
    """What the next `compute_logits` gives: states instead of logits in a step that drafts; both are logits, and kept
    states, where vLLM wants to mask logits before the sampler sees them."""

    def get_model_state_cls(self) -> type[TidarModelState]:
        from tidar.vllm.state import TidarModelState

        return TidarModelState

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        wanted, self.wanted = self.wanted, "logits"
        if wanted != "logits":
            self.step_states = hidden_states
        return hidden_states if wanted == "states" else super().compute_logits(hidden_states, *args, **kwargs)


class TidarLlamaForCausalLM(Tidar, LlamaForCausalLM):
    pass


class TidarQwen2ForCausalLM(Tidar, Qwen2ForCausalLM):
    pass


class TidarQwen3ForCausalLM(Tidar, Qwen3ForCausalLM):
    pass


class TidarForCausalLM(Tidar, TransformersForCausalLM):
    """Any causal LM that vLLM's Transformers backend runs."""
