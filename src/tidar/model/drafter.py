"""The drafter of a lossless conversion: gated LoRA, a learned mask embedding and a sampler head, in one small folder.

The folder has PEFT's file names and PEFT's tensor names for the LoRA (so other tools can read it), and three additions:
`mask_embedding`, `sampler_head.*` and a `tidar` entry in `adapter_config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tidar.config import TidarConfig
from tidar.errors import TidarError, first_line
from tidar.model.gated_lora import Gate, install, lora_targets
from tidar.model.sampler_head import SamplerHead

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class DrafterSpec(NamedTuple):
    """Shape of a drafter: LoRA rank and alpha (scaling is alpha / rank), target layer names (None: every linear layer
    of the backbone), and the width of the sampler head (0: none)."""

    rank: int = 32
    alpha: float = 64.0
    target_modules: list[str] | None = None
    sampler_width: int = 512


class Drafter(nn.Module):
    """Everything a lossless conversion adds to a causal LM. Creating it installs the gated layers in `model`, in place.

    Parameters are float32 and the only ones that train. Raises TidarError if a target layer does not exist.
    """

    def __init__(self, model: PreTrainedModel, spec: DrafterSpec) -> None:
        super().__init__()
        if spec.rank < 1 or spec.sampler_width < 0:
            raise TidarError(
                f"a drafter needs rank >= 1 and sampler width >= 0, not {spec.rank} and {spec.sampler_width}"
            )
        self.spec = spec
        self.gate = Gate()
        embedding: Tensor = model.get_input_embeddings().weight
        backbone_name = model.base_model_prefix
        targets = [
            f"{backbone_name}.{path}" for path in lora_targets(model.get_submodule(backbone_name), spec.target_modules)
        ]
        layers = install(model, targets, spec.rank, spec.alpha / spec.rank, self.gate)
        # Dots separate submodules, so a path becomes a key without them.
        self.lora = nn.ModuleDict(
            {
                path.replace(".", "/"): nn.ModuleDict({"lora_A": g.lora_A, "lora_B": g.lora_B})
                for path, g in layers.items()
            }
        )
        self.mask_embedding = nn.Parameter(embedding.detach().float().mean(0))
        hidden, device = embedding.shape[1], embedding.device
        self.sampler_head = SamplerHead(hidden, spec.sampler_width).to(device) if spec.sampler_width else None

    def tensors(self) -> dict[str, Tensor]:
        """Parameters under their stored names."""
        named: dict[str, Tensor] = {}
        for name, tensor in self.named_parameters():
            if name.startswith("lora."):
                name = PEFT_PREFIX + name.removeprefix("lora.").replace("/", ".")
            named[name] = tensor
        return named

    def save(self, folder: Path, base: str, config: TidarConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the adapter folder; `base` names the model it belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.tensors().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        entry: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.spec.rank,
            "lora_alpha": self.spec.alpha,
            "target_modules": self.spec.target_modules or "all-linear",
            "bias": "none",
            "tidar": {**config.to_dict(), "sampler_width": self.spec.sampler_width},
        }
        (folder / CONFIG_FILE).write_text(json.dumps(entry, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the weights of `folder` into this drafter. Raises TidarError for a bad file, other names or shapes."""
        try:
            stored, own = load_file(folder / WEIGHTS_FILE), self.tensors()
        except (OSError, SafetensorError) as error:
            raise TidarError(f"{folder / WEIGHTS_FILE} is missing or damaged: {first_line(error)}") from error
        if stored.keys() != own.keys():
            odd = sorted(stored.keys() ^ own.keys())
            raise TidarError(
                f"{folder / WEIGHTS_FILE} does not fit this model: {len(odd)} tensors differ, first {odd[0]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != stored[name].shape:
                    raise TidarError(
                        f"{folder / WEIGHTS_FILE} does not fit this model: {name} is {list(stored[name].shape)}, "
                        f"the model needs {list(parameter.shape)}"
                    )
                parameter.copy_(stored[name])


class StoredDrafter(NamedTuple):
    """What `adapter_config.json` of a drafter folder says."""

    folder: Path
    base: str
    spec: DrafterSpec
    config: TidarConfig


def read_drafter_config(folder: Path) -> StoredDrafter | None:
    """The drafter stored in `folder`, or None if there is no adapter. Raises TidarError if it is not one of ours."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text())
        tidar = entry["tidar"]
        targets = entry["target_modules"]
        spec = DrafterSpec(
            rank=entry["r"],
            alpha=entry["lora_alpha"],
            target_modules=None if targets == "all-linear" else list(targets),
            sampler_width=tidar["sampler_width"],
        )
        return StoredDrafter(folder, entry["base_model_name_or_path"], spec, TidarConfig.from_dict(tidar))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise TidarError(f"{path} is not a tidar drafter ({error!r}); `tidar train` writes one") from error
