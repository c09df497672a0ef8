"""`TidarModel`: load, generate, stream, save. What a user holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidar.config import MAX_DRAFT, TidarConfig
from tidar.decode.block_diffusion import BlockDiffusion
from tidar.decode.engine import Answer, Engine, Limits, Planner, Update
from tidar.decode.hf import make_custom_generate
from tidar.decode.planner import AutoPlanner
from tidar.decode.record import Event
from tidar.decode.step import Plan
from tidar.decode.trace import trace
from tidar.errors import PromptError, TidarError
from tidar.kernels.draft import ALTERNATIVES
from tidar.model import hub
from tidar.model.network import Network
from tidar.prompts import Message, Prompt, encode_prompt
from tidar.sampling import DEFAULT_DECODER, Reveal, SamplingParams

Mode = Literal["tidar", "ar", "block-diffusion"]
DRAFTING = "draft length, outcomes, alternatives, plan and remeasure"


class TidarModel:
    """A causal LM that drafts by one-step diffusion and verifies autoregressively in the same forward.

    Build one with `from_pretrained`, or from a `Network` and its tokenizer.
    """

    def __init__(self, network: Network, tokenizer: PreTrainedTokenizerBase | None, base: str = "") -> None:
        self.network, self.tokenizer, self.base = network, tokenizer, base

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        drafter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        weights: str | None = None,
    ) -> TidarModel:
        """Load "smollm2-135m", a drafter folder, a model folder or a hub id; arguments as in `model.hub.load`."""
        return cls(*hub.load(name, drafter=drafter, device=device, dtype=dtype, weights=weights))

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model inside; on its own it is the plain causal LM."""
        return self.network.lm

    @property
    def config(self) -> TidarConfig | None:
        return self.network.config

    def plan(
        self,
        mode: Mode = "tidar",
        draft_length: int | None = None,
        params: SamplingParams | None = None,
        outcomes: int | None = None,
        plan: Literal["auto", "fixed"] | None = None,
        remeasure: bool = False,
        alternatives: int | None = None,
    ) -> Plan | Planner:
        """What a run's forwards do.

        Args:
            mode: "ar" for plain decoding, which none of the other options but `params` goes with.
            draft_length: K. Naming it (or `outcomes` or `alternatives`) fixes the plan.
            params: how tokens are chosen.
            outcomes: outcome blocks drafted in each forward, the likeliest; default all K.
            plan: "auto" chooses all three by measured cost and observed acceptance; "fixed" takes the block size of
                training, all outcomes and no alternatives. Default "auto" if none of them is named.
            remeasure: measure the costs of this machine again ("auto").
            alternatives: next best tokens that are verified beside the drafts (see `decode.step.Plan`).
        """
        if mode == "block-diffusion":
            raise TidarError("mode 'block-diffusion' has no drafts to plan: decode with `generate` or `stream`")
        if mode not in ("tidar", "ar"):
            raise TidarError(f"mode is {mode!r}, but must be 'tidar', 'ar' or 'block-diffusion'")
        if plan not in (None, "auto", "fixed"):
            raise TidarError(f"plan is {plan!r}, but must be 'auto' or 'fixed'")
        most = min(MAX_DRAFT, self.network.max_positions or MAX_DRAFT)
        for name, value in (("draft length", draft_length), ("outcomes", outcomes)):
            if value is not None and not 1 <= value <= most:
                raise TidarError(f"{name} is {value}, but must be between 1 and {most} for this model")
        params = params or SamplingParams()
        named = any(value is not None for value in (draft_length, outcomes, alternatives))
        if mode == "ar":
            if params.trust < 1:
                raise TidarError("trust below 1 asks the drafter, which mode 'ar' does not run: leave one of them out")
            if named or plan is not None or remeasure:
                raise TidarError(f"mode 'ar' drafts nothing: {DRAFTING} are options of mode 'tidar'")
            return Plan(1, params)
        if plan == "fixed" and remeasure:
            raise TidarError("plan 'fixed' needs no costs: leave it or remeasure, which is for plan 'auto', out")
        length = draft_length or (self.config.block_size if self.config is not None else 8)
        self._check_alternatives(alternatives, length, params)
        # Trust judges every draft by a block of its own, so there is nothing to choose.
        fixed = named or params.trust < 1
        if fixed and (plan == "auto" or remeasure):
            raise TidarError(
                "draft length, outcomes, alternatives and trust below 1 fix the plan: leave them or plan 'auto' out "
                "(and remeasure, which is for it)"
            )
        if plan != "fixed" and not fixed and self.network.can_draft:
            return AutoPlanner(params, remeasure)
        return Plan(length, params, outcomes, alternatives or 0)

    def engine(
        self, mode: Mode = "tidar", params: SamplingParams | None = None, decoder: str | None = None, **planning: Any
    ) -> Engine | BlockDiffusion:
        """What decodes in a mode.

        Args:
            mode, params: as of `plan`.
            decoder: block diffusion's, see `stream`.
            **planning: the other arguments of `plan`.

        Raises:
            TidarError: for options that cannot be honoured.
        """
        if mode != "block-diffusion":
            if decoder is not None:
                raise TidarError(
                    f"decoder is {decoder!r}, but mode {mode!r} has none: it is an option of 'block-diffusion'"
                )
            return Engine(self.network, self.plan(mode, params=params, **planning), self.tokenizer)
        if any(value is not None and value is not False for value in planning.values()):
            raise TidarError(
                f"{DRAFTING} are options of mode 'tidar': block diffusion decodes blocks of the size that it was "
                "trained with, without drafts"
            )
        return BlockDiffusion(self.network, Reveal.parse(decoder or DEFAULT_DECODER), params, self.tokenizer)

    @staticmethod
    def _check_alternatives(alternatives: int | None, draft_length: int, params: SamplingParams) -> None:
        most = ALTERNATIVES * (draft_length - 1)
        if alternatives is not None and not 0 <= alternatives <= most:
            raise TidarError(
                f"alternatives is {alternatives}, but must be between 0 and {most} for draft length {draft_length}"
            )
        if alternatives and params.trust < 1:
            raise TidarError("alternatives are judged by the AR half alone, so they do not go with trust below 1")

    @overload
    def generate(self, prompts: str | list[Message], **options: object) -> Answer: ...
    @overload
    def generate(self, prompts: list[Prompt] | list[str] | list[list[Message]], **options: object) -> list[Answer]: ...
    def generate(self, prompts, *, batch_size=8, on_update=None, **options):  # type: ignore[no-untyped-def]
        """Answer prompts.

        Args:
            prompts: one prompt (a text, or a list of messages: role/content dictionaries), or a list of prompts.
            batch_size: rows decoded together.
            on_update: called with every `Update` as it comes.
            **options: as in `stream`.

        Returns:
            One Answer for one prompt, else a list in the order of the prompts.

        Raises:
            PromptError: (a TidarError) for a prompt that cannot be used, before any is answered.
            TidarError: for options that cannot be honoured.
        """
        prompts = prompts if isinstance(prompts, str) else list(prompts)
        single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, dict) for p in prompts))
        if batch_size < 1:
            raise TidarError(f"batch size is {batch_size}, but must be at least 1")
        engine, limits, encode = self._prepare(**options)
        ids = [encode(prompts)] if single else [_for_row(row, encode, prompt) for row, prompt in enumerate(prompts)]
        answers: dict[int, Answer] = {}
        for updates in engine.run(ids, limits, batch_size, streaming=on_update is not None):
            for update in updates:
                answers[update.answer.row] = update.answer
                if on_update is not None:
                    on_update(update)
        ordered = [answers[row] for row in range(len(ids))]
        return ordered[0] if single else ordered

    def stream(self, prompt: Prompt, **options: object) -> Iterator[Update]:
        """Answer one prompt, yielding an `Update` after every forward.

        Args:
            prompt: a text (sent as a user message through the chat template) or a message list.
            **options: max_new_tokens (256), temperature (0), top_k, top_p, min_p, seed (0), trust (1), stop (texts),
                mode ("tidar", "ar" or "block-diffusion"), decoder (of block diffusion: "max-confidence",
                "left-to-right", "fixed-N" or "confidence>P"), draft_length, outcomes, alternatives, plan ("auto"; see
                `plan`), remeasure, raw (False: use the chat template).

        Raises:
            TidarError: for options or prompts that cannot be honoured.
        """
        engine, limits, encode = self._prepare(**options)  # type: ignore[arg-type]
        for updates in engine.run([encode(prompt)], limits):
            yield from updates

    def trace(self, prompt: Prompt, *, mode: Mode = "tidar", **options: object) -> Iterator[Event]:
        """Answer one prompt, telling what every forward did (see `decode.record`); options as in `stream`.

        The answer is that of `stream`. Forwards run eagerly, which on a GPU is slower.

        Raises:
            TidarError: for options or prompts that cannot be honoured, and for mode "block-diffusion".
        """
        if mode == "block-diffusion":
            raise TidarError("mode 'block-diffusion' has no drafts to trace: give 'tidar' or 'ar'")
        engine, limits, encode = self._prepare(mode=mode, **options)  # type: ignore[arg-type]
        assert isinstance(engine, Engine)
        return trace(engine, encode(prompt), limits, mode)

    def _prepare(
        self,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        trust: float = 1.0,
        stop: Sequence[str] = (),
        mode: Mode = "tidar",
        decoder: str | None = None,
        draft_length: int | None = None,
        outcomes: int | None = None,
        alternatives: int | None = None,
        plan: Literal["auto", "fixed"] | None = None,
        remeasure: bool = False,
        raw: bool = False,
    ) -> tuple[Engine | BlockDiffusion, Limits, Callable[[Prompt], list[int]]]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise TidarError("this model folder has no tokenizer, so text prompts cannot be encoded")
        if max_new_tokens < 1:
            raise TidarError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
        if isinstance(stop, str) or not all(stop):
            raise TidarError("stop must be a list of texts, none of them empty")
        params = SamplingParams(temperature, top_k, top_p, min_p, seed, trust)
        engine = self.engine(
            mode,
            params,
            decoder,
            draft_length=draft_length,
            outcomes=outcomes,
            alternatives=alternatives,
            plan=plan,
            remeasure=remeasure,
        )

        def encode(prompt: Prompt) -> list[int]:
            ids, context = encode_prompt(tokenizer, prompt, raw), self.network.max_positions
            if not ids:
                raise TidarError("the prompt is empty: give at least one token")
            if context is not None and len(ids) >= context:
                raise TidarError(f"the prompt has {len(ids)} tokens, but the model's context is {context}: shorten it")
            return ids

        return engine, Limits(max_new_tokens, self.network.eos_ids, tuple(stop)), encode

    def check(self, **options: object) -> None:
        """Raise TidarError for options that `stream` and `generate` would refuse."""
        self._prepare(**options)  # type: ignore[arg-type]

    def custom_generate(
        self,
        mode: Mode = "tidar",
        draft_length: int | None = None,
        outcomes: int | None = None,
        alternatives: int | None = None,
        plan: Literal["auto", "fixed"] | None = None,
    ) -> Callable:
        """A decoding method for transformers: `hf_model.generate(**inputs, custom_generate=m.custom_generate())`.

        Arguments as of `plan`; how tokens are chosen is said to `generate`.

        Raises:
            TidarError: for options that cannot be honoured.
        """

        def planned(params: SamplingParams | None = None) -> Plan | Planner:
            return self.plan(mode, draft_length, params, outcomes, plan, alternatives=alternatives)

        planned()  # says what is wrong before anything is generated
        return make_custom_generate(self.network, planned)

    def save_pretrained(self, folder: str | Path, *, with_base: bool | None = None) -> None:
        """Write a checkpoint that `from_pretrained` reads.

        A lossless conversion is its drafter folder alone (`with_base=False`, the default) or a plain Hugging Face
        checkpoint with the drafter in `drafter/`; an all-weights model is always the whole checkpoint. A quantised
        model is refused.
        """
        if self.network.weights is not None:
            raise TidarError("a model with quantised weights is not saved: load it without `weights` and save that")
        folder, drafter, config = Path(folder), self.network.drafter, self.network.config
        if drafter is not None and config is not None and not with_base:
            drafter.save(folder, self.base, config)
            return
        if drafter is None and config is not None:
            self.hf_model.config.tidar = config.to_dict()
        self.hf_model.save_pretrained(folder, state_dict=base_state_dict(self.hf_model))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if drafter is not None and config is not None:
            drafter.save(folder / "drafter", str(folder.resolve()), config)


def _for_row(row: int, encode: Callable[[Prompt], list[int]], prompt: Prompt) -> list[int]:
    try:
        return encode(prompt)
    except TidarError as error:
        raise PromptError(row, str(error)) from error


def base_state_dict(model: nn.Module) -> dict:
    """The causal LM's own tensors, without those of a drafter installed in it."""
    return {k: v for k, v in model.state_dict().items() if ".lora_A." not in k and ".lora_B." not in k}
