"""A GPU worker whose full CUDA graphs cover every shape of the curve, and plain decoding.

vLLM records full graphs of steps in which each request has as many tokens as the longest shape has slots; all others
would run in pieces, with attention launched from Python layer by layer.

It also tells vLLM what the plug-in's own tensors take, which are made after vLLM has measured the model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from tidar.vllm.settings import curve_of
from tidar.vllm.shapes import PLAIN


class TidarWorker(Worker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """What the plug-in holds beside the model counts as the model's memory: the KV cache is given the rest."""
        before = torch.cuda.memory_allocated()
        super().load_model(*args, **kwargs)
        gc.collect()
        held, runner = torch.cuda.memory_allocated() - before, self.model_runner
        runner.model_memory_usage = max(held, getattr(runner, "model_memory_usage", 0))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        shapes = (PLAIN, *(shape for _, shape in curve_of(self.vllm_config).steps))
        add_uniform(self.model_runner.cudagraph_manager, {shape.slots for shape in shapes})


def add_uniform(manager: Any, lengths: Iterable[int]) -> None:
    """Let a `CudaGraphManager` of vLLM record full graphs of uniform steps of several lengths.

    Its own rule, which sizes are worth a graph, is asked once for each number of tokens a request may have; all others'
    full graphs go before the ones in pieces. To be called before anything is captured.
    """
    own, full = manager.decode_query_len, CUDAGraphMode.FULL
    captures, candidates = manager._capture_descs, manager._candidates
    for length in sorted(set(lengths) - {own}):
        manager.decode_query_len, manager._capture_descs, manager._candidates = length, {}, {}
        manager._init_candidates()
        captures[full] = captures.get(full, []) + manager._capture_descs.get(full, [])
        for key, descs in manager._candidates.items():
            known = candidates.get(key, [])
            candidates[key] = [desc for desc in descs if desc.cg_mode == full and desc not in known] + known
    captures.get(full, []).sort(key=lambda desc: desc.num_tokens, reverse=True)
    manager.decode_query_len, manager._capture_descs, manager._candidates = own, captures, candidates
