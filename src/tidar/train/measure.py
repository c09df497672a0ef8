"""Tokens per forward by the real decoder while a model trains; teacher-forced rates flatter a drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tidar.decode.engine import Engine, Limits
from tidar.decode.runner import Runner
from tidar.decode.step import Plan
from tidar.errors import TidarError
from tidar.model.network import Network
from tidar.prompts import encode_prompt, prompts_of
from tidar.sources import BadRows, Reading
from tidar.train.conversion import Conversion, decoder_layers
from tidar.train.shard import gathered

BATCH = 16


@dataclass(frozen=True)
class Measurement:
    """Greedy decoding of some prompts at one draft length.

    Attributes:
        draft_length: K.
        tokens, forwards: sums over prompts, the prefill counted.
        acceptance: of drafts 2..K, the share of steps in which that many stood.
    """

    draft_length: int
    tokens: int
    forwards: int
    acceptance: list[float]

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)

    def to_dict(self) -> dict[str, Any]:
        return {
            "draft_length": self.draft_length,
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "acceptance": [round(rate, 3) for rate in self.acceptance],
            "tokens": self.tokens,
            "forwards": self.forwards,
        }


def read_measure_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of a source. Raises TidarError naming the first bad row."""
    encoded = []
    for place, prompt in prompts_of([path], BadRows(), Reading(count)):
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
        except TidarError as error:
            raise TidarError(f"{place}: {error}") from error
    if not encoded:
        raise TidarError(f"measure-prompts is {path}, which has no prompts")
    return encoded


def measure(
    module: Conversion, prompts: Sequence[list[int]], draft_lengths: Sequence[int], limits: Limits
) -> list[Measurement]:
    """Decode `prompts` greedily at each draft length; processes share them out, and all call this.

    The stock modules decode: the fused ones turn weights into views of others, which an optimizer or FSDP2 would not
    survive. Weights are taken in the precision in which this process has them (float32 masters: float32). Training goes
    on as if nothing had happened.
    """
    network, device = module.network, module.network.device
    rank, world = _process()
    mine = prompts[rank::world]
    results = []
    with decoding(module):
        for length in draft_lengths:
            counts = _decode(network, mine, length, limits).to(device)
            if world > 1:
                torch.distributed.all_reduce(counts)
            tokens, forwards, steps, *stood = counts.tolist()
            results.append(Measurement(length, tokens, forwards, [n / max(1, steps) for n in stood]))
    return results


def _decode(network: Network, prompts: Sequence[list[int]], draft_length: int, limits: Limits) -> Tensor:
    """[3 + K - 1] int64: new tokens, forwards, steps after the prefill, steps in which draft m = 2..K stood."""
    answers = {}
    if prompts:
        engine = Engine(network, Plan(draft_length), runner=Runner(network))
        for updates in engine.run(prompts, limits, BATCH):
            answers.update({update.answer.row: update.answer for update in updates})
    gains = [gain for answer in answers.values() for gain in answer.acceptance_lengths]
    tokens, forwards = sum(a.new_tokens for a in answers.values()), sum(a.forwards for a in answers.values())
    stood = [sum(gain >= m for gain in gains) for m in range(2, draft_length + 1)]
    return torch.tensor([tokens, forwards, len(gains), *stood])


@contextmanager
def decoding(module: Conversion) -> Iterator[None]:
    """The module ready to decode: eager layers, evaluation mode, whole weights; training's state comes back after."""
    layers, training = decoder_layers(module.network), module.training
    compiled = [layer._compiled_call_impl for layer in layers]
    gpus = [module.network.device] if module.network.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), gathered(module):
        for layer in layers:
            layer._compiled_call_impl = None
        module.eval()  # which keeps activations, too
        try:
            yield
        finally:
            module.train(training)
            for layer, call in zip(layers, compiled, strict=True):
                layer._compiled_call_impl = call


def _process() -> tuple[int, int]:
    """Rank and number of processes."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
