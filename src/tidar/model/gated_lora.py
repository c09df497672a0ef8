"""LoRA that acts on mask tokens only (gated LoRA, Apple MTP arXiv 2507.11851): the AR half stays the base model.

Mask tokens are the tail of each row, so the gate is a slice. `GatedLinear` keeps the base layer's own parameters under
their own names; the base checkpoint is not changed by having a drafter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar.errors import TidarError


class Gate(threading.local):
    """Index of the first mask token of the running forward; None while no mask token is about (plain causal LM).

    Each thread has its own, so that a server and a demo may decode with one network at once.
    """

    def __init__(self) -> None:  # once in each thread; as a class attribute the compiler would take its value for fixed
        self.start: int | None = None

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()  # a network can be copied and pickled, which a thread's own values cannot

    @contextmanager
    def opened(self, start: int) -> Iterator[None]:
        before, self.start = self.start, start
        try:
            yield
        finally:
            self.start = before


class GatedLinear(nn.Linear):
    """A linear layer with y[:, start:] += B(A(x[:, start:])) * scaling.

    Shares `weight` and `bias` with the layer it replaces; `path` names it in errors. lora_A is [rank, in], lora_B [out,
    rank] (zero at the start).
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, gate: Gate, path: str = "") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.gate, self.scaling, self.path = gate, scaling, path
        device = base.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.normal_(self.lora_A.weight, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        start = self.gate.start
        if start is None:
            return F.linear(x, self.weight, self.bias)
        if x.dim() != 3:
            raise TidarError(
                f"linear layer {self.path} sees its tokens flattened, so mask tokens cannot be told apart there: adapt "
                "others (--target NAME for each, such as q_proj)"
            )
        if start >= x.shape[1]:
            return F.linear(x, self.weight, self.bias)
        y, masks = F.linear(x, self.weight, self.bias), x[:, start:]
        low_rank = F.linear(masks, self.lora_A.weight.to(x.dtype))
        delta = F.linear(low_rank, self.lora_B.weight.to(x.dtype)) * self.scaling
        return y + delta if start == 0 else torch.cat((y[:, :start], y[:, start:] + delta), dim=1)


def lora_targets(backbone: nn.Module, names: list[str] | None) -> list[str]:
    """Module paths to adapt, relative to `backbone`: every linear layer, or those whose last name is in `names`.

    Raises:
        TidarError: if a name matches nothing, or there is no linear layer at all.
    """
    linears = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if names is not None:
        found = {path.rsplit(".", 1)[-1] for path in linears}
        if unknown := sorted(set(names) - found):
            raise TidarError(
                f"no linear layer is called {', '.join(unknown)}; this model has {', '.join(sorted(found))}"
            )
        linears = [path for path in linears if path.rsplit(".", 1)[-1] in names]
    if not linears:
        raise TidarError(f"{type(backbone).__name__} has no torch.nn.Linear layer that a gated LoRA could adapt")
    return linears


def install(backbone: nn.Module, targets: list[str], rank: int, scaling: float, gate: Gate) -> dict[str, GatedLinear]:
    """Replace each target by its gated twin, in place; returns them by path."""
    installed = {}
    for path in targets:
        parent_path, _, name = path.rpartition(".")
        parent, base = backbone.get_submodule(parent_path), backbone.get_submodule(path)
        assert isinstance(base, nn.Linear)
        gated = GatedLinear(base, rank, scaling, gate, path)
        setattr(parent, name, gated)
        installed[path] = gated
    return installed
