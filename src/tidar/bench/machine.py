"""The two ceilings of a machine, reading memory and multiplying; and what to write beside figures."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tidar.decode.costs import processor_name


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10, warmups: int = 2) -> float:
    """Median time of `work`, waiting for the device each time."""
    return statistics.median(_times(work, device, repeats, warmups))


def _times(work: Callable[[], object], device: torch.device, repeats: int = 10, warmups: int = 2) -> list[float]:
    taken = []
    for _ in range(warmups + repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return taken[warmups:]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second when reading much more than the caches hold; the best of several tries, as for any ceiling."""
    size = (4 << 30) if device.type == "cuda" else (1 << 29)
    data = torch.ones(size // 4, device=device)
    return size / min(_times(data.sum, device))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(_times(lambda: a @ b, device))


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What figures were measured with."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": command(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """The command line, without the folders that files are in: those are of this machine."""

    def short(argument: str) -> str:
        parts = re.split("([=:])", argument)  # --out=FILE, NAME=FILE:10, KIND:FOLDER:OPTION
        files = (part for part in parts if os.path.isabs(part) or os.path.exists(part))
        names = {file: Path(file).name or file for file in files}
        return "".join(names.get(part, part) for part in parts)

    return " ".join(["tidar", *map(short, sys.argv[1:])])


def precision(result: dict[str, Any]) -> str:
    """The dtype of a measurement, and that of its weights if it is another."""
    dtype = str(result["conditions"]["dtype"])
    return dtype if result.get("weights") is None else f"{dtype}, {result['weights']} weights"


def rounded(value: float) -> str:
    """A speed for people, of slow machines too."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
