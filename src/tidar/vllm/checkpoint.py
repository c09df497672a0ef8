"""What a checkpoint folder says about how it can be served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.config import TidarConfig
from tidar.errors import TidarError
from tidar.model.drafter import StoredDrafter, read_drafter_config

NATIVE = {name: f"Tidar{name}" for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")}
"""Architectures that run in vLLM's own model classes; all others run through its Transformers backend."""
GENERAL = "TidarForCausalLM"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A plain Hugging Face folder with a `drafter/`, or one whose config.json has a `tidar` entry."""

    folder: Path
    entry: dict[str, Any]
    tidar: TidarConfig
    drafter: StoredDrafter | None

    @staticmethod
    def read(folder: str | Path) -> Checkpoint:
        """Raises TidarError for a folder that cannot draft."""
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise TidarError(f"{folder} holds no config.json: give a folder that save_pretrained(with_base=True) wrote")
        try:
            entry = json.loads((path / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise TidarError(f"{path / 'config.json'} is damaged: {error}") from error
        drafter = read_drafter_config(path / "drafter")
        stored = TidarConfig.from_dict(entry["tidar"]) if entry.get("tidar") else None
        config = drafter.config if drafter is not None else stored
        if config is None or not config.drafts:
            raise TidarError(f"{folder} has no drafter: convert it with `tidar train`, or serve it with --mode ar")
        return Checkpoint(path, entry, config, drafter)

    @property
    def architecture(self) -> str:
        """The name under which the plug-in registers the class that serves this folder."""
        found = (self.entry.get("architectures") or [""])[0]
        return NATIVE.get(found, GENERAL)

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the base's weights, by their index if there is one; None where the folder has neither."""
        try:
            return int(json.loads((self.folder / INDEX).read_text())["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) or None

    @property
    def mask_token(self) -> int | None:
        """Vocabulary id of the mask token; None for a drafter with an embedding of its own."""
        return self.tidar.mask_token_id if self.drafter is None else None
