"""Contestants of `tidar compare`: a prompt in, an answer with its time out, each by its own engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tidar.api import TidarModel
from tidar.bench.speed import peer_attention, peer_generate
from tidar.errors import TidarError, first_line
from tidar.prompts import Prompt, encode_prompt
from tidar.sampling import DEFAULT_DECODER, Reveal, SamplingParams


@dataclass(frozen=True)
class Method:
    """What `--method` names.

    Attributes:
        name: how the report calls it.
        kind: a key of KINDS.
        folder: the model; None for the one that all share. For "assisted" it is the draft model.
        options: as in the text, by name.
    """

    name: str
    kind: str
    folder: str | None = None
    options: dict[str, str] = field(default_factory=dict)


class Kind(NamedTuple):
    """What a kind of method needs: which folder its text names, and the options it has."""

    folder: str
    options: tuple[str, ...] = ()


KINDS = {
    "tidar": Kind("[MODEL]", ("K", "outcomes", "alternatives", "trust", "plan")),
    "ar": Kind("[MODEL]"),
    "block-diffusion": Kind("MODEL"),
    "assisted": Kind("DRAFTMODEL", ("K",)),
    "prompt-lookup": Kind("[MODEL]", ("K",)),
    "transformers": Kind("[MODEL]"),
}
ASSISTED_K, LOOKUP_K = 5, 10
"""Draft lengths of transformers' assisted generation and prompt lookup, where the method does not name one."""


def parse_method(text: str, name: str | None = None) -> Method:
    """A method as users write it: KIND[:FOLDER][:OPTION=VALUE,...], for block diffusion KIND:FOLDER[:DECODER].

    Raises:
        TidarError: for an unknown kind or option, or a folder that is missing.
    """
    kind, *parts = text.split(":")
    if kind not in KINDS:
        raise TidarError(f"method {text!r}: {kind!r} is no method; there are {', '.join(KINDS)}")
    if kind == "block-diffusion":
        options = {"decoder": parts.pop() if len(parts) > 1 else DEFAULT_DECODER}
        Reveal.parse(options["decoder"])
    else:
        options = _options(text, kind, parts.pop()) if parts and "=" in parts[-1] else {}
    if len(parts) > 1 or not all(parts):
        raise TidarError(f"method {text!r} is not {_form(kind)}")
    if not parts and not KINDS[kind].folder.startswith("["):
        raise TidarError(f"method {text!r} names no folder: write {_form(kind)}")
    folder = parts[0] if parts else None
    try:
        _values(options)
    except TidarError as error:
        raise TidarError(f"method {text!r}: {error}") from error
    return Method(name or _short(kind, folder, options), kind, folder, options)


def _form(kind: str) -> str:
    """How a method of this kind is written."""
    if kind == "block-diffusion":
        return "block-diffusion:MODEL[:DECODER]"
    folder, options = KINDS[kind]
    named = f"[:{folder[1:]}" if folder.startswith("[") else f":{folder}"
    return f"{kind}{named}" + (f"[:{','.join(f'{name}=..' for name in options)}]" if options else "")


def _options(text: str, kind: str, part: str) -> dict[str, str]:
    options = {}
    for pair in part.split(","):
        name, _, value = pair.partition("=")
        if name not in KINDS[kind].options or not value:
            known = ", ".join(KINDS[kind].options) or "none"
            raise TidarError(f"method {text!r}: {pair!r} is no option of {kind!r} with its value; its options: {known}")
        options[name] = value
    return options


def _short(kind: str, folder: str | None, options: dict[str, str]) -> str:
    """A name for people: folders by their last part."""
    parts = [kind, Path(folder).name if folder else "", ",".join(_spelt(k, v) for k, v in options.items())]
    return " ".join(part for part in parts if part)


def _spelt(name: str, value: str) -> str:
    return value if name == "decoder" else f"{name}={value}"


def read_methods(path: Path) -> list[Method]:
    """Methods of a YAML file: a list of texts or of {name, method}, alone or under `methods`. Raises TidarError."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TidarError(f"cannot read {path}: {first_line(error)}") from error
    rows = loaded.get("methods") if isinstance(loaded, dict) else loaded
    if not isinstance(rows, list) or not rows:
        raise TidarError(f"{path} holds no list of methods")
    found = []
    for number, row in enumerate(rows, 1):
        entry = {"method": row} if isinstance(row, str) else row
        texts = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
        if not texts or "method" not in entry or not entry.keys() <= {"name", "method"}:
            raise TidarError(
                f"{path}, method {number}: must be a text, or have 'method' and perhaps 'name', both texts"
            )
        try:
            found.append(parse_method(entry["method"], entry.get("name")))
        except TidarError as error:
            raise TidarError(f"{path}, method {number}: {error}") from error
    return found


class Reply(NamedTuple):
    """One answer.

    token_ids: with the end of sequence. forwards: of the model that is asked, the prefill included; not those of a
    draft model. gains: tokens that each forward gained, in order. seconds: wall time, prefill included.
    """

    token_ids: list[int]
    text: str
    forwards: int
    gains: list[int]
    seconds: float


Contestant = Callable[[Prompt, int], Reply]
"""(prompt, seed) -> Reply. Every prompt has a seed of its own: the same draws for all would not be independent."""


class Settings(NamedTuple):
    """What all methods have in common."""

    model: str
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None


class Models:
    """The models of a comparison, each loaded once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loaded: dict[str, TidarModel] = {}

    def get(self, name: str | None) -> TidarModel:
        name = name or self.settings.model
        if name not in self.loaded:
            self.loaded[name] = TidarModel.from_pretrained(name, device=self.settings.device, dtype=self.settings.dtype)
        return self.loaded[name]


