"""FSDP2: weights, gradients and optimizer state spread over the processes, one unit a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tidar.model.drafter import Drafter
from tidar.train.conversion import Conversion, decoder_layers


def shard(module: Conversion, bf16: bool) -> None:
    """Shard `module` in place over all processes.

    Frozen bfloat16 and trained float32 weights share a unit: each is gathered in its own precision, and gradients are
    reduced in float32. With `bf16` (trained weights are float32 masters) everything is gathered in bfloat16. The root
    unit holds the embeddings, tied or not, the final norm and the drafter's own parts; it stays gathered from the
    forward to the end of the backward, as the loss uses the output embedding outside of any layer.
    """
    device = module.network.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Outputs are left alone: a loss in bfloat16 would be too coarse to log.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in decoder_layers(module.network):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def named_once(drafter: Drafter | None) -> Iterator[None]:
    """Hide the drafter's list of its LoRA, which lives in the layers: FSDP2 and checkpoints want one owner each."""
    if drafter is None:
        yield
        return
    lora = drafter._modules.pop("lora")
    drafter.__dict__["lora"] = lora
    try:
        yield
    finally:
        del drafter.__dict__["lora"]
        drafter._modules["lora"] = lora


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights on every process, in the precision of the forward, for as long as this lasts."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not module, recurse=False)


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole and on the CPU, by name: on the first process, nothing elsewhere. All call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]
