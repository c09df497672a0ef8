"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer
from transformers.utils import logging as hf_logging

from tidar.api import TidarModel
from tidar.errors import TidarError, memory_for

Model = Annotated[str, typer.Option(help="'smollm2-135m', a drafter or model folder, or a Hugging Face id.")]
DrafterFolder = Annotated[str | None, typer.Option("--drafter", help="Drafter folder instead of the model's own.")]
Mode = Annotated[
    str,
    typer.Option(
        help="'tidar' drafts and verifies, 'ar' is plain decoding, 'block-diffusion' is for models of that objective."
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="Of block-diffusion: max-confidence, left-to-right, fixed-N or confidence>P [default: max-confidence]."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the smallest set with this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest one.")]
Seed = Annotated[int, typer.Option(help="Random seed; with --plan fixed a row's tokens do not depend on its batch.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text (repeatable).")]
DraftLength = Annotated[
    int | None, typer.Option(help="K, tokens drafted a step. This and the next two turn --plan auto off.")
]
Outcomes = Annotated[int | None, typer.Option(help="Outcome blocks drafted a step, the likeliest [without it: all K].")]
CurveSteps = Annotated[
    list[str] | None,
    typer.Option(
        "--curve",
        help="REQUESTS:K:OUTCOMES: vLLM drafts so up to that many requests (repeatable) [default: a rule].",
    ),
]
Alternatives = Annotated[
    int | None, typer.Option(help="Next best tokens verified beside the drafts, one slot each [without it: none].")
]
PlanName = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="'auto' drafts as much as pays on this machine, 'fixed' does not [default: auto; evaluating, fixed].",
    ),
]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure this machine's costs for --plan auto again.")]
Trust = Annotated[float, typer.Option(help="Beta: 1 judges by AR logits (exact), 0 by diffusion logits.")]
Device = Annotated[str | None, typer.Option(help="Torch device [default: the GPU if there is one].")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: bfloat16 on a GPU].")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="int8 or fp8: quantise the base weights; half the bytes on CUDA, elsewhere only rounded: no faster."
    ),
]


def load(model: str, drafter: str | None, device: str | None, dtype: str | None, weights: str | None) -> TidarModel:
    """Load quietly, so that the terminal belongs to the answer."""
    be_quiet()
    with memory_for("the model's weights", "take a smaller model, a --dtype of 16 bits, or a device with more memory"):
        return TidarModel.from_pretrained(model, drafter=drafter, device=device, dtype=dtype, weights=weights)


def be_quiet() -> None:
    """Let transformers show neither progress bars nor warnings."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def check_counts(**counts: int | None) -> None:
    """Raise TidarError for an option that counts something and is below 1; None is not asked for."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise TidarError(f"{name.replace('_', '-')} is {value}, but must be at least 1")