def model_of(method: Method, models: Models) -> TidarModel:
    """The model whose text is measured."""
    return models.get(None if method.kind == "assisted" else method.folder)


def prepare(method: Method, models: Models) -> Contestant:
    """The contestant of a method; raises TidarError, before anything runs, for what it cannot do."""
    settings, model = models.settings, model_of(method, models)
    if model.tokenizer is None:
        raise TidarError(f"{method.name}: the model folder has no tokenizer")
    try:
        return _prepare(method, models, model, settings)
    except TidarError as error:
        raise TidarError(f"{method.name}: {error}") from error


def _prepare(method: Method, models: Models, model: TidarModel, settings: Settings) -> Contestant:
    sampling = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    SamplingParams(settings.temperature, seed=settings.seed)
    if method.kind == "tidar":
        return _ours(model, mode="tidar", **sampling, **_values(method.options))
    if method.kind == "ar":
        return _ours(model, mode="ar", **sampling)
    if method.kind == "block-diffusion":
        return _ours(model, mode="block-diffusion", decoder=method.options["decoder"], **sampling)
    model.check(mode="ar", **sampling)  # whether it is an AR model at all
    if method.kind == "prompt-lookup":
        length = _values(method.options).get("draft_length", LOOKUP_K)
        return TransformersContestant(model, settings, {"prompt_lookup_num_tokens": length})
    if method.kind == "assisted":
        draft = models.get(method.folder)
        if draft is model:
            raise TidarError("the draft model is the model itself: name a smaller one")
        if draft.network.vocabulary != model.network.vocabulary:
            raise TidarError(
                f"the draft model's vocabulary has {draft.network.vocabulary} tokens, the model's has "
                f"{model.network.vocabulary}: a draft model must share the tokenizer"
            )
        length = _values(method.options).get("draft_length", ASSISTED_K)
        return TransformersContestant(model, settings, {}, draft, length)
    return TransformersContestant(model, settings, {})


def _values(options: dict[str, str]) -> dict[str, Any]:
    """Options as `TidarModel.generate` names and takes them. Raises TidarError for what is no number."""
    names = {"K": "draft_length", "outcomes": "outcomes", "alternatives": "alternatives"}
    found: dict[str, Any] = {names[k]: _whole(k, v) for k, v in options.items() if k in names}
    if "trust" in options:
        try:
            found["trust"] = float(options["trust"])
        except ValueError as error:
            raise TidarError(f"trust is {options['trust']!r}, but must be a number") from error
    if "plan" in options:
        found["plan"] = options["plan"]
    return found


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise TidarError(f"{name} is {text!r}, but must be a whole number of at least 1")
    return int(text)


def _ours(model: TidarModel, **options: Any) -> Contestant:
    """Our engine, in any mode."""
    model.check(**options)

    def run(prompt: Prompt, seed: int) -> Reply:
        started = time.perf_counter()
        answer = model.generate([prompt], batch_size=1, seed=seed, **options)[0]
        seconds = time.perf_counter() - started
        prefill = [] if options["mode"] == "block-diffusion" else [1]  # block diffusion counts its first forward itself
        gains = [*prefill, *answer.acceptance_lengths]
        return Reply(answer.token_ids, answer.text, answer.forwards, gains, seconds)

    return run


class _Sizes(BaseStreamer):
    """Notes how many tokens each round of `generate` hands out; the prompt comes first."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


class TransformersContestant:
    """transformers' `generate` on the same weights, in plain form, with a draft model, or with prompt lookup."""

    def __init__(
        self,
        model: TidarModel,
        settings: Settings,
        options: dict[str, Any],
        draft: TidarModel | None = None,
        draft_length: int = 0,
    ) -> None:
        self.model, self.settings, self.options, self.draft = model, settings, options, draft
        if draft is not None:
            config = draft.hf_model.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_length, "constant"
            config.assistant_confidence_threshold = 0.0  # always so many, as in the papers
            self.options = {**options, "assistant_model": draft.hf_model}

    def __call__(self, prompt: Prompt, seed: int) -> Reply:
        tokenizer, settings = self.model.tokenizer, self.settings
        assert tokenizer is not None
        ids, forwards, sizes = encode_prompt(tokenizer, prompt), 0, _Sizes()
        options = {**self.options, "streamer": sizes}
        if not SamplingParams(settings.temperature).greedy:
            options |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
            transformers.set_seed(seed % 2**32)  # what numpy takes

        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        hook = self.model.hf_model.register_forward_pre_hook(count)
        try:
            with peer_attention(*(model for model in (self.model, self.draft) if model is not None)):
                started = time.perf_counter()
                (tokens,) = peer_generate(self.model, [ids], settings.max_new_tokens, **options)
                seconds = time.perf_counter() - started
        finally:
            hook.remove()
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Reply(tokens, str(text), forwards, sizes.sizes[1:], seconds)
