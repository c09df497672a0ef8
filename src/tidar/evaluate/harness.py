"""A model as lm-evaluation-harness sees one: answers by our engines, likelihoods by the plain causal model.

A block-diffusion model has no likelihood in one forward; its own are bounds by Monte Carlo (see likelihood.py).
"""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, get_args

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PreTrainedModel

from tidar.api import Mode, TidarModel
from tidar.config import require_choice
from tidar.decode.block_diffusion import BlockDiffusion
from tidar.decode.engine import Answer, Engine, Limits
from tidar.errors import TidarError
from tidar.evaluate.likelihood import SAMPLES, Likelihood, check_samples, log_likelihood
from tidar.sampling import Reveal, SamplingParams

GREEDY = {"do_sample": False, "temperature": 0.0}


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; the fields are those of `TidarModel.engine` and `SamplingParams`.

    In mode "tidar" `plan` is "fixed" unless told otherwise: what "auto" drafts depends on the machine, and so do tokens
    per forward.

    Raises:
        TidarError: for a field that cannot be meant.
    """

    mode: Mode = "tidar"
    plan: Literal["auto", "fixed"] | None = None
    draft_length: int | None = None
    outcomes: int | None = None
    alternatives: int | None = None
    temperature: float = 0.0
    trust: float = 1.0
    seed: int = 0
    decoder: str | None = None

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, get_args(Mode))
        if self.plan is None and self.mode == "tidar":
            object.__setattr__(self, "plan", "fixed")
        if self.plan is not None:
            require_choice("plan", self.plan, ("auto", "fixed"))
        if self.decoder is not None:
            Reveal.parse(self.decoder)
        _ = self.params

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen. Raises TidarError for numbers that cannot be meant."""
        return SamplingParams(self.temperature, seed=self.seed, trust=self.trust)


@dataclass
class Spent:
    """What the answers of one task cost, and how many did not fit.

    Attributes:
        new_tokens, forwards: sums over answers, prefills counted.
        unended: answers that their limit cut; those often repeat themselves, which is easy to draft.
        truncated: prompts that lost their beginning, because the context has no room for them and the answer.
        acceptance_lengths: how often a forward after the prefill gained so many tokens.
    """

    new_tokens: int = 0
    forwards: int = 0
    unended: int = 0
    truncated: int = 0
    acceptance_lengths: Counter[int] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        self.new_tokens += answer.new_tokens
        self.forwards += answer.forwards
        self.unended += answer.finish_reason == "length"
        self.acceptance_lengths.update(answer.acceptance_lengths)

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.new_tokens + other.new_tokens,
            self.forwards + other.forwards,
            self.unended + other.unended,
            self.truncated + other.truncated,
            self.acceptance_lengths + other.acceptance_lengths,
        )


