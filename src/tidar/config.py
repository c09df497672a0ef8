"""What a checkpoint says about its conversion: the `tidar` entry of `config.json` or `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from tidar.errors import TidarError

Objective = Literal["lossless", "paper", "ar", "block-diffusion"]
BlockAttention = Literal["bidirectional", "causal"]
MAX_DRAFT = 128
"""Longest block: a step runs K + K * K tokens, so beyond this it is sure to be slower than plain decoding."""


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise TidarError, naming the field, for a value that is none of the choices."""
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise TidarError(f"{name} is {value!r}, but must be {listed}")


@dataclass(frozen=True)
class TidarConfig:
    """How a checkpoint was converted.

    Attributes:
        block_size: K of training, in tokens. Decoding may use another draft length.
        objective: "lossless" (base frozen, gated drafter), "paper" (all weights, Sec. 3.2 of arXiv 2511.08923), "ar"
            (plain fine-tuning, no drafter) or "block-diffusion" (all weights, no AR term: BD3-LM, arXiv 2503.09573).
        mask_token_id: vocabulary id of the mask token, or None where the drafter carries a learned embedding.
        block_attention: what a mask sees of its block: all of it, or the earlier masks only ("causal").
        provenance: free-form record of data, command and versions.

    Raises:
        TidarError: if a field cannot be meant.
    """

    block_size: int = 8
    objective: Objective = "lossless"
    mask_token_id: int | None = None
    block_attention: BlockAttention = "bidirectional"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 2 <= self.block_size <= MAX_DRAFT:
            raise TidarError(f"block size is {self.block_size}, but must be between 2 and {MAX_DRAFT}")
        require_choice("objective", self.objective, get_args(Objective))
        require_choice("block_attention", self.block_attention, get_args(BlockAttention))
        if self.objective in ("paper", "block-diffusion") and self.mask_token_id is None:
            raise TidarError(
                f"objective {self.objective!r} trains a vocabulary entry as the mask token, so mask_token_id is needed"
            )

    @property
    def drafts(self) -> bool:
        """Whether such a checkpoint verifies drafts and makes new ones in the same forward."""
        return self.objective in ("lossless", "paper")

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> TidarConfig:
        """Read a stored entry; keys of newer versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in entry.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
