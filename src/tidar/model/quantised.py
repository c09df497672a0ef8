"""Quantised base weights: which layers, and where their numbers are kept.

A layer either keeps the eight-bit numbers, and whoever asks for its `weight` gets them multiplied out (stock modules
then run the same model as the kernel that streams the numbers), or, where no kernel would read them, it keeps its
weight in the model's dtype, rounded to what the numbers can say.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from tidar.errors import TidarError, first_line
from tidar.kernels.launch import available
from tidar.kernels.linear import linear, linear_eager
from tidar.kernels.weights import KINDS, QuantWeight, quantise


def check_kind(weights: str | None) -> None:
    """Raise TidarError for a kind of weights that does not exist."""
    if weights is not None and weights not in KINDS:
        raise TidarError(f"weights is {weights!r}, but must be one of {', '.join(KINDS)}")


@functools.cache
def kernel_reads(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernel for linear layers streams such numbers there: fp8 needs compute capability 8.9.

    It is tried once against its eager twin, as it makes floats of numbers by instructions of its own.
    """
    if not available(device) or (kind == "fp8" and torch.cuda.get_device_capability(device) < (8, 9)):
        return False
    numbers = torch.Generator(device).manual_seed(0)
    whole = torch.randn(64, 1088, device=device, generator=numbers)
    weight, why = quantise(whole, kind), ""
    try:
        for rows in (1, 72, 272):  # each is cut in another way
            x = whole.repeat(5, 1)[:rows].to(dtype)
            got, wanted = linear(x, weight).double().sum(0), linear_eager(x.double(), weight)[0]
            if not (got - wanted).norm() < 0.02 * wanted.norm():
                why = "its results are wrong here"
    except Exception as failure:  # whatever a compiler may raise: there is another way
        why = first_line(failure)
    if why:
        print(f"{kind} weights save no memory here, as the kernel that reads them fails: {why}", file=sys.stderr)
    return not why


class MultipliedOut(nn.Module):
    """The parametrisation of a quantised layer's weight."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        quantised = quantise(weight, self.kind)
        return quantised.values, quantised.scale

    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        return QuantWeight(values, scale).to(self.dtype)


@torch.no_grad()
def quantise_model(lm: PreTrainedModel, kind: str, keep_numbers: bool) -> None:
    """Quantise every linear layer of `lm` in place, but no part of a drafter.

    A tied output embedding becomes a weight of its own; the input embedding stays as it is.

    Raises:
        TidarError: if there is no linear layer.
    """
    layers = _linears(lm)
    if not layers:
        raise TidarError(f"{type(lm).__name__} has no torch.nn.Linear layer whose weight could be quantised")
    for layer in layers:
        if keep_numbers:
            parametrize.register_parametrization(layer, "weight", MultipliedOut(kind, layer.weight.dtype), unsafe=True)
        else:
            rounded = quantise(layer.weight, kind).to(layer.weight.dtype)
            layer.weight = nn.Parameter(rounded, requires_grad=False)


def _linears(lm: PreTrainedModel) -> list[nn.Linear]:
    named = lm.get_submodule(lm.base_model_prefix).named_modules()
    of_drafter = ("lora_A", "lora_B")
    layers = [m for path, m in named if isinstance(m, nn.Linear) and not path.endswith(of_drafter)]
    output = lm.get_output_embeddings()
    return [*layers, output] if isinstance(output, nn.Linear) else layers


def stored_weight(layer: nn.Linear) -> Tensor | QuantWeight:
    """What a layer keeps: its weight [N, K], or the numbers it is quantised to."""
    numbers = _numbers(layer)
    return layer.weight if numbers is None else QuantWeight(numbers.original0, numbers.original1)


def move_weight(layer: nn.Linear, to: Tensor | QuantWeight) -> None:
    """Let the layer's parameters (which an optimizer may hold) be `to`, the same numbers elsewhere in memory."""
    if isinstance(to, Tensor):
        layer.weight.data = to
    else:
        numbers = _numbers(layer)
        numbers.original0.data, numbers.original1.data = to.values, to.scale


def _numbers(layer: nn.Linear) -> Any:
    """The parametrisation that holds a layer's numbers, if it is quantised to them."""
    held: Any = layer.parametrizations if parametrize.is_parametrized(layer, "weight") else None
    return None if held is None else held.weight
