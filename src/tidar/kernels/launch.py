"""What all kernels share: when they can run, and programmatic dependent launch.

On Hopper and later a kernel may be scheduled while the one before it still runs; it must then wait before touching
that one's results. What it reads before waiting (weights) overlaps with its predecessor's tail, which is where a step
made of a few hundred small kernels otherwise loses its time. The rule that makes it safe: every kernel waits, and does
so before its first read or write of an activation.
"""

from __future__ import annotations

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = tl = None

def available(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`. (Tests also run them on the CPU, in Triton's interpreter.)"""
    return triton is not None and device.type == "cuda"


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether `device` can start a kernel before its predecessor ends (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, bool]:
    """Launch options every kernel takes."""
    early = dependent_launch(device)
    return {"PDL": early, "launch_pdl": early} if early else {"PDL": False}


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU (1 elsewhere)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
