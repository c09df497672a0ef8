"""A GPU that is not there: kernels are compiled for it, as a launch would, and never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tidar.kernels import attention, launch, linear

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program can have, by compute capability: A100; L4, RTX 4090; H100; B200; RTX 5090."""
PROCESSORS = 132


class AbsentDriver:
    """Knows what to compile for, and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"absent {self.capability}"  # compiled kernels are kept by device: no real one shall find these

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def absent_gpu(capability: int) -> Iterator[dict[str, Any]]:
    """Meanwhile kernels' wrappers, given CPU tensors, compile for `capability`; their results are garbage.

    Yields the compiled kernels, by the name of each and what it was specialised for.
    """
    compiled = dict[str, Any]()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[f"{self.__name__} {kernel.hash}"] = kernel
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "shared_memory", lambda device: SHARED[capability])
        for module in (launch, attention):
            patch.setattr(module, "multiplies_from_shared", lambda device: 90 <= capability < 120)
        patch.setattr(launch, "dependent_launch", lambda device: capability >= 90)
        for module in (linear, attention):
            patch.setattr(module, "processors", lambda device: PROCESSORS)
        driver.set_active(AbsentDriver(capability))
        linear.choose.cache_clear()  # it depends on what was replaced
        try:
            yield compiled
        finally:
            linear.choose.cache_clear()
            driver.reset_active() if torch.cuda.is_available() else driver.set_active(None)
