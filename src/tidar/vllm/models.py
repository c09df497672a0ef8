"""The model classes: vLLM's own, and what the plug-in adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.platforms import current_platform

from tidar.vllm.checkpoint import Checkpoint
from tidar.vllm.twin import build_twin

if TYPE_CHECKING:
    from tidar.vllm.state import TidarModelState


class Tidar:
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
        return hidden_states if wanted == "states" else self.logits(hidden_states, *args, **kwargs)

    def logits(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return super().compute_logits(*args, **kwargs)  # type: ignore[misc]


class Native(Tidar):
    """Mixin for vLLM's own classes: drafting steps run a twin of the layers, see twin.py."""

    model: nn.Module
    running: Literal["plain", "drafting", "both"] = "both"
    """Which layers a forward runs; both while vLLM measures memory, compiles and captures."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        gated = Checkpoint.read(vllm_config.model_config.model).drafter is not None
        wanted = gated and vllm_config.quant_config is None and not current_platform.is_cpu()
        # In a tuple: a submodule's weights would be looked for in the checkpoint.
        self.twins: tuple[nn.Module, ...] = (build_twin(self.model, vllm_config),) if wanted else ()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        given, output = (input_ids, positions, intermediate_tensors, inputs_embeds), None
        if self.running != "drafting" or not self.twins:
            output = super().forward(*given)  # type: ignore[misc]
        if self.running != "plain":
            for twin in self.twins:
                output = twin(*given)
        return output


class TidarLlamaForCausalLM(Native, LlamaForCausalLM):
    pass


class TidarQwen2ForCausalLM(Native, Qwen2ForCausalLM):
    pass


class TidarQwen3ForCausalLM(Native, Qwen3ForCausalLM):
    pass


class TidarForCausalLM(Tidar, TransformersForCausalLM):
    """Any causal LM that vLLM's Transformers backend runs; its drafter is in all steps."""
