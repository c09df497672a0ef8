"""`tidar train`: a causal LM and data in, a TiDAR checkpoint out."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from tidar import __version__
from tidar.api import TidarModel
from tidar.config import Objective, TidarConfig
from tidar.errors import TidarError
from tidar.model import hub
from tidar.model.compat import probe
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.prompts import read_prompts
from tidar.train.conversion import Conversion, LossWeights
from tidar.train.data import Packed, Sample, collate, pack, read_samples
from tidar.train.samples import load_samples, save_samples
from tidar.train.selfgen import Generation, self_generate, self_generate_parallel


@dataclass
class TrainConfig:
    """Everything a conversion depends on; each field is a flag of `tidar train`.

    Lengths are in tokens; learning_rate None means 2e-3 (lossless) or 1e-5 (paper).
    """

    model: str
    output: Path
    data: list[Path] = field(default_factory=list)
    objective: Objective = "lossless"
    block_size: int = 8
    rank: int = 32
    alpha: float = 64.0
    target_modules: list[str] | None = None
    sampler_width: int = 512
    ar_weight: float = 1.0
    diffusion_weight: float = 1.0
    marginal_weight: float = 0.3
    teacher_temperature: float = 1.0
    self_generate: bool = True
    answers: Path | None = None
    answers_per_prompt: int = 1
    answer_tokens: int = 256
    generation_batch: int = 8
    generation_workers: int = 1
    generation_minutes: float | None = None
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    sequence_length: int = 512
    anchors: int = 0
    learning_rate: float | None = None
    warmup: int = 50
    log_every: int = 20
    seed: int = 0
    device: str | None = None
    compiled: bool | None = None
    recompute_logits: bool = True


def convert(config: TrainConfig) -> TidarModel:
    """Train a conversion and write it to `config.output`; Ctrl-C stops training early and still writes.

    Raises:
        TidarError: for bad data, an impossible model or options that cannot be meant.
    """
    _check(config)
    transformers.set_seed(config.seed)
    model = prepare_model(config)
    packed, facts = prepare_data(config, model)
    cuda = model.network.device.type == "cuda"
    # A fresh drafter differs from the base by nothing, so it can be checked after installing and before training.
    install_conversion(config, model)
    module = Conversion(
        model.network,
        LossWeights(config.ar_weight, config.diffusion_weight, config.marginal_weight, config.teacher_temperature),
        compiled=cuda if config.compiled is None else config.compiled,
        recompute=config.recompute_logits,
    )
    blocks = config.anchors or max(1, config.sequence_length // config.block_size)
    trainer = ConversionTrainer(
        model=module,
        args=_arguments(config, cuda),
        train_dataset=packed,
        data_collator=partial(collate, blocks=blocks),
        callbacks=[_StopOnInterrupt()],
    )
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    assert model.network.config is not None
    record = provenance(config, trainer, facts, seconds)
    model.network.config = TidarConfig(**{**model.network.config.to_dict(), "provenance": record["summary"]})
    model.network.eval()
    module.uncompile()
    if trainer.is_world_process_zero():
        model.save_pretrained(config.output)
        (config.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return model


def _check(config: TrainConfig) -> None:
    positive = (
        "steps",
        "batch_size",
        "accumulate",
        "sequence_length",
        "generation_batch",
        "answers_per_prompt",
        "answer_tokens",
    )
    for name in positive:
        if getattr(config, name) < 1:
            raise TidarError(f"{name.replace('_', '-')} is {getattr(config, name)}, but must be at least 1")
    if not config.data and not (config.answers and config.answers.exists()):
        raise TidarError("no training data: name at least one JSONL file with --data")
    if config.sequence_length < 2 * config.block_size:
        raise TidarError(f"sequence-length {config.sequence_length} is too short for blocks of {config.block_size}")
    if config.output.is_file():
        raise TidarError(f"{config.output} is a file; --output names a folder")


def prepare_model(config: TrainConfig) -> TidarModel:
    """The plain base model, in the precision that the objective trains it in."""
    cuda = hub.resolve_device(config.device).type == "cuda"
    # Frozen base weights can be bf16; weights that train need float32 masters (autocast does the rest).
    dtype = "bfloat16" if cuda and config.objective == "lossless" else "float32"
    model = TidarModel.from_pretrained(config.model, drafter="none", device=config.device, dtype=dtype)
    if model.tokenizer is None:
        raise TidarError(f"{config.model} has no tokenizer, so training data cannot be encoded")
    return model


def install_conversion(config: TrainConfig, model: TidarModel) -> None:
    """Give the network what its objective trains: a gated drafter, or a mask token and free weights."""
    network = model.network
    if config.objective == "lossless":
        spec = DrafterSpec(config.rank, config.alpha, config.target_modules, config.sampler_width)
        network.drafter = Drafter(network.lm, spec)
        network.config = TidarConfig(block_size=config.block_size)
    else:
        network.config = TidarConfig(config.block_size, "paper", free_mask_token(model))
        network.lm.requires_grad_(True)
    probe(config.model, network)


def free_mask_token(model: TidarModel) -> int:
    """A vocabulary id that text never uses: the tokenizer's own mask, a row beyond its tokens, or a reserved special.

    Raises:
        TidarError: if there is none (the lossless objective learns an embedding instead).
    """
    tokenizer, vocabulary = model.tokenizer, model.hf_model.get_input_embeddings().weight.shape[0]
    assert tokenizer is not None
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < vocabulary:
        return len(tokenizer)
    specials = set(tokenizer.all_special_ids)
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if i not in specials}
    for word in ("mask", "reserved", "unused", "extra_id", "reponame", "filename"):
        for token_id, text in sorted(added.items()):
            if word in text.lower():
                return int(token_id)
    raise TidarError("this model has no free token to serve as the mask: use --objective lossless, which learns one")


def prepare_data(config: TrainConfig, model: TidarModel) -> tuple[Packed, dict[str, Any]]:
    """Read, generate or reload the samples, and pack them. Returns the rows and facts about the data."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if config.answers is not None and config.answers.exists():
        samples = load_samples(config.answers)
    elif config.self_generate:
        samples = _self_generate(config, model)
    else:
        samples = [sample for path in config.data for sample in read_samples(path, tokenizer)]
    packed = pack(samples, config.sequence_length)
    facts = {
        "files": [path.name for path in config.data],
        "samples": len(samples),
        "tokens": sum(len(s.ids) for s in samples),
        "answer_tokens": sum(len(s.ids) - s.answer for s in samples),
        "rows": len(packed),
        "self_generated": config.self_generate,
    }
    print(f"data: {facts['samples']:,} samples, {facts['tokens']:,} tokens in {len(packed):,} rows", file=sys.stderr)
    return packed, facts


