"""A second body for drafting steps, so that plain ones do not pay for the drafter.

vLLM compiles a model's layers once, without branches, so a gated LoRA in them would run in every step. The twin is the
same class again around the same weights and the same attention layers; only it is gated.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

PREFIX = "drafting"


def build_twin(body: nn.Module, config: VllmConfig) -> nn.Module:
    """The layers of `body` (what a causal LM calls its `model`) once more, without memory of their own."""
    layers = config.compilation_config.static_forward_context
    before = set(layers)
    with torch.device("meta"), set_model_tag(PREFIX):
        twin = _drafting_class(type(body))(vllm_config=config, prefix=PREFIX)
    for name in set(layers) - before:  # the twin uses the body's attention, and its part of the cache
        del layers[name]
    return twin


def share_weights(twin: nn.Module, body: nn.Module) -> None:
    """Let the twin use all that the body has loaded."""
    for name, module in body.named_modules():
        if isinstance(module, AttentionLayerBase):
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, module)
    for name, parameter in body.named_parameters(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        twin.get_submodule(parent)._parameters[leaf] = parameter
    for name, buffer in body.named_buffers(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        twin.get_submodule(parent)._buffers[leaf] = buffer


def _drafting_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of its own with code of its own: compiled code is kept by either."""
    old = kind.forward
    code = old.__code__.replace(co_name=f"{PREFIX}_forward")
    forward = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, old.__closure__)
    forward.__kwdefaults__, forward.__annotations__ = old.__kwdefaults__, old.__annotations__
    forward.__qualname__ = f"{PREFIX}.{old.__qualname__}"
    return type(f"Drafting{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})
