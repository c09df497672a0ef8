"""`tidar train`: a causal LM and data in, a TiDAR checkpoint out."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from tidar import __version__
from tidar.api import TidarModel
from tidar.config import BlockAttention, Objective, TidarConfig
from tidar.errors import TidarError
from tidar.model import hub
from tidar.model.compat import probe
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.prompts import encode_prompt, read_prompts
from tidar.train.blocks import BlockDraw, collate_blocks
from tidar.train.config import TrainConfig
from tidar.train.conversion import Conversion, LossOptions
from tidar.train.data import Packed, Sample, pack, read_samples
from tidar.train.samples import ModelCard, load_samples, save_samples
from tidar.train.selfgen import Generation, self_generate, self_generate_parallel


def convert(config: TrainConfig) -> TidarModel:
    """Train a conversion and write it to `config.output`; Ctrl-C stops training early and still writes.

    Raises:
        TidarError: for bad data, an impossible model or options that cannot be meant.
    """
    config.check()
    transformers.set_seed(config.seed)
    model = prepare_model(config)
    # Before the data: what this model cannot do shows here, and a fresh drafter changes nothing in AR mode.
    install_conversion(config, model)
    packed, facts = prepare_data(config, model)
    device = model.network.device
    module = Conversion(
        model.network,
        loss_options(config),
        compiled=device.type == "cuda" if config.compiled is None else config.compiled,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    trainer = ConversionTrainer(
        model=module,
        args=_arguments(config, device),
        train_dataset=packed,
        data_collator=partial(collate_blocks, block_draw(config)),
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
    _refuse_non_finite(module)
    if trainer.is_world_process_zero():
        model.save_pretrained(config.output)
        (config.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return model


def loss_options(config: TrainConfig) -> LossOptions:
    return LossOptions(
        ar=config.ar_weight,
        diffusion=config.diffusion_weight,
        marginal=config.marginal_weight,
        teacher_temperature=config.teacher_temperature,
        loss=config.chosen("loss"),
        position_weights=config.chosen("position_weights"),
        decay_gamma=config.decay_gamma,
    )


def block_draw(config: TrainConfig) -> BlockDraw:
    tiled, random = config.chosen("anchor_mode") == "tiled", config.chosen("masking") == "random"
    return BlockDraw(config.block_size, config.anchors, tiled, random)


def _refuse_non_finite(module: Conversion) -> None:
    if not all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad):
        raise TidarError(
            "training diverged (some weights are not finite any more), so nothing is saved: lower --learning-rate"
        )


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
    else:
        network.lm.requires_grad_(True)
    mask = free_mask_token(model) if config.objective in ("paper", "block-diffusion") else None
    network.config = TidarConfig(
        config.block_size, cast(Objective, config.objective), mask, cast(BlockAttention, config.block_attention)
    )
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
    files = [path.name for path in config.data]
    if config.answers is not None and config.answers.exists():
        samples, source, files = load_samples(config.answers, model_card(model)), f"read from {config.answers.name}", []
    elif config.self_generate:
        samples, source = _self_generate(config, model), "self-generated"
    else:
        samples, source = [s for path in config.data for s in read_samples(path, tokenizer)], "given in the data"
    packed = pack(samples, config.sequence_length)
    facts = {
        "files": files,
        "samples": len(samples),
        "tokens": sum(len(s.ids) for s in samples),
        "answer_tokens": sum(len(s.ids) - s.answer for s in samples),
        "rows": len(packed),
        "answers": source,
    }
    print(f"data: {facts['samples']:,} samples, {facts['tokens']:,} tokens in {len(packed):,} rows", file=sys.stderr)
    return packed, facts


def _self_generate(config: TrainConfig, model: TidarModel) -> list[Sample]:
    """Let the base model answer the prompts; the answers are kept in a file, which the other ranks read.

    Reruns read it too if it was named by `--answers`; the default file in the output folder is written anew.
    """
    path = config.answers or config.output / "answers.safetensors"
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            prompts = [ids for file in config.data for ids in _encode_file(model.tokenizer, file)]
            context = model.network.max_positions or config.sequence_length
            how = Generation(
                answers=config.answers_per_prompt,
                max_new_tokens=config.answer_tokens,
                max_prompt_tokens=min(config.sequence_length - config.block_size, context - 1),
                batch_size=config.generation_batch,
                seed=config.seed,
                seconds=None if config.generation_minutes is None else 60 * config.generation_minutes,
            )
            if config.generation_workers > 1:
                dtype = str(model.hf_model.dtype).removeprefix("torch.")
                workers = config.generation_workers
                samples = self_generate_parallel(config.model, config.device, dtype, prompts, how, workers)
            else:
                samples = self_generate(model.network, prompts, how)
            save_samples(path, samples, model_card(model))
        return load_samples(path, model_card(model))


def _encode_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> Iterator[list[int]]:
    for place, prompt in read_prompts(file):
        try:
            yield encode_prompt(tokenizer, prompt)
        except TidarError as error:
            raise TidarError(f"{place}: {error}") from error


def model_card(model: TidarModel) -> ModelCard:
    """What answers must fit: the last part of the base's name (folders move), and its vocabulary."""
    return ModelCard(Path(model.base).name, model.hf_model.get_input_embeddings().weight.shape[0])


def _arguments(config: TrainConfig, device: torch.device) -> TrainingArguments:
    """The Trainer's options; without a launcher it trains on `device` and nowhere else."""
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(config.warmup, max(1, config.steps // 10)),
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=device.type == "cuda" and config.objective != "lossless",
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=False,
        seed=config.seed,
    )
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        _pin(arguments, device)
    return arguments


def _pin(arguments: TrainingArguments, device: torch.device) -> None:
    """Left alone, the Trainer takes cuda:0, and nn.DataParallel (which cannot split our loss) over all visible GPUs."""
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # accelerate moves things to "cuda", the current one
    arguments.__dict__["_setup_devices"] = device  # its cached property
    arguments._n_gpu = min(arguments.n_gpu, 1)


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
    options["data"] = [path.name for path in config.data]
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
