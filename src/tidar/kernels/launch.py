"""What all kernels share: when they can run, how much fits into a multiprocessor, programmatic dependent launch.

On Hopper and later a kernel may be scheduled while the one before it still runs; it must then wait before touching
that one's results. What it reads before waiting (weights, the cached prefix) overlaps with its predecessors' tails,
which is where a step made of a few hundred small kernels otherwise loses its time. The rules that make it safe: every
kernel waits, and does so before it touches anything that this step wrote; and a step contains ordinary launches (the
embedding lookup), which wait for all that went before.
"""

from __future__ import annotations

import functools
import sys

import torch

from tidar.errors import first_line

try:
    import triton
    import triton.language as tl

    @triton.jit
    def _mark(place):
        tl.store(place, 1)

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
    return triton is not None and device.type == "cuda" and compiles(device)


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether a first kernel can be compiled and launched; where not, says so: without a C compiler Triton cannot."""
    try:
        _mark[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except Exception as failure:  # whatever a compiler, or what it starts, may raise
        why = first_line(failure)
        print(f"Triton's kernels do not run here, decoding is slow without them: {why}", file=sys.stderr)
        return False
    return True


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether `device` can start a kernel before its predecessor ends (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, bool]:
    """Launch options every kernel takes."""
    early = dependent_launch(device)
    return {"PDL": early, "launch_pdl": early} if early else {"PDL": False}


SHARED = 227 << 10
"""Bytes of shared memory that a program can have on an H100; GPUs for desktops have 99 KB."""
BARRIERS = 1 << 10
"""Bytes of it that are left for what Triton itself keeps there."""


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on a GPU (an H100's elsewhere)."""
    if device.type != "cuda":
        return SHARED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def multiplies_from_shared(device: torch.device) -> bool:
    """Whether tensor cores read tiles where they arrive (compute capability 9 to 11), not out of registers."""
    return device.type != "cuda" or 9 <= torch.cuda.get_device_capability(device)[0] <= 11


def stages_for(device: torch.device, wanted: int, tile: int, rest: int = 0) -> int:
    """How many tiles a loop can have in flight, at most `wanted`; below 2 there is no room for it.

    `tile` is the bytes of one, `rest` what the program keeps there beside them. A tile that goes through registers
    needs no room while it is multiplied.
    """
    held = (shared_memory(device) - BARRIERS - rest) // tile
    return min(wanted, held if multiplies_from_shared(device) else held + 1)


def programs_for(device: torch.device, stages: int, tile: int) -> int:
    """How many programs with so many tiles in flight, of so many bytes each, share a multiprocessor's memory."""
    tiles = stages_for(device, stages, tile)
    held = tiles if multiplies_from_shared(device) else tiles - 1
    return max(1, shared_memory(device) // (max(1, held) * tile + BARRIERS))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU (1 elsewhere)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
