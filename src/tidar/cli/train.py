"""`tidar train`: convert a causal LM. Its options are the fields of `TrainConfig`."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_type_hints

import typer
from transformers.utils import logging as hf_logging

from tidar.train.config import TrainConfig
from tidar.train.convert import convert


def train(**options: Any) -> None:
    """Convert a causal LM: by default a small drafter is trained and the base model stays as it is."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    config = TrainConfig(**{name: value for name, value in options.items() if value is not None})
    convert(config)
    typer.echo(f"wrote {config.output}; try: tidar generate --model {config.output} 'Hello'", err=True)


def _parameter(option: Field, hint: Any) -> Parameter:
    """The field as Typer wants it; None leaves a list to the dataclass, whose default is made anew each time."""
    kind, text, *flags = get_args(hint)
    default = Parameter.empty if option.default is MISSING else option.default
    if option.default_factory is not MISSING:
        kind, default = kind | None, None
    annotation: Any = Annotated[kind, typer.Option(*flags, help=text)]
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_hints = get_type_hints(TrainConfig, include_extras=True)
train.__signature__ = Signature([_parameter(f, _hints[f.name]) for f in fields(TrainConfig)])  # type: ignore[attr-defined]
