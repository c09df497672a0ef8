"""What all kernels share: when they can run, and programmatic dependent launch.

On Hopper and later a kernel may be scheduled while the one before it still runs; it must then wait before touching
that one's results. What it reads before waiting (weights, the cached prefix) overlaps with its predecessors' tails,
which is where a step made of a few hundred small kernels otherwise loses its time. The rules that make it safe: every
kernel waits, and does so before it touches anything that this step wrote; and a step contains ordinary launches (the
embedding lookup), which wait for all that went before.
"""

from __future__ import annotations

import functools

import torch

try:
    import triton
    import triton.language as tl

    @triton.jit
    def prefetch(address, real, fallback):
        """Ask for the cache lines at `address` (a block of pointers) to be brought to L2; `fallback` is a valid one."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [tl.where(real, address.to(tl.int64), fallback.to(tl.int64))],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
except ImportError:  # a CPU build of torch brings no Triton
    triton = tl = prefetch = None


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
