"""Everything a conversion depends on: each field of `TrainConfig` is a flag of `tidar train`, spelt here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

from tidar.config import BlockAttention, Objective, TidarConfig, require_choice
from tidar.errors import TidarError

COUNTS = (
    *("steps", "batch_size", "accumulate", "sequence_length", "log_every", "rank"),
    *("answers_per_prompt", "answer_tokens", "generation_batch", "generation_workers"),
)

CHOICES = {
    "loss": ("soft", "hard", "lk"),
    "position_weights": ("acceptance", "accept-until-fail", "decay", "uniform"),
    "masking": ("full", "random"),
    "anchor_mode": ("random", "tiled"),
}
PAPER = {"loss": "hard", "position_weights": "uniform", "masking": "full", "anchor_mode": "tiled"}
BLOCK_DIFFUSION = {**PAPER, "masking": "random", "block_attention": "bidirectional"}
DEFAULTS = {
    "lossless": {"loss": "soft", "position_weights": "acceptance", "masking": "full", "anchor_mode": "random"},
    "paper": PAPER,
    "block-diffusion": BLOCK_DIFFUSION,
}


@dataclass
class TrainConfig:
    """Options of a conversion, each with its help text (and its flags, if not just its name); lengths are in tokens."""

    model: Annotated[str, "Base model: 'smollm2-135m', a folder or a Hugging Face id."]
    output: Annotated[Path, "Folder for the result."]
    data: Annotated[list[Path], "JSONL file of prompts or conversations (repeatable)."] = field(default_factory=list)
    objective: Annotated[
        str,
        "'lossless' (gated drafter, base frozen), 'paper' (all weights); for comparison, without drafts: 'ar' (plain "
        "fine-tuning), 'block-diffusion' (no AR term).",
    ] = "lossless"
    loss: Annotated[
        str | None,
        "Loss of the masks: 'soft' (cross-entropy to the AR model), 'hard' (to the data) or 'lk' (acceptance itself) "
        "[default: soft lossless, else hard].",
    ] = None
    position_weights: Annotated[
        str | None,
        "What a block's positions count: 'acceptance' (as reached), 'accept-until-fail', 'decay' or 'uniform' "
        "[default: acceptance lossless, else uniform].",
    ] = None
    decay_gamma: Annotated[float, "Positions over which 'decay' falls to a third."] = 4.0
    masking: Annotated[
        str | None, "'full' (all masks) or 'random' (some tokens shown) [default: full; random for block-diffusion]."
    ] = None
    block_attention: Annotated[str, "'bidirectional' inside a block, or 'causal': a mask sees the earlier ones."] = (
        "bidirectional"
    )
    anchor_mode: Annotated[
        str | None, "Where blocks start: 'random', before answers, or 'tiled' [default: random lossless, else tiled]."
    ] = None
    block_size: Annotated[int, "K, tokens in a mask block."] = 8
    rank: Annotated[int, "LoRA rank of the drafter."] = 32
    alpha: Annotated[float, "LoRA alpha; scaling is alpha / rank."] = 64.0
    target_modules: Annotated[
        list[str] | None, "Linear layers to adapt, by name (repeatable) [default: all].", "--target"
    ] = None
    sampler_width: Annotated[int, "Width of the sampler head; 0 for none."] = 512
    ar_weight: Annotated[float, "Weight of the AR term (paper)."] = 1.0
    diffusion_weight: Annotated[float, "Weight of the diffusion term (paper)."] = 1.0
    marginal_weight: Annotated[float, "Weight of the masks' own loss beside the sampler head's."] = 0.3
    teacher_temperature: Annotated[float, "Below 1 sharpens the soft targets (lossless)."] = 1.0
    self_generate: Annotated[bool, "Let the base model answer the prompts in the data."] = True
    answers: Annotated[Path | None, "File for the generated answers; read instead, if it exists."] = None
    answers_per_prompt: Annotated[int, "Answers generated for each prompt."] = 1
    answer_tokens: Annotated[int, "Longest generated answer."] = 256
    generation_batch: Annotated[int, "Answers generated together, in each worker."] = 8
    generation_workers: Annotated[int, "Processes that generate on the same device."] = 1
    generation_minutes: Annotated[float | None, "Stop generating after about this long."] = None
    steps: Annotated[int, "Optimizer steps."] = 1000
    batch_size: Annotated[int, "Rows a step and device."] = 8
    accumulate: Annotated[int, "Batches a step."] = 1
    sequence_length: Annotated[int, "Tokens in a packed row."] = 512
    anchors: Annotated[int, "Mask blocks a row; 0 for sequence length / block size."] = 0
    learning_rate: Annotated[float | None, "Peak rate [default: 2e-3 lossless, 1e-5 paper]."] = None
    warmup: Annotated[int, "Warm-up steps."] = 50
    log_every: Annotated[int, "Steps between log lines."] = 20
    seed: Annotated[int, "Random seed."] = 0
    device: Annotated[str | None, "Torch device [default: the GPU if there is one]."] = None
    compiled: Annotated[bool | None, "torch.compile the layers [default: on a GPU]."] = None
    gradient_checkpointing: Annotated[bool, "Save memory by running the layers twice."] = False

    @property
    def peak_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.objective == "lossless" else 1e-5

    def chosen(self, name: str) -> str:
        """The value of one of CHOICES: the user's, or what the objective is known by."""
        value = getattr(self, name)
        return value or DEFAULTS.get(self.objective, DEFAULTS["paper"])[name]

    def check(self) -> None:
        """Raise TidarError for options that cannot be meant, before anything is loaded or generated."""
        require_choice("objective", self.objective, get_args(Objective))
        require_choice("block-attention", self.block_attention, get_args(BlockAttention))
        for name, choices in CHOICES.items():
            require_choice(name.replace("_", "-"), self.chosen(name), choices)
        if self.objective == "block-diffusion":
            for name, only in BLOCK_DIFFUSION.items():
                value = self.chosen(name) if name in CHOICES else getattr(self, name)
                if value != only:
                    field_name = name.replace("_", "-")
                    raise TidarError(f"{field_name} is {value!r}, but objective 'block-diffusion' is {only!r}")
        TidarConfig(self.block_size)
        for name in COUNTS:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sampler_width", "warmup"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ar_weight", "diffusion_weight", "marginal_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number, at least 0")
        for name in ("alpha", "teacher_temperature", "decay_gamma", "generation_minutes", "learning_rate"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a finite number above 0")
        self._require("anchors", 0 <= self.anchors <= self.sequence_length, "between 0 and the sequence length")
        self._require("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        if self.objective == "paper" and not self.ar_weight + self.diffusion_weight > 0:
            raise TidarError("ar-weight and diffusion-weight are both 0: nothing would be trained")
        if not self.data and not (self.answers and self.answers.exists()):
            raise TidarError("no training data: name at least one JSONL file with --data")
        if self.sequence_length < 2 * self.block_size:
            raise TidarError(f"sequence-length {self.sequence_length} is too short for blocks of {self.block_size}")
        if self.output.is_file():
            raise TidarError(f"{self.output} is a file; --output names a folder")

    def _require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise TidarError(f"{name.replace('_', '-')} is {getattr(self, name)}, but must be {wanted}")
