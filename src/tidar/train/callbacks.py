"""What happens between steps: stopping on a signal, checkpoints, measuring, the progress line."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2.0
"""Seconds within which further signals are one and the same Ctrl-C: launchers pass on what their children got too."""


class StopOnSignal(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends training after the running step, with a checkpoint; a second one, later, kills."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.before: dict[int, Any] = {}
        self.group: dist.ProcessGroup | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # on the CPU: asking must not wait for the GPU

        def stop(signum: int, frame: object) -> None:
            now = time.monotonic()
            if self.asked_at is not None and now - self.asked_at > PATIENCE:
                self._restore()
                signal.raise_signal(signum)
            elif self.asked_at is None:
                self.asked_at = now
                if state.is_world_process_zero:
                    print("\nstopping after this step; checkpoint and result will be saved", file=sys.stderr)

        try:
            self.before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
        except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
            self.before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anyone_asked() and not control.should_training_stop:
            control.should_training_stop = control.should_save = control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def _anyone_asked(self) -> bool:
        """Whether a process was signalled: all of them stop after the same step."""
        asked = self.asked_at is not None
        if self.group is None:
            return asked
        flag = torch.tensor(int(asked))
        dist.all_reduce(flag, group=self.group)
        return bool(flag)

    def _restore(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}


class SaveEvery(TrainerCallback):
    """Checkpoints, each with a log line, so that what is averaged between log lines does not span two runs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # log as this run wants to, not as the one that it resumes did

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps and state.global_step % self.steps == 0:
            control.should_save = control.should_log = True


class MeasureEvery(TrainerCallback):
    """Calls `measure` every so many steps, and at the last."""

    def __init__(self, steps: int, measure: Callable[[], object]) -> None:
        self.steps, self.measure = steps, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self.steps and state.global_step % self.steps == 0
        if due or state.global_step == state.max_steps:
            self.measure()


class ProgressLine(TrainerCallback):
    """A bar with the time left on a terminal, and every log as one line on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "train_runtime" not in logs:
            self.console.print(describe(state.log_history[-1], state.max_steps, self.bar.tasks[0].time_remaining))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe(entry: dict[str, Any], steps: int, seconds_left: float | None) -> str:
    """One entry of the curve as a line."""
    words = [f"step {entry['step']}/{steps}"]
    for key, value in entry.items():
        if isinstance(value, list):
            words.append(f"{key} {' '.join(f'{v:.2f}' for v in value)}")
        elif isinstance(value, float) and key not in ("epoch", "grad_norm"):
            words.append(f"{key} {value:.4g}" if value < 1e5 else f"{key} {value:,.0f}")
    if seconds_left is not None:
        words.append(f"left {time.strftime('%H:%M:%S', time.gmtime(seconds_left))}")
    return " · ".join(words)


def flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry whose lists are numbered scalars, as TensorBoard and trackio want them; positions count from 1."""
    scalars: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, list):
            scalars.update({f"{key}/{place}": item for place, item in enumerate(value, 1)})
        else:
            scalars[key] = value
    return scalars
