"""vLLM engines in this process, and what tests look at inside of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from models import CONTEXT
from vllm import LLM, SamplingParams

from tidar.kernels.draft import Drafted
from tidar.vllm import Options, engine_options
from tidar.vllm.replay import Recorded, Replay

GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


@contextmanager
def engine(folder: str, options: Options | None = None, **more: Any) -> Iterator[LLM]:
    """`LLM` with the flags that `tidar serve` gives."""
    from vllm.distributed import cleanup_dist_env_and_memory

    given = engine_options(folder, options or Options(cuda=False, max_num_seqs=8))
    sizes = {"max_model_len": CONTEXT, "max_num_batched_tokens": 512, "max_num_seqs": 8}
    flags = {"dtype": "float32", "enforce_eager": True, "seed": 0, "skip_tokenizer_init": True, "block_size": 32}
    llm = LLM(folder, **{**flags, **sizes, **given, **more})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: LLM, prompts: list[list[int]], new: int = 40, **params: Any) -> list[list[int]]:
    """New tokens of each prompt; greedy unless told otherwise."""
    asked = SamplingParams(max_tokens=new, **{**GREEDY, **params})
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def free_blocks(llm: LLM) -> int:
    return core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def runner(llm: LLM) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


class Rerun(Replay):
    """Stands for CUDA graphs: what was recorded runs again on the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.enabled, self.seen, self.recorded = True, set(), {}
        self.replays = 0

    def _record(self, function: Any, inputs: tuple[torch.Tensor, ...], addresses: tuple[int, ...]) -> Recorded:
        places, results = [tensor.clone() for tensor in inputs], list[torch.Tensor]()

        def again() -> None:
            self.replays += 1
            fresh = function(*places)
            if results:
                for old, new in zip(results, fresh, strict=True):
                    old.copy_(new)
            else:
                results.extend(tensor.clone() for tensor in fresh)

        return Recorded(SimpleNamespace(replay=again), places, results, addresses)


class Oracle:
    """Drafts what follows in known texts, with every seventh token wrong, so that most drafts stand and some do not."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.steps = list[Any]()

    @contextmanager
    def instead(self, llm: LLM) -> Iterator[None]:
        """Draft like this for a while."""
        state = runner(llm).model_state
        prepare = state.prepare_inputs

        def prepare_inputs(*args: Any) -> Any:
            if state.step is not None:
                self.steps.append(state.step)
            return prepare(*args)

        state.prepare_inputs, state.head.drafts = prepare_inputs, self.drafts
        try:
            yield
        finally:
            del state.prepare_inputs, state.head.drafts

    def drafts(self, block: torch.Tensor, logits: torch.Tensor, first: torch.Tensor) -> Drafted:
        step, length = self.steps[-1], block.shape[1]
        rows = [
            self._row(int(start), judged.tolist(), token, length)
            for start, judged, token in zip(step.prefix, step.tokens, first.tolist(), strict=True)
        ]
        confidence = torch.full((len(rows), length - 1), 0.8)
        return Drafted(torch.tensor(rows), confidence, torch.zeros(len(rows), length - 1, 3, dtype=torch.long))

    def _row(self, start: int, judged: list[int], token: int, length: int) -> list[int]:
        for text in self.texts:
            for ahead in range(1, len(judged) + 1):
                at = start + ahead
                if text[start:at] == judged[:ahead] and text[at : at + 1] == [token]:
                    known = [
                        0 if place % 7 == 0 else text[place] for place in range(at + 1, min(at + length, len(text)))
                    ]
                    return [token, *known, *[0] * (length - 1 - len(known))]
        return [token] + [0] * (length - 1)
