"""Everything a conversion depends on: each field of `TrainConfig` is a flag of `tidar train`, spelt here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

from tidar.config import MAX_DRAFT, BlockAttention, Objective, TidarConfig, require_choice
from tidar.errors import TidarError
from tidar.sources import HUB, hub_source, local_files

DRAFTING = ("lossless", "paper")
COUNTS = (
    *("steps", "batch_size", "accumulate", "sequence_length", "log_every", "rank"),
    *("answers_per_prompt", "answer_tokens", "keep_checkpoints", "measure_count", "measure_tokens"),
)
REPORTERS = ("none", "tensorboard", "trackio")

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
MASKED = ("lossless", "paper", "block-diffusion")
ONLY_FOR = {
    **dict.fromkeys(("rank", "alpha", "target_modules", "sampler_width"), ("lossless",)),
    **dict.fromkeys(("marginal_weight", "with_base"), ("lossless",)),
    **dict.fromkeys(("ar_weight", "diffusion_weight"), ("paper",)),
    **dict.fromkeys(("loss", "position_weights", "masking", "anchor_mode", "block_size", "anchors"), MASKED),
    **dict.fromkeys(("block_attention", "decay_gamma", "teacher_temperature"), MASKED),
}
"""Objectives for which a field means something; it must keep its default for the others."""


@dataclass
class TrainConfig:
    """Options of a conversion, each with its help text (and its flags, if not just its name); lengths are in tokens.

    A config file spells the same names, see recipe.py.
    """

    model: Annotated[str, "Base model: 'smollm2-135m', a folder or a Hugging Face id."]
    output: Annotated[Path, "Folder for the result."]
    data: Annotated[
        list[Path], "File (JSONL, JSON, Parquet, text), folder, glob or hf:NAME[:CONFIG][:SPLIT] (repeatable)."
    ] = field(default_factory=list)
    skip_bad_rows: Annotated[bool, "Count and report unreadable rows instead of stopping at the first."] = False
    row_limit: Annotated[int | None, "Most rows to take of each source."] = None
    stream: Annotated[bool, "Take rows of hf: data sets as they arrive instead of downloading them first."] = False
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
    teacher_temperature: Annotated[float, "Below 1 sharpens the soft targets."] = 1.0
    self_generate: Annotated[bool, "Let the base model answer the prompts in the data."] = True
    answers: Annotated[Path | None, "File for the encoded samples; read instead, if it exists."] = None
    answers_per_prompt: Annotated[int, "Answers generated for each prompt."] = 1
    answer_tokens: Annotated[int, "Longest generated answer."] = 256
    temperatures: Annotated[
        list[float] | None,
        "Temperature of generated answers; prompts go round them (repeatable) [default: 0, 0.5, 0.8, 1].",
        "--temperature",
    ] = None
    generation_batch: Annotated[int, "Answers generated together; 0 for as many as memory allows."] = 0
    generation_minutes: Annotated[float | None, "Stop generating after about this long."] = None
    steps: Annotated[int, "Optimizer steps."] = 1000
    batch_size: Annotated[int, "Rows a step and device."] = 8
    accumulate: Annotated[int, "Batches a step."] = 1
    sequence_length: Annotated[int, "Tokens in a packed row."] = 512
    anchors: Annotated[int, "Mask blocks a row; 0 for sequence length / block size."] = 0
    learning_rate: Annotated[float | None, "Peak rate [default: 2e-3 lossless, 1e-5 paper]."] = None
    min_learning_rate: Annotated[float, "Where the cosine ends."] = 0.0
    warmup: Annotated[int, "Warm-up steps, at most a tenth of all."] = 50
    warmup_ratio: Annotated[float | None, "Warm-up as a share of the steps, instead of --warmup."] = None
    gradient_checkpointing: Annotated[bool, "Save memory by running each layer twice."] = False
    fsdp: Annotated[bool, "Shard weights, gradients and optimizer over the processes (FSDP2)."] = False
    resume: Annotated[str | None, "Continue a run: 'auto' (its last checkpoint, if any) or a checkpoint folder."] = None
    save_every: Annotated[int, "Steps between checkpoints; 0 for none but on Ctrl-C."] = 0
    keep_checkpoints: Annotated[int, "Checkpoints to keep, the newest."] = 2
    log_every: Annotated[int, "Steps between log lines."] = 20
    report_to: Annotated[str, "Where logs also go: 'none', 'tensorboard' or 'trackio'."] = "none"
    measure_every: Annotated[int, "Steps between decoding the measure prompts; 0 for the end only."] = 0
    measure_prompts: Annotated[Path | None, "Prompts to count tokens per forward on; a source like --data."] = None
    measure_count: Annotated[int, "Prompts of it to use, the first."] = 16
    measure_tokens: Annotated[int, "New tokens for each."] = 128
    measure_draft_lengths: Annotated[
        list[int], "Draft lengths to measure (repeatable) [default: the block size].", "--measure-draft-length"
    ] = field(default_factory=list)
    with_base: Annotated[bool, "Write the base model too, with the drafter inside (lossless)."] = False
    seed: Annotated[int, "Random seed."] = 0
    device: Annotated[str | None, "Torch device [default: the GPU if there is one]."] = None
    compiled: Annotated[bool | None, "torch.compile the layers [default: on a GPU]."] = None

    @property
    def peak_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.objective == "lossless" else 1e-5

    @property
    def warmup_steps(self) -> int:
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * self.steps)
        return min(self.warmup, max(1, self.steps // 10))

    @property
    def checkpoints(self) -> Path:
        """Folder of what a run can be continued from."""
        return self.output / "checkpoints"

    @property
    def curve_options(self) -> dict[str, Any]:
        """What a continued run must share with the one before, beside data and seed. Not the number of steps, which may
        be raised, nor how a batch is divided."""
        names = (
            *("objective", "block_size", "block_attention", "anchors", "learning_rate", "min_learning_rate"),
            *("ar_weight", "diffusion_weight", "marginal_weight", "teacher_temperature", "decay_gamma"),
        )
        own = {name: getattr(self, name) for name in names}
        return own | {name: self.chosen(name) for name in CHOICES if self.objective != "ar"}

    def chosen(self, name: str) -> str:
        """The value of one of CHOICES: the user's, or what the objective is known by."""
        value = getattr(self, name)
        return value or DEFAULTS.get(self.objective, DEFAULTS["paper"])[name]

    def check(self) -> None:
        """Raise TidarError for options that cannot be meant, before anything is loaded or generated."""
        self.check_options()
        self._check_data()
        self._check_measuring()
        self._check_resuming()
        if self.output.is_file():
            raise TidarError(f"{self.output} is a file; --output names a folder")

    def check_options(self) -> None:
        """The part of `check` that asks for no file."""
        require_choice("objective", self.objective, get_args(Objective))
        require_choice("block-attention", self.block_attention, get_args(BlockAttention))
        for name, choices in CHOICES.items():
            require_choice(name.replace("_", "-"), self.chosen(name), choices)
        self._refuse_idle()
        if self.objective == "block-diffusion":
            for name, only in BLOCK_DIFFUSION.items():
                value = self.chosen(name) if name in CHOICES else getattr(self, name)
                if value != only:
                    field_name = name.replace("_", "-")
                    raise TidarError(f"{field_name} is {value!r}, but objective 'block-diffusion' is {only!r}")
        TidarConfig(self.block_size)
        for name in COUNTS:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sampler_width", "warmup", "generation_batch", "save_every", "measure_every"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ar_weight", "diffusion_weight", "marginal_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number, at least 0")
        for name in ("alpha", "teacher_temperature", "decay_gamma", "generation_minutes", "learning_rate"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a finite number above 0")
        self._require("anchors", 0 <= self.anchors <= self.sequence_length, "between 0 and the sequence length")
        self._require("row_limit", self.row_limit is None or self.row_limit >= 1, "at least 1")
        for temperature in self.temperatures or ():
            if not 0 <= temperature < math.inf:
                raise TidarError(f"temperature is {temperature}, but must be finite, 0 (greedy) or more")
        self._require("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        if self.objective == "paper" and not self.ar_weight + self.diffusion_weight > 0:
            raise TidarError("ar-weight and diffusion-weight are both 0: nothing would be trained")
        self._require("min_learning_rate", 0 <= self.min_learning_rate <= self.peak_rate, "at most the learning rate")
        ratio = self.warmup_ratio
        self._require("warmup_ratio", ratio is None or 0 <= ratio < 1, "at least 0 and below 1")
        self._require("report_to", self.report_to in REPORTERS, f"one of {', '.join(REPORTERS)}")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise TidarError(f"report-to is {self.report_to!r}, which is not installed: pip install {self.report_to}")
        if self.sequence_length < 2 * self.block_size:
            raise TidarError(f"sequence-length {self.sequence_length} is too short for blocks of {self.block_size}")

    def _refuse_idle(self) -> None:
        """No option may be given that would do nothing."""
        for name, objectives in ONLY_FOR.items():
            if self.objective not in objectives:
                self._require_default(name, f"objective {self.objective!r} makes no use of it")
        if self.chosen("position_weights") != "decay":
            self._require_default("decay_gamma", "it belongs to position-weights 'decay'")
        if self.objective != "lossless" and self.chosen("loss") == "hard":
            self._require_default("teacher_temperature", "hard targets have none")
        if not self.sampler_width:
            self._require_default("marginal_weight", "without a sampler head there is only that loss")

    def _require_default(self, name: str, why: str) -> None:
        default = next(field.default for field in fields(self) if field.name == name)
        if getattr(self, name) != default:
            raise TidarError(f"{name.replace('_', '-')} is {getattr(self, name)!r}, but {why}: leave it out")

    def _check_data(self) -> None:
        if self.answers is not None and self.answers.exists():
            return  # the data is not read
        if not self.data:
            raise TidarError("no training data: name at least one file or hf: data set with --data")
        for path in self.data:
            _require_source("data", path)

    def _check_measuring(self) -> None:
        if self.measure_prompts is None:
            self._require("measure_every", not self.measure_every, "0 without measure-prompts")
        else:
            _require_source("measure-prompts", self.measure_prompts)
            if self.objective not in DRAFTING:
                raise TidarError(f"measure-prompts is given, but objective {self.objective!r} trains no drafts")
        wrong = [k for k in self.measure_draft_lengths if not 2 <= k <= MAX_DRAFT]
        self._require("measure_draft_lengths", not wrong, f"between 2 and {MAX_DRAFT} each")

    def _check_resuming(self) -> None:
        if self.resume in (None, "auto"):
            if self.resume is None and any(self.checkpoints.glob("checkpoint-*")):
                raise TidarError(f"{self.checkpoints} holds checkpoints of an earlier run: --resume auto, or delete it")
        elif not (Path(self.resume or "") / "trainer_state.json").is_file():
            raise TidarError(f"resume is {self.resume}, which is no checkpoint of `tidar train`")

    def _require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise TidarError(f"{name.replace('_', '-')} is {getattr(self, name)}, but must be {wanted}")


def _require_source(name: str, source: Path) -> None:
    """What can be said about a source before it is read; data sets of the hub are only asked for then."""
    try:
        if str(source).startswith(HUB):
            hub_source(str(source))
            return
        missing = [file for file in local_files(source) if not file.exists()]
    except TidarError as error:
        raise TidarError(f"{name} is {source}, but {error}") from error
    if missing:
        raise TidarError(f"{name} is {source}, which does not exist")