class TidarLM(HFLM):
    """lm-evaluation-harness' own `hf` model on the same weights, whose answers come from our engines.

    Likelihoods are those of the plain causal model in one forward: the mask tokens, and the drafter of a lossless
    conversion, take no part in them. Those of a block-diffusion model are Monte Carlo bounds. Give an instance to
    `lm_eval.simple_evaluate(model=...)`.

    Attributes:
        spent: what answers cost, by task.
        estimates: the bounds that were estimated, by context and continuation; empty for causal models.
    """

    def __init__(
        self,
        model: TidarModel,
        decoding: Decoding | None = None,
        batch_size: int = 1,
        likelihood_samples: int | None = None,
    ) -> None:
        """
        Args:
            likelihood_samples: draws of each bound, for block-diffusion models; None for the paper's 128.

        Raises:
            TidarError: for a model without a tokenizer, and for samples that a model does not take or are too few.
        """
        decoding = decoding or Decoding()
        if model.tokenizer is None:
            raise TidarError("this model folder has no tokenizer, so tasks cannot be encoded")
        self.bounds = model.config is not None and model.config.objective == "block-diffusion"
        if likelihood_samples is not None and not self.bounds:
            raise TidarError("likelihood-samples is for block-diffusion models: this one has an exact likelihood")
        self.samples = SAMPLES if likelihood_samples is None else likelihood_samples
        check_samples(self.samples)
        if batch_size < 1:
            raise TidarError(f"batch size is {batch_size}, but must be at least 1")
        self._tidar, self._decoding, self.seed = model, decoding, decoding.seed
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self.estimates: dict[tuple[str, str], Likelihood] = {}
        # The harness chooses a pad token where there is none: on a copy, the user's tokenizer stays as it is.
        tokenizer = copy.deepcopy(model.tokenizer)
        with _weights_untied(model.hf_model):
            super().__init__(pretrained=model.hf_model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

    @cached_property
    def engine(self) -> Engine | BlockDiffusion:
        """What decodes answers. Raises TidarError for options that this model cannot honour."""
        how = self._decoding
        return self._tidar.engine(
            how.mode,
            how.params,
            how.decoder,
            draft_length=how.draft_length,
            outcomes=how.outcomes,
            alternatives=how.alternatives,
            plan=how.plan,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As in HFLM; of a block-diffusion model, bounds. Those never say that a text is what greedy decoding gives."""
        if not self.bounds:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        found = []
        for texts, context, continuation in tqdm(requests, desc="Likelihoods by Monte Carlo", disable=disable_tqdm):
            room = int(self.max_length) - len(continuation)
            context = context[max(0, len(context) - room) :]
            # A text's draws are its own, whatever else is asked.
            key = repr((self.seed, context, continuation)).encode()
            seed = int.from_bytes(blake2b(key, digest_size=7).digest())
            estimate = log_likelihood(self._tidar.network, context, continuation, self.samples, seed)
            self.estimates[texts] = estimate
            found.append((estimate.log_likelihood, False))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before their stop texts; ours because rows then end, and are refilled, one by one.

        Raises:
            TidarError: for a task that samples in its own way, or asks for more tokens than the context holds.
        """
        groups = defaultdict[str, list[int]](list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(place)
        texts: dict[int, str] = {}
        for places in groups.values():
            found = self._answer([requests[place] for place in places], disable_tqdm)
            texts.update(zip(places, found, strict=True))
        return [texts[place] for place in range(len(requests))]

    def _answer(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[str]:
        """Answers to requests whose options are the same."""
        options, task = dict(requests[0].args[1]), requests[0].task_name
        until, most = self._limits(options, task)
        room = self.room(most, task)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = dict[int, Answer]()
        progress = tqdm(total=len(prompts), desc=f"Answers of {task}", disable=disable_tqdm)
        limits = Limits(most, self.engine.network.eos_ids | self._special(until), tuple(until))
        rows = [prompt[-room:] for prompt in prompts]
        for updates in self.engine.run(rows, limits, self.batch_size, streaming=False):
            ended = [update.answer for update in updates if update.answer.finish_reason is not None]
            answers |= {answer.row: answer for answer in ended}
            if ended:
                progress.update(len(ended))
        progress.close()
        for row, request in enumerate(requests):
            self.spent[request.task_name].add(answers[row])
            self.spent[request.task_name].truncated += len(prompts[row]) > room
        return [postprocess_generated_text(answers[row].text, until, None) for row in range(len(requests))]

    def room(self, most: int, task: str | None) -> int:
        """Tokens of a prompt that fit before an answer of `most`. Raises TidarError if none do."""
        if most >= self.max_length:
            raise TidarError(
                f"task {task} asks for {most} new tokens, but the model's context is {self.max_length}: "
                "give less with --max-new-tokens"
            )
        return int(self.max_length) - most

    def _limits(self, options: dict[str, Any], task: str | None) -> tuple[list[str], int]:
        """Stop texts and the longest answer, of a task's generation options."""
        kwargs = normalize_gen_kwargs(options, self.max_gen_toks)
        until, most = handle_stop_sequences(kwargs.pop("until", None), eos=None), int(kwargs.pop("max_gen_toks"))
        other = {name: value for name, value in kwargs.items() if GREEDY.get(name, ...) != value}
        if other:
            named = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise TidarError(f"task {task} wants to decode with {named}: how answers are decoded is yours to say")
        return [text for text in until if text], most

    def _special(self, until: Sequence[str]) -> frozenset[int]:
        """Ids of stop texts that are special tokens: no text shows those."""
        special = self.tokenizer.get_added_vocab()
        return frozenset(special[text] for text in until if text in special)


@contextmanager
def _weights_untied(lm: PreTrainedModel) -> Iterator[None]:
    """HFLM ties the weights of any model it is given; the two embeddings of a quantised one must stay two."""
    lm.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del lm.tie_weights
