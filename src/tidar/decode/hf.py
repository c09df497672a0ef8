"""The Hugging Face way in: a callable for `hf_model.generate(**inputs, custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import EosTokenCriteria, LogitsProcessorList, StoppingCriteriaList

from tidar.decode.engine import Engine, Limits, Planner
from tidar.decode.step import Plan
from tidar.errors import TidarError
from tidar.model.network import Network
from tidar.sampling import SamplingParams

_HONOURED = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}
_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}


def make_custom_generate(network: Network, plan: Callable[[SamplingParams], Plan | Planner]) -> Callable[..., Tensor]:
    """A decoding method with the signature that `generate` calls; left-padded batches in, right-padded output."""

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        if model is not network.lm:
            raise TidarError(
                "this custom_generate belongs to another model: take it from the TidarModel that wraps this one"
            )
        _refuse_unknown(logits_processor, stopping_criteria, generation_config)
        params = _params(generation_config)
        mask = model_kwargs.get("attention_mask")
        rows = [
            ids[m.bool()].tolist()
            for ids, m in zip(input_ids, torch.ones_like(input_ids) if mask is None else mask, strict=True)
        ]
        eos = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        ends = frozenset(token for ids in eos for token in ids)
        limits = Limits(generation_config.max_length - input_ids.shape[1], ends)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        answers = {}
        for updates in Engine(network, plan(params)).run(rows, limits):
            for update in updates:
                answers[update.answer.row] = update.answer.token_ids
                if streamer is not None:
                    for token in update.token_ids:
                        streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        width = max(map(len, answers.values()))
        pad = generation_config.pad_token_id
        if pad is None:
            pad = min(ends, default=0)
        new = [answers[i] + [pad] * (width - len(answers[i])) for i in range(len(rows))]
        return torch.cat((input_ids, torch.tensor(new, device=input_ids.device)), 1)

    return generate


def _params(config: GenerationConfig) -> SamplingParams:
    if not config.do_sample:
        return SamplingParams()
    # transformers' global generator decides, so that `set_seed` works as it does for any other decoding method.
    seed = int(torch.randint(2**62, ()).item())
    return SamplingParams(
        temperature=config.temperature if config.temperature is not None else 1.0,
        top_k=config.top_k or None,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=seed,
    )


def _refuse_unknown(processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig) -> None:
    """What we cannot honour is an error, not something to ignore."""
    unknown = [type(p).__name__ for p in processors if type(p).__name__ not in _HONOURED]
    unknown += [type(c).__name__ for c in criteria if type(c).__name__ not in _CRITERIA]
    if (config.num_return_sequences or 1) > 1:
        unknown.append("num_return_sequences > 1")
    if (config.num_beams or 1) > 1:
        unknown.append("beam search")
    if config.return_dict_in_generate:
        unknown.append("return_dict_in_generate")
    if unknown:
        raise TidarError(f"tidar's custom_generate cannot honour {', '.join(unknown)}; leave it out")
