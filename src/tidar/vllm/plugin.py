"""The entry point `vllm.general_plugins`: tells vLLM what there is, in every one of its processes."""

from __future__ import annotations

from tidar.vllm.checkpoint import GENERAL, NATIVE
from tidar.vllm.hooks import check_hooks, check_version


def register() -> None:
    """Register the model classes and the attention backend. Raises TidarError outside the tested versions."""
    check_version()
    check_hooks()
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in (*NATIVE.values(), GENERAL):
        ModelRegistry.register_model(name, f"tidar.vllm.models:{name}")
    if current_platform.is_cpu():
        # The CPU platform knows one backend only, so ours takes its place; without drafts it does the same.
        register_backend(AttentionBackendEnum.CPU_ATTN, "tidar.vllm.attention_cpu.StepAttentionBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "tidar.vllm.attention_cuda.StepAttentionBackend")
