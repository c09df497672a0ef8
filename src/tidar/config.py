"""What a checkpoint says about its conversion: the `tidar` entry of `config.json` or `adapter_config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from tidar.errors import TidarError

Objective = Literal["lossless", "paper"]
MAX_DRAFT = 128
"""Longest block: a step runs K + K * K tokens, so beyond this it is sure to be slower than plain decoding."""


@dataclass(frozen=True)
class TidarConfig:
    """How a checkpoint was converted.

    Attributes:
        block_size: K of training, in tokens. Decoding may use another draft length.
        objective: "lossless" (base frozen, gated drafter) or "paper" (all weights, Sec. 3.2 of arXiv 2511.08923).
        mask_token_id: vocabulary id of the mask token, or None where the drafter carries a learned embedding.
        provenance: free-form record of data, command and versions.

    Raises:
        TidarError: if a field cannot be meant.
    """

    block_size: int = 8
    objective: Objective = "lossless"
    mask_token_id: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 2 <= self.block_size <= MAX_DRAFT:
            raise TidarError(f"block size is {self.block_size}, but must be between 2 and {MAX_DRAFT}")
        if self.objective not in ("lossless", "paper"):
            raise TidarError(f"objective is {self.objective!r}, but must be 'lossless' or 'paper'")
        if self.objective == "paper" and self.mask_token_id is None:
            raise TidarError(
                "objective 'paper' trains a vocabulary entry as the mask token, so mask_token_id is needed"
            )

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> TidarConfig:
        """Read a stored entry; keys of newer versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in entry.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
