"""transformers' Trainer for conversions: two counts a batch, data by place, checkpoints that fit any process count."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from tidar.train.blocks import BlockDraw, collate_blocks
from tidar.train.callbacks import MeasureEvery, ProgressLine, SaveEvery, StopOnSignal, flat
from tidar.train.checkpoint import Cursor, load_state, save_state
from tidar.train.config import TrainConfig
from tidar.train.conversion import Conversion
from tidar.train.measure import Measurement
from tidar.train.stream import Rows, Stream, collate_placed
from tidar.train.throughput import model_flops, peak_flops, peak_memory

SCHEDULER_FILE = "scheduler.pt"


class ConversionTrainer(Trainer):
    """Trains `module`; its log entries say what docs/train.md says they mean.

    Args:
        config: the options.
        module: what trains, already on its device, and already sharded if `sharded`.
        rows: the packed data.
        cursor: where in the data to start; `done` steps were trained before.
        measure: decodes the measure prompts, None for none.
    """

    def __init__(
        self,
        config: TrainConfig,
        module: Conversion,
        rows: Rows,
        cursor: Cursor,
        done: int,
        sharded: bool,
        measure: Any = None,
    ) -> None:
        arguments = arguments_of(config, module.network.device)
        self.config, self.cursor, self.done = config, cursor, done
        self.batch_rows = config.batch_size * config.accumulate * arguments.world_size
        self.stream = Stream(rows, config.seed, cursor.consumed, (config.steps - done) * self.batch_rows)
        draw = block_draw(config)
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=self.stream,
            data_collator=partial(collate_blocks, partial(collate_placed, draw)),
            callbacks=[SaveEvery(config.save_every), MeasureEvery(config.measure_every, self._measure), StopOnSignal()],
        )
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.add_callback(ProgressLine())
        self.measure, self.measured = measure, list[Measurement]()
        length = config.sequence_length
        self.flops, self.peak = model_flops(module, length, draw.count(length)), peak_flops(arguments.device)
        self._rng_from: str | None = None
        self._logged_at, self._logged_step = time.perf_counter(), done
        if sharded:  # accelerate would wrap it in DDP, unless it is only to be evaluated
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from `checkpoint` if there is one."""
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)  # generating answers was not training
        self._logged_at = time.perf_counter()
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    # -- the data ------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.stream)

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Global counts [2] of the AR and the diffusion term over ranks and accumulation steps."""
        module: Conversion = self.accelerator.unwrap_model(self.model)
        counts = torch.stack([module.counts(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts, reduction="sum")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rng_from is not None:  # now: making the data loader's iterator has drawn a number
            super()._load_rng_state(self._rng_from)
            self._rng_from = None
        return samples

    @property
    def consumed(self) -> int:
        """Rows trained on, by all processes, before this run too."""
        return self.cursor.consumed + (self.state.global_step - self.done) * self.batch_rows

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: weights are saved with the optimizer's state, and the result by `convert`."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self._logged_at += time.perf_counter() - started

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder, self.model, self.optimizer.optimizer)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
            self.cursor._replace(consumed=self.consumed).write(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights come with the optimizer's state, which is there later."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_state(Path(checkpoint), self.model, self.optimizer.optimizer)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._rng_from = checkpoint

    # -- placement -----------------------------------------------------------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: it was loaded there, and sharded weights do not move."""

    # -- the log -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add an entry to the curve and hand it to the reporters."""
        if "loss" in logs:
            logs = {**logs, **self._terms(), **self._speed()}
        entry = {**logs, "epoch": round(self.consumed / self.cursor.rows, 4), "step": self.state.global_step}
        self.state.log_history.append(entry)
        self.callback_handler.on_log(self.args, self.state, self.control, flat(logs))

    def _terms(self) -> dict[str, Any]:
        """The module's own figures, over all processes."""
        module: Conversion = self.accelerator.unwrap_model(self.model)
        module.sums = self.accelerator.reduce(module.sums.to(self.args.device), reduction="sum")
        return module.pop_metrics()

    def _speed(self) -> dict[str, float]:
        """Since the last log, over all processes: clean tokens a second, and model FLOPs against the peak."""
        now, steps = time.perf_counter(), self.state.global_step - self._logged_step
        rows = steps * self.batch_rows / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_step = now, self.state.global_step
        figures = {"tokens_per_second": round(rows * self.config.sequence_length, 1)}
        if self.peak is not None:
            figures["mfu"] = round(rows * self.flops / (self.peak * self.args.world_size), 4)
        return {**figures, "peak_memory_gib": round(peak_memory(self.args.device), 2)}

    def _measure(self) -> None:
        """Decode the measure prompts; the time it takes is not training's."""
        if self.measure is None:
            return
        started, wanted = time.perf_counter(), self.control.should_log
        self.measured = self.measure()
        self.log({k: v for m in self.measured for k, v in _decoded(m).items()})
        self.control.should_log = wanted  # an entry counts as the step's own, whose is still to come
        self._logged_at += time.perf_counter() - started


def _decoded(measured: Measurement) -> dict[str, Any]:
    name = f"k{measured.draft_length}"
    return {
        f"tokens_per_forward_{name}": round(measured.tokens_per_forward, 3),
        f"acceptance_{name}": [round(rate, 3) for rate in measured.acceptance],
    }


def block_draw(config: TrainConfig) -> BlockDraw:
    tiled, random = config.chosen("anchor_mode") == "tiled", config.chosen("masking") == "random"
    return BlockDraw(config.block_size, config.anchors, tiled, random)


def arguments_of(config: TrainConfig, device: torch.device) -> TrainingArguments:
    """The Trainer's options; without a launcher it trains on `device` and nowhere else."""
    if config.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.output / "logs"))
    ends = {"min_lr": config.min_learning_rate} if config.min_learning_rate else {}
    arguments = TrainingArguments(
        output_dir=str(config.checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.peak_rate,
        lr_scheduler_type="cosine_with_min_lr" if ends else "cosine",
        lr_scheduler_kwargs=ends,
        warmup_steps=config.warmup_steps,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=trains_in_bf16(config, device),
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",  # a callback asks for checkpoints
        save_total_limit=config.keep_checkpoints,
        ignore_data_skip=True,  # the stream itself starts where the run stopped
        ddp_find_unused_parameters=False,
        report_to=config.report_to,
        remove_unused_columns=False,
        dataloader_drop_last=False,
        seed=config.seed,
    )
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        pin(arguments, device)
    return arguments


def trains_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether float32 masters train in mixed precision; a frozen base is bfloat16 itself."""
    return device.type == "cuda" and config.objective != "lossless"


def pin(arguments: TrainingArguments, device: torch.device) -> None:
    """Left alone, the Trainer takes cuda:0, and nn.DataParallel (which cannot split our loss) over all visible GPUs."""
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # accelerate moves things to "cuda", the current one
    arguments.__dict__["_setup_devices"] = device  # its cached property
    arguments._n_gpu = min(arguments.n_gpu, 1)


def join_processes(device: str | None) -> bool:
    """Under a launcher, find the other processes and this one's GPU. Returns whether there was a launcher."""
    if "LOCAL_RANK" not in os.environ:
        return False
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # Layers are compiled one by one. DDP's own cuts through what is compiled change its kernels, and their rounding.
    torch._dynamo.config.optimize_ddp = False
    # The others wait while the first process generates answers.
    PartialState(cpu=on_cpu, timeout=timedelta(hours=2))
    return True


def launcher_shards() -> bool:
    """Whether `accelerate launch` was configured for FSDP, which is then told nothing of it: we shard ourselves."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; its trainer state is written last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