def _self_generate(config: TrainConfig, model: TidarModel) -> list[Sample]:
    """Let the base model answer the prompts; the answers are kept in a file, which other ranks (and reruns) read."""
    path = config.answers or config.output / "answers.safetensors"
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            prompts = [placed.prompt for file in config.data for placed in read_prompts(file)]
            how = Generation(
                answers=config.answers_per_prompt,
                max_new_tokens=config.answer_tokens,
                max_prompt_tokens=max(1, config.sequence_length - config.block_size),
                batch_size=config.generation_batch,
                seed=config.seed,
                seconds=None if config.generation_minutes is None else 60 * config.generation_minutes,
            )
            if config.generation_workers > 1:
                dtype = str(model.hf_model.dtype).removeprefix("torch.")
                workers = config.generation_workers
                samples = self_generate_parallel(config.model, config.device, dtype, prompts, how, workers)
            else:
                assert model.tokenizer is not None
                samples = self_generate(model.network, model.tokenizer, prompts, how)
            save_samples(path, samples)
        return load_samples(path)


def _arguments(config: TrainConfig, cuda: bool) -> TrainingArguments:
    rate = config.learning_rate or (2e-3 if config.objective == "lossless" else 1e-5)
    return TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(config.warmup, max(1, config.steps // 10)),
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=cuda and config.objective == "paper",
        use_cpu=config.device == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=False,
        seed=config.seed,
    )


class ConversionTrainer(Trainer):
    """transformers' Trainer, with two counts a batch instead of one and match rates in the log."""

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Global counts [2] of the AR and the diffusion term over ranks and accumulation steps."""
        module: Conversion = self.accelerator.unwrap_model(self.model)
        counts = torch.stack([module.counts(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts, reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        module: Conversion = self.accelerator.unwrap_model(self.model)
        if "loss" in logs:
            logs = {**logs, **module.pop_metrics()}
        super().log(logs, start_time)


class _StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the running step, so that what was learned is saved; the second kills."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Callable[..., Any] | int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def stop(signum: int, frame: object) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nstopping after this step; the drafter will be saved", file=sys.stderr)

        try:
            self.before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
            self.before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def provenance(config: TrainConfig, trainer: Trainer, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What made this checkpoint: options, data, versions, device, curve."""
    device = trainer.args.device
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    options["data"] = facts["files"]
    summary = {
        "base": config.model,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "data": facts,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            "tidar": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    return {"summary": summary, "options": options, "curve": trainer.state.log_history}
